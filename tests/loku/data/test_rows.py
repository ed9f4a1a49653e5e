"""Rows of every kind become tokens and labels, and bad rows are named."""

import numpy as np
import pytest
import torch
from character_tokenizer import BOS, CHAT, EOS, MARKED_CHAT, PLAIN_CHAT, character_tokenizer
from datasets import Dataset, DatasetDict
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from loku.data import collate, documents, infer_tokenizer, tokenize_dataset


def labelled(row):
    """Return the ids that have a label, each of which must equal its label."""
    assert len(row["input_ids"]) == len(row["labels"])
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    kept = [(token, label) for token, label in pairs if label != -100]
    assert all(token == label for token, label in kept)
    return [token for token, _ in kept]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_has_bos_once_and_eos_once(tokenizer):
    rows = ["ab", {"text": "ab"}, {"text": "<s>ab</s>"}]
    for row in tokenize_dataset(rows, tokenizer):
        assert row["input_ids"] == [BOS, *ids(tokenizer, "ab"), EOS] == row["labels"]


def test_without_bos_and_eos_only_the_text_is_left():
    tokenizer = character_tokenizer(bos=False, eos=False)
    (row,) = tokenize_dataset(["ab"], tokenizer)
    assert row["input_ids"] == row["labels"] == ids(tokenizer, "ab")


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "why?", "completion": " so"}, "why?", " so"),
        ({"question": "why?", "answer": "so", "other": 3}, "Question: why?\nAnswer:", " so"),
    ],
)
def test_only_the_completion_is_labelled(tokenizer, row, prompt, completion):
    for rows in ([row], Dataset.from_list([row])):
        (tokens,) = tokenize_dataset(rows, tokenizer)
        assert tokens["input_ids"] == [BOS, *ids(tokenizer, prompt), *ids(tokenizer, completion), EOS]
        assert labelled(tokens) == [*ids(tokenizer, completion), EOS]


def test_input_ids_are_taken_as_they_are():
    rows = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]},
        {"input_ids": np.array([9, 5, 6, 7, 9]), "attention_mask": [0, 1, 1, 1, 0]},
        {"input_ids": torch.tensor([5, 6, 7]), "text": 3},
    ]
    tokens = tokenize_dataset(rows, tokenizer=None)
    assert [row["input_ids"] for row in tokens] == [[5, 6, 7]] * 4
    assert [row["labels"] for row in tokens] == [[5, 6, 7], [-100, 6, -100], [5, 6, 7], [5, 6, 7]]


def test_documents_that_share_a_row():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1]},
        {
            "input_ids": [5, 6, 7, 8, 9],
            "labels": [-100, 6, 7, 8, 9],
            "seq_lengths": [3, 2],
            "position_ids": None,
        },
        {"input_ids": [5, 6], "position_ids": [0, 1]},
        {"input_ids": [4, 5, 6], "position_ids": [1, 0, 1], "attention_mask": [0, 1, 1]},
    ]
    tokens = tokenize_dataset(rows, None)
    assert tokens[0] == tokens[1]
    assert tokens[0]["labels"] == [-100, 6, 7, -100, 9] and tokens[0]["position_ids"] == [0, 1, 2, 0, 1]
    assert tokens[2:] == [{"input_ids": [5, 6], "labels": [5, 6]}] * 2  # one document
    assert documents(tokens[0]) == [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]
    assert documents(tokens[2]) == [tokens[2]]
    with pytest.warns(UserWarning, match="1 of the 1 rows"):
        (cut,) = tokenize_dataset(rows[:1], None, max_length=4)
    assert cut["position_ids"] == [0, 1, 2, 0] and len(documents(cut)) == 1
    for bad, message in [
        ({"position_ids": [0, 2]}, "must count 0, 1, 2"),
        ({"position_ids": [1, 2]}, "must count 0, 1, 2"),
        ({"position_ids": [0]}, "2 input_ids but 'position_ids' has 1"),
        ({"seq_lengths": [1, 2]}, "2 input_ids but 'seq_lengths' has 3"),
        ({"seq_lengths": [1, 1]}, "no label token"),
        ({"seq_lengths": [3, -1]}, "'seq_lengths' has -1; the length of a document is 0 or greater"),
        ({"seq_lengths": [10**18]}, f"2 input_ids but 'seq_lengths' has {10**18}"),  # before it is expanded
    ]:
        with pytest.raises(ValueError, match=message):
            tokenize_dataset([{"input_ids": [5, 6], **bad}], None)

    batch = collate([tokens[0], {"input_ids": [6], "labels": [6]}], pad_token_id=9)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0] * 5]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [6, 9, 9, 9, 9]]


