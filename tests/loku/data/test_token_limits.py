"""Rows that a model cannot take are named before anything is touched."""

import pytest
import torch
from character_tokenizer import character_tokenizer
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
)

from loku.data import RowError, check_tokens, padding_id, retain_rows, token_limits, tokenize_dataset
from loku.data.token_limits import TokenLimits, _context

ROWS = [{"input_ids": [3, 4, 5]}, {"input_ids": [3] * 6}]


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (GPT2Config(n_positions=32), 32),
        (MistralConfig(max_position_embeddings=96, sliding_window=16), 96),
        (MptConfig(max_seq_len=48), 48),
        (MambaConfig(), None),
        (BloomConfig(), None),
        (FalconConfig(alibi=True), None),
        (FalconConfig(alibi=False, max_position_embeddings=40), 40),
        (Gemma3Config(text_config={"max_position_embeddings": 128}).get_text_config(), 128),
    ],
)
def test_the_context_is_that_of_the_config(config, context):
    assert _context(config) == context


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            64,
        ),
        ({"rope_type": "default"}, 64),
    ],
)
def test_stretched_rope_has_a_longer_context(rope, context):
    config = LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope})
    assert _context(config) == context


def test_limits_of_wrapped_models():
    model = tiny_model("llama")
    assert token_limits(model) == TokenLimits(128, 97, 97)
    lora = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    assert token_limits(get_peft_model(model, lora)) == TokenLimits(128, 97, 97)


@pytest.mark.parametrize(
    ("row", "limits", "message"),
    [
        (
            {"input_ids": [3] * 6},
            TokenLimits(5, None, None),
            r"it has 6 tokens.*max_length=5 \(--max-length 5\)",
        ),
        ({"input_ids": [3, 97]}, TokenLimits(None, 97, 97), r"token id 97.*97 rows.*resize_token_embeddings"),
        ({"input_ids": [3, 4], "labels": [-100, 97]}, TokenLimits(None, None, 97), "label 97.*97 rows"),
        ({"input_ids": [3] * 7, "seq_lengths": [1, 6]}, TokenLimits(5, None, None), "it has 6 tokens"),
    ],
)
def test_rows_beyond_the_limits(row, limits, message):
    with pytest.raises(RowError, match=f"row 1 of the retain set: .*{message}"):
        tokenize_dataset([ROWS[0], row], None, name="retain", limits=limits)


def test_rows_within_the_limits():
    limits = TokenLimits(5, 97, 97)
    packed = {"input_ids": [3] * 9, "seq_lengths": [5, 4]}  # each document fits
    other = {"input_ids": [3, 4, 5], "labels": [-100, 96, 0]}  # labels may differ from the ids
    tokenize_dataset([ROWS[0], packed, other], None, limits=limits)
    with pytest.warns(UserWarning, match="1 of the 2 rows"):
        tokenize_dataset(ROWS, None, limits=limits, max_length=5)


def test_tokenised_rows_are_checked():
    model = tiny_model("llama")
    check_tokens(model, tokenize_dataset(ROWS, None), "forget")
    with pytest.raises(RowError, match="row 1 of the other set: it has 129 tokens"):
        check_tokens(model, [ROWS[0] | {"labels": [3]}, {"input_ids": [3] * 129, "labels": [3]}], "other")


def test_drawn_rows_are_checked_as_they_are_drawn(monkeypatch):
    class Stream:
        def __iter__(self):
            return iter(ROWS)

    limits = TokenLimits(5, 97, 97)
    monkeypatch.setattr("loku.data.large_sets.LAZY_ROWS", 1)
    for given in (ROWS, Stream()):
        for rows in (
            retain_rows(given, None, limits=limits),
            retain_rows(retain_rows(given, None), None, limits=limits),
        ):
            assert rows[0]["input_ids"] == [3, 4, 5]
            with pytest.raises(RowError, match="row 1 of the retain set: it has 6 tokens"):
                rows[1]


def test_the_padding_id_is_in_the_embedding():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})  # and the model is not resized
    model = tiny_model("llama", len(tokenizer) - 1)
    assert padding_id(tokenizer) == len(tokenizer) - 1
    assert padding_id(tokenizer, model) == tokenizer.eos_token_id
    assert padding_id(tokenizer, tiny_model("llama", len(tokenizer))) == len(tokenizer) - 1
    model.resize_token_embeddings(1)
    assert padding_id(tokenizer, model) == padding_id(None, model) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
def test_the_padding_id_does_not_count(kind):
    """So any id in the embedding will do."""
    from loku.data import collate

    model = tiny_model(kind)
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3] * 4}, {"input_ids": [7, 8], "labels": [7, 8]}]
    outputs = []
    for pad in (0, 96):
        batch = collate(rows, pad)
        with torch.no_grad():
            outputs.append(model(**batch).logits[batch["attention_mask"].bool()])
    torch.testing.assert_close(*outputs)
