"""The fused row kernel: emulated on the CPU, compiled without a GPU, and run on a GPU if there is one.

Tests that need a GPU have the marker ``gpu``.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fresh_process import run_python
from kernel_inputs import DTYPES, IGNORE, planted_logits

from loku_kernels import backends
from loku_kernels.backends import cuda, native, reference

ROOT = Path(__file__).parents[2]
KIB = 1024
SHARED = 227 * KIB  # bytes of shared memory that a block of an H100 may ask for
RESIDENT = 3  # clusters that the emulated device holds at a time
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


# --- emulation ------------------------------------------------------------------------------------


def build_emulation(folder, changes=(), name="emulated_cuda"):
    """Build the CUDA sources as a Python module for the CPU; ``cuda/emulated_gpu.h`` says how.

    Args:
        folder: An empty folder.
        changes: Pairs of a text in fused_rows_cuda.cu and its replacement.
        name: The name of the module.
    """
    compiler, python = shutil.which("g++"), sysconfig.get_paths()["include"]
    if compiler is None:
        pytest.skip("no g++")
    if not os.path.exists(os.path.join(python, "Python.h")):
        pytest.skip("no headers of Python")
    tests = folder / "tests" / "loku_kernels" / "cuda"
    shutil.copytree(ROOT / "tests" / "loku_kernels" / "cuda", tests)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = folder / "csrc" / "fused_rows_cuda.cu"
    for old, new in changes:
        text = source.read_text()
        assert text.count(old) == 1, old
        source.write_text(text.replace(old, new))
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"),
            *(f"-I{python}", f"-DEMULATION={name}"),
            *("-include", tests / "emulated_gpu.h", "-x", "c++", tests / "emulated.cpp", source),
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


@pytest.fixture(autouse=True)
def _fresh_answers():
    """Forget what the core has said about the machine, before and after a test."""
    for step in range(2):
        cuda._error.cache_clear()
        cuda._longest_row.cache_clear()
        if step == 0:
            yield


def use_emulation(monkeypatch, module):
    """Send CPU tensors the way of CUDA tensors, to the emulated kernel."""
    module.set_machine(SHARED, RESIDENT, 0)
    monkeypatch.setattr(native, "_core", module)
    monkeypatch.setattr(cuda, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(cuda, "_launch", lambda function, logits, *arguments: function(*arguments, (0, 0)))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of the kernel: "cpu", where it is emulated, or "cuda"."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
        return "cuda"
    use_emulation(monkeypatch, request.getfixturevalue("emulation"))
    return "cpu"


@pytest.fixture
def gpu(monkeypatch):
    """Skip without a device that runs the kernel."""
    if not torch.cuda.is_available() or not cuda._longest_row(0):
        pytest.skip("no CUDA device, built without the kernel, or a device that cannot run it")
    monkeypatch.setenv("LOKU_BACKEND", "native")
    assert backends.choose("inverted_hinge_", torch.zeros(2, 3, device="cuda")) is cuda


def one(device, value=1.0):
    return torch.tensor(value, dtype=torch.float64, device=device)


def sizes(device):
    return [2, 3, 17, 2047, 4100] if device == "cpu" else [2, 3, 17, 2047, 32000, 50257, 128256, 262144]


def exact_results(logits, labels, softcap, scale):
    """Compute triplet, runner_up_id and the overwritten logits in float64, for any finite logits and masks.

    A scale of None stands for ``rest_probabilities_``.
    """
    labels, u = labels.cpu(), logits.cpu().double()
    counted = labels != IGNORE
    target = labels.where(counted, 0)[..., None]
    y = u * (softcap or 1.0)
    others = y.scatter(-1, target, -torch.inf)
    runner_up = others.argmax(-1, keepdim=True)
    runner_up = runner_up.where(runner_up != target, (target == 0).long())
    remaining = others.scatter(-1, runner_up, -torch.inf)
    terms = remaining.softmax(-1).nan_to_num(
        0.0
    )  # float64 cannot tell the log of their sum from a mask of -1e30
    triplet = torch.cat([y.gather(-1, target), y.gather(-1, runner_up), remaining.logsumexp(-1, True)], -1)
    if scale is None:
        at_target = at_runner_up = torch.zeros_like(target, dtype=torch.float64)
        if softcap:
            terms = terms * (1 - u * u)
    else:
        top = y.amax(-1, keepdim=True)
        shifted = torch.cat([triplet[..., :2] - top, (remaining - top).logsumexp(-1, True)], -1)
        p0, p1, p2 = shifted.softmax(-1).split(1, -1)
        at_target, at_runner_up = scale * p0 * (2 * p1 + p2), -scale * p1 * (2 * p0 + p2)
        terms = scale * p2 * (p1 - p0) * terms
    terms = terms.scatter(-1, target, at_target).scatter(-1, runner_up, at_runner_up)
    keep = counted[..., None]
    runner_up_id = runner_up[..., 0].where(counted, -1)
    return triplet.where(keep, 0.0), runner_up_id, terms.where(keep, 0.0)


def check(logits, labels, softcap=0.0, scale=None):
    """Overwrite logits by the ending that the arguments name, and compare with float64.

    The tolerance is four ulps of a row's largest entry.
    """
    expected, expected_id, terms = exact_results(logits, labels, softcap, scale)
    if scale is None:
        triplet, runner_up_id = cuda.rest_probabilities_(logits, labels, IGNORE, softcap=softcap)
    else:
        triplet, runner_up_id = cuda.inverted_hinge_(logits, labels, IGNORE, one(logits.device, scale))
    triplet, ours = triplet.cpu(), logits.cpu().double()
    assert torch.equal(runner_up_id.cpu(), expected_id)
    assert torch.equal(triplet[..., :2], expected[..., :2])
    torch.testing.assert_close(triplet[..., 2], expected[..., 2], rtol=1e-12, atol=2e-6)
    info = torch.finfo(logits.dtype)
    allowed = 4 * max(info.eps, 5e-7) * terms.abs().amax(-1, keepdim=True) + info.smallest_normal
    error = (ours - terms).abs()
    assert error.le(allowed).all(), (error / allowed).amax(-1)
    assert ours[(labels == IGNORE).cpu()].eq(0).all()


ENDINGS = {
    "inverted hinge": {"scale": 0.37},
    "rest": {},
    "capped rest": {"softcap": 30.0},
    "rest of a large softcap": {"softcap": 4000.0},  # logits as large as masks
}


def entries(logits, softcap=0.0, scale=None):
    """Turn logits into what the ending reads: tanh(z / softcap) with a softcap."""
    return torch.tanh(logits.float() / softcap).to(logits.dtype) if softcap else logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ending", ENDINGS)
def test_planted_rows(device, dtype, ending):
    for v in sizes(device):
        logits, labels = planted_logits(24, v, dtype)
        check(entries(logits, **ENDINGS[ending]).to(device), labels.to(device), **ENDINGS[ending])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [1 * KIB, 2 * KIB, 3 * KIB])
def test_clusters(emulation, monkeypatch, dtype, shared):
    """Where blocks have little shared memory, a row takes a cluster."""
    use_emulation(monkeypatch, emulation)
    monkeypatch.setattr(cuda, "_longest_row", lambda index: 1 << 20)
    clusters = set()
    for seed, times in enumerate([0.3, 0.9, 1.7, 3.1, 4.3]):
        v = int(times * shared) // dtype.itemsize
        emulation.set_machine(shared, 1 + seed, seed)
        logits, labels = planted_logits(36, v, dtype, seed)
        check(logits.clone(), labels, scale=1.0)
        clusters.add(emulation.last_launch() // 10000 % 10000)
        check(entries(logits, 30.0), labels, softcap=30.0)
        padded = torch.nn.functional.pad(logits, (1, 2))[:, 1:-2]
        check(padded, labels)
    assert len(clusters) >= 3 and max(clusters) == 8


@pytest.mark.parametrize("v, cluster", [(32000, 2), (50257, 2), (128256, 8), (262144, 8)])
def test_real_sizes(emulation, monkeypatch, v, cluster):
    use_emulation(monkeypatch, emulation)
    logits, labels = planted_logits(5, v, torch.bfloat16)
    check(logits.clone(), labels, scale=1 / 4096)
    assert emulation.last_launch() // 10000 % 10000 == cluster
    check(logits, labels)


LAYOUTS = {  # name -> (shape of the rows, padding of the store, the rows in the store)
    "padded": ((24,), (3, 5), lambda x: x[:, 3:-5]),
    "sliced": ((2, 12), (0, 0, 0, 1), lambda x: x[:, :-1]),
    "three strides": ((2, 3, 4), (0, 0, 0, 1, 0, 2), lambda x: x[:, :-2, :-1]),
    "no rows": ((24,), (0, 0), lambda x: x[:0]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, v", [(torch.bfloat16, 1001), (torch.float32, 515), (torch.float16, 1000)])
def test_strides(device, layout, dtype, v):
    shape, padding, part = LAYOUTS[layout]
    logits, labels = (x.to(device) for x in planted_logits(24, v, dtype))
    store = torch.nn.functional.pad(logits.view(*shape, v), padding, value=7.0)
    rows, labels = part(store), labels.view(shape)
    around = store.clone()
    for ending in ENDINGS.values():
        rows.copy_(entries(part(around), **ending))
        check(rows, labels[: len(rows)], **ending)
        rows.copy_(part(around))
        assert torch.equal(store, around), "wrote outside the rows"
    check(logits[0], labels.view(-1)[0])  # no dimension before V


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_nan_and_inf_never_give_a_plausible_number(device, dtype, fill):
    for v in (2, 3000):
        logits = torch.randn(3, v).to(dtype)
        for row, position in enumerate((0, 1, 5)):
            logits[row, position % v] = fill
        labels = torch.zeros(3, dtype=torch.int64, device=device)
        ours = logits.clone().to(device)
        triplet, _ = cuda.inverted_hinge_(ours, labels, IGNORE, one(device))
        assert triplet.softmax(-1).isnan().any(-1).all() and ours.isnan().any(-1).all()
    nan = torch.randn(1, 3000).to(dtype)
    nan[0, 2000] = torch.nan
    ours = nan.clone().to(device)
    assert cuda.rest_probabilities_(ours, labels[:1], IGNORE)[0][0, 2].isnan() and ours[0, 1:].isnan().any()
    masked = torch.full((1, 3000), -torch.inf, dtype=dtype)
    masked[0, 2000], masked[0, 0] = torch.nan, 1.0
    triplet, _ = cuda.inverted_hinge_(masked.to(device), labels[:1], IGNORE, one(device))
    assert triplet.softmax(-1).isnan().any()


@pytest.mark.parametrize("mask", [-1e10, -1e30, 1e12, "lowest"])
def test_masks_that_are_finite(device, mask):
    """At such masks, float32 rounds a product with log2(e) by more than the largest exponent of 2."""
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.finfo(dtype).min if mask == "lowest" else mask
        logits = torch.full((4, 3000), value).to(dtype)
        labels = torch.tensor([7, 0, 2999, 7], device=device)
        logits[0, 7] = logits[0, 9] = logits[1, 9] = 1.0  # kept: target and another word; another word; none
        logits[3, 7], logits[3, 9], logits[3, 11] = 1.0, 2.0, 0.5
        for ending in ({"scale": 1.0}, {}):
            check(logits.clone().to(device), labels, **ending)


@pytest.mark.parametrize("ending", [{}, {"scale": 4096.0}])
def test_small_entries_keep_their_digits(device, ending):
    """An entry is right to its own last digits, also where its term would underflow in float16."""
    for dtype in DTYPES:
        logits = (3 * torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))).to(dtype)
        labels = torch.zeros(4, dtype=torch.int64)
        _, _, terms = exact_results(logits, labels, 0.0, ending.get("scale"))
        ours, info = logits.to(device), torch.finfo(dtype)
        check(ours, labels.to(device), **ending)
        error, quantum = (ours.cpu().double() - terms).abs(), info.smallest_normal * info.eps
        assert error.le(1.01 * max(info.eps, 4e-6) * terms.abs() + quantum).all()


def test_any_order_gives_the_same(emulation, monkeypatch):
    use_emulation(monkeypatch, emulation)
    monkeypatch.setattr(cuda, "_longest_row", lambda index: 1 << 20)
    results = []
    for seed in range(4):
        emulation.set_machine(2 * KIB, 1 + seed, seed)
        logits, labels = planted_logits(24, 2049, torch.float16)
        triplet, runner_up_id = cuda.inverted_hinge_(logits, labels, IGNORE, one("cpu"))
        results.append((logits, triplet, runner_up_id))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    "old, new",
    [
        ("if (thread == 0) announce(i);", ""),
        ("    await_messages(0);\n    begin_load(n + step, next_target);",
         "    begin_load(n + step, next_target);\n    await_messages(0);"),
    ],
    ids=["announcement", "early copy"],
)  # fmt: skip
def test_the_emulation_shows_a_mistake(tmp_path, monkeypatch, old, new):
    """Without an announcement, or with a copy over a row in use, the emulated kernel fails or is wrong."""
    module = build_emulation(tmp_path, [(old, new)], f"broken_{len(old)}")
    use_emulation(monkeypatch, module)
    monkeypatch.setattr(cuda, "_longest_row", lambda index: 1 << 20)
    module.set_machine(10 * KIB, 2, 0)
    with pytest.raises((AssertionError, RuntimeError)):
        check(*planted_logits(24, 4100, torch.float32), scale=1.0)


def test_the_longest_row(emulation, monkeypatch):
    """The core takes a row of the length that it names, and refuses a longer one by name."""
    use_emulation(monkeypatch, emulation)
    assert emulation.cuda_longest_row(0) == 1 << 20
    emulation.set_machine(99 * KIB, RESIDENT, 0)  # of a block on a card for desktops
    assert 512 * KIB < emulation.cuda_longest_row(0) < 1 << 20
    emulation.set_machine(0, RESIDENT, 0)  # the answer of gpu.h for a device that cannot run the kernels
    assert emulation.cuda_longest_row(0) == 0 and not cuda.serves(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"cannot run on cpu: they need compute capability 9\.0"):
        cuda.check_built(torch.zeros(2, 3))
    cuda._longest_row.cache_clear()
    emulation.set_machine(6 * KIB, RESIDENT, 0)
    longest = emulation.cuda_longest_row(0)
    assert 6 * KIB < longest < 48 * KIB
    for dtype in DTYPES:
        v = longest // dtype.itemsize
        aligned = torch.randn(2, v).to(dtype)
        shifted = torch.nn.functional.pad(aligned, (1, 0))[:, 1:]
        assert cuda._fits(aligned) and not cuda._fits(shifted)
        assert cuda._fits(shifted[:, : v + 1 - 16 // dtype.itemsize])
        labels = torch.tensor([v - 1, 0])
        check(aligned, labels, scale=1.0)
        check(shifted[:, : v + 1 - 16 // dtype.itemsize], labels.clamp(max=9))
        rows = (aligned.data_ptr(), 1, 1, 0, 0, 2 * v, native._DTYPE_TAGS[dtype])
        with pytest.raises(ValueError, match=f"no kernel for 1 rows of {2 * v} logits"):
            emulation.cuda_rest_probabilities_(rows, labels.data_ptr(), IGNORE, 0.0, 0, 0, (0, 0))


def test_longer_rows_go_to_the_next_backend(emulation, monkeypatch):
    use_emulation(monkeypatch, emulation)
    emulation.set_machine(6 * KIB, RESIDENT, 0)
    calls = []

    fallback = SimpleNamespace(
        inverted_hinge_=lambda *arguments: calls.append(arguments),
        rest_probabilities_=lambda *arguments, softcap: calls.append((*arguments, softcap)),
    )
    monkeypatch.setattr(cuda, "_fallback", lambda: fallback)
    logits, labels, scale = torch.randn(2, 20000), torch.tensor([0, 1]), one("cpu")
    assert not cuda.serves(logits) and cuda.serves(logits[:, :100])
    cuda.inverted_hinge_(logits, labels, IGNORE, scale)
    cuda.rest_probabilities_(logits, labels, IGNORE, softcap=3.0)
    assert calls == [(logits, labels, IGNORE, scale), (logits, labels, IGNORE, 3.0)]


def test_bad_arguments_are_refused(emulation, monkeypatch):
    use_emulation(monkeypatch, emulation)
    logits, labels, scale = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64), one("cpu")
    for bad_logits, bad_labels, bad_scale, message in (
        (logits.t(), labels, scale, "last dimension of logits must be contiguous"),
        (logits, labels[:3], scale, "labels must be"),
        (logits, labels.int(), scale, "labels must be"),
        (logits, labels, scale.float(), "scale must be"),
        (logits.double(), labels, scale, "float32, bfloat16 or float16"),
        (logits[:, :1], labels, scale, "V >= 2"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.inverted_hinge_(bad_logits, bad_labels, IGNORE, bad_scale)
    for bad in (9, -1):
        labels[2] = bad
        with pytest.raises(RuntimeError, match="the kernel failed"):
            cuda.rest_probabilities_(logits.clone(), labels, IGNORE)


@pytest.mark.parametrize("current", [0, 1])
def test_the_device_of_a_launch(monkeypatch, current):
    """A device that is torch's current one is not entered, since that takes longer than a launch."""
    entered, launched = [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=70 + index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda index: entered.append(index) or nullcontext())
    logits = SimpleNamespace(device=torch.device("cuda", 1))
    cuda._launch(lambda *arguments: launched.append(arguments), logits, 5, 6)
    assert launched == [(5, 6, (1, 71))] and entered == ([] if current == 1 else [1])


