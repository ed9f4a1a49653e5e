"""Rows of every form become the texts that they mean, and what is no row is named."""

import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from character_tokenizer import BOS, CHAT, EOS, MARKED_CHAT, PLAIN_CHAT, character_tokenizer
from datasets import Dataset

from loku.data import (
    RefusalRows,
    RowError,
    as_rows,
    has_input_ids,
    labelled_column,
    load_refusals,
    paraphrased_answer,
    tokenize_dataset,
    wrong_answers,
)

PLAIN, MARKED = (character_tokenizer(chat_template=template) for template in (PLAIN_CHAT, MARKED_CHAT))
SHAREGPT = [
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yo"},
    {"from": "human", "value": "who"},
    {"from": "gpt", "value": "me"},
]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
    "### Input:\n1 and 2\n\n### Response:\n"
)


def texts(row, tokenizer=PLAIN):
    """Return the whole text of a row and the text of its labels."""
    (tokens,) = tokenize_dataset([row], tokenizer)
    kept = [i for i, label in enumerate(tokens["labels"]) if label != -100]
    assert [tokens["input_ids"][i] for i in kept] == [tokens["labels"][i] for i in kept]
    whole, answer = (
        tokenizer.convert_ids_to_tokens(ids)
        for ids in (tokens["input_ids"], [tokens["input_ids"][i] for i in kept])
    )
    return "".join(whole), "".join(answer)


def both(row):
    """Return a row as it is, and as ``datasets`` gives it."""
    return [row, Dataset.from_list([row])[0]]


# Instructions


@pytest.mark.parametrize("context", [None, "", " ", math.nan])
def test_instructions(context):
    row = {"instruction": "Add.", "output": "3", "text": "another"} | ({"input": context} if context else {})
    assert labelled_column(row) == "output"
    assert texts(row) == (f"<s>{ALPACA}3</s>", "3</s>")
    assert texts({**row, "input": "1 and 2"}) == (f"<s>{ALPACA_WITH_INPUT}3</s>", "3</s>")
    refused = RefusalRows([row], ["no"], PLAIN)[0, 0]
    assert refused == tokenize_dataset([{"prompt": ALPACA, "completion": "no"}], PLAIN)[0]


# Conversations

WHOLE = "[user]hi;[assistant]yo;[user]who;[assistant]me;"


@pytest.mark.parametrize("row", both({"conversations": SHAREGPT}) + both({"conversations": CHAT}))
def test_sharegpt(row):
    assert labelled_column(row) == "messages"
    assert texts(row) == (WHOLE, "me;")
    assert texts(row, MARKED) == (WHOLE, "yo;me;")
    system = {"conversations": [{"from": "system", "value": "be"}, *SHAREGPT[:2]]}
    assert texts(system) == ("[system]be;[user]hi;[assistant]yo;", "yo;")
    no = RefusalRows([system], ["no"], PLAIN)[0, 0]
    assert (
        no
        == tokenize_dataset(
            [
                {
                    "messages": [
                        {"role": "system", "content": "be"},
                        CHAT[0],
                        {"role": "assistant", "content": "no"},
                    ]
                }
            ],
            PLAIN,
        )[0]
    )


@pytest.mark.parametrize("row", both({"prompt": CHAT[:3], "completion": CHAT[3:]}))
def test_conversational_prompt_and_completion(row):
    assert labelled_column(row) == "messages"
    assert texts(row) == (WHOLE, "me;")
    assert texts(row, MARKED) == (WHOLE, "me;")  # the assistant's turn of the prompt is no completion
    longer = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    assert texts(longer) == (WHOLE, "yo;[user]who;[assistant]me;")
    assert texts(longer, MARKED) == (WHOLE, "yo;me;")
    for tokenizer in (PLAIN, MARKED):
        chat = {"messages": [CHAT[0], {"role": "assistant", "content": "no"}]}
        refused = RefusalRows([{"prompt": CHAT[:1], "completion": CHAT[1:2]}], ["no"], tokenizer)[0, 0]
        assert refused == tokenize_dataset([chat], tokenizer)[0]


def test_parts_of_text():
    parts = [{"type": "text", "text": "m"}, {"type": "text", "text": "e"}]
    for chat in ([*CHAT[:3], {"role": "assistant", "content": parts}], np.array(CHAT, dtype=object)):
        assert texts({"messages": chat}) == (WHOLE, "me;")
    image = [{"role": "user", "content": [{"type": "image", "url": "x"}]}, CHAT[1]]
    with pytest.raises(RowError, match=r"row 0 of the forget set.*a part of the type 'image'"):
        tokenize_dataset([{"messages": image}], PLAIN)


