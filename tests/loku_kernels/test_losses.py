"""``ihl_loss`` and ``cross_entropy_loss`` on logits, in place and not, against their formulas in float64."""

import contextlib
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_as_good_as_eager, gradients, lean_eager_ihl, per_row
from kernel_inputs import DTYPES, IGNORE, planted_logits
from peak_memory import PeakMemory, needs_proc
from torch.utils.flop_counter import FlopCounterMode

from loku_kernels import cross_entropy_loss, ihl_loss, linear_ihl_loss, losses, softmax_triplet
from loku_kernels.backends import native, reference

needs_core = pytest.mark.skipif(native._core is None, reason="no compiled core")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [2, 3, 1000, 50257])
def test_ihl_is_the_formula_of_the_paper(inplace, dtype, v):
    logits, labels = planted_logits(48, v, dtype)
    logits, labels = logits[labels != IGNORE], labels[labels != IGNORE]
    weights = torch.randn(len(labels), dtype=torch.float64)
    exact, exact_grad = gradients(reference.inverted_hinge_loss, logits.double(), labels, weights)
    eager, eager_grad = gradients(lean_eager_ihl, logits, labels, weights)
    ours, grad = gradients(per_row(ihl_loss, inplace=inplace), logits, labels, weights)
    assert ours.dtype == torch.float32
    assert_as_good_as_eager(ours, eager.float(), exact)
    assert_as_good_as_eager(grad, eager_grad, exact_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [2, 1000, 50257])
def test_cross_entropy_is_that_of_torch(dtype, v):
    logits, labels = planted_logits(48, v, dtype)
    kept = (labels != IGNORE) & logits.gather(1, labels.clamp(0)[:, None])[:, 0].isfinite()
    logits, labels = logits[kept], labels[kept]
    weights = torch.randn(len(labels), dtype=torch.float64)
    torchs = per_row(torch.nn.functional.cross_entropy)
    exact, exact_grad = gradients(torchs, logits.double(), labels, weights)
    eager, eager_grad = gradients(torchs, logits, labels, weights)
    ours, grad = gradients(per_row(cross_entropy_loss), logits, labels, weights)
    assert_as_good_as_eager(ours, eager.float(), exact)
    assert_as_good_as_eager(grad, eager_grad, exact_grad)


def test_memorised_tokens_keep_their_digits():
    """At p_t = 1 - 1e-9 the gradient is about 1e-9, and right to float32 precision."""
    logits = torch.randn(8, 5000)
    labels = torch.arange(8)
    logits[torch.arange(8), labels] = logits.logsumexp(1) + 20.7
    for loss_function, exact_function in (
        (ihl_loss, reference.inverted_hinge_loss),
        (cross_entropy_loss, torch.nn.functional.cross_entropy),
    ):
        _, grad = gradients(per_row(loss_function), logits, labels, torch.ones(8))
        exact_per_row = (
            exact_function if exact_function is reference.inverted_hinge_loss else per_row(exact_function)
        )
        _, exact = gradients(exact_per_row, logits.double(), labels, torch.ones(8))
        assert ((grad - exact).norm() / exact.norm()).item() < 1e-5


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 6),
    st.integers(2, 3000),
    st.sampled_from(DTYPES),
    st.sampled_from(["mean", "sum", "none"]),
    st.floats(0.1, 8),
    st.integers(0, 99),
)
def test_inplace_agrees(n, v, dtype, reduction, upstream, seed):
    logits, labels = planted_logits(2 * n, v, dtype, seed)
    shifted = torch.nn.functional.pad(logits.view(2, n, v), (0, 0, 0, 1))[:, :-1]  # no view flattens its rows
    labels = labels.view(2, n)
    results = []
    for inplace in (False, True):
        leaf = shifted.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = ihl_loss(leaf * 1, labels, reduction=reduction, inplace=inplace)
        (loss.sum() * upstream).backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    tolerance = {
        "rtol": max(4 * torch.finfo(dtype).eps, 2e-6),
        "atol": 1e-6 if dtype == torch.float16 else 1e-12,
    }
    torch.testing.assert_close(results[0][1], results[1][1], **tolerance)


def test_reductions_and_ignored_rows():
    logits, labels = planted_logits(24, 50, torch.float32)
    counted = labels != IGNORE
    for loss_function in (ihl_loss, cross_entropy_loss):
        none = loss_function(logits, labels, reduction="none")
        assert none.shape == labels.shape and none[~counted].eq(0).all()
        torch.testing.assert_close(loss_function(logits, labels, reduction="sum"), none.sum())
        torch.testing.assert_close(loss_function(logits, labels), none.sum() / counted.sum())
        with pytest.raises(ValueError, match="'max'"):
            loss_function(logits, labels, reduction="max")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(0, 9), (4, 9)])
