"""The CUDA kernels: emulated on the CPU, compiled without a GPU, and run on a GPU if there is one.

Tests that need a GPU have the marker ``gpu``.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from kernel_checks import (
    assert_as_good_as_eager,
    check_against_reference,
    check_linear,
    exact_fisher,
    gradients,
    lean_eager_ihl,
    per_row,
)
from kernel_inputs import DTYPES, IGNORE, fisher_operands, planted_logits, planted_operands

import loku_kernels
from loku_kernels import accumulate_squared_grad_, ihl_loss, logits_blocks, softmax_triplet
from loku_kernels.backends import native, reference

ROOT = Path(__file__).parents[2]
KIB = 1024
# Shared memory of a block and of a multiprocessor, in bytes, and whether there are clusters. The first is an
# H100. The others have so little shared memory that a row takes a cluster, or is read twice without clusters.
MACHINES = {
    "row in a block": (227 * KIB, 228 * KIB, True),
    "row in a cluster": (6 * KIB, 12 * KIB, True),
    "row read twice": (4 * KIB, 8 * KIB, False),
}


# --- emulation ------------------------------------------------------------------------------------


def build_emulation(folder, csrc=ROOT / "csrc", name="emulated_cuda"):
    """Build the CUDA sources as a Python module for the CPU; ``cuda/emulated_gpu.h`` says how."""
    compiler, python = shutil.which("g++"), sysconfig.get_paths()["include"]
    if compiler is None:
        pytest.skip("no g++")
    if not os.path.exists(os.path.join(python, "Python.h")):
        pytest.skip("no headers of Python")
    tests = folder / "tests" / "loku_kernels" / "cuda"
    shutil.copytree(ROOT / "tests" / "loku_kernels" / "cuda", tests)
    shutil.copytree(csrc, folder / "csrc")
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"),
            *(f"-I{python}", f"-DEMULATION={name}"),
            *("-include", tests / "emulated_gpu.h", "-x", "c++", tests / "emulated.cpp"),
            *(folder / "csrc" / "triplet_cuda.cu", folder / "csrc" / "fisher_cuda.cu"),
            *("-o", folder / f"{name}.so"),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return build_emulation(tmp_path_factory.mktemp("emulation"))


def use_emulation(monkeypatch, module):
    """Send CPU tensors the way of CUDA tensors, to the emulated kernels."""
    monkeypatch.setenv("LOKU_BACKEND", "native")
    monkeypatch.setattr(native, "_core", module)
    monkeypatch.setattr(native, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(
        native, "_launch", lambda name, tensor, *args: native._call(f"cuda_{name}", *args, (0, 0))
    )
    monkeypatch.setattr(
        reference, "multiplies_bfloat16", lambda device: False
    )  # the CPU's library must not serve them
    native._cuda_works.cache_clear()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of the kernels: "cpu", where they are emulated, or "cuda"."""
    if request.param == "emulated":
        module = request.getfixturevalue("emulation")
        module.set_machine(*MACHINES["row in a block"], 0)
        use_emulation(monkeypatch, module)
        yield "cpu"
    else:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if native._core is None or not native._core.has_cuda:
            pytest.skip("built without CUDA")
        monkeypatch.setenv("LOKU_BACKEND", "native")
        yield "cuda"
    native._cuda_works.cache_clear()


@pytest.fixture(params=MACHINES)
def machine(request, device):
    """The device, as each of the machines if it is emulated."""
    if device == "cpu":
        native._core.set_machine(*MACHINES[request.param], 1)
    elif request.param != next(iter(MACHINES)):
        pytest.skip("a GPU is one machine")
    return device


def one(device):
    return torch.ones((), dtype=torch.float64, device=device)


def shapes(device):
    return [2, 3, 17, 2047, 4100] if device == "cpu" else [2, 3, 17, 2047, 4100, 32000, 50257, 128256, 262144]


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(device, dtype):
    for v in shapes(device):
        logits, labels = planted_logits(24, v, dtype)
        check_against_reference(logits.to(device), labels.to(device))