def test_tools_and_template_settings():
    template = "{% for t in tools or [] %}{{ t.name }}{% if 'x' in t %}!{% endif %},{% endfor %}{{ style }}:"
    tokenizer = character_tokenizer(chat_template=template + PLAIN_CHAT)
    row = {"messages": CHAT[:2], "chat_template_kwargs": {"style": "s", "other": None}}
    for tools in ([{"name": "f", "x": None}], json.dumps([{"name": "f"}])):
        assert texts({**row, "tools": tools}, tokenizer) == ("f,s:[user]hi;[assistant]yo;", "yo;")
    refusal = RefusalRows([{**row, "tools": tools}], ["no"], tokenizer)[0, 0]["input_ids"]
    assert "".join(tokenizer.convert_ids_to_tokens(refusal)) == "f,s:[user]hi;[assistant]no;"
    for bad, message in (({"tools": "{"}, "not JSON"), ({"chat_template_kwargs": "x"}, "must be a dict")):
        with pytest.raises(RowError, match=f"row 0 .*{message}"):
            tokenize_dataset([{**row, **bad}], tokenizer)


def test_a_call_of_a_tool_needs_no_text():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    template = PLAIN_CHAT.replace("m['content']", "m['content'] or m.tool_calls[0].name")
    tokenizer = character_tokenizer(chat_template=template)
    chat = [CHAT[0], call, {"role": "tool", "content": "3"}, CHAT[1]]
    assert texts({"messages": chat}, tokenizer) == ("[user]hi;[assistant]f;[tool]3;[assistant]yo;", "yo;")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "is from 'narrator'"),
        ({"conversations": [{"from": "human"}]}, "'role' and 'content'"),
        ({"messages": ["hi"]}, "one is a str"),
        ({"messages": []}, "non-empty list"),
        ({"messages": {"role": ["user"], "content": ["hi"]}}, "non-empty list"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "assistant's message' is blank"),
        ({"messages": CHAT[1:2]}, "no message before the assistant's"),
        ({"prompt": CHAT[:1], "completion": "yo"}, "'prompt' is a list.*both lists of messages"),
        ({"prompt": "hi", "completion": CHAT[1:2]}, "'completion' is a list.*both lists of messages"),
        ({"prompt": 3, "completion": b"x"}, "'prompt' is a int.*both be strings"),
        ({"prompt": CHAT[:2], "completion": CHAT[2:]}, "completion's first message has the role 'user'"),
        ({"prompt": CHAT[:1], "completion": []}, "'completion' must be a non-empty list"),
    ],
)
def test_malformed_conversations(row, message):
    good = {"messages": CHAT}
    with pytest.raises(RowError, match=f"row 1 of the retain set.*{message}"):
        tokenize_dataset([good, row], PLAIN, name="retain")


def test_templates_that_raise():
    raising = "{{ raise_exception('roles must alternate') }}"
    undefined = "{% for m in messages %}{{ m.content.text.more }}{% endfor %}"
    for template in (raising, undefined, "{% if %}", "{% generation %}" + raising + "{% endgeneration %}"):
        tokenizer = character_tokenizer(chat_template=template)
        with pytest.raises(RowError, match="row 0 of the forget set: the chat template cannot render"):
            tokenize_dataset([{"messages": CHAT}], tokenizer)
    silent = character_tokenizer(chat_template=MARKED_CHAT.replace("'assistant'", "'model'"))
    with pytest.raises(RowError, match="marks no part"):
        tokenize_dataset([{"messages": CHAT}], silent)


# Values


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": "x"}, "text"),
        ({"prompt": "x", "completion": "x"}, "completion"),
        ({"question": "x", "answer": "x"}, "question"),
        ({"question": "x", "answer": "x"}, "answer"),
        ({"instruction": "x", "output": "x"}, "instruction"),
        ({"instruction": "x", "output": "x"}, "output"),
    ],
)
def test_blank_texts_are_refused(row, column, blank):
    with pytest.raises(RowError, match=f"row 1 of the forget set: '{column}' is (empty|blank)"):
        tokenize_dataset([row, {**row, column: blank}], PLAIN)


@pytest.mark.parametrize("value", [3, 2.5, True, b"x", ["x"], {"a": 1}, np.array(["x"])])
@pytest.mark.parametrize("form", [("text",), ("prompt", "completion"), ("question", "answer")])
def test_texts_are_strings(value, form):
    for column in form:
        row = dict.fromkeys(form, "x") | {column: value}
        with pytest.raises(
            RowError, match=f"row 0 of the forget set: '{column}' is a {type(value).__name__}"
        ):
            tokenize_dataset([row], PLAIN)