def test_no_counted_token_is_zero(inplace, shape):
    labels = torch.full(shape[:1], IGNORE)
    logits = torch.randn(shape, requires_grad=True)
    loss = ihl_loss(logits * 1, labels, inplace=inplace)
    loss.backward()
    assert loss.item() == 0 and logits.grad.eq(0).all()
    assert cross_entropy_loss(logits, labels).item() == 0
    assert ihl_loss(logits, labels, reduction="none").shape == labels.shape


def test_gradcheck():
    logits = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, IGNORE, 3, 2, 2])
    for loss_function in (ihl_loss, cross_entropy_loss):
        for reduction in ("mean", "sum", "none"):
            assert torch.autograd.gradcheck(
                lambda y, f=loss_function, r=reduction: f(y, labels, reduction=r), logits
            )
    exact = reference.inverted_hinge_loss(logits[:2], labels[:2]).mean()
    torch.testing.assert_close(ihl_loss(logits[:2], labels[:2]), exact)
    assert ihl_loss(logits, labels).dtype == torch.float64


@needs_core
@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_is_native_and_overwrites(dtype, monkeypatch):
    monkeypatch.delenv("LOKU_BACKEND", raising=False)
    source, labels = planted_logits(24, 500, dtype)
    source.requires_grad_()
    logits = source * 1
    address = logits.data_ptr()
    with mock.patch.object(native, "_core", wraps=native._core) as core:
        loss = ihl_loss(logits, labels, inplace=True)
        loss.backward()
    assert core.inverted_hinge_loss_.call_count == 1 and core.triplet_forward.call_count == 0
    assert logits.data_ptr() == address
    torch.testing.assert_close(logits.detach(), source.grad)
    torch.library.opcheck(
        torch.ops.loku_kernels.ihl_forward_backward_.default,
        (source.detach().clone(), labels, IGNORE, torch.tensor(1.0, dtype=torch.float64)),
    )


def test_inplace_keeps_the_small_gradients_that_a_loss_scale_protects(backend):
    """The mean's 1/N would round them to 0 in float16, before the factor of the loss restores them."""
    logits, labels = torch.zeros(4000, 4, dtype=torch.float16), torch.zeros(4000, dtype=torch.int64)
    logits[:, 1] = 9.0
    _, expected = gradients(ihl_loss, logits.double(), labels, torch.tensor(2.0**16))
    _, grad = gradients(partial(ihl_loss, inplace=True), logits, labels, torch.tensor(2.0**16))
    torch.testing.assert_close(grad.double(), expected, rtol=2e-2, atol=0.0)