def test_a_chat_template_with_an_assistant_mask_labels_every_assistant_turn(tokenizer):
    tokenizer = character_tokenizer(chat_template=MARKED_CHAT)
    (row,) = tokenize_dataset([{"messages": CHAT}], tokenizer)
    assert row["input_ids"] == ids(tokenizer, "[user]hi;[assistant]yo;[user]who;[assistant]me;")
    assert labelled(row) == ids(tokenizer, "yo;me;")


def test_a_plain_chat_template_labels_the_last_message(tokenizer):
    tokenizer = character_tokenizer(chat_template=PLAIN_CHAT)
    for rows in ([{"messages": CHAT}], Dataset.from_list([{"messages": CHAT}])):
        (row,) = tokenize_dataset(rows, tokenizer)
        assert row["input_ids"] == ids(tokenizer, "[user]hi;[assistant]yo;[user]who;[assistant]me;")
        assert labelled(row) == ids(tokenizer, "me;")
    with pytest.raises(ValueError, match=r"row 0 of the forget set.*role 'user'"):
        tokenize_dataset([{"messages": CHAT[:-1]}], tokenizer)


def test_truncation_keeps_the_start_and_is_reported_once(tokenizer):
    rows = ["abc", "abcdef", {"prompt": "ab", "completion": "cdef"}]
    with pytest.warns(UserWarning, match="2 of the 3 rows of the retain set.*max_length=5") as caught:
        tokens = tokenize_dataset(rows, tokenizer, max_length=5, name="retain")
    assert len(caught) == 1
    assert [len(row["input_ids"]) for row in tokens] == [5, 5, 5]
    assert tokens[1]["input_ids"] == [BOS, *ids(tokenizer, "abcd")]
    assert labelled(tokens[2]) == ids(tokenizer, "cd")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the retain set is empty"),
        ("abc", "the retain set is a str; pass a list"),
        (None, "the retain set is a NoneType"),
        (DatasetDict(train=Dataset.from_list([{"text": "a"}])), r"mapping with the keys \['train'\]"),
        (["ab", {"texts": "ab"}], r"row 1 of the retain set.*\['texts'\]; it needs 'text'"),
        (["ab", {"text": None}], "row 1 of the retain set"),
        (["ab", 3], "row 1 of the retain set: it is a int"),
        ([{"text": 3}], "row 0 of the retain set: 'text' is a int"),
        ([{"prompt": ["a"], "completion": "b"}], "'prompt' is a list"),
        (["ab", ""], "row 1 of the retain set: 'text' is empty"),
        ([{"prompt": "a", "completion": ""}], "row 0 of the retain set: 'completion' is empty"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], "no label token after its first"),
        ([{"input_ids": [1]}], "no label token after its first"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids but 'labels' has 1"),
        ([{"input_ids": [[1, 2]]}], "'input_ids' must be a flat list"),
        ([{"input_ids": 3}], "'input_ids' must be a flat list"),
        ([{"messages": CHAT}], "row 0 of the retain set.*no chat template"),
        ([{"messages": [{"role": "user"}]}], "'role' and 'content'"),
        ([{"prompt": "abcdefghij", "completion": "k"}], "max_length=8; raise max_length"),
    ],
)
def test_errors_name_the_row_and_the_reason(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(rows, tokenizer, max_length=8, name="retain")


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="pass tokenizer="):
        tokenize_dataset(["ab"], None)


def test_infer_tokenizer(tokenizer, tmp_path):
    model = tiny_model("llama", len(tokenizer))
    with pytest.raises(ValueError, match="tokenizer="):
        infer_tokenizer(model)
    model.save_pretrained(tmp_path / "model")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer="):
        infer_tokenizer(loaded)
    tokenizer.save_pretrained(tmp_path / "model")
    assert infer_tokenizer(loaded).get_vocab() == tokenizer.get_vocab()
    loaded.config._name_or_path = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="is not there"):
        infer_tokenizer(loaded)


@pytest.mark.parametrize("kind", ["llama", "phi", "gpt_neo"])
def test_no_tokenizer_is_made_up(kind, tmp_path):
    """For some models AutoTokenizer makes one without a vocabulary. It turns every text into nothing."""
    AutoModelForCausalLM.from_config(tiny_config(kind)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer="):
        infer_tokenizer(AutoModelForCausalLM.from_pretrained(tmp_path))