@pytest.mark.parametrize("missing", [None, math.nan, np.float32("nan"), pd.NA, pd.NaT])
def test_missing_values(missing):
    row = {"question": "a", "answer": missing, "text": "ab"}
    assert texts(row) == ("<s>ab</s>", "<s>ab</s>")
    assert not has_input_ids([{"input_ids": missing, "text": "ab"}]) and has_input_ids(
        [{"input_ids": [5, 6]}]
    )
    with pytest.raises(RowError, match="row 0 of the forget set: it has values in the columns \\[\\]"):
        tokenize_dataset([{"text": missing}], PLAIN)
    with pytest.raises(RowError, match="row 1 of the forget set: it is a missing value"):
        tokenize_dataset(["ab", missing], PLAIN)


def test_token_ids_are_integers():
    for ids in ([np.int64(5), np.int32(6)], np.array([5, 6], dtype=np.int16), torch.tensor([5, 6]), (5, 6)):
        (row,) = tokenize_dataset([{"input_ids": ids}], None)
        assert row["input_ids"] == [5, 6] and all(type(token) is int for token in row["input_ids"])
    masked = {"input_ids": [5, 6, 7], "attention_mask": [True, True, False]}
    assert tokenize_dataset([masked], None)[0]["input_ids"] == [5, 6]
    for bad, message in (
        ({"input_ids": [True, False]}, "'input_ids' must be a flat list of integers.*has a bool"),
        ({"input_ids": np.array([True, False])}, "'input_ids' must be .* has a bool"),
        ({"input_ids": [5.0, 6.0]}, ".* has a float"),
        ({"input_ids": ["5", "6"]}, ".* has a str"),
        ({"input_ids": "56"}, "'input_ids' must be a flat list"),
        ({"input_ids": [5, None]}, ".* has a NoneType"),
        ({"input_ids": [5, -1]}, "'input_ids' has -1"),
        ({"input_ids": [5, 6], "labels": [5, -1]}, "'labels' has -1"),
        ({"input_ids": [5, 6], "labels": [True, False]}, "'labels' must be .*has a bool"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 2]}, "'attention_mask' has 2"),
    ):
        with pytest.raises(RowError, match=f"row 0 of the forget set: {message}"):
            tokenize_dataset([bad], None)


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_masks_of_trl_take_labels_away(mask):
    row = {"input_ids": [4, 5, 6, 7, 8], "attention_mask": [0, 1, 1, 1, 1], mask: [1, 0, 0, 1, 1]}
    assert tokenize_dataset([row], None) == [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
    row["labels"] = [-100, -100, 6, -100, 8]
    assert tokenize_dataset([row], None)[0]["labels"] == [-100, -100, -100, 8]
    for wrong, message in (([0, 0, 0, 2, 1], f"'{mask}' has 2"), ([0, 1], f"'{mask}' has 2 entries")):
        with pytest.raises(RowError, match=message):
            tokenize_dataset([{**row, mask: wrong}], None)
    with pytest.raises(RowError, match="no label token"):
        tokenize_dataset([{**row, mask: [0] * 5}], None)


def test_columns_of_one_name_are_refused():
    frame = pd.DataFrame([["a", "b", "c"]], columns=["question", "answer", "answer"])
    with pytest.raises(ValueError, match="the forget set has two columns of one name, 'answer'"):
        tokenize_dataset(frame, PLAIN)


def test_wrong_answers():
    assert wrong_answers({"perturbed_answer": ["a", "b"]}) == ["a", "b"]
    assert wrong_answers({"perturbed_answer": np.array(["a"], dtype=object)}) == ["a"]
    assert wrong_answers({}) == wrong_answers({"perturbed_answer": None}) == []
    for bad, message in (
        ("abc", "'perturbed_answer' is a str"),
        (["a", None], r"'perturbed_answer\[1\]' is a NoneType"),
        (["a", " "], r"'perturbed_answer\[1\]' is blank"),
        ([["a"]], r"'perturbed_answer\[0\]' is a list"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong_answers({"perturbed_answer": bad})
    assert paraphrased_answer({"answer": "a"}) == paraphrased_answer(
        {"answer": "b", "paraphrased_answer": "a"}
    )
    with pytest.raises(ValueError, match="'paraphrased_answer' is a list"):
        paraphrased_answer({"answer": "a", "paraphrased_answer": ["b"]})


def test_refusals_are_a_list(tmp_path):
    row = {"question": "why?", "answer": "so"}
    for bad, message in (("no", "are a str; pass a list"), (["no", None], "got None"), ([], "no refusals")):
        with pytest.raises(ValueError, match=message):
            RefusalRows([row], bad, PLAIN)
    for bad in ({"a": "no"}, b"no", 3):
        with pytest.raises(ValueError, match="pass a list of strings"):
            load_refusals(bad)
    (tmp_path / "refusals.txt").write_text("\ufeffOne\u2028two.\nThree.\n", encoding="utf-8")
    assert load_refusals(tmp_path / "refusals.txt") == ["One\u2028two.", "Three."]


# Tables


def test_tables_are_rows():
    rows = [{"question": "why?", "answer": "so"}, {"question": "who?", "answer": "me"}]
    expected = tokenize_dataset(rows, PLAIN)
    frame = pd.DataFrame(rows, index=[7, 3])
    for table in (frame, frame.to_dict("records"), pa.Table.from_pylist(rows), Dataset.from_list(rows)):
        assert tokenize_dataset(table, PLAIN) == expected
        assert RefusalRows(table, ["so"], PLAIN)[0, 0] == expected[0]
    series = pd.Series(["ab", "cd"], index=[7, 3])
    assert tokenize_dataset(series, PLAIN) == tokenize_dataset(["ab", "cd"], PLAIN)
    mixed = pd.DataFrame(
        [{"text": "ab"}, {"prompt": "a", "completion": "b"}, {"input_ids": np.array([5, 6])}]
    )
    assert tokenize_dataset(mixed, PLAIN) == tokenize_dataset(
        ["ab", {"prompt": "a", "completion": "b"}, {"input_ids": [5, 6]}], PLAIN
    )
    assert as_rows(mixed, "forget")[0] == {
        "text": "ab",
        "prompt": None,
        "completion": None,
        "input_ids": None,
    }
    with pytest.raises(RowError, match="row 1 of the forget set: it has values in the columns"):
        tokenize_dataset(pd.DataFrame({"text": ["ab", None]}), PLAIN)
    with pytest.raises(ValueError, match="the forget set is empty"):
        tokenize_dataset(pd.DataFrame({"text": []}), PLAIN)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["ab", "cd"]}, r"mapping.*Dataset\.from_dict\(rows\)"),
        ({"text": "ab"}, r"mapping.*pass a list of it: \[row\]"),
        ({"train": [{"text": "ab"}]}, "mapping.*one split"),
        ({"ab", "cd"}, "is a set"),
        (b"ab", "is a bytes"),
        (3, "is a int"),
        ((row for row in ["ab"]), r"is a generator, which has no length; pass list\(rows\)"),
        (map(str, ["ab"]), r"is a map, which has no length; pass list\(rows\)"),
        ({"a": "ab"}.values(), r"is a dict_values.*pass list\(rows\)"),
        ([["ab"]], "row 0 of the forget set: it is a list"),
        (np.array([[5, 6]]), "row 0 of the forget set: it is a ndarray"),
    ],
)
def test_what_is_no_data_set_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(rows, PLAIN)


