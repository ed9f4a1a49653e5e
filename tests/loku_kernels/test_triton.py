"""Triton kernels against the float64 reference, in Triton's interpreter and on a GPU if there is one.

``test_in_the_interpreter`` runs this file in the interpreter. In this process the same tests need a GPU.
"""

import itertools
import json
import os
import subprocess
import sys
from unittest import mock

import derivatives
import pytest
import torch
from fresh_process import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_as_good_as_eager, lean_eager_ihl, ulp
from kernel_inputs import IGNORE, planted_logits
from triton_ahead import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    INTERPRETED,
    TABLE_SCRIPT,
    gpu_alone,
    on,
    on_device,
    outside,
    run_in_the_interpreter,
    sources,
    triton_table,
)

from loku_kernels import (
    cross_entropy_loss,
    ihl_loss,
    linear_ihl_loss,
    linear_kl_divergence_loss,
    softmax_triplet,
)
from loku_kernels.backends import choose, reference

pytest.importorskip("triton", reason="no triton")

LONGEST = 1500 if INTERPRETED else 140_000


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("LOKU_BACKEND", "triton")


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Let the interpreter use blocks of about 128 entries, so that small shapes have several."""
    if not INTERPRETED:
        yield
        return
    from loku_kernels.backends.triton import triplet

    small = {"LOSS_ROWS": 64, "LABELS": 64, "HIDDEN_COLUMNS": 32}
    with mock.patch.multiple(triplet, WARPS=1, FUSED_WARPS=1, VECTORS=1, **small):
        yield


def launched(parts=None, vectors=None):
    """Patch the number of programs a row and of vectors a thread, if they are given."""
    from loku_kernels.backends.triton import triplet

    changes = {}
    if parts:
        changes["_parts"] = lambda rows, logits: parts
    if vectors:
        changes["VECTORS"] = vectors
    return mock.patch.multiple(triplet, **changes) if changes else mock.patch.multiple(triplet, WARPS=8)


def assert_close_to(exact, ours, dtype):
    """Assert that ours (N, V) is exact (N, V) rounded, up to a few ulps of the row's largest entry."""
    scale = exact.abs().amax(-1, keepdim=True)
    error = (ours.cpu().double() - exact).abs()
    assert error.le(4 * max(ulp(dtype), 5e-7) * scale + torch.finfo(dtype).smallest_normal).all()


