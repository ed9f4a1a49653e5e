"""The Fisher's Triton kernel against float64, in Triton's interpreter and on a GPU if there is one.

``test_in_the_interpreter`` runs this file in the interpreter. In this process the same tests need a GPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_ahead import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    on,
    on_device,
    outside,
    run_in_the_interpreter,
    sources,
    triton_table,
)

from loku_kernels import accumulate_squared_grad_

pytest.importorskip("triton", reason="no triton")


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("LOKU_BACKEND", "triton")


# --- the same tests in the interpreter and on a GPU -----------------------------------------------


@on_device
@settings(deadline=None, max_examples=EXAMPLES)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 99),
)
def test_fisher(n, tokens, d, k, dtype, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, tokens, k, generator=generator).to(dtype)
    grad_outputs = torch.randn(n, tokens, d, generator=generator).to(dtype)
    grads = torch.einsum("ntd,ntk->ndk", grad_outputs.double(), inputs.double())
    start, divisor = torch.rand(d, k, generator=generator), torch.rand(d, k, generator=generator) + 0.1
    if strided:
        inputs = inputs.transpose(1, 2).contiguous().transpose(1, 2)
        grad_outputs = torch.nn.functional.pad(grad_outputs, (2, 3))[..., 2:-3]
    inputs, grad_outputs = on(DEVICE, inputs, grad_outputs)
    ours = accumulate_squared_grad_(start.clone().to(DEVICE), inputs, grad_outputs).cpu().double()
    expected = start.double() + grads.square().sum(0)
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * expected.max().item()}
    torch.testing.assert_close(ours, expected, **tolerance)
    for wrong in (start.double(), start.double() - grads.square().sum(0)):  # left out, and subtracted
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, expected, **tolerance)
    rows, divisor = torch.ones(d).to(DEVICE), divisor.to(DEVICE)
    accumulate_squared_grad_(rows, inputs, grad_outputs, divisor)
    expected = 1 + (grads.square() / divisor.cpu().double()).sum((0, 2))
    torch.testing.assert_close(rows.cpu().double(), expected, rtol=1e-4, atol=1e-5 * expected.max().item())


@on_device
def test_fisher_of_tokens_more_than_2_to_the_31_entries_apart():
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(1, 3, 40, generator=generator).half().to(DEVICE)
    stride = 2**30 + 8  # less than 2^31, and twice it is more
    try:
        memory = torch.empty(2 * stride + 40, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("the system does not lend this much memory, even untouched")
    far = memory.as_strided((1, 3, 40), (3 * stride, stride, 1)).copy_(near)
    expected = accumulate_squared_grad_(torch.zeros(40, 40, device=DEVICE), near, near)
    for operands in ((far, near), (near, far)):
        ours = accumulate_squared_grad_(torch.zeros(40, 40, device=DEVICE), *operands)
        assert torch.equal(ours, expected) and ours.gt(0).all()


# --- on any machine, in this process --------------------------------------------------------------


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@outside
def test_tf32_is_as_torch_has_it():
    from loku_kernels.backends.triton import fisher

    matmul = torch.backends.cuda.matmul
    assert fisher._precision(torch.float32) == "ieee"
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"  # the older attribute allow_tf32 cannot be read afterwards
        assert fisher._precision(torch.float32) == "tf32" and fisher._precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


@outside
def test_another_batch_compiles_nothing_anew(monkeypatch):
    """Kernels are compiled for dtypes and options, not for numbers of samples or tokens."""
    table = triton_table(monkeypatch)

    def fisher(n, tokens):
        operands = [table.meta(n, tokens, 4096, dtype=torch.bfloat16) for _ in range(2)]
        fisher = table.meta(4096, 4096, dtype=torch.float32)
        table.fisher.accumulate_squared_grad_(fisher, *operands, None)

    assert sources(table, fisher, 16, 128) == sources(table, fisher, 1, 77)