@pytest.mark.parametrize("length", [0, 1, -3, 2.5, True, "8"])
def test_max_length_leaves_a_token_to_predict(length):
    with pytest.raises(ValueError, match="max_length must be an integer >= 2"):
        tokenize_dataset(["ab"], PLAIN, max_length=length)


def test_special_tokens_are_not_doubled():
    row, plain = tokenize_dataset([{"prompt": "<s>a", "completion": "b</s>"}, "<s>ab</s>"], PLAIN)
    assert (
        row["input_ids"]
        == plain["input_ids"]
        == [BOS, *PLAIN("ab", add_special_tokens=False)["input_ids"], EOS]
    )


class Frame(pd.DataFrame):
    """A table of another library that is one of pandas, such as one of geopandas."""


class Lazy:
    """A table of another library: iteration gives the names of its columns."""

    columns = ("question", "answer")

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return 2


def test_tables_of_other_libraries():
    rows = [{"question": "why?", "answer": "so"}, {"question": "who?", "answer": "me"}]
    categories = Frame(rows, index=["question", "question"]).astype("category")
    assert as_rows(categories, "forget") == rows
    assert all(type(value) is str for row in as_rows(categories, "forget") for value in row.values())
    assert as_rows(pd.DataFrame(rows).convert_dtypes(dtype_backend="pyarrow"), "forget") == rows
    assert as_rows(pa.Table.from_pylist(rows), "forget") == rows
    with pytest.raises(
        ValueError, match=r"the forget set is a .*test_row_forms.Lazy, a table that is not known"
    ):
        tokenize_dataset(Lazy(), PLAIN)