def check_triplet(logits, labels, seed=0, softcap=0.0):
    """Check forward, backward and the probabilities of the rest on logits (..., V), or their tanh."""
    from loku_kernels.backends import triton as kernels

    vocab, dtype = logits.shape[-1], logits.dtype
    flat, flat_labels = logits.cpu().reshape(-1, vocab), labels.cpu().reshape(-1)
    exact, exact_id = reference.softmax_triplet(flat, flat_labels, IGNORE, softcap)
    triplet, runner_up_id = kernels.triplet_forward(logits, labels, IGNORE, softcap=softcap)
    assert triplet.dtype == torch.float64 and runner_up_id.dtype == torch.int64
    assert torch.equal(runner_up_id.cpu().reshape(-1), exact_id)
    ours = triplet.cpu().reshape(-1, 3)
    assert torch.equal(ours[:, :2], exact[:, :2])
    finite = exact[:, 2].isfinite()
    assert torch.equal(ours[:, 2].isfinite(), finite)
    assert (ours[:, 2] - exact[:, 2])[finite].abs().le(2e-6).all()

    def expected_of(grad_triplet):
        saved = (flat, flat_labels, IGNORE, exact, exact_id, 0, softcap)
        return reference.softmax_triplet_backward(grad_triplet, *saved)

    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(triplet.shape, generator=generator, dtype=torch.float64)
    factor = torch.rand(labels.shape, generator=generator) + 0.5
    factor = [None, factor, factor.mean().half(), factor.flatten()[0].double().expand(labels.shape)][seed % 4]
    scaled = upstream if factor is None else upstream * factor.double()[..., None]
    arguments = (upstream.to(logits.device), logits, labels, IGNORE, triplet, runner_up_id)
    options = {"factor": None if factor is None else factor.to(logits.device), "softcap": softcap}
    grad = kernels.triplet_backward(*arguments, **options)
    expected = expected_of(scaled.reshape(-1, 3))
    assert grad.is_contiguous() and grad.dtype == dtype
    assert_close_to(expected, grad.reshape(-1, vocab), dtype)
    for wrong in (torch.zeros_like(grad), -grad):
        if expected.abs().amax() > 1e-3:
            with pytest.raises(AssertionError):
                assert_close_to(expected, wrong.reshape(-1, vocab), dtype)
    if vocab > 2:
        cut = vocab // 2
        blocks = [
            kernels.triplet_backward(
                arguments[0], logits[..., part], *arguments[2:], first_column=part.start, **options
            )
            for part in (slice(0, cut), slice(cut, vocab))
        ]
        assert_close_to(expected, torch.cat(blocks, -1).reshape(-1, vocab), dtype)
    if not any(stride == 0 for stride in logits.stride()):
        clone = as_laid_out(logits)
        kernels.triplet_backward(arguments[0], clone, *arguments[2:], out=clone, **options)
        assert torch.equal(clone, grad)

        clone = as_laid_out(logits)
        again, again_id = kernels.rest_probabilities_(clone, labels, IGNORE, softcap=softcap)
        assert torch.equal(again_id, runner_up_id) and torch.equal(again[..., :2], triplet[..., :2])
        torch.testing.assert_close(again[..., 2], triplet[..., 2], rtol=1e-12, atol=2e-6)
        unit = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(exact.shape)
        assert_close_to(expected_of(unit), clone.reshape(-1, vocab), dtype)


def as_laid_out(tensor):
    """Copy a tensor with its strides; the gaps of the memory hold a sentinel."""
    size = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = torch.full((size,), 77.0, dtype=tensor.dtype, device=tensor.device)
    copy = memory.as_strided(tensor.shape, tensor.stride())
    copy.copy_(tensor)
    return copy


def laid_out(logits, labels, layout):
    vocab = logits.shape[-1]
    match layout:
        case "padded":
            logits = torch.nn.functional.pad(logits, (3, 5))[:, 3:-5]
        case "sliced":  # the usual shift by one token, which no view flattens
            logits = torch.nn.functional.pad(logits.view(2, -1, vocab), (0, 0, 0, 1))[:, :-1]
            labels = labels.view(2, -1)
        case "three strides":
            logits = torch.nn.functional.pad(logits.view(2, 2, -1, vocab), (0, 0, 0, 1, 0, 1))[:, :-1, :-1]
            labels = labels.view(2, 2, -1)
        case "one row":
            logits, labels = logits[0], labels[0]
        case "expanded":
            logits, labels = logits[:1].expand(4, vocab), labels[:1].expand(4)
    return logits, labels


# --- the same tests in the interpreter and on a GPU -----------------------------------------------


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [2, 3, 17, 300] if INTERPRETED else [2, 3, 17, 2049, 32000, 50257, 128256])
@pytest.mark.parametrize("parts", [1, 4])
def test_planted(dtype, v, parts):
    logits, labels = on(DEVICE, *planted_logits(12 if INTERPRETED else 48, v, dtype))
    with launched(parts):
        check_triplet(logits, labels, seed=parts)  # with a factor a row for one part


@on_device
@settings(deadline=None, max_examples=EXAMPLES)
@given(
    st.integers(1, 2),
    st.integers(2, LONGEST),
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
    st.sampled_from(["plain", "padded", "sliced", "three strides", "one row", "expanded"]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([0.0, 6.0]),
)
def test_any_shape_and_stride(n, v, dtype, seed, layout, parts, vectors, softcap):
    logits, labels = planted_logits(4 * n, v, dtype, seed)
    if softcap:
        logits = torch.tanh(logits.double() / softcap).to(dtype)
    with launched(parts, vectors):
        check_triplet(*laid_out(*on(DEVICE, logits, labels), layout), seed, softcap)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2])
