"""Triton kernels against the float64 reference, in Triton's interpreter and on a GPU if there is one.

``test_in_the_interpreter`` runs this file in the interpreter. In this process the same tests need a GPU.
"""

import itertools
import json
import os
import subprocess
import sys
from unittest import mock

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
    ihl_loss,
    linear_ihl_loss,
    linear_softmax_triplet,
    logits_blocks,
    softmax_triplet,
)
from loku_kernels.backends import reference
from loku_kernels.backends.online_state import OnlineState
from loku_kernels.losses import cross_entropy

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

    with mock.patch.multiple(triplet, WARPS=1, FUSED_WARPS=1, VECTORS=1):
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


def check_triplet(logits, labels, seed=0):
    """Check forward and backward on logits (..., V)."""
    from loku_kernels.backends import triton as kernels

    vocab, dtype = logits.shape[-1], logits.dtype
    flat, flat_labels = logits.cpu().reshape(-1, vocab), labels.cpu().reshape(-1)
    exact, exact_id = reference.softmax_triplet(flat, flat_labels)
    triplet, runner_up_id = kernels.triplet_forward(logits, labels, IGNORE)
    assert triplet.dtype == torch.float64 and runner_up_id.dtype == torch.int64
    assert torch.equal(runner_up_id.cpu().reshape(-1), exact_id)
    ours = triplet.cpu().reshape(-1, 3)
    assert torch.equal(ours[:, :2], exact[:, :2])
    finite = exact[:, 2].isfinite()
    assert torch.equal(ours[:, 2].isfinite(), finite)
    assert (ours[:, 2] - exact[:, 2])[finite].abs().le(2e-6).all()

    upstream = torch.randn(triplet.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    arguments = (upstream.to(logits.device), logits, labels, IGNORE, triplet, runner_up_id)
    grad = kernels.triplet_backward(*arguments)
    expected = reference.softmax_triplet_backward(
        upstream.reshape(-1, 3), flat, flat_labels, IGNORE, exact, exact_id
    )
    assert grad.is_contiguous() and grad.dtype == dtype
    assert_close_to(expected, grad.reshape(-1, vocab), dtype)
    for wrong in (torch.zeros_like(grad), -grad):
        if expected.abs().amax() > 1e-3:
            with pytest.raises(AssertionError):
                assert_close_to(expected, wrong.reshape(-1, vocab), dtype)
    if not any(stride == 0 for stride in logits.stride()):
        clone = as_laid_out(logits)
        kernels.triplet_backward(upstream.to(logits.device), clone, *arguments[2:], out=clone)
        assert torch.equal(clone, grad)


def check_columns(logits, labels, cuts, softcap, out_dtype=None):
    """Check logits (N, V), block by block of columns, as the linear operator takes them.

    No label is ignored. The terms overwrite the logits, or have a tensor of their own in ``out_dtype``.
    """
    from loku_kernels.backends import triton as kernels

    dtype, scale = out_dtype or logits.dtype, softcap or 1.0
    exact, exact_id = reference.softmax_triplet(logits.cpu().double() * scale, labels.cpu())
    unit = torch.zeros_like(exact)
    unit[:, 2] = 1.0
    arguments = (logits.cpu(), labels.cpu(), IGNORE, exact, exact_id)
    expected = reference.softmax_triplet_backward(unit, *arguments, 0, softcap)

    def place_for(block):
        return block if out_dtype is None else torch.empty(block.shape, dtype=dtype, device=block.device)

    state, silent = OnlineState.start(labels), OnlineState.start(labels)
    terms = torch.zeros(logits.shape, dtype=torch.float64)
    for first, end in itertools.pairwise([0, *cuts, logits.shape[1]]):
        block = logits[:, first:end].clone()
        kernels.triplet_columns_(block, labels, silent, first_column=first, softcap=softcap)
        assert torch.equal(block, logits[:, first:end])
        out = place_for(block)
        kernels.triplet_columns_(block, labels, state, first_column=first, softcap=softcap, out=out)
        terms *= state.rescale.cpu().double()[:, None]
        demoted = state.demoted_id.cpu()
        row = (demoted >= 0).nonzero()[:, 0]
        terms[row, demoted[row]] = state.demoted_share.cpu().double()[row]
        terms[:, first:end] = out.cpu().double()
    for ours, theirs in zip(state[:2], silent[:2], strict=True):
        assert torch.equal(ours, theirs)
    triplet = state.triplet().cpu()
    assert torch.equal(state.runner_up_id.cpu(), exact_id)
    torch.testing.assert_close(triplet, exact, rtol=1e-12, atol=2e-6)
    rest_sum = state.numbers[:, 3:].cpu()
    assert_close_to(expected, torch.where(rest_sum == 0, 0.0, terms / rest_sum), dtype)

    upstream = torch.randn(triplet.shape, dtype=torch.float64)
    expected = reference.softmax_triplet_backward(upstream, *arguments, 0, softcap)
    saved = (exact.to(logits.device), exact_id.to(logits.device))
    grad = torch.cat(
        [
            kernels.triplet_backward(
                upstream.to(logits.device),
                logits[:, first:end],
                labels,
                IGNORE,
                *saved,
                first_column=first,
                softcap=softcap,
                out=None if out_dtype is None else place_for(logits[:, first:end]),
            )
            for first, end in itertools.pairwise([0, *cuts, logits.shape[1]])
        ],
        1,
    )
    assert_close_to(expected, grad, dtype)


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
        check_triplet(logits, labels)


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
)
def test_any_shape_and_stride(n, v, dtype, seed, layout, parts, vectors):
    logits, labels = on(DEVICE, *planted_logits(4 * n, v, dtype, seed))
    with launched(parts, vectors):
        check_triplet(*laid_out(logits, labels, layout), seed)


