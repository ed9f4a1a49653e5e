"""Digests of models and rows change with each fact that counts, and with no other."""

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

from loku.data import collate
from loku.fingerprints import batches_fingerprint, weights_fingerprint

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