def test_in_place_leaves_the_neighbours_alone(dtype, parts):
    from loku_kernels.backends import triton as kernels

    logits, labels = on(DEVICE, *planted_logits(6, 261, dtype))
    memory = torch.full((8, 271), 77.0, dtype=dtype, device=DEVICE)
    inside = memory[1:7, 5:266]
    with launched(parts):
        inside.copy_(logits)
        kernels.inverted_hinge_(inside, labels, IGNORE, torch.ones((), dtype=torch.float64, device=DEVICE))
        kernels.scale_rows_(inside, torch.full((6,), 0.5, device=DEVICE))
        kernels.rest_probabilities_(inside, labels, IGNORE)
    outside = memory.clone()
    outside[1:7, 5:266] = 77.0
    assert outside.eq(77.0).all()


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("inplace", [False, True])
def test_ihl_is_the_formula_of_the_paper(dtype, parts, inplace):
    logits, labels = planted_logits(24, 300, dtype)
    logits, labels = logits[labels != IGNORE], labels[labels != IGNORE]
    weights = torch.randn(len(labels), dtype=torch.float64)

    def gradients(loss_function, logits, labels):
        leaf = logits.clone().requires_grad_()
        loss = loss_function(leaf, labels)
        (loss * weights.to(loss.device, loss.dtype)).sum().backward()
        return loss.detach().cpu(), leaf.grad.cpu()

    def ours(logits, labels):
        return ihl_loss(logits, labels, reduction="none", inplace=inplace)

    exact = gradients(reference.inverted_hinge_loss, logits.double(), labels)
    eager = gradients(lean_eager_ihl, logits, labels)
    with launched(parts):
        loss, grad = gradients(ours, *on(DEVICE, logits, labels))
    assert_as_good_as_eager(loss, eager[0].float(), exact[0])
    assert_as_good_as_eager(grad, eager[1], exact[1])
    for wrong in (torch.zeros_like(grad), -grad):
        with pytest.raises(AssertionError):
            assert_as_good_as_eager(wrong, eager[1], exact[1])


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_inplace_agrees(dtype, reduction, upstream):
    logits, labels = on(DEVICE, *planted_logits(6, 150, dtype))
    results = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        loss = ihl_loss(leaf * 1, labels, reduction=reduction, inplace=inplace)
        (loss * upstream).backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    tolerance = {"rtol": max(4 * ulp(dtype), 2e-6), "atol": 1e-6 if dtype == torch.float16 else 1e-12}
    torch.testing.assert_close(results[0][1], results[1][1], **tolerance)


@on_device
def test_no_counted_token_is_zero():
    for rows in (0, 3):
        logits = torch.randn(rows, 9, device=DEVICE, requires_grad=True)
        loss = ihl_loss(logits * 1, torch.full((rows,), IGNORE, device=DEVICE), inplace=True)
        loss.backward()
        assert loss.item() == 0 and logits.grad.eq(0).all()


@on_device
def test_an_ignored_index_inside_the_vocabulary():
    logits, labels = on(DEVICE, torch.randn(4, 9), torch.tensor([3, 0, 8, 3]))
    logits.requires_grad_()
    triplet, runner_up_id = softmax_triplet(logits, labels, ignore_index=3)
    triplet.sum().backward()
    assert triplet[0].eq(0).all() and runner_up_id[0] == -1
    assert logits.grad[[0, 3]].eq(0).all() and logits.grad[[1, 2]].ne(0).all()


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 1, 200])
@pytest.mark.parametrize("parts", [1, 2])
def test_nan_and_inf_never_give_a_plausible_number(dtype, fill, position, parts):
    with launched(parts):
        for v in (2, 300):
            logits = torch.randn(1, v).to(dtype)
            logits[0, position % v] = fill
            p = softmax_triplet(*on(DEVICE, logits, torch.tensor([0])))[0].softmax(-1)
            assert p.isnan().any(-1).all()
        masked = torch.full((1, 300), -torch.inf, dtype=dtype)
        masked[0, position + 1] = torch.nan
        masked[0, 0] = 1.0
        assert softmax_triplet(*on(DEVICE, masked, torch.tensor([0])))[0].softmax(-1).isnan().any()


