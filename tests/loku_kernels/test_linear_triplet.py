"""``linear_softmax_triplet`` and the linear losses against whole logits in float64."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import check_linear, eager_logits
from kernel_inputs import DTYPES, IGNORE, planted_operands
from peak_memory import PeakMemory, needs_proc
from torch.utils.flop_counter import FlopCounterMode

from loku_kernels import (
    linear_cross_entropy_loss,
    linear_ihl_loss,
    linear_kl_divergence_loss,
    linear_softmax_triplet,
    linear_triplet,
    logits_blocks,
)
from loku_kernels.backends import native, reference

needs_core = pytest.mark.skipif(native._core is None, reason="no compiled core")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 6.0}, {"logit_scale": 0.25}, {"softcap": 5.0, "logit_scale": 1.5}], ids=str
)
def test_planted(backend, dtype, options):
    *operands, labels = planted_operands(24, 16, 301, dtype)
    check_linear(operands, labels, **options)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(8, 40),  # the entries of a shorter row of hidden states may all cancel
    st.integers(3, 700),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
    st.integers(1, 4000),
    st.integers(0, 99),
)
def test_any_shape_and_block(n, d, v, dtype, bias, block_bytes, seed):
    *operands, labels = planted_operands(n, d, v, dtype, seed, bias)
    with mock.patch.object(logits_blocks, "BLOCK_BYTES", block_bytes):
        check_linear(operands, labels)


def test_block_size_changes_nothing_beyond_rounding(backend):
    hidden, weight, bias, labels = planted_operands(50, 32, 900, torch.float32)
    hidden.requires_grad_()
    results = []
    for block_bytes in (1, 9 * 900 * 4, 64 << 20):
        with mock.patch.object(logits_blocks, "BLOCK_BYTES", block_bytes):
            loss = linear_ihl_loss(hidden, weight, labels, bias)
            results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("loss", [linear_ihl_loss, linear_cross_entropy_loss])
def test_losses(backend, loss):
    hidden, weight, bias, labels = planted_operands(24, 16, 301, torch.float32)
    counted = labels != IGNORE

    def exact_loss(hidden):
        logits = eager_logits(hidden, weight.double(), bias.double(), None, 1.0)[counted]
        if loss is linear_ihl_loss:
            return reference.inverted_hinge_loss(logits, labels[counted])
        return torch.nn.functional.cross_entropy(logits, labels[counted], reduction="none")

    leaf, exact_leaf = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    ours, exact = loss(leaf, weight, labels, bias), exact_loss(exact_leaf).mean()
    ours.backward()
    exact.backward()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-9)
    error = (leaf.grad - exact_leaf.grad).norm() / exact_leaf.grad.norm()
    assert error < 2e-6
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    value = loss(leaves[0], leaves[1], labels, leaves[2])
    once, thrice = (torch.autograd.grad(value * k, leaves, retain_graph=True) for k in (1, -3))
    torch.testing.assert_close(thrice, tuple(-3 * x for x in once))
    # A zeroed and a negated gradient would not pass.
    for wrong in (torch.zeros_like(leaf.grad), -leaf.grad):
        assert (wrong - exact_leaf.grad).norm() / exact_leaf.grad.norm() > 0.5

    none = loss(hidden, weight, labels, bias, reduction="none")
    torch.testing.assert_close(none.sum(), loss(hidden, weight, labels, bias, reduction="sum"))
    assert none[~counted].eq(0).all() and none.dtype == torch.float32
    batched = loss(hidden.view(4, 6, -1), weight, labels.view(4, 6), bias, reduction="none")
    torch.testing.assert_close(batched.flatten(), none)


def test_more_accurate_than_eager_where_unlearning_starts():
    """At p_t = 0.98, p - onehot subtracts nearly equal numbers, and the triplet does not."""
    hidden, weight, _, labels = planted_operands(64, 96, 5000, torch.float32, bias=False)
    hidden, labels = hidden[::2], labels[::2].clamp(0)
    errors = []
    exact_leaf = hidden.double().requires_grad_()
    reference.inverted_hinge_loss(exact_leaf @ weight.double().t(), labels).sum().backward()
    for loss in (
        lambda h: reference.inverted_hinge_loss(h @ weight.t(), labels).sum(),
        lambda h: linear_ihl_loss(h, weight, labels, reduction="sum"),
    ):
        leaf = hidden.clone().requires_grad_()
        loss(leaf).backward()
        errors.append(((leaf.grad - exact_leaf.grad).norm() / exact_leaf.grad.norm()).item())
    assert errors[1] < 1e-5 and errors[1] < errors[0] / 3


@pytest.mark.parametrize("masked", [False, True])
def test_two_words_have_no_rest(masked):
    hidden, weight, _, labels = planted_operands(6, 4, 2, torch.float32, bias=False, memorised=False)
    bias = None
    if masked:  # seven words, of which five are masked
        weight, bias = torch.cat([weight, torch.randn(5, 4)]), torch.tensor([0.0, 0.0] + [-torch.inf] * 5)
    leaf = hidden.clone().requires_grad_()
    linear_ihl_loss(leaf, weight, labels, bias).backward()
    counted = labels != IGNORE
    exact_leaf = hidden.double().requires_grad_()
    logits = exact_leaf[counted] @ weight[:2].double().t()
    reference.inverted_hinge_loss(logits, labels[counted]).mean().backward()
    torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, rtol=1e-5, atol=1e-7)


def test_a_frozen_weight_costs_no_product():
    hidden, weight, bias, labels = planted_operands(24, 16, 301, torch.float32)
    hidden.requires_grad_()
    with mock.patch.object(linear_triplet, "_gradient_of_weight", side_effect=AssertionError):
        linear_ihl_loss(hidden, weight, labels, bias).backward()
    with torch.no_grad():
        *_, direction = torch.ops.loku_kernels.linear_softmax_triplet(
            hidden, weight, bias, labels, IGNORE, 0.0, 1.0, False
        )
    assert direction.shape == (0, 16)  # without a gradient there is no second product


def test_empty_and_all_ignored():
    weight = torch.randn(9, 4, requires_grad=True)
    for n in (0, 3):
        hidden = torch.randn(n, 4, requires_grad=True)
        loss = linear_ihl_loss(hidden, weight, torch.full((n,), IGNORE))
        loss.backward()
        assert loss.item() == 0 and hidden.grad.eq(0).all() and weight.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_linear(dtype):
    hidden, weight, bias, labels = planted_operands(24, 16, 301, torch.float32)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype):
        triplet, _ = linear_softmax_triplet(hidden, weight, labels, bias)
        mixed, _ = linear_softmax_triplet(hidden.to(dtype), weight, labels, bias)
    low = [x.to(dtype) for x in (hidden, weight, bias)]
    expected, _ = linear_softmax_triplet(low[0], low[1], labels, low[2])
    assert torch.equal(triplet, expected) and torch.equal(mixed, expected)
    triplet.sum().backward()
    assert hidden.grad.dtype == torch.float32 and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_float64_alone(dtype):
    """``linear`` gives float64 logits of float64 operands, and multiplies no float64 with another."""
    *operands, labels = planted_operands(24, 16, 301, torch.float64)
    leaves = [x.requires_grad_() for x in operands]
    functions = {
        "ihl": lambda h, w, b: linear_ihl_loss(h, w, labels, b),
        "triplet": lambda h, w, b: linear_softmax_triplet(h, w, labels, b)[0].sum(),
        "kl": lambda h, w, b: linear_kl_divergence_loss(h, w, h.detach().flip(0), labels, b),
        "jvp": lambda h, w, b: torch.func.jvp(lambda h: linear_ihl_loss(h, w, labels, b), (h,), (h,))[1],
    }
    for name, function in functions.items():
        expected = function(*leaves)
        expected_gradients = torch.autograd.grad(expected, leaves)
        for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):  # functions and operators
            with torch.autocast("cpu", dtype), mode:
                assert torch.nn.functional.linear(*leaves).dtype == torch.float64
                result = function(*leaves)
            found = result.detach(), torch.autograd.grad(result, leaves)
            right = expected.detach(), expected_gradients
            torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13, msg=name)
    hidden, weight, bias = (x.detach() for x in operands)
    with torch.autocast("cpu", dtype):
        for mixed in (
            (hidden.float(), weight, bias),
            (hidden, weight.float(), bias),
            (hidden.long(), weight),
        ):
            with pytest.raises(RuntimeError, match="dtype"):
                torch.nn.functional.linear(*mixed)
            with pytest.raises(ValueError, match=r"must have the dtype of hidden, .*convert one of them"):
                linear_ihl_loss(*mixed[:2], labels, *mixed[2:])


def test_gradcheck_and_opcheck():
    hidden, weight, bias, labels = planted_operands(6, 4, 7, torch.float64, memorised=False)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for options in ({}, {"softcap": 3.0, "logit_scale": 0.7}):
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: linear_softmax_triplet(h, w, labels, b, **o)[0], leaves
        )
    op = torch.ops.loku_kernels.linear_softmax_triplet.default
    for dtype in DTYPES:
        h, w, b, t = planted_operands(12, 8, 33, dtype)
        torch.library.opcheck(op, (h.requires_grad_(), w, b, t, IGNORE, 0.0, 1.0, True))
        torch.library.opcheck(op, (h, w.requires_grad_(), None, t, IGNORE, 5.0, 0.5, True))
        torch.library.opcheck(op, (h.detach(), w.detach(), None, t, IGNORE, 0.0, 1.0, False))
        direction = op(h.detach(), w.detach(), b, t, IGNORE, 5.0, 0.5, True)
        grad = torch.randn_like(direction[0])
        for backward, operands in (
            (torch.ops.loku_kernels.linear_softmax_triplet_backward, (w, t, *direction)),
            (
                torch.ops.loku_kernels.linear_softmax_triplet_backward_weight,
                (h, w, b, t, IGNORE, *direction[:2]),
            ),
        ):
            operands = [x.detach() if isinstance(x, torch.Tensor) else x for x in operands]
            torch.library.opcheck(backward.default, (grad, *operands, 5.0, 0.5))


@pytest.mark.parametrize("trained", [False, True])
def test_compile(trained):
    """One graph serves any number of tokens."""
    torch.compiler.reset()

    def step(hidden, weight, bias, labels):
        triplet, runner_up_id = linear_softmax_triplet(hidden * 2, weight, labels, bias, softcap=5.0)
        loss = linear_ihl_loss(hidden, weight, labels, bias, reduction="sum")
        return loss + triplet[:, 1:].sum(), triplet, runner_up_id

    def gradients(step, operands, labels):
        leaves = [x.clone().requires_grad_(trained or i == 0) for i, x in enumerate(operands)]
        loss, triplet, runner_up_id = step(*leaves, labels)
        loss.backward()
        return loss.detach(), triplet.detach(), runner_up_id, *(x.grad for x in leaves if x.requires_grad)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, stance in ((24, "default"), (31, "fail_on_recompile"), (9, "fail_on_recompile")):
        *operands, labels = planted_operands(n, 16, 301, torch.float32)
        with torch.compiler.set_stance(stance):
            ours = gradients(compiled, operands, labels)
        expected = gradients(step, operands, labels)
        assert len(ours) == (6 if trained else 4) and expected[3].abs().sum() > 0
        torch.testing.assert_close(ours, expected)


def test_errors(backend):
    hidden, weight, bias, labels = planted_operands(6, 4, 9, torch.float32)
    with pytest.raises(ValueError, match=r"\(\.\.\., 4\).*got \(6, 3\)"):
        linear_softmax_triplet(hidden[:, :3], weight, labels)
    with pytest.raises(ValueError, match="V >= 2"):
        linear_softmax_triplet(hidden, weight[:1], labels)
    with pytest.raises(ValueError, match=r"\(6,\), got \(5,\)"):
        linear_softmax_triplet(hidden, weight, labels[:5])
    with pytest.raises(ValueError, match=r"hidden, torch\.float32, got torch\.float64"):
        linear_softmax_triplet(hidden, weight.double(), labels)
    with pytest.raises(ValueError, match=r"\(9,\), got \(8,\)"):
        linear_softmax_triplet(hidden, weight, labels, bias[:8])
    with pytest.raises(ValueError, match="softcap must be positive"):
        linear_softmax_triplet(hidden, weight, labels, softcap=0)
    with pytest.raises(ValueError, match="device"):
        linear_softmax_triplet(hidden, weight.to("meta"), labels)
    labels[4] = 9
    with pytest.raises(IndexError, match="label 9 at position 4"):
        linear_softmax_triplet(hidden, weight, labels)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_error_of_a_later_block_names_the_position_among_all_labels(needs_grad):
    hidden, labels = torch.zeros(2500, 4, requires_grad=needs_grad), torch.zeros(2500, dtype=torch.int64)
    labels[2100] = 9
    with pytest.raises(IndexError, match="label 9 at position 2100"):
        linear_softmax_triplet(hidden, torch.zeros(9, 4), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ignore_index_above_the_vocabulary(dtype):
    hidden, weight, bias, labels = planted_operands(12, 4, 9, dtype)
    hidden, columns = hidden.requires_grad_(), weight.t().contiguous().t()
    expected, ours = (
        torch.autograd.grad(
            linear_ihl_loss(hidden, w, labels.where(labels != IGNORE, index), bias, ignore_index=index),
            hidden,
        )
        for w, index in ((weight, IGNORE), (columns, 40))
    )
    torch.testing.assert_close(ours, expected)


@needs_core  # plain torch makes float64 copies of a block
@needs_proc
def test_memory_is_a_block():
    n, d, v = 512, 64, 100_000  # the logits are 195 MiB, and a block at most 16 MiB
    hidden, weight, _, labels = planted_operands(n, d, v, torch.float32, bias=False)
    hidden.requires_grad_()

    linear_ihl_loss(hidden[:4], weight, labels[:4]).backward()
    peak = PeakMemory()
    linear_ihl_loss(hidden, weight, labels).backward()
    assert peak.extra() < 32 << 20
