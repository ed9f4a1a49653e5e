"""Digests of models and rows change with each fact that counts, and with no other."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

from loku.data import collate
from loku.fingerprints import (
    batches_fingerprint,
    ordered_rows_fingerprint,
    sampled_weights_fingerprint,
    tensors_fingerprint,
    texts_fingerprint,
    weights_fingerprint,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_adapter_does_not_count():
    model = tiny_model("llama")
    plain = weights_fingerprint(model)
    assert weights_fingerprint(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) == plain


def test_where_packed_documents_begin_counts():
    def fingerprint(row):
        return batches_fingerprint([collate([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], **row}], 0)])

    whole, packed = fingerprint({}), fingerprint({"position_ids": [0, 1, 0, 1]})
    assert len({whole, packed, fingerprint({"position_ids": [0, 1, 2, 0]})}) == 3


def test_every_weight_counts_in_the_whole_digest_and_a_sample_in_the_other():
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.data  # 1536 values, of which every second is sampled
    whole, sampled = weights_fingerprint(model), sampled_weights_fingerprint(model)
    weight.view(-1)[1] += 1
    assert weights_fingerprint(model) != whole and sampled_weights_fingerprint(model) == sampled
    weight.view(-1)[1] -= 1
    weight.view(-1)[2] += 1
    assert sampled_weights_fingerprint(model) != sampled
    assert weights_fingerprint(tiny_model("llama")) == whole
    assert weights_fingerprint(tiny_model("llama", seed=1)) != whole
    assert weights_fingerprint(tiny_model("llama").bfloat16()) != whole


def test_an_adapter_does_not_change_a_sample():
    model = tiny_model("llama")
    plain = sampled_weights_fingerprint(model)
    assert sampled_weights_fingerprint(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) == plain


ROWS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]


def test_rows_in_their_order():
    plain = ordered_rows_fingerprint(ROWS)
    assert ordered_rows_fingerprint(iter(ROWS)) == plain
    others = [ROWS[::-1], ROWS[:1], [*ROWS, ROWS[0]], [{**ROWS[0], "labels": [-100, -100, 7]}, ROWS[1]]]
    joined = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]}]
    assert len({plain, *map(ordered_rows_fingerprint, [*others, joined])}) == 6


def test_batches_in_any_order_grouping_and_padding():
    plain = batches_fingerprint([collate(ROWS, 0)])
    for same in ([collate(ROWS[::-1], 0)], [collate([row], 0) for row in ROWS], [collate(ROWS, 3)]):
        assert batches_fingerprint(same) == plain
    assert batches_fingerprint([collate(ROWS[:1], 0)]) != plain
    assert batches_fingerprint([collate([*ROWS, ROWS[0]], 0)]) != plain


def test_texts_and_tensors():
    assert len({texts_fingerprint(texts) for texts in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5
    assert texts_fingerprint(iter(["a", "b"])) == texts_fingerprint(["a", "b"])
    a, b = torch.ones(3), torch.zeros(2)
    assert tensors_fingerprint({"a": a, "b": b}) == tensors_fingerprint({"b": b, "a": a})
    assert tensors_fingerprint({"a": a, "b": b}) != tensors_fingerprint({"a": b, "b": a})
    assert tensors_fingerprint({"a": a}) != tensors_fingerprint({"a": -a})