def planted_triplets():
    """Triplets (N, 3) of planted logits and of extreme differences, and labels (N,)."""
    logits, labels = planted_logits(96, 50, torch.float32)
    triplet, _ = reference.softmax_triplet(logits, labels)
    extreme = [-torch.inf, -3e38, -1e10, -40.0, 0.0, 1e-3, 40.0, 1e10, 3e38]
    rows = [row for row in itertools.product(extreme, repeat=3) if max(row) > -torch.inf]
    triplet = torch.cat([triplet, torch.tensor(rows, dtype=torch.float64)])
    return triplet, torch.cat([labels, torch.zeros(len(rows), dtype=torch.int64)])


@on_device
@pytest.mark.parametrize("loss", ["inverted_hinge", "cross_entropy"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_losses(loss, reduction, dtype):
    from loku_kernels.backends import triton as kernels

    triplet, labels = planted_triplets()
    if reduction != "none":  # a sum needs comparable numbers
        few = triplet.abs().amax(-1) < 1e4
        triplet, labels = triplet[few], labels[few]
    losses, grad = reference.token_losses(loss, triplet, labels, IGNORE, reduction, torch.float64, True)
    if (loss, reduction) == ("cross_entropy", "none"):  # -log_softmax loses the digits of p_target near 1
        ordered = triplet.sort(-1, descending=True).values
        others = (ordered[:, 1:] - ordered[:, :1]).exp().sum(-1)
        losses = (ordered[:, 0] - triplet[:, 0] + others.log1p()).where(labels != IGNORE, 0.0)
    arguments = (loss, *on(DEVICE, triplet, labels), IGNORE, reduction, dtype)
    ours, ours_grad = kernels.token_losses(*arguments, True)
    assert ours.dtype == dtype and ours_grad.dtype == torch.float64
    tolerance = {"rtol": 8 * ulp(dtype), "atol": torch.finfo(dtype).smallest_normal}
    torch.testing.assert_close(ours.cpu().double(), losses.to(dtype).double(), **tolerance)
    scale = grad.abs().amax(-1, keepdim=True)
    assert ((ours_grad.cpu() - grad).abs() <= 8 * ulp(dtype) * scale + tolerance["atol"]).all()
    again, none = kernels.token_losses(*arguments, False)
    assert torch.equal(again, ours) and none is None


@on_device
@pytest.mark.parametrize("loss", ["inverted_hinge", "cross_entropy"])
def test_losses_of_nan_and_of_nothing(loss):
    from loku_kernels.backends import triton as kernels

    for place, fill in itertools.product(range(3), (torch.nan, torch.inf)):
        triplet = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
        triplet[0, place] = fill
        arguments = (*on(DEVICE, triplet, torch.tensor([0])), IGNORE, "none", torch.float32, True)
        losses, grad = kernels.token_losses(loss, *arguments)
        assert losses.isnan().all() and grad.isnan().all()
    nothing = torch.full((1, 3), -torch.inf, dtype=torch.float64)
    for labels, triplet in ((torch.tensor([IGNORE]), nothing), (torch.tensor([], dtype=int), nothing[:0])):
        arguments = (*on(DEVICE, triplet, labels), IGNORE, "mean", torch.float32, True)
        losses, grad = kernels.token_losses(loss, *arguments)
        assert losses.item() == 0 and grad.eq(0).all()
        assert kernels.mean_scale(labels.to(DEVICE), IGNORE).item() == 1
    arguments = (*on(DEVICE, nothing, torch.tensor([0])), IGNORE, "none", torch.float32, True)
    assert kernels.token_losses(loss, *arguments)[0].isnan().all()


@on_device
@pytest.mark.parametrize("rows", [1, 200, 20_001])
def test_mean_scale(rows):
    from loku_kernels.backends import triton as kernels

    labels = torch.randint(-1, 2, (3, rows), generator=torch.Generator().manual_seed(rows))[:, : rows - 1]
    for x in (labels, labels[:, ::2]):
        scale = kernels.mean_scale(x.to(DEVICE), -1)
        assert scale.dtype == torch.float64 and scale.item() == 1 / max((x != -1).sum().item(), 1)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 6.0])