def test_inplace_contract():
    source, labels = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    loss = ihl_loss(source * 1, labels, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    with pytest.raises(ValueError, match="expanded"):
        ihl_loss((source * 1)[:1].expand(4, 9), labels, inplace=True)
    before = source.detach().clone()
    with torch.no_grad():
        ihl_loss(source, labels, inplace=True)
    ihl_loss(source.detach(), labels, inplace=True)
    assert torch.equal(source, before)
    for bad in (-1, 9):  # the check comes before anything is overwritten
        logits = source * 1
        with pytest.raises(IndexError):
            ihl_loss(logits, torch.tensor([0, 1, bad, 2]), inplace=True)
        assert torch.equal(logits, before)
    # Torch notices that an output is gone which the backward of its operation needs.
    loss = ihl_loss(source.tanh(), labels, inplace=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@needs_core
@needs_proc
def test_inplace_allocates_nothing_of_the_size_of_the_logits():
    n, v = 512, 32000  # logits of 64 MiB

    def extra(inplace):
        logits, labels = torch.randn(n, v), torch.randint(0, v, (n,))
        logits.requires_grad_()
        peak = PeakMemory()
        ihl_loss(logits, labels, inplace=inplace).backward()
        return peak.extra()

    extra(True)  # the first call loads code and allocates memory that stays
    assert extra(True) < n * v * 4 / 8
    assert extra(False) > n * v * 4 / 2  # the measurement sees such a tensor


def test_a_wrong_gradient_fails(monkeypatch):
    check = test_memorised_tokens_keep_their_digits
    check()
    right = losses.gradient_of_logits
    for change in (torch.zeros_like, torch.neg):
        monkeypatch.setattr(losses, "gradient_of_logits", lambda *args, change=change: change(right(*args)))
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize("loss_function", [ihl_loss, cross_entropy_loss])
def test_compile(loss_function):
    """One graph serves any number of tokens."""
    torch.compiler.reset()

    def step(logits, labels):
        triplet, runner_up_id = softmax_triplet(logits * 2, labels)
        return loss_function(logits, labels) + triplet[..., 1:].float().mean(), triplet, runner_up_id

    def gradient(step, logits, labels):
        leaf = logits.clone().requires_grad_()
        loss, triplet, runner_up_id = step(leaf, labels)
        loss.backward()
        return loss.detach(), triplet.detach(), runner_up_id, leaf.grad

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, stance in ((12, "default"), (18, "fail_on_recompile"), (30, "fail_on_recompile")):
        logits, labels = planted_logits(n, 33, torch.float32)
        logits, labels = logits.nan_to_num(neginf=-9.0).view(2, -1, 33), labels.view(2, -1)
        with torch.compiler.set_stance(stance):
            ours = gradient(compiled, logits, labels)
        expected = gradient(step, logits, labels)
        assert expected[-1].abs().sum() > 0
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compile_inplace(dtype, reduction):
    """The in-place loss is one graph, in both directions."""
    torch.compiler.reset()
    logits, labels = planted_logits(12, 33, dtype)
    logits = logits.nan_to_num(neginf=-9.0)

    def step(logits):
        return ihl_loss(logits * 2, labels, inplace=True, reduction=reduction)

    results = []
    for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaf = logits.clone().requires_grad_()
        loss = run(leaf)
        (loss * 0.5).backward()
        results.append((loss.detach(), leaf.grad))
    assert results[1][1].abs().sum() > 0
    torch.testing.assert_close(*results)


def test_operators_and_functions_agree():
    """A dispatch mode sends a loss to the registered operators, which give the same numbers."""
    logits, labels = planted_logits(24, 50, torch.float32)
    for loss_function in (ihl_loss, cross_entropy_loss):
        for reduction in ("mean", "sum", "none"):
            results = []
            for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
                leaf = logits.nan_to_num(neginf=-9.0).requires_grad_()
                with mode:
                    loss = loss_function(leaf, labels, reduction=reduction)
                    loss.sum().backward()
                results.append((loss.detach(), leaf.grad))
            torch.testing.assert_close(*results)


@needs_core
def test_calls_of_the_core(monkeypatch):
    """A loss is one call of the core, and its gradient another. In place the labels are counted before."""
    monkeypatch.delenv("LOKU_BACKEND", raising=False)
    logits, labels = planted_logits(12, 33, torch.float32)
    leaf = logits.nan_to_num(neginf=-9.0).requires_grad_()
    hidden, weight = torch.randn(12, 5, requires_grad=True), torch.randn(33, 5)

    def calls(loss):
        with mock.patch.object(native, "_core", wraps=native._core) as core:
            loss().backward()
        return [name for name, *_ in core.mock_calls]

    assert calls(lambda: ihl_loss(leaf, labels)) == ["logits_loss", "logits_loss_backward"]
    assert calls(lambda: 2 * ihl_loss(leaf * 1, labels, inplace=True)) == [
        *("number_counted", "inverted_hinge_loss_", "scale_rows_")
    ]
    labels = labels.clamp(0)
    assert calls(lambda: linear_ihl_loss(hidden, weight, labels)) == [
        *("number_counted", "logits_loss", "hidden_loss_backward")
    ]
    assert "triplet_forward" in calls(lambda: softmax_triplet(leaf, labels)[0].sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_backend_has_the_same_loss(backend, dtype, reduction):
    """The core's single call and the operations one by one give one loss, in place and not."""
    logits, labels = planted_logits(24, 50, dtype)
    exact = logits.double().requires_grad_()
    counted = labels != IGNORE
    per_token = torch.zeros(24, dtype=torch.float64)
    per_token[counted] = reference.inverted_hinge_loss(exact[counted], labels[counted])
    total = per_token.sum() / (counted.sum() if reduction == "mean" else 1)
    total.backward()
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        loss = ihl_loss(leaf * 1, labels, reduction=reduction, inplace=inplace)
        loss.sum().backward()
        torch.testing.assert_close(
            loss.sum().double(),
            per_token.sum() / (counted.sum() if reduction == "mean" else 1),
            rtol=1e-5,
            atol=1e-6,
        )
        error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 4 * torch.finfo(dtype).eps + 1e-6