@on_device
@settings(deadline=None, max_examples=EXAMPLES)
@given(
    st.integers(2, LONGEST),
    st.lists(st.floats(0, 1), max_size=2),
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
    st.sampled_from([0.0, 6.0]),
    st.booleans(),
)
def test_any_columns(v, cuts, dtype, seed, softcap, narrow):
    """The terms have the dtype of the logits, or are 16-bit for float32 logits, as on CUDA."""
    logits, labels = planted_logits(11, v, torch.float32 if narrow else dtype, seed)
    if softcap:
        logits = torch.tanh(logits / softcap)
    logits, labels = on(DEVICE, logits, labels.where(labels != IGNORE, 0))
    check_columns(logits, labels, unique(cuts, v), softcap, DTYPES[-1] if narrow else None)


def unique(cuts, v):
    return sorted({1 + int(cut * (v - 2)) for cut in cuts})


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bit_operands_are_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(300, 64, generator=generator)).to("cuda", dtype).requires_grad_()
    weight = torch.randn(5000, 64, generator=generator).to("cuda", dtype)
    labels = torch.randint(0, 5000, (300,), generator=generator).cuda()
    assert logits_blocks.product_dtype(weight) == torch.float32
    triplet, runner_up_id = linear_softmax_triplet(hidden, weight, labels)
    exact, exact_id = reference.softmax_triplet(hidden.detach().double() @ weight.double().t(), labels)
    assert torch.equal(runner_up_id, exact_id)
    assert (triplet - exact).abs().max() < 1e-3  # logits near 100, rounded to 16 bits, would be off by 0.02
    cross_entropy(triplet).sum().backward()
    leaf = hidden.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(leaf @ weight.double().t(), labels, reduction="sum").backward()
    assert (hidden.grad - leaf.grad).norm() < 4 * ulp(dtype) * leaf.grad.norm()


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
def test_a_bad_label_is_a_device_assert():
    code = """if True:
        import torch, loku_kernels
        logits = torch.randn(4, 9, device="cuda")
        loku_kernels.softmax_triplet(logits, torch.tensor([0, 9, 1, 2], device="cuda"))
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
def test_another_batch_compiles_nothing_anew(monkeypatch):
    """Kernels are compiled for dtypes and options, not for numbers of rows, tokens or columns."""
    table = triton_table(monkeypatch)

    def columns(first, count):
        block, labels = table.meta(1024, count, dtype=torch.float32), table.meta(1024, dtype=torch.int64)
        state = OnlineState.start(labels)
        table.triplet.triplet_columns_(block, labels, state, first_column=first, softcap=0.0, out=block)

    def of_triplet(vocab, rows):
        return sources(table, table.launches_of_triplet, torch.bfloat16, vocab, rows)

    assert len(of_triplet(50257, 4096)) == 4
    assert of_triplet(50257, 4096) == of_triplet(50304, 4097) != of_triplet(50257, 16)
    assert of_triplet(50257, 16) == of_triplet(50304, 13)
    assert sources(table, columns, 0, 4096) == sources(table, columns, 4097, 4099)


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