@pytest.mark.parametrize("layout", ["padded", "sliced", "three strides", "one row", "expanded", "no rows"])
def test_strides(device, layout):
    for dtype, v in ((torch.bfloat16, 1001), (torch.float32, 515)):
        logits, labels = (x.to(device) for x in planted_logits(24, v, dtype))
        match layout:
            case "padded":
                logits = torch.nn.functional.pad(logits, (3, 5))[:, 3:-5]
            case "sliced":
                logits = torch.nn.functional.pad(logits.view(2, 12, v), (0, 0, 0, 1))[:, :-1]
                labels = labels.view(2, 12)
            case "three strides":
                logits = torch.nn.functional.pad(logits.view(2, 3, 4, v), (0, 0, 0, 1, 0, 2))[:, :-2, :-1]
                labels = labels.view(2, 3, 4)
            case "one row":
                logits, labels = logits[0], labels[0]
            case "expanded":
                logits, labels = logits[:1].expand(4, v), labels[:1].expand(4)
            case _:
                logits, labels = logits[:0], labels[:0]
        check_against_reference(logits, labels)
        assert not labels.numel() or ihl_loss((logits * 1).requires_grad_(), labels, inplace=True) >= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_nan_and_inf_never_give_a_plausible_number(machine, dtype, fill):
    for v in (2, 3000):
        logits = torch.randn(3, v).to(dtype)
        for row, position in enumerate((0, 1, 5)):
            logits[row, position % v] = fill
        labels = torch.zeros(3, dtype=torch.int64, device=machine)
        p = softmax_triplet(logits.to(machine), labels)[0].softmax(-1)
        assert p.isnan().any(-1).all()
    masked = torch.full((1, 3000), -torch.inf, dtype=dtype)
    masked[0, 2000], masked[0, 0] = torch.nan, 1.0
    triplet, _ = native.inverted_hinge_(masked.to(machine), labels[:1], IGNORE, one(machine))
    assert triplet.softmax(-1).isnan().any()


