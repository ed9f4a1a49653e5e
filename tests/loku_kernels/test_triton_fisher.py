"""The Fisher's Triton kernel against float64, in Triton's interpreter and on a GPU if there is one.

``test_in_the_interpreter`` runs this file in the interpreter. In this process the same tests need a GPU.
"""

import re
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_ahead import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    INTERPRETED,
    on,
    on_device,
    outside,
    run_in_the_interpreter,
    sources,
    triton_table,
)

from loku_kernels import accumulate_squared_grad_

pytest.importorskip("triton", reason="no triton")

WHOLE = [0, 128, 208]  # the longest sample without a loop: by plain loads, on capability 10 and on 9


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("LOKU_BACKEND", "triton")


def served(whole):
    """Let the kernel serve samples as a GPU does that has this longest sample without a loop."""
    from loku_kernels.backends.triton import fisher

    if not INTERPRETED and whole > fisher._longest_whole_sample(torch.device("cuda", 0)):
        pytest.skip("a GPU without these descriptors")
    return mock.patch.object(fisher, "_longest_whole_sample", lambda device: whole)


# Entries of a row before the operand, entries after it, and tokens after it. Else rows are whole vectors.
GAPS = {"padded": (8, 16, 2), "odd start": (1, 7, 0), "odd stride": (0, 9, 0)}


