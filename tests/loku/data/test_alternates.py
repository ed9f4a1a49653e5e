"""Alternates of rows: they are read, drawn, and in the place of the answers."""

import numpy as np
import pytest
from character_tokenizer import PLAIN_CHAT, character_tokenizer
from datasets import Dataset

from loku.data import AlternateRows, PairedDataset, tokenize_dataset
from loku.data.pairs import Draw

ROWS = [
    {"question": "why?", "answer": "so", "alternate": ["no", "may be"]},
    {"question": "who?", "answer": "me", "alternate": "you"},
]


def test_an_alternate_is_in_the_place_of_the_answer(tokenizer):
    mixed = Dataset.from_list([{**row, "alternate": row["alternate"]} for row in ROWS[:1]])
    for rows in (ROWS, mixed):
        found = AlternateRows(rows, tokenizer)
        for number, text in enumerate(("no", "may be")):
            (expected,) = tokenize_dataset([{"question": "why?", "answer": text}], tokenizer)
            assert found[0, number] == expected
    (expected,) = tokenize_dataset([{"question": "who?", "answer": "you"}], tokenizer)
    found = AlternateRows(ROWS, tokenizer)
    assert found[1, 0] == expected
    assert found.refusals == ["no", "may be", "you"]  # they identify the run


def test_chats_have_alternates():
    tokenizer = character_tokenizer(chat_template=PLAIN_CHAT)
    question = {"role": "user", "content": "why?"}
    row = {"messages": [question, {"role": "assistant", "content": "so"}], "alternate": ["no"]}
    refused = {"messages": [question, {"role": "assistant", "content": "no"}]}
    assert AlternateRows([row], tokenizer)[0, 0] == tokenize_dataset([refused], tokenizer)[0]


def test_each_epoch_draws_one_of_the_rows_own(tokenizer):
    rows = AlternateRows(ROWS, tokenizer)
    forget = tokenize_dataset(ROWS, tokenizer)
    dataset = PairedDataset(forget, forget, seed=3, refusals=rows, kinds=("forget", "refusal"))
    drawn = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        items = [dataset[Draw(index, index)] for index in range(2)]
        assert items[1]["refusal"] == rows[1, 0]
        drawn.add(tuple(items[0]["refusal"]["input_ids"]))
        dataset.set_epoch(epoch)
        assert items == [dataset[Draw(index, index)] for index in range(2)]
    assert drawn == {tuple(rows[0, number]["input_ids"]) for number in range(2)}
    assert set(rows.draw(np.random.default_rng(0)).tolist()) <= {0, 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b"}, "it has no column 'alternate'.*loku alternates lets a model"),
        ({"question": "a", "answer": "b", "alternate": None}, "it has no column 'alternate'"),
        ({"question": "a", "answer": "b", "alternate": []}, "must be a text or a list of texts"),
        ({"question": "a", "answer": "b", "alternate": 3}, "must be a text or a list of texts"),
        ({"question": "a", "answer": "b", "alternate": ["c", " "]}, r"'alternate\[1\]' is blank"),
        ({"text": "a", "alternate": "b"}, "a plain text.*question/answer rows"),
        ("a", "it has no column 'alternate'"),
    ],
)
def test_rows_without_alternates_are_named(tokenizer, row, reason):
    with pytest.raises(ValueError, match=rf"row 1 of the forget set: .*{reason}"):
        AlternateRows([ROWS[0], row], tokenizer)


def test_the_longest_alternate_must_fit(tokenizer):
    row = {"question": "why?", "answer": "so", "alternate": ["no"]}
    length = len(AlternateRows([row], tokenizer)[0, 0]["input_ids"]) - 4
    with pytest.raises(ValueError, match="row 0 of the forget set: no label token is left"):
        AlternateRows([row], tokenizer, max_length=length)
