"""Batches are padded on the right, and ``transformers.Trainer`` takes them."""

from functools import partial

import torch
from character_tokenizer import EOS, character_tokenizer
from tiny_models import tiny_model
from transformers import Trainer, TrainingArguments

from loku.data import collate, padding_id, tokenize_dataset


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


def test_trainer_takes_the_rows(tokenizer, tmp_path):
    rows = tokenize_dataset(["ab", "abcd", "a b c"], tokenizer)
    options = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    collator = partial(collate, pad_token_id=padding_id(tokenizer))
    trainer = Trainer(
        tiny_model("llama", len(tokenizer)), options, data_collator=collator, train_dataset=rows
    )
    assert trainer.train().global_step == 2
