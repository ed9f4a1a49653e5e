"""``accumulate_squared_grad_`` against per-sample autograd in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import exact_fisher
from kernel_inputs import DTYPES, fisher_operands
from peak_memory import PeakMemory, needs_proc

from loku_kernels import accumulate_squared_grad_
from loku_kernels.backends import native, reference


def check(inputs, grad_outputs):
    d, k = grad_outputs.shape[2], inputs.shape[2]
    # A gradient in bfloat16 is off by up to 2^-8, its square by 2^-7.
    rtol = 1.05 * 2**-7 if inputs.dtype == torch.bfloat16 else 1e-4
    start = torch.rand(d, k)
    expected = exact_fisher(inputs, grad_outputs)
    ours = accumulate_squared_grad_(start.clone(), inputs, grad_outputs)
    torch.testing.assert_close(ours.double(), start + expected, rtol=rtol, atol=1e-5 * expected.max().item())

    ours = accumulate_squared_grad_(torch.zeros(d, k), inputs, grad_outputs)
    torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=1e-6 * expected.max().item())
    for wrong in (torch.zeros_like(ours), ours.sqrt()):  # nothing added, and nothing squared
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong.double(), expected, rtol=rtol, atol=1e-6 * expected.max().item())

    divisor = torch.rand(d, k) + 0.1
    rows = accumulate_squared_grad_(torch.zeros(d), inputs, grad_outputs, divisor)
    expected = exact_fisher(inputs, grad_outputs, divisor)
    torch.testing.assert_close(rows.double(), expected, rtol=rtol, atol=1e-6 * expected.max().item())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.sampled_from([4, 500, 1 << 20]),
    st.integers(0, 99),
)
def test_any_shape_and_tile(n, tokens, d, k, dtype, size, seed):
    with mock.patch.multiple(reference.fisher, TILE_BYTES=size, TOKEN_BYTES=size):
        check(*fisher_operands(n, tokens, d, k, dtype, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_than_a_tile(backend, dtype):
    check(*fisher_operands(3, 50, 700, 2100, dtype))


def test_many_tokens(backend):
    check(
        *fisher_operands(1, 3000, 50, 300, torch.float32)
    )  # more tokens than fit into a panel of 256 columns


def test_native_kernel_runs(monkeypatch):
    if native._core is None:
        pytest.skip("no compiled core")
    monkeypatch.delenv("LOKU_BACKEND", raising=False)
    for dtype, kernel in ((torch.float32, "accumulate_squared_grad_"), (torch.bfloat16, "add_squares_")):
        with (
            mock.patch.object(native, "_core", wraps=native._core) as core,
            mock.patch.object(reference.fisher, "multiplies_bfloat16", lambda device: True),
        ):
            accumulate_squared_grad_(torch.zeros(8, 12), *fisher_operands(2, 5, 8, 12, dtype))
        assert getattr(core, kernel).call_count >= 1


def test_thread_count_changes_nothing(backend):
    inputs, grad_outputs = fisher_operands(3, 40, 300, 600, torch.float32)
    divisor = torch.rand(300, 600) + 0.1
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            whole = accumulate_squared_grad_(torch.zeros(300, 600), inputs, grad_outputs)
            rows = accumulate_squared_grad_(torch.zeros(300), inputs, grad_outputs, divisor)
            results.append((whole, rows))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0 if backend == "native" else 1e-5, atol=0)


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_without_bias(native):
    inputs, grad_outputs = fisher_operands(8, 50, 300, 200, torch.bfloat16)
    with mock.patch.object(reference.fisher, "multiplies_bfloat16", lambda device: native):
        ours = accumulate_squared_grad_(torch.zeros(300, 200), inputs, grad_outputs).double()
    expected = exact_fisher(inputs, grad_outputs)
    error = (ours - expected) / expected
    assert abs(error.mean()) < 1e-4 and error.std() < (2**-8 if native else 1e-4)


def test_transposed_and_sliced_operands(backend):
    inputs, grad_outputs = fisher_operands(3, 20, 8, 12, torch.float32)
    expected = accumulate_squared_grad_(torch.zeros(8, 12), inputs, grad_outputs)
    strided = inputs.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.nn.functional.pad(grad_outputs, (2, 3))[..., 2:-3]
    torch.testing.assert_close(accumulate_squared_grad_(torch.zeros(8, 12), strided, padded), expected)
    part = torch.zeros(10, 40)[1:9, 5:17]  # a Fisher that is a part of another tensor
    accumulate_squared_grad_(part, inputs, grad_outputs, None)
    torch.testing.assert_close(part, expected)


def test_batching_and_padding_change_nothing():
    inputs, grad_outputs = fisher_operands(6, 20, 8, 12, torch.float32)
    whole = accumulate_squared_grad_(torch.zeros(8, 12), inputs, grad_outputs)
    parts = torch.zeros(8, 12)
    for part in (slice(0, 1), slice(1, 5), slice(5, 6)):
        accumulate_squared_grad_(parts, inputs[part], grad_outputs[part])
    torch.testing.assert_close(parts, whole)
    padded_inputs = torch.cat([inputs, torch.full((6, 7, 12), 1e3)], 1)
    padded_grads = torch.cat([grad_outputs, torch.zeros(6, 7, 8)], 1)
    padded = accumulate_squared_grad_(torch.zeros(8, 12), padded_inputs, padded_grads)
    torch.testing.assert_close(padded, whole)


def test_empty_adds_nothing():
    for n, tokens in ((0, 5), (3, 0)):
        inputs, grad_outputs = torch.randn(n, tokens, 4), torch.randn(n, tokens, 3)
        assert accumulate_squared_grad_(torch.ones(3, 4), inputs, grad_outputs).eq(1).all()


def test_opcheck():
    inputs, grad_outputs = fisher_operands(3, 7, 5, 6, torch.float32)
    op = torch.ops.loku_kernels.accumulate_squared_grad_.default
    torch.library.opcheck(op, (torch.zeros(5, 6), inputs, grad_outputs, None))
    torch.library.opcheck(op, (torch.zeros(5), inputs, grad_outputs, torch.ones(5, 6)))


def test_errors():
    inputs, grad_outputs = fisher_operands(3, 7, 5, 6, torch.float32)
    with pytest.raises(ValueError, match=r"\(3, 7, 6\) and \(3, 6, 5\)"):
        accumulate_squared_grad_(torch.zeros(5, 6), inputs, grad_outputs[:, :6])
    with pytest.raises(ValueError, match="one dtype"):
        accumulate_squared_grad_(torch.zeros(5, 6), inputs.bfloat16(), grad_outputs)
    with pytest.raises(ValueError, match=r"shape \(5, 6\), got torch.float32 \(6, 5\)"):
        accumulate_squared_grad_(torch.zeros(6, 5), inputs, grad_outputs)
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        accumulate_squared_grad_(torch.zeros(5, 6).bfloat16(), inputs, grad_outputs)
    with pytest.raises(ValueError, match=r"divisor must be torch.float32 of shape \(5, 6\)"):
        accumulate_squared_grad_(torch.zeros(5), inputs, grad_outputs, torch.ones(5))
    with pytest.raises(ValueError, match="device"):
        accumulate_squared_grad_(torch.zeros(5, 6, device="meta"), inputs, grad_outputs)


@needs_proc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_is_a_few_mebibytes(dtype):
    inputs, grad_outputs = fisher_operands(16, 64, 2048, 2048, dtype)
    total = torch.zeros(2048, 2048)
    accumulate_squared_grad_(total, inputs, grad_outputs)

    peak = PeakMemory()
    accumulate_squared_grad_(total, inputs, grad_outputs)
    assert peak.extra() <= 8 << 20  # a tensor (n, d, k) would be 256 MiB
