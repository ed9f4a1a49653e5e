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
@pytest.mark.parametrize(("softcap", "logit_scale"), [(0.0, 1.0), (0.0, 0.25), (5.0, 1.0), (5.0, 1.5)])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_in_the_dtype_of_their_operands(dtype, softcap, logit_scale, biased):
    hidden, weight, bias, _ = planted_operands(6, 4, 9, dtype)
    bias = bias if biased else None
    exact = logit_scale * torch.nn.functional.linear(
        hidden.double(), weight.double(), bias.double() if biased else None
    )
    # A dot product of 4 terms may be off by 4 roundings of the sum of their sizes, as torch's own is.
    sizes = torch.nn.functional.linear(hidden.double().abs(), weight.double().abs())
    bound = 4 * torch.finfo(dtype).eps * logit_scale * sizes / (softcap or 1.0)
    exact = (exact / softcap).tanh() if softcap else exact
    for rows, columns in (([6], [9]), ([3, 3], [9]), ([6], [4, 5]), ([2, 4], [3, 6])):
        parts = [[slice(sum(n[:i]), sum(n[: i + 1])) for i in range(len(n))] for n in (rows, columns)]
        logits = logits_blocks.LogitsBlocks(hidden, weight, bias, softcap, logit_scale, parts)
        if logits.memory is not None:
            logits.memory.fill_(torch.nan)  # the memory's old content does not matter
        for r in logits.rows:
            for c in logits.columns:
                block = logits.compute(r, c)
                assert block.dtype == dtype
                eps = torch.finfo(dtype).eps
                allowed = 8 * eps + 2 * eps * exact[r, c].abs() + bound[r, c]
                assert ((block.double() - exact[r, c]).abs() <= allowed).all()


def test_blocks_on_a_card_have_whole_rows():
    """256 MiB hold 2048 rows of 32000 16-bit logits, and 1024 rows at V = 128256."""
    for vocab, most in ((32000, 2048), (128256, 1024), (256000, 524), (2**20, 128)):
        rows, columns = logits_blocks.whole_row_slices(8192, vocab, 2, "cuda")
        assert columns == [slice(0, vocab)]
        assert max(part.stop - part.start for part in rows) == most or len(rows) == -(-8192 // most)


def test_the_limit_of_a_block_is_an_option(monkeypatch):
    monkeypatch.setenv("LOKU_BLOCK_MIB", "1000")
    rows, _ = logits_blocks.whole_row_slices(2048, 256000, 2, "cuda")
    assert rows == [slice(0, 2048)]
    for wrong in ("0", "-3", "1.5", "many"):
        monkeypatch.setenv("LOKU_BLOCK_MIB", wrong)
        with pytest.raises(ValueError, match="LOKU_BLOCK_MIB"):
            logits_blocks.block_slices(9, 9, 2)
