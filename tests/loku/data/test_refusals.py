"""Refusals are read, and replace the answers of rows."""

import pytest
from character_tokenizer import CHAT, MARKED_CHAT, PLAIN_CHAT, character_tokenizer
from datasets import Dataset

from loku.data import RefusalRows, load_refusals, tokenize_dataset


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        ({"question": "why?", "answer": "so", "text": None}, {"question": "why?", "answer": "no"}),
        ({"prompt": "why?", "completion": " so"}, {"prompt": "why?", "completion": " no"}),
        ({"prompt": "why? ", "completion": "so"}, {"prompt": "why? ", "completion": "no"}),
        ({"messages": CHAT[:2]}, {"messages": [CHAT[0], {"role": "assistant", "content": "no"}]}),
    ],
)
def test_a_refusal_is_in_the_place_of_the_answer(row, refused):
    for template in (PLAIN_CHAT, MARKED_CHAT):
        tokenizer = character_tokenizer(chat_template=template)
        refusals = RefusalRows(Dataset.from_list([row, row]), ["maybe", "no"], tokenizer)
        (expected,) = tokenize_dataset([refused], tokenizer)
        assert refusals[1, 1] == expected and refusals[0, 0] != expected
        length = len(expected["labels"]) - 1
        cut = RefusalRows([row], ["no"], tokenizer, max_length=length)
        assert cut[0, 0]["labels"] == expected["labels"][:-1]
        with pytest.raises(ValueError, match="row 0 of the forget set: no label token is left"):
            RefusalRows([row], ["no"], tokenizer, max_length=length - 3)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a text", "plain text"),
        ({"text": "a text"}, "plain text"),
        ({"input_ids": [1, 2, 3], "question": "a", "answer": "b"}, "where its answer begins"),
        ({"messages": CHAT}, "the assistant must have one"),
    ],
)
def test_rows_that_cannot_be_refused_are_named(tokenizer, row, reason):
    good = {"question": "why?", "answer": "so"}
    with pytest.raises(ValueError, match=rf'row 1 of the forget set: .*{reason}.*"dpo", "idk"'):
        RefusalRows([good, row], ["no"], tokenizer)


def test_refusals(tmp_path):
    tofu = load_refusals()
    assert len(tofu) == len(set(tofu)) == 100 and "I'm not sure." in tofu
    (tmp_path / "refusals.txt").write_text("One.\n\n Two. \n", encoding="utf-8")
    for path in (tmp_path / "refusals.txt", str(tmp_path / "refusals.txt")):
        assert load_refusals(path) == ["One.", "Two."]
    assert load_refusals(["a", "b"]) == ["a", "b"]
    for bad, message in (
        ([], "no refusals"),
        (["a", " "], "non-empty string"),
        ([1], "non-empty string, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_refusals(bad)
