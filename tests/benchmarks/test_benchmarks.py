"""Each benchmark runs in a tiny configuration, and the report reads the results. No speed is tested."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from loku_kernels.backends import native

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
OPTIONS = {
    "ihl_kernel": ["--shape", "12x301", "--dtype", "float32", "bfloat16", "float16"],
    "linear": ["--shape", "24x16x301", "--dtype", "float32", "bfloat16"],
    "fisher": ["--shape", "2x3x8x6", "--models"],
    "fisher_memory": ["--shape", "2x8", "--budget", "none"],
    "fila": ["--shape", "40x30x2", "--rank", "4", "--no-embedded"],
    "unlearn": ["--shape", "2x12", "--dtype", "float32", "bfloat16"],
    "host_time": ["--shape", "4x8x16"],
    "fingerprint": ["--shape", "2x16"],
    "scaling": ["--shape", "8x301", "8x602", "--large", "6x400", "128x400", "--limit-gib", "0.0001"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    torch.compiler.set_stance("force_eager")  # compiling takes longer than all the rest
    yield
    torch.compiler.set_stance("default")
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("name", OPTIONS)
def test_it_runs(name, results):
    path = results / f"{name}_cpu.json"
    options = {}
    if name in ("unlearn", "fisher_memory"):
        options = {"build_model": partial(tiny_model, "gpt_neo")}
    common = ["--threads", "1", "--runs", "1", "--json", str(path)]
    importlib.import_module(name).main([*OPTIONS[name], *common], **options)
    result = json.loads(path.read_text())
    assert result["environment"]["versions"]["torch"] == torch.__version__
    timed = [row for row in result["rows"] if "milliseconds" in row]
    assert timed and all(row["threads"] == 1 and row["milliseconds"] > 0 for row in timed)
    assert len({json.dumps({**row, "milliseconds": 0}) for row in timed}) == len(timed)


def write_empty_pages(report, root):
    """Write the pages with the markers of their tables and nothing between them."""
    (root / "docs").mkdir()
    for page, names in report.PAGES.items():
        text = "\n".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names)
        (root / page).write_text(text, encoding="utf-8")


def test_report(results, tmp_path):
    """Tables and picture come from the results of the tests before this one."""
    if len(list(results.glob("*.json"))) < len(OPTIONS):
        pytest.skip("needs the results of the other tests here")
    for name in ("demo", "gpu_h200"):
        shutil.copyfile(BENCHMARKS / "results" / f"{name}.json", results / f"{name}.json")
    report = importlib.import_module("report")
    command = ["--results", str(results), "--root", str(tmp_path)]
    with pytest.raises(SystemExit, match="is missing"):
        report.main([*command, "--check"])
    write_empty_pages(report, tmp_path)
    with pytest.raises(SystemExit, match="out of date"):
        report.main([*command, "--check"])
    report.main(command)
    report.main([*command, "--check"])
    pages = {page: (tmp_path / page).read_text(encoding="utf-8") for page in report.PAGES}
    assert "12 x 301 float32" in pages["README.md"]
    assert all(part in pages["docs/benchmarks.md"] for part in ("12 x 301 float32", "24 x 16 x 301 bfloat16"))
    for text in pages.values():
        for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block
        assert "\n| " in text and report.render(text, results) == text
    assert 1000 < (results / "scaling_cpu.png").stat().st_size < 100_000
    cut = pages["README.md"].replace("<!-- /summary -->", "")
    (tmp_path / "README.md").write_text(cut, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"README.md needs <!-- summary --> and <!-- /summary --> once"):
        report.main(command)


def test_report_reads_the_committed_results(tmp_path):
    report = importlib.import_module("report")
    write_empty_pages(report, tmp_path)
    shutil.copytree(BENCHMARKS / "results", tmp_path / "results")
    report.main(["--results", str(tmp_path / "results"), "--root", str(tmp_path)])
    tables = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    gpu = tables.split("<!-- gpu_h200 -->")[1].split("<!-- /gpu_h200 -->")[0]
    assert "On one NVIDIA H200, torch 2.11.0, Triton 3.6.0" in gpu
    assert "0 functions failed and 0 cases were left out" in gpu
    # 2 x 8192 x 32000 bytes in 0.152 ms, of 4.8 TB/s
    assert "| 8192 x 32000 | 0.152 (1.25; 3456 GB/s, 72%) | 0.296 (2.45; 1771 GB/s, 37%) |" in gpu
    rows = json.loads((BENCHMARKS / "results" / "gpu_h200.json").read_text())["rows"]
    for shape in {row["shape"] for row in rows}:
        assert f"\n| {shape.replace('x', ' x ')} | " in gpu


def test_time_on_a_gpu_is_between_events_behind_a_wait(monkeypatch):
    harness = importlib.import_module("harness")
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, end):
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("wait"))
    assert harness.seconds_of(lambda: calls.append("call"), "cuda") == 2e-3
    assert calls == ["wait", "record", "call", "record", "synchronize"]


def test_processor_time_counts_every_thread_and_no_waiting():
    harness = importlib.import_module("harness")

    def busy():
        end = time.thread_time() + 1e-3
        while time.thread_time() < end:
            pass

    def in_another_thread():
        thread = threading.Thread(target=busy)
        thread.start()
        thread.join()

    assert harness.processor_seconds_of(in_another_thread) >= 1e-3
    assert harness.processor_seconds_of(lambda: time.sleep(5e-3)) < 2.5e-3


def test_percentiles_lie_around_the_median():
    harness = importlib.import_module("harness")
    seconds = iter([9.0, 5.0, 1.0, 2.0, 3.0, 4.0])  # the first is the warm-up
    found = harness.measured({"f": lambda: None}, runs=5, timer=lambda *call: next(seconds), memory=False)
    (row,) = found.rows()
    assert row["milliseconds"] == 3e3
    assert row["milliseconds_p20"] == pytest.approx(1.8e3) and row["milliseconds_p80"] == pytest.approx(4.2e3)


def test_host_time_is_over_eager_cross_entropy(results):
    path = results / "host_time_cpu.json"
    if not path.exists():
        pytest.skip("needs the result of the other test here")
    result = json.loads(path.read_text())
    times = {row["name"]: row["times"]["eager cross_entropy"] for row in result["rows"]}
    assert times["eager cross_entropy"] == 1
    losses = {"ihl_loss", "ihl_loss in place", "cross_entropy_loss"}
    assert times.keys() > losses | {"linear_ihl_loss", "linear_cross_entropy_loss"}
    (line,) = importlib.import_module("tables").host_time(result).splitlines()[2:]
    assert f"({times['linear_ihl_loss']:.2f})" in line


@pytest.mark.parametrize(
    "wrong", [lambda loss: 1.1 * loss, lambda loss: loss.detach() - (loss - loss.detach())]
)
def test_unlearn_checks_losses_and_gradients_in_bfloat16(wrong, monkeypatch, results):
    """A loss that is 10% off, and a gradient of the wrong sign, stop the benchmark."""
    unlearn = importlib.import_module("unlearn")
    right = unlearn.official_loss
    monkeypatch.setattr(unlearn, "official_loss", lambda *arguments: wrong(right(*arguments)))
    command = [
        "--dtype",
        "bfloat16",
        *OPTIONS["unlearn"][:2],
        "--threads",
        "1",
        "--json",
        str(results / "no"),
    ]
    with pytest.raises(AssertionError, match=r"gives|is off by"):
        unlearn.main(command, build_model=partial(tiny_model, "gpt_neo"))


# --- benchmarks/gpu.py ----------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """The command for a GPU, on the CPU and in small, to test how it goes on."""
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "SECONDS", 0)
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "peak_extra_bytes", lambda function, device: [function()] and 0)
    return module


def test_gpu_plan(capsys):
    gpu, plan, cases, runs = map(importlib.import_module, ("gpu", "gpu_plan", "gpu_cases", "gpu_runs"))
    gpu.main(["--dry-run", "--card", "H200 SXM"])
    printed = capsys.readouterr().out
    assert list(plan.SHAPES) == [*cases.CASES, *runs.CASES, *runs.RUNS] == list(plan.SMALL_SHAPES)
    assert list(plan.STEPS) == list(plan.BUDGETS) == ["build", "tests", *plan.SHAPES]
    for step, shapes in plan.SHAPES.items():
        assert f"\n{step}: " in printed
        for shape in shapes:
            assert f"\n  {plan.label_of(shape)} " in printed
            assert 0 < plan.floors(step, shape, "H200 SXM")[2] <= plan.floors(step, shape, "A100 SXM")[2]


def test_gpu_builds_the_core_before_it_imports_it():
    code = "import sys, gpu; sys.exit('loku_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True)


def test_gpu_goes_on_from_the_committed_results(gpu, tmp_path, monkeypatch):
    """Rows of an earlier version are read, and kept as they are."""
    path = tmp_path / "gpu.json"
    shutil.copyfile(BENCHMARKS / "results" / "gpu_h200.json", path)
    earlier = json.loads(path.read_text())
    result_files = importlib.import_module("result_files")
    monkeypatch.setattr(result_files, "environment", lambda *args: earlier["environment"])
    run = gpu.Run(tmp_path, 1, "cpu")
    assert all(run.done(row["step"], row["shape"]) for row in earlier["rows"])
    run.write()
    assert json.loads(path.read_text()) == earlier


@pytest.mark.skipif(native._core is None, reason="no compiled core")
def test_gpu_measures_what_it_can_and_goes_on(gpu, tmp_path, monkeypatch):
    def too_large(*shape):
        raise torch.OutOfMemoryError("out of memory")

    cases_of, plan, peers = (importlib.import_module(name) for name in ("gpu_cases", "gpu_plan", "peers"))
    monkeypatch.setitem(cases_of.CASES, "fused", too_large)
    small = plan.SMALL_SHAPES
    command, path = ["--device", "cpu", "--out", str(tmp_path)], tmp_path / "gpu.json"
    gpu.main([*command, "--minutes", "0"])
    result = json.loads(path.read_text())
    assert not result["rows"] and len(result["left_out"]) == sum(map(len, small.values()))

    gpu.main(command)
    result = json.loads(path.read_text())
    assert not result["left_out"]
    assert result["failed"] == [{"step": "fused", "shape": "6x50", "why": "OutOfMemoryError: out of memory"}]
    cases = {(row["step"], row["shape"]) for row in result["rows"]}
    expected = {(step, plan.label_of(shape)) for step, shapes in small.items() for shape in shapes}
    assert cases == expected - {("fused", "6x50")}
    names = {step: {row["name"] for row in result["rows"] if row["step"] == step} for step in small}
    assert "softmax_triplet [native]" in names["forward"] and "with divisor [native]" in names["fisher"]
    assert "linear_ihl_loss [native]" in names["linear"] and "ihl_loss in place" in names["host"]
    assert names["step"] == {"without adapters", "forward and backward", "whole step"}
    assert names["initialise"] == {"first call", "second call"}
    assert names["run"] == {"whole run", "Fisher and initialisation", "training", "saving"}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert "torch chunked linear_cross_entropy" in names["linear"]
    times = {row["name"]: row["milliseconds"] for row in result["rows"] if row["step"] == "run"}
    assert sum(times.values()) == pytest.approx(2 * times["whole run"], rel=0.1)
    for row in result["rows"]:
        assert row["milliseconds"] > 0
        if row["step"] not in ("initialise", "run"):
            assert row["times_floor"] > 0 and row["milliseconds_p20"] <= row["milliseconds_p80"]
    committed = json.loads((BENCHMARKS / "results" / "gpu_h200.json").read_text())
    assert result.keys() == committed.keys()
    for step in {row["step"] for row in committed["rows"]} - {"fused"}:
        ours, theirs = (
            {row["name"]: set(row) for row in rows if row["step"] == step}
            for rows in (result["rows"], committed["rows"])
        )
        percentiles = {"milliseconds_p20", "milliseconds_p80"}
        assert all(keys - percentiles == theirs[name] for name, keys in ours.items() if name in theirs), step
    assert (tmp_path / "gpu_linear.png").exists() or not peers.importable("matplotlib")
    table = importlib.import_module("gpu_tables").gpu(result)
    assert "| 2 x 64 x 96 x 80 x 4 x 8 x 2 | whole run |" in table and "1 functions failed" in table

    kept = [row for row in result["rows"] if row["step"] != "forward"]
    path.write_text(json.dumps({**result, "rows": kept}))
    measured = []
    monkeypatch.setattr(gpu, "measure", lambda run, step, shape, seconds: measured.append((step, shape)))
    gpu.main(command)
    assert measured == [("forward", shape) for shape in small["forward"]]
    path.write_text(json.dumps({**result, "environment": {**result["environment"], "commit": "another"}}))
    with pytest.raises(SystemExit, match="another commit"):
        gpu.main(command)


def test_gpu_stops_a_case_at_the_end_of_its_time_and_keeps_its_rows(gpu, tmp_path, monkeypatch):
    def two_rows(device, *shape):
        yield {"name": "first call", "milliseconds": 1.0}
        time.sleep(30)
        yield {"name": "second call", "milliseconds": 1.0}

    runs, cases = importlib.import_module("gpu_runs"), importlib.import_module("gpu_cases")
    monkeypatch.setitem(runs.RUNS, "initialise", two_rows)
    never_ends = cases.Case({"ours": lambda: time.sleep(30)}, lambda times: times["ours"])
    monkeypatch.setitem(cases.CASES, "fused", lambda *shape: never_ends)
    run = gpu.Run(tmp_path, 1, "cpu")
    begin = time.monotonic()
    gpu.measure(run, "initialise", (2, 64, 96, 80), 0.2)
    gpu.measure(run, "fused", (6, 50), 0.2)
    assert time.monotonic() - begin < 20
    assert [row["name"] for row in run.rows] == ["first call"]
    assert [entry["step"] for entry in run.failed] == ["initialise", "fused"]
    assert all(entry["why"] == "OutOfTime: stopped after 0 s" for entry in run.failed)
    # The budget of a step ends it before the time of the command does.
    monkeypatch.setitem(gpu.BUDGETS, "fused", 0)
    gpu.run_steps(run, ["fused"], {"fused": [(8, 50)]})
    assert run.left_out == [{"step": "fused", "shape": "8x50"}]


def test_gpu_loses_no_function_to_another(gpu, tmp_path, monkeypatch):
    calls = iter(range(5))

    def late():
        if next(calls) == 4:
            raise RuntimeError("no more\nof this")

    def never():
        raise ImportError

    functions = {"late": late, "never": never, "ours": lambda: None}
    cases = importlib.import_module("gpu_cases")
    case = cases.Case(
        functions, lambda times: times["never"], lambda times: 2 * times["ours"], over=("late", "ours")
    )
    monkeypatch.setitem(cases.CASES, "forward", lambda *shape: case)
    run = gpu.Run(tmp_path, 1, "cpu")
    gpu.measure(run, "forward", (6, 50), 60)
    (row,) = run.rows
    assert row["name"] == "ours" and row["times_floor"] is None and row["over"] == {"ours": 1.0}
    assert row["times_target"] == pytest.approx(0.5)
    assert {entry["name"]: entry["why"] for entry in run.failed} == {
        "late": "RuntimeError: no more",
        "never": "ImportError: ",
    }