def whole_numbers(n, tokens, features, seed, layout="plain", dtype=torch.float16):
    """Make an operand (n, T, features) of small whole numbers, so that float32 sums of products are exact.

    NaN lies wherever nothing may read. The layout is one of ``GAPS``, or "plain", "swapped" (T before n),
    "transposed" (contiguous tokens) or "expanded" (one sample n times).
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-4, 5, (n, tokens, features), generator=generator).to(DEVICE, dtype)
    if layout == "expanded":
        return numbers[:1].expand(n, tokens, features)
    first, after, long = GAPS.get(layout, (0, 0, 0))
    row = first + -(-features // 8) * 8 + after
    order = {"swapped": (1, 0, 2), "transposed": (0, 2, 1)}.get(layout, (0, 1, 2))
    shape = [(n, tokens + long, row)[i] for i in order]
    memory = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE).permute(order)
    return memory[:, :tokens, first : first + features].copy_(numbers)


def check(inputs, grad_outputs, described):
    """Check the kernel, with a divisor and without, and that descriptors serve or not."""
    from loku_kernels.backends.triton import fisher

    d, k = grad_outputs.shape[2], inputs.shape[2]
    grads = torch.einsum("ntd,ntk->ndk", grad_outputs.cpu().double(), inputs.cpu().double())
    generator = torch.Generator().manual_seed(1)
    divisor = torch.rand(d, k, generator=generator) + 0.1
    memory = torch.full((d + 2, k + 6), -0.0, device=DEVICE)  # adding even a zero makes it positive
    ours = memory[1:-1, 4 : k + 4].fill_(0.5)
    rows = torch.ones(d, device=DEVICE)
    with mock.patch.object(fisher, "_describe", wraps=fisher._describe) as describe:
        accumulate_squared_grad_(ours, inputs, grad_outputs)
        accumulate_squared_grad_(rows, inputs, grad_outputs, divisor.to(DEVICE))
    assert describe.called == described
    exact = {"rtol": 1e-5, "atol": 0}
    expected = 0.5 + grads.square().sum(0)
    torch.testing.assert_close(ours.cpu().double(), expected, **exact)
    for wrong in (grads.square().sum(0), 0.5 + grads.sum(0).square(), 0.5 + grads[:-1].square().sum(0)):
        if (wrong - expected).abs().max() > 0:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(wrong, expected, **exact)
    ours.fill_(-0.0)
    assert memory.eq(0).all() and memory.signbit().all()
    expected = 1 + (grads.square() / divisor.double()).sum((0, 2))
    torch.testing.assert_close(rows.cpu().double(), expected, **exact)


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
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("tokens", [1, 32, 33, 64, 65, 96, 97, 128, 129, 161, 193, 200, 208, 209, 257, 300])
def test_every_length(whole, tokens):
    """The lengths are those where the steps change. Two tiles of rows and of columns have a ragged end."""
    with served(whole):
        check(whole_numbers(2, tokens, 131, 0), whole_numbers(2, tokens, 136, 1), described=whole > 0)


@on_device
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(
    ("layout", "n", "tokens", "described"),
    [
        ("padded", 3, 70, True),
        ("padded", 1, 210, True),
        ("swapped", 3, 210, True),
        ("swapped", 3, 1, True),
        ("odd start", 3, 70, False),
        ("odd stride", 3, 210, False),
        ("odd stride", 3, 1, False),
        ("odd stride", 1, 1, True),  # no stride is used
        ("transposed", 2, 70, False),
        ("expanded", 3, 70, False),
        ("expanded", 1, 70, True),
    ],
)
def test_layouts(whole, layout, n, tokens, described):
    """Descriptors serve strides of whole vectors, and no others."""
    features = 48 if layout == "expanded" else 45
    other, plain = whole_numbers(n, tokens, features, 0, layout), whole_numbers(n, tokens, 24, 1)
    with served(whole):
        for operands in ((other, plain), (plain, other)):
            check(*operands, described=described and whole > 0)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (5, 8, 200), (1, 300, 16)])
def test_dtypes_and_sizes(dtype, whole, n, d, k):
    """float32 operands are never described."""
    operands = whole_numbers(n, 40, k, 0, dtype=dtype), whole_numbers(n, 40, d, 1, dtype=dtype)
    with served(whole):
        check(*operands, described=whole > 0 and dtype != torch.float32)


@on_device
@pytest.mark.parametrize("whole", WHOLE)
def test_a_transposed_fisher_and_empty_operands(whole):
    inputs, grad_outputs = (whole_numbers(2, 9, width, width) for width in (16, 24))
    expected = torch.einsum("ntd,ntk->ndk", grad_outputs.double(), inputs.double()).square().sum(0)
    fisher, divisor = torch.zeros(16, 24, device=DEVICE).t(), torch.rand(16, 24, device=DEVICE).t() + 0.1
    with served(whole):
        accumulate_squared_grad_(fisher, inputs, grad_outputs)
        assert torch.equal(fisher.double(), expected)
        rows = accumulate_squared_grad_(torch.zeros(24, device=DEVICE), inputs, grad_outputs, divisor)
        torch.testing.assert_close(rows.double(), (expected / divisor.double()).sum(1), rtol=1e-5, atol=0)
        for empty in (inputs[:0], inputs[:, :0]):
            accumulate_squared_grad_(fisher, empty, grad_outputs[: empty.shape[0], : empty.shape[1]])
        assert torch.equal(fisher.double(), expected)


@on_device
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("tokens", [100, 300])
def test_the_same_each_time(whole, tokens):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, tokens, 264, generator=generator).to(DEVICE, DTYPES[-1])
    grad_outputs = torch.randn(3, tokens, 264, generator=generator).to(DEVICE, DTYPES[-1])
    with served(whole):
        results = [
            accumulate_squared_grad_(torch.zeros(264, 264, device=DEVICE), inputs, grad_outputs)
            for _ in range(2 if INTERPRETED else 5)
        ]
    assert all(torch.equal(result, results[0]) for result in results[1:])


@on_device
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(
    ("n", "tokens", "stride"),
    [
        (1, 3, 2**30 + 8),  # less than 2^31, and twice it is more
        (3, 1, 2**30 + 8),
        (1, 70, 2**25 + 8),  # more than 2^31 after two steps of 32 tokens
    ],
)
def test_operands_more_than_2_to_the_31_entries_apart(whole, n, tokens, stride):
    near = whole_numbers(n, tokens, 40, 0)
    try:
        memory = torch.empty((n * tokens - 1) * stride + 40, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("the system does not lend this much memory, even untouched")
    far = memory.as_strided((n, tokens, 40), (stride, stride, 1)).copy_(near)
    with served(whole):
        for operands in ((far, near), (near, far)):
            check(*operands, described=whole > 0)


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
@pytest.mark.parametrize("whole", WHOLE)
def test_another_batch_compiles_little_anew(monkeypatch, whole):
    """Kernels are compiled for dtypes and a few lengths, not for numbers of samples or tokens."""
    table = triton_table(monkeypatch)
    launches = [
        repr(sources(table, table.launches_of_fisher, torch.bfloat16, tokens, whole))
        for tokens in [*range(1, 260), 1000, 4097]
    ]
    assert len(set(launches)) == {0: 2, 128: 5, 208: 8}[whole]


@outside
@pytest.mark.parametrize("whole", WHOLE)
def test_steps_cover_a_sample_with_little_to_spare(whole):
    from loku_kernels.backends.triton.fisher import launch_options

    for tokens in range(1, 1000):
        options = launch_options(torch.bfloat16, "ieee", tokens, whole)
        length = options["STEPS"] * options["BLOCK_T"] + options["TAIL"]
        assert (length > 0) == (tokens <= whole)
        if length:
            assert tokens <= length < tokens + 32
            # The operands' tiles have 256 columns of 16 bits. Barriers take some more bytes.
            assert options["num_stages"] * length * 512 + 1024 <= 227 * 1024 and options["num_stages"] >= 2
    assert launch_options(torch.bfloat16, "ieee", 200, 0)["BLOCK_T"] == 32  # 224 tokens, and not 256


@outside
def test_descriptors_need_whole_vectors():
    from loku_kernels.backends.triton.fisher import _describable

    x = torch.zeros(4, 6, 64, dtype=torch.bfloat16)
    assert _describable(x) and _describable(x[:, 1:, 8:]) and _describable(x.transpose(0, 1))
    assert _describable(x[:, :, :5]) and _describable(x[:1, :1, 8:13])
    assert not _describable(x.float()) and not _describable(x[:, :, 1:])
    for strides in ((0, 64, 1), (384, 0, 1), (388, 64, 1), (384, 60, 1)):
        assert not _describable(x.as_strided((2, 2, 32), strides))
        alone = x.as_strided((1, 1, 32), strides)
        assert _describable(alone)
    far = torch.empty(2, 2, 8, dtype=torch.half, device="meta").as_strided((2, 2, 8), (2**39, 8, 1))
    assert not _describable(far)


def body_of_the_loop(text):
    """Return the text before the only loop of a kernel, and the text of its body."""
    before, _, rest = text.partition("scf.for ")
    margin = before.rpartition("\n")[2].rpartition("%")[0] or before.rpartition("\n")[2]
    indent = len(margin) - len(margin.lstrip())
    end = re.search(rf"^ {{{indent}}}}}", rest, re.MULTILINE)
    assert end is not None and rest[: end.start()].count("\n") > 5
    return before, rest[: end.start()]


def compiled(table, architecture, tokens, whole, dtype=torch.bfloat16):
    """Compile the launch without a divisor."""
    import triton

    launch = table.record(table.launches_of_fisher, dtype, tokens, whole)[0]
    source = table.source(*launch[:2])
    return triton.compile(source, target=table.TARGETS[architecture], options=launch[2]), launch[2]


@outside
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("tokens", [200, 512])
def test_plain_loads_are_under_way_during_a_product(monkeypatch, architecture, tokens):
    kernel, _ = compiled(triton_table(monkeypatch), architecture, tokens, 0)
    _, body = body_of_the_loop(kernel.asm["ttgir"])
    waits = [int(number) for number in re.findall(r"async_wait .*num = (\d+)", body)]
    assert waits and min(waits) == 2  # the loads of one step, of both operands
    assert body.count("ttg.async_copy_global_to_local") == 2 and not re.search(r"= tt\.load", body)
    if architecture == "sm_90":
        assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert re.search(r"warp_group_dot_wait .*pendings = 1", body)  # the product is under way too


@outside
@pytest.mark.parametrize(("architecture", "whole"), [("sm_90", 208), ("sm_100", 128)])
@pytest.mark.parametrize("tokens", [32, 128, 200, 512])
def test_described_loads_are_under_way_during_a_product(monkeypatch, architecture, whole, tokens):
    kernel, options = compiled(triton_table(monkeypatch), architecture, tokens, whole)
    before, body = body_of_the_loop(kernel.asm["ttgir"])
    copy = "ttng.async_tma_copy_global_to_local"
    copies = body.count(copy)
    # The stages before the loop, all but the one that the loop's first turn loads.
    assert copies >= 2 and before.count(copy) // copies in (options["num_stages"] - 1, options["num_stages"])
    ptx = kernel.asm["ptx"]
    assert "cp.async.bulk.tensor.3d" in ptx
    assert re.search(r"(red|atom)\.global\.gpu\.relaxed\.add\.v4\.f32", ptx)
    assert not re.search(r"\b(ld|st)\.global", ptx)  # nothing waits for the Fisher
    if architecture == "sm_90":
        length = tokens if tokens < 200 else {200: 208, 512: 64}[tokens]
        assert (
            ptx.count("wgmma.mma_async") == length // 16
        )  # of 16 tokens each: none is padding but at the end
        if tokens > whole:
            assert re.search(r"warp_group_dot_wait .*pendings = 1", body)


@outside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_amd_has_no_spills(monkeypatch, dtype):
    kernel, _ = compiled(triton_table(monkeypatch), "gfx942", 512, 0, dtype)
    assembly = kernel.asm["amdgcn"]
    for field in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        assert re.search(rf"\.{field}:\s+0$", assembly, re.MULTILINE), field
    assert "mfma" in assembly