# --- on a GPU alone -------------------------------------------------------------------------------


@pytest.mark.gpu
def test_few_rows_and_many(gpu):
    for n, v in ((1, 32000), (1, 262144), (133, 128256), (131, 50257), (1000, 32000)):
        check(*(x.cuda() for x in planted_logits(n, v, torch.bfloat16)), scale=1.0)


@pytest.mark.gpu
def test_another_stream_and_a_graph(gpu):
    logits, labels = (x.cuda() for x in planted_logits(24, 50257, torch.bfloat16))
    expected = cuda.rest_probabilities_(logits.clone(), labels, IGNORE)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            assert torch.equal(cuda.rest_probabilities_(logits.clone(), labels, IGNORE)[0], expected)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    static = logits.clone()
    with torch.cuda.graph(graph):
        triplet, _ = cuda.inverted_hinge_(static, labels, IGNORE, one("cuda"))
    for _ in range(2):
        static.copy_(logits)
        graph.replay()
        assert torch.equal(triplet, expected)


@pytest.mark.gpu
def test_more_entries_than_an_int_can_count(gpu):
    n, v = 17000, 128256  # 2.2e9 entries in 4.1 GiB
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("less than 8 GiB of free memory")
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    labels = torch.zeros(n, dtype=torch.int64, device="cuda")
    logits[-1, 5] = 3.0
    triplet, runner_up_id = cuda.inverted_hinge_(logits, labels, IGNORE, one("cuda"))
    assert runner_up_id[-1] == 5 and runner_up_id[0] == 1
    assert logits[-1, 5] < 0 and logits[-1, 0] > 0
    torch.testing.assert_close(triplet[0, 2].item(), torch.tensor(float(v - 2)).double().log().item())


