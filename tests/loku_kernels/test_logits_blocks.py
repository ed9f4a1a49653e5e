"""Blocks of logits cover all rows and columns, and have the logits of a linear layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DTYPES, planted_operands

from loku_kernels import logits_blocks


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 5000), st.integers(2, 300_000), st.sampled_from([2, 4, 8]))
def test_slices_cover_each_entry_once(count, vocab, itemsize):
    for slices in (logits_blocks.block_slices, logits_blocks.whole_row_slices):
        rows, columns = slices(count, vocab, itemsize)
        for size, parts in ((count, rows), (vocab, columns)):
            assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
            assert size == (parts[-1].stop if parts else 0)
        sizes = [(r.stop - r.start) * (c.stop - c.start) for r in rows for c in columns]
        assert all(0 < size for size in sizes) and sum(sizes) == count * vocab
        one_row = vocab * itemsize  # a block of whole rows has at least one
        assert all(size * itemsize <= max(logits_blocks.BLOCK_BYTES, one_row) for size in sizes)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_on_the_cpu_products_are_in_their_operands_dtype(dtype):
    hidden, weight, bias, _ = planted_operands(6, 4, 9, dtype)
    assert logits_blocks.product_dtype(weight) == dtype
    logits = logits_blocks.LogitsBlocks(hidden, weight, bias, 0.0, 1.0)
    block = logits.compute(slice(0, 6), slice(0, 9))
    assert torch.equal(block, torch.nn.functional.linear(hidden, weight, bias))
    assert logits.terms_of(block) is block