@pytest.mark.parametrize("columns", [5, 96])
def test_hidden_gradient(dtype, softcap, columns):
    from loku_kernels.backends import triton as kernels

    generator = torch.Generator().manual_seed(columns)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, vocab = 11, 40
    weight, direction = normal(vocab, columns + 3).to(dtype)[:, :columns], normal(rows, columns).to(dtype)
    labels, runner_up_id = (torch.randint(0, vocab, (rows,), generator=generator) for _ in range(2))
    grad, triplet = normal(rows, 3), normal(rows, 3)
    if softcap:
        triplet[:4, :2] = softcap * (1 - 1e-5 * torch.rand(4, 2, generator=generator, dtype=torch.float64))
    triplet[2, 2], grad[2, 2] = -torch.inf, torch.nan  # without a rest, its gradient does not count
    runner_up_id[3], labels[3], direction[3] = -1, IGNORE, torch.nan
    for factor in (None, torch.tensor(3.0), torch.rand(rows, generator=generator).half()):
        arguments = (grad, factor, weight, labels, triplet, runner_up_id, direction)
        options = {"softcap": softcap, "logit_scale": 0.5}
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
        expected = reference.hidden_gradient(*wide, **options)
        moved = [None if x is None else x.to(DEVICE) for x in arguments]
        ours = kernels.hidden_gradient(*moved, **options)
        assert ours.dtype == dtype
        wide[0], wide[2], wide[6] = (x.abs() for x in (wide[0], wide[2], wide[6]))
        bound = reference.hidden_gradient(*wide, **options) + torch.finfo(dtype).smallest_normal
        assert ((ours.cpu().double() - expected).abs() <= 2 * max(ulp(dtype), 5e-7) * bound).all()


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 6.0])
@pytest.mark.parametrize("v", [2, 3, 17, 300, 1301])
@pytest.mark.parametrize("store", [False, True])
def test_divergence(dtype, softcap, v, store):
    """KL of rows that begin anywhere, with words that one model or both mask."""
    rows = [torch.randn(9, v) * 4 for _ in range(2)]
    rows[0][0, 0], rows[1][1, 0] = 60.0, 60.0  # memorised by one model
    if softcap:
        rows = [(x / softcap).tanh() for x in rows]
    elif v > 3:
        for x in rows:
            x[2, 1] = -torch.inf
        rows[1][3, 1] = -torch.inf
    rows = [torch.nn.functional.pad(x, (3, 2)).to(dtype).to(DEVICE)[:, 3:-2] for x in rows]
    exact_rows = [x.cpu().double() for x in rows]
    exact, exact_normalizers = reference.divergence_(*exact_rows, softcap=softcap, store=store)
    kept = rows[0].clone()
    divergence, normalizers = choose("divergence_", *rows).divergence_(*rows, softcap=softcap, store=store)
    assert divergence.dtype == normalizers.dtype == torch.float32
    torch.testing.assert_close(divergence.cpu().double(), exact, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(normalizers.cpu().double(), exact_normalizers, rtol=1e-5, atol=2e-6)
    if store:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(rows[0].cpu().double(), exact_rows[0], rtol=eps, atol=max(eps * eps, 2e-6))
        assert rows[0].count_nonzero() > 0
    else:
        assert torch.equal(rows[0], kept)


@on_device
def test_a_divergence_of_nan_is_nan():
    rows = [torch.randn(4, 40, device=DEVICE) for _ in range(2)]
    rows[0][0, 3], rows[1][1, 3], rows[0][2, 3] = torch.nan, torch.nan, torch.inf
    divergence, _ = choose("divergence_", *rows).divergence_(*rows, softcap=0.0, store=True)
    assert divergence[:3].isnan().all() and divergence[3].isfinite()
    assert rows[0][:3].isnan().any(1).all() and rows[0][3].isfinite().all()


@on_device
@pytest.mark.parametrize("lowering", [0.0, 10.0])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_linear_divergence(softcap, lowering):
    """The loss from hidden states by Triton is that of plain torch, with its gradient."""
    leaf = torch.randn(12, 8, device=DEVICE, requires_grad=True)
    operands = [torch.randn(300, 8, device=DEVICE), torch.randn(12, 8, device=DEVICE)]
    labels = (operands[1] @ operands[0].t()).argmax(-1)
    loss = linear_kl_divergence_loss(leaf, *operands, labels, softcap=softcap, lowering=lowering)
    (grad,) = torch.autograd.grad(loss, leaf)
    ours, theirs = ((x @ operands[0].t()).double() for x in (leaf, operands[1]))
    if softcap:
        ours, theirs = (softcap * torch.tanh(y / softcap) for y in (ours, theirs))
    theirs = theirs - lowering * torch.nn.functional.one_hot(labels, 300)
    log_p, log_q = (y.log_softmax(-1) for y in (ours, theirs))
    exact = torch.nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    (expected,) = torch.autograd.grad(exact, leaf)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def launches_of(step):
    """List the kernels that a step launches. In the interpreter they are ours and those of torch."""
    step()
    if not INTERPRETED:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        return [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    from triton.runtime.interpreter import InterpretedFunction

    ours, run = [], InterpretedFunction.run

    def note(self, *args, **options):
        ours.append(self.fn.__name__)
        return run(self, *args, **options)

    with mock.patch.object(InterpretedFunction, "run", note):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
    of_torch = {
        f"aten::{name}" for name in ("mm", "addmm", "tanh_", "cat", "mul", "add", "ones", "where", "sum")
    }
    return ours + [event.name for event in profile.events() if event.name in of_torch]


@on_device
def test_launches_of_losses(monkeypatch):
    """A loss and its gradient launch at most 4 kernels, and the linear form at most 4 and 4 a block."""
    from loku_kernels import logits_blocks

    logits = torch.randn(12, 40, device=DEVICE, requires_grad=True)
    labels = torch.arange(12, device=DEVICE)
    assert len(launches_of(lambda: ihl_loss(logits, labels).backward())) <= 4
    assert len(launches_of(lambda: cross_entropy_loss(logits, labels).backward())) <= 4
    work = torch.randn(12, 40, device=DEVICE).requires_grad_()
    assert len(launches_of(lambda: ihl_loss(work, labels, inplace=True).backward())) <= 4
    hidden = torch.randn(12, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(40, 8, device=DEVICE)

    def linear():
        hidden.grad = None
        linear_ihl_loss(hidden, weight, labels, softcap=6.0).backward()

    assert len(launches_of(linear)) <= 4 + 4
    for rows in ("BLOCK_ROWS", "CUDA_BLOCK_ROWS"):
        monkeypatch.setattr(logits_blocks, rows, 4)  # three blocks
    found = launches_of(linear)
    assert 3 * 3 < len(found) <= 4 + 3 * 4


@pytest.mark.skipif(not INTERPRETED, reason="the operands of tests/helpers/derivatives.py are on the CPU")
@pytest.mark.parametrize("way", ["grad", "penalty", "functional.hvp", "func.jvp", "dual over reverse"])
def test_derivatives(way):
    for name in ("ihl_loss", "linear_cross_entropy_loss capped", "linear_kl_divergence_loss"):
        derivatives.check(way, name, torch.float32)


@on_device
def test_linear_loss():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(100, 8, generator=generator)
    labels = torch.tensor([3, IGNORE, 99, 0, 50, 7])
    results = []
    for dtype in (torch.float32, torch.float64):  # plain torch computes in float64, on the GPU too
        leaf = hidden.to(DEVICE, dtype, copy=True).requires_grad_()
        loss = linear_ihl_loss(leaf, weight.to(DEVICE, dtype), labels.to(DEVICE), softcap=5.0)
        loss.backward()
        results.append((loss.detach().cpu().double(), leaf.grad.cpu().double()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# --- on a GPU alone -------------------------------------------------------------------------------


@pytest.mark.gpu
@gpu_alone
def test_another_stream():
    logits, labels = on("cuda", *planted_logits(256, 32000, torch.bfloat16))
    expected = softmax_triplet(logits, labels)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = logits.clone()
        triplet = softmax_triplet(late, labels)[0]
    stream.synchronize()
    assert torch.equal(triplet, expected)


@pytest.mark.gpu
@gpu_alone
def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    logits, labels = on("cuda:1", *planted_logits(24, 5000, torch.bfloat16))
    with torch.cuda.device(0):
        check_triplet(logits, labels)


@pytest.mark.gpu
@gpu_alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rows", [8, 1024])
def test_graph_capture(dtype, inplace, rows):
    source, labels = on("cuda", *planted_logits(rows, 32000, dtype))
    static, grad = source.clone().requires_grad_(), torch.empty_like(source)

    def step():
        loss = ihl_loss(static * 1, labels, inplace=inplace)
        grad.copy_(torch.autograd.grad(loss, static)[0])
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    changed, changed_labels = on("cuda", *planted_logits(rows, 32000, dtype, seed=1))
    with torch.no_grad():
        static.copy_(changed)
    labels.copy_(changed_labels)
    graph.replay()
    loss, replayed = captured.clone(), grad.clone()
    expected = step()
    assert torch.equal(loss, expected) and torch.equal(replayed, grad)


@pytest.mark.gpu
@gpu_alone
def test_nothing_waits_for_the_device():
    logits, labels = on("cuda", *planted_logits(64, 5000, torch.bfloat16))
    for _ in range(2):  # the first pass compiles the kernels
        leaf = logits.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            ihl_loss(leaf * 1, labels, inplace=True).backward()
            softmax_triplet(leaf, labels)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu_alone
def test_more_than_2_to_the_31_entries():
    rows, vocab = 16500, 131_072
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2:
        pytest.skip("needs 13 GB")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-1, 7] = 5.0
    labels = torch.zeros(rows, dtype=torch.int64, device="cuda")
    triplet, runner_up_id = softmax_triplet(logits, labels)
    assert runner_up_id[-1] == 7 and runner_up_id[0] == 1 and triplet[-1, 1] == 5
    ihl_loss(logits.requires_grad_() * 1, labels, inplace=True)


@pytest.mark.gpu
@gpu_alone
@pytest.mark.parametrize("call", ["softmax_triplet", "hidden_gradient"])
def test_a_bad_label_is_a_device_assert(call):
    code = f"""if True:
        import torch, loku_kernels
        from loku_kernels.backends import triton
        logits = torch.randn(4, 9, device="cuda")
        labels = torch.tensor([0, 9, 1, 2], device="cuda")
        if {call == "hidden_gradient"}:
            rows, ids = torch.zeros(4, 3, dtype=torch.float64, device="cuda"), torch.ones_like(labels)
            weight, direction = torch.randn(9, 4, device="cuda"), torch.randn(4, 4, device="cuda")
            operands = rows, None, weight, labels, rows, ids, direction
            triton.hidden_gradient(*operands, softcap=0.0, logit_scale=1.0)
        else:
            loku_kernels.softmax_triplet(logits, labels)
        torch.cuda.synchronize()
    """
    result = run_python(code, LOKU_BACKEND="triton")
    assert result.returncode != 0 and "device-side assert" in result.stderr


# --- on any machine, in this process --------------------------------------------------------------


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@outside
def test_on_the_cpu_it_needs_the_interpreter():
    result = run_python(
        "import torch, loku_kernels; loku_kernels.softmax_triplet(torch.randn(2, 5), torch.tensor([0, 1]))",
        LOKU_BACKEND="triton",
    )
    assert result.returncode != 0 and "TRITON_INTERPRET=1" in result.stderr


@outside
def test_the_gradient_of_hidden_states_checks_label_and_runner_up(monkeypatch):
    """Both choose a row of the weight, and the caller may have changed them since the forward."""
    table = triton_table(monkeypatch)
    [(kernel, arguments, options)] = table.record(table.launches_of_hidden, torch.bfloat16)
    source = table.source(kernel, arguments)
    compiled = table.triton.compile(source, target=table.TARGETS["sm_90"], options=options)
    assert compiled.asm["ttir"].count("tt.assert") == 2


@outside
def test_another_batch_compiles_nothing_anew(monkeypatch):
    """Kernels are compiled for dtypes and options, not for numbers of rows, tokens or columns."""
    table = triton_table(monkeypatch)

    def of_triplet(vocab, rows):
        return sources(table, table.launches_of_triplet, torch.bfloat16, vocab, rows)

    assert len(of_triplet(50257, 4096)) == 6
    assert of_triplet(50257, 4096) == of_triplet(50304, 4097) != of_triplet(50257, 16)
    assert of_triplet(50257, 16) == of_triplet(50304, 13)


@outside
@pytest.mark.parametrize(("rows", "several"), [(4096, 0), (16, 1)])
def test_launches_of_each_operation(rows, several):
    """Each operation launches one kernel, or two if several programs share a row."""
    import triton

    from loku_kernels.backends import triton as kernels
    from loku_kernels.backends.triton import triplet as launchers

    logits, labels = torch.zeros(rows, 6000), torch.zeros(rows, dtype=torch.int64)
    triplet, ids = torch.zeros(rows, 3, dtype=torch.float64), labels.clone()
    scale = torch.ones((), dtype=torch.float64)

    def launches(operation, *arguments, **options):
        with mock.patch.object(triton.JITFunction, "run") as run:
            operation(*arguments, **options)
        return run.call_count

    with mock.patch.object(launchers, "_multiprocessors", lambda device: 132):
        whole = (logits, labels, IGNORE)
        assert launches(kernels.triplet_forward, *whole) == 1 + several
        assert launches(kernels.inverted_hinge_, *whole, scale) == 1 + several
        assert launches(kernels.rest_probabilities_, *whole, softcap=6.0) == 1 + several
        backward = (triplet, *whole, triplet, ids)
        assert launches(kernels.triplet_backward, *backward, factor=scale.expand(rows)) == 1
        assert launches(kernels.scale_rows_, logits, scale) == 1
        assert launches(kernels.mean_scale, labels, IGNORE) == 1
        for reduction in ("none", "mean", "sum"):
            losses = ("cross_entropy", triplet, labels, IGNORE, reduction, torch.float32, True)
            assert launches(kernels.token_losses, *losses) == 1
        hidden = (triplet, scale, logits[:, :64], labels, triplet, ids, logits[:, :64])
        assert launches(kernels.hidden_gradient, *hidden, softcap=0.0, logit_scale=1.0) == 1
        both = (logits, logits.clone())
        assert launches(kernels.divergence_, *both, softcap=6.0, store=True) == 1


@outside
def test_the_table_of_compiled_kernels():
    """Registers, spills and vector widths are as committed, for GPUs that need not be present."""
    if not TABLE_SCRIPT.exists():
        pytest.skip("no checkout")
    environment = {key: value for key, value in os.environ.items() if key != "LOKU_BACKEND"}
    result = subprocess.run(
        [sys.executable, TABLE_SCRIPT], capture_output=True, text=True, timeout=1800, env=environment
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert json.loads(TABLE_SCRIPT.with_suffix(".json").read_text())["kernels"]
