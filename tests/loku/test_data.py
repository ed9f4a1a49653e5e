"""Rows of every kind become tokens and labels, and bad rows are named."""

from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny_models import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from loku.data import (
    RefusalRows,
    collate,
    documents,
    infer_tokenizer,
    load_refusals,
    padding_id,
    tokenize_dataset,
)

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]
BOS, EOS = 0, 1
PLAIN_CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }};{% endgeneration %}{% else %}{{ m['content'] }};{% endif %}"
    "{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "me"},
]


def character_tokenizer(bos=True, eos=True, **special):
    """One token a character; adds a BOS by default, as Llama's does."""
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate(SPECIAL + characters)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special |= {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def labelled(row):
    """The ids with a label; a label must be its own token."""
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
        (["ab", ""], "row 1 of the retain set: there is no label token"),
        ([{"prompt": "a", "completion": ""}], "row 0 of the retain set: there is no label token"),
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
def test_errors_say_what_is_wrong_and_where(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(rows, tokenizer, max_length=8, name="retain")


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="pass tokenizer="):
        tokenize_dataset(["ab"], None)


def test_collate_pads_on_the_right():
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, {"input_ids": [6], "labels": [6]}]
    batch = collate(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 4, 5], [6, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_id_never_fails():
    assert padding_id(character_tokenizer(pad_token="<pad>")) == 2
    assert padding_id(character_tokenizer()) == EOS
    assert padding_id(character_tokenizer(eos=False)) == padding_id(None) == 0


def tiny_llama(vocab_size):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def test_trainer_takes_the_rows(tokenizer, tmp_path):
    rows = tokenize_dataset(["ab", "abcd", "a b c"], tokenizer)
    options = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    collator = partial(collate, pad_token_id=padding_id(tokenizer))
    trainer = Trainer(tiny_llama(len(tokenizer)), options, data_collator=collator, train_dataset=rows)
    assert trainer.train().global_step == 2


def test_infer_tokenizer(tokenizer, tmp_path):
    model = tiny_llama(len(tokenizer))
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
        assert RefusalRows([row], ["no"], tokenizer, max_length=9)[0, 0]["labels"] == expected["labels"][:9]


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