def test_masks_of_the_lowest_finite_number(device):
    for dtype in (torch.float32, torch.bfloat16):
        lowest = torch.finfo(dtype).min
        logits = torch.full((3, 3000), lowest).to(dtype)
        logits[:, 7] = 1.0
        logits[1:, 9] = 2.0
        logits[2:, 11] = 0.5
        labels = torch.full((3,), 7, device=device)
        for inplace in (False, True):
            leaf = logits.to(device).requires_grad_()
            loss = ihl_loss(leaf * 1, labels, reduction="none", inplace=inplace)
            loss.sum().backward()
            torch.testing.assert_close(
                loss.cpu(), reference.inverted_hinge_loss(logits.double(), labels.cpu()).float()
            )
            assert leaf.grad.isfinite().all() and leaf.grad[1:, 7].gt(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_ihl_is_the_formula_of_the_paper(machine, dtype, inplace):
    for v in shapes(machine)[:-1] if machine == "cuda" else (2, 17, 4100):
        logits, labels = planted_logits(12, v, dtype)
        logits, labels = logits[labels != IGNORE].to(machine), labels[labels != IGNORE].to(machine)
        weights = torch.randn(len(labels), dtype=torch.float64, device=machine)
        exact, exact_grad = gradients(reference.inverted_hinge_loss, logits.double(), labels, weights)
        eager, eager_grad = gradients(lean_eager_ihl, logits, labels, weights)
        ours, grad = gradients(per_row(ihl_loss, inplace=inplace), logits, labels, weights)
        assert_as_good_as_eager(ours, eager.float(), exact)
        assert_as_good_as_eager(grad, eager_grad, exact_grad)


@pytest.mark.parametrize("offset", [-1e10, -1e30, 1e12])
def test_an_offset_beyond_the_exponents_of_float32(device, offset):
    """At such finite masks, float32 rounds a product with log2(e) by more than the largest exponent of 2."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.full((3, 3000), offset).to(dtype)
        labels = torch.tensor([7, 0, 2999], device=device)
        logits[0, 7] = logits[0, 9] = logits[1, 9] = 1.0  # kept: target and another word; another word; none
        check_against_reference(logits.to(device), labels)
        fused = logits.clone().to(device)
        triplet, _ = native.inverted_hinge_(fused, labels, IGNORE, one(device))
        torch.testing.assert_close(triplet.cpu(), reference.softmax_triplet(logits, labels.cpu())[0])
        assert fused.isfinite().all()


def test_scaled_rows(device):
    for dtype, v in ((torch.bfloat16, 1001), (torch.float32, 515)):
        rows = torch.nn.functional.pad(torch.randn(2, 3, 4, v), (3, 5, 0, 1, 0, 2)).to(dtype).to(device)
        part, factors = rows[:, :-2, :-1, 3:-5], torch.rand(2, 3, 4, device=device)
        part[0, 0, 0], part[1, 2, 3], factors[0, 0, 0], factors[1, 2, 3] = torch.inf, torch.nan, 1.0, 0.5
        expected = rows.clone()
        expected[:, :-2, :-1, 3:-5] = (part.float() * factors[..., None]).to(dtype)
        native.scale_rows_(part, factors)
        assert torch.equal(rows.nan_to_num(7.0), expected.nan_to_num(7.0))
        native.scale_rows_(part, torch.full((), 2.0, dtype=torch.float64, device=device))
        expected[:, :-2, :-1, 3:-5] *= 2
        assert torch.equal(rows.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_fused_leaves_nothing_of_ignored_rows_and_touches_no_neighbour(machine):
    logits, labels = planted_logits(24, 1001, torch.bfloat16)
    padded = torch.nn.functional.pad(logits, (3, 5), value=7.0).to(machine)
    triplet, runner_up_id = native.inverted_hinge_(
        padded[:, 3:-5], labels.to(machine), IGNORE, 2 * one(machine)
    )
    ignored = (labels == IGNORE).to(machine)
    assert padded[:, :3].eq(7).all() and padded[:, -5:].eq(7).all()
    assert padded[ignored, 3:-5].eq(0).all()
    assert triplet[ignored].eq(0).all() and runner_up_id[ignored].eq(-1).all()
    expected, expected_id = reference.softmax_triplet(logits.double(), labels)
    assert torch.equal(runner_up_id.cpu(), expected_id)
    torch.testing.assert_close(triplet.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("block_bytes", [1 << 24, 10_000])  # all columns at once, then some at a time
def test_linear(machine, dtype, softcap, block_bytes, monkeypatch):
    monkeypatch.setattr(logits_blocks, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(logits_blocks, "CUDA_BLOCK_BYTES", block_bytes)
    hidden, weight, bias, labels = (x.to(machine) for x in planted_operands(24, 16, 1301, dtype))
    check_linear([hidden, weight, bias], labels, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, tokens, d, k", [(1, 1, 1, 1), (2, 33, 130, 72), (3, 100, 40, 300), (5, 7, 136, 129)]
)
def test_fisher(device, dtype, n, tokens, d, k):
    # Products of 16-bit numbers are exact in float32, so every type is held to float32's rounding.
    inputs, grad_outputs = fisher_operands(n, tokens, d, k, dtype)
    here = inputs.to(device), grad_outputs.to(device)
    start, divisor = torch.rand(d, k), torch.rand(d, k) + 0.1
    expected = exact_fisher(inputs, grad_outputs)
    ours = accumulate_squared_grad_(start.clone().to(device), *here).cpu().double()
    torch.testing.assert_close(ours, start + expected, rtol=1e-4, atol=1e-5 * expected.max().item())
    ours = accumulate_squared_grad_(torch.zeros(d, k, device=device), *here).cpu().double()
    tolerance = {"rtol": 1e-4, "atol": 1e-6 * expected.max().item()}
    torch.testing.assert_close(ours, expected, **tolerance)
    for wrong in (torch.zeros_like(ours), ours.sqrt()):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, expected, **tolerance)
    expected = exact_fisher(inputs, grad_outputs, divisor)
    rows = accumulate_squared_grad_(torch.zeros(d, device=device), *here, divisor.to(device))
    tolerance["atol"] = 1e-6 * expected.max().item()
    torch.testing.assert_close(rows.cpu().double(), expected, **tolerance)


def test_fisher_of_strided_operands(device):
    inputs, grad_outputs = fisher_operands(3, 20, 8, 16, torch.bfloat16)
    expected = exact_fisher(inputs, grad_outputs)
    inputs, grad_outputs = inputs.to(device), grad_outputs.to(device)
    transposed = inputs.transpose(1, 2).contiguous().transpose(1, 2)
    unaligned = torch.nn.functional.pad(grad_outputs, (2, 3))[..., 2:-3]
    aligned = torch.nn.functional.pad(grad_outputs, (8, 8), value=1e4)[..., 8:-8]
    target = torch.zeros(8, 40, device=device)
    for x, delta in ((transposed, unaligned), (inputs, aligned)):
        accumulate_squared_grad_(target[:, :16].zero_(), x, delta)
        torch.testing.assert_close(target[:, :16].cpu().double(), expected, rtol=1e-4, atol=1e-6)
    assert target[:, 16:].eq(0).all()


def test_any_order_of_threads_gives_the_same(emulation, monkeypatch):
    use_emulation(monkeypatch, emulation)
    results = []
    inputs, grad_outputs = fisher_operands(2, 50, 30, 40, torch.float16)
    for seed in range(4):
        emulation.set_machine(*MACHINES["row in a cluster"], seed)
        logits, labels = planted_logits(12, 5000, torch.float16)
        triplet, runner_up_id = native.inverted_hinge_(logits, labels, IGNORE, one("cpu"))
        emulation.set_machine(*MACHINES["row in a block"], seed)
        squares = accumulate_squared_grad_(torch.zeros(30, 40), inputs, grad_outputs)
        results.append((logits.nan_to_num(), triplet.nan_to_num(), runner_up_id, squares))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    native._cuda_works.cache_clear()


def test_the_emulation_shows_a_missing_barrier(tmp_path, monkeypatch):
    """Without one of its barriers or waits, a kernel gives wrong results on the emulation."""
    csrc = tmp_path / "broken" / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for name, statement, change in (
        ("reduction_cuda.h", "  cluster_barrier(cluster);  // the last access", "  // the last access"),
        ("fisher_cuda.cu", "copy_async_wait<kStages - 2>();", "copy_async_wait<kStages - 1>();"),
    ):
        text = (csrc / name).read_text()
        assert text.count(statement) == 1
        (csrc / name).write_text(text.replace(statement, change))
    module = build_emulation(tmp_path, csrc, "broken_emulated_cuda")
    use_emulation(monkeypatch, module)
    with pytest.raises(AssertionError):
        check_against_reference(*planted_logits(12, 4100, torch.float32))
    with pytest.raises(AssertionError):
        inputs, grad_outputs = fisher_operands(2, 50, 30, 40, torch.float32)
        squares = accumulate_squared_grad_(torch.zeros(30, 40), inputs, grad_outputs)
        torch.testing.assert_close(squares.double(), exact_fisher(inputs, grad_outputs), rtol=1e-3, atol=0)
    native._cuda_works.cache_clear()


def test_sizes_that_the_kernels_do_not_take(emulation):
    features = (0, 2**24, 0, 0)
    with pytest.raises(ValueError, match="sizes up to"):
        emulation.cuda_accumulate_squared_grad_(1, 1, 0, features, features, (0, 0), (0, 0), 0, (0, 0))
    with pytest.raises(ValueError, match=r"at most 2\^30 words"):
        emulation.cuda_triplet_forward((0, 1, 1, 0, 0, 2**31, 0), 0, IGNORE, 0, 0, (0, 0))


# --- on a GPU alone -------------------------------------------------------------------------------


@pytest.fixture
def gpu(device):
    if device != "cuda":
        pytest.skip("on a GPU alone")


@pytest.mark.gpu
def test_another_stream_and_a_graph(gpu):
    logits, labels = (x.cuda() for x in planted_logits(24, 50257, torch.bfloat16))
    expected = softmax_triplet(logits, labels)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    scale = one("cuda")
    with torch.cuda.stream(stream):
        for _ in range(3):
            native.inverted_hinge_(logits.clone(), labels, IGNORE, scale)
        assert torch.equal(softmax_triplet(logits, labels)[0], expected)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    static = logits.clone()
    with torch.cuda.graph(graph):
        triplet, _ = native.inverted_hinge_(static, labels, IGNORE, scale)
    for _ in range(2):
        static.copy_(logits)
        graph.replay()
        torch.testing.assert_close(triplet, expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_more_entries_than_an_int_can_count(gpu):
    n, v = 17000, 128256  # 2.2e9 entries in 4.1 GiB
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of free memory")
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    labels = torch.zeros(n, dtype=torch.int64, device="cuda")
    logits[-1, 5] = 3.0
    triplet, runner_up_id = softmax_triplet(logits, labels)
    assert runner_up_id[-1] == 5 and runner_up_id[0] == 1
    native.inverted_hinge_(logits, labels, IGNORE, one("cuda"))
    assert logits[-1, 5] < 0 and logits[-1, 0] > 0
    torch.testing.assert_close(triplet[0, 2].item(), torch.tensor(float(v - 2)).double().log().item())


@pytest.mark.gpu
def test_a_bad_label_asserts(gpu):
    code = """if True:
        import os
        os.environ["LOKU_BACKEND"] = "native"
        import torch, loku_kernels
        try:
            loku_kernels.softmax_triplet(torch.randn(4, 9).cuda(), torch.full((4,), 9).cuda())
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise SystemExit(7)
    """
    assert run_python(code).returncode == 7


# --- compiled, not run ----------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@needs_nvcc
def test_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import cuda_table

    committed = json.loads(cuda_table.TABLE.read_text())
    ours = cuda_table.table()
    assert cuda_table.problems(ours, committed) == []
    # The check can fail.
    facts = next(iter(ours["kernels"].values()))["sm_90"]
    facts["spill_bytes"] = 4
    assert "spills 4 bytes" in cuda_table.problems(ours, committed)[0]
    ours["kernels"].popitem()
    assert any("not the kernels" in line for line in cuda_table.problems(ours, committed))


@pytest.mark.skipif(native._core is None or not native._core.has_cuda, reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_driver(monkeypatch):
    """The CUDA calls of the core fail with a reason, and a forced backend falls back with one warning."""
    assert loku_kernels.backends.native._core is native._core
    assert "no CUDA driver or device" in native._core.cuda_error()
    rows = (0, 1, 1, 0, 9, 9, 0)
    with pytest.raises(RuntimeError, match=r"loku_kernels, cuda.*driver"):
        native._core.cuda_triplet_forward(rows, 0, IGNORE, 0, 0, (0, 0))
    native._cuda_works.cache_clear()
    monkeypatch.setenv("LOKU_BACKEND", "native")
    monkeypatch.setattr(native, "_on_cuda", lambda tensor: True)
    logits, _ = planted_logits(12, 50, torch.float32)
    with pytest.warns(RuntimeWarning, match="no CUDA driver or device") as caught:
        assert not native.serves(logits) and not native.serves(logits)
    assert len(caught) == 1
    native._cuda_works.cache_clear()


def test_a_missing_core_warns_of_the_slow_reference(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(native, "_core", object())
        native.warn_if_missing()
    monkeypatch.setattr(native, "_core", None)
    with pytest.warns(RuntimeWarning, match="on the CPU, and on a GPU where triton is not installed"):
        native.warn_if_missing()


def test_a_core_without_cuda_says_so(monkeypatch):
    if native._core is None:
        pytest.skip("no compiled core")
    monkeypatch.setenv("LOKU_BACKEND", "native")
    monkeypatch.setattr(native, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(native._core, "has_cuda", False)
    with pytest.raises(RuntimeError, match="without its CUDA kernels"):
        native.serves(torch.zeros(2, 3))