@pytest.mark.gpu
def test_a_bad_label_is_an_error(gpu):
    code = """if True:
        import torch
        from loku_kernels.backends import cuda
        try:
            cuda.rest_probabilities_(torch.randn(4, 9).cuda(), torch.full((4,), 9).cuda(), -100)
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise SystemExit(7)
    """
    assert run_python(code).returncode == 7


# --- compiled, not run ----------------------------------------------------------------------------


@needs_nvcc
def test_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import cuda_table

    committed = json.loads(cuda_table.TABLE.read_text())
    ours = cuda_table.table()
    assert cuda_table.problems(ours, committed) == []
    # The check can fail.
    facts = next(iter(ours["kernels"].values()))["sm_90"]
    facts["spill_bytes"], facts["fences_in_loops"] = 4, 1
    lines = cuda_table.problems(ours, committed)
    assert "spills 4 bytes" in lines[0] and "1 fences of global memory in loops" in lines[1]
    ours["kernels"].popitem()
    assert any("not the kernels" in line for line in cuda_table.problems(ours, committed))


def test_fences_in_loops_are_seen(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import cuda_table

    loop = "$L__BB0_1:\n{}\n$L__BB0_2:\n@%p1 bra $L__BB0_1;\n{}\n@%p2 bra.uni $L__BB0_3;\n$L__BB0_3:"
    for fence in ("barrier.cluster.arrive.aligned;", "membar.gl;", "fence.acq_rel.gpu;"):
        assert cuda_table.fences_in_loops(loop.format(fence, "")) == 1
        assert cuda_table.fences_in_loops(loop.format("", fence)) == 0
    assert cuda_table.fences_in_loops(loop.format("fence.proxy.async.shared::cta;", "")) == 0


@needs_nvcc
def test_older_architectures_are_refused_by_name(tmp_path):
    source = ROOT / "csrc" / "fused_rows_cuda.cu"
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-ptx", str(source), "-o", str(tmp_path / "x.ptx")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "need compute capability 9.0" in result.stderr


@pytest.mark.skipif(native._core is None or not native._core.has_cuda, reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_driver(monkeypatch):
    """The CUDA calls of the core fail with a reason, and the backend serves nothing, with one warning."""
    assert "no CUDA driver or device" in native._core.cuda_error()
    with pytest.raises(RuntimeError, match=r"loku_kernels, .*driver"):
        native._core.cuda_rest_probabilities_((0, 1, 1, 0, 9, 9, 0), 0, IGNORE, 0.0, 0, 0, (0, 0))
    monkeypatch.setattr(cuda, "_on_cuda", lambda tensor: True)
    logits, _ = planted_logits(12, 50, torch.float32)
    with pytest.warns(RuntimeWarning, match="no CUDA driver or device") as caught:
        assert not cuda.serves(logits) and not cuda.serves(logits)
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="cannot run on cpu: no CUDA driver"):
        cuda.check_built(logits)


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
    monkeypatch.setattr(cuda, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(native._core, "has_cuda", False)
    assert not cuda.serves(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="without its CUDA kernels"):
        cuda.check_built(torch.zeros(2, 3))
    monkeypatch.setattr(cuda, "_on_cuda", lambda tensor: False)
    cuda.check_built(torch.zeros(2, 3))


def test_the_reference_serves_what_triton_cannot(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cuda._fallback.__wrapped__() is reference
