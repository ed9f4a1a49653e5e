"""Every benchmark runs, in a tiny configuration, and the report reads what they write. No speed is tested."""

import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from loku_kernels.backends import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONS = {
    "ihl_kernel": ["--shape", "12x301", "--dtype", "float32", "bfloat16", "float16"],
    "linear": ["--shape", "24x16x301", "--dtype", "float32", "bfloat16"],
    "fisher": ["--shape", "2x3x8x6", "--models"],
    "fisher_memory": ["--shape", "2x8", "--budget", "none"],
    "fila": ["--shape", "40x30x2", "--rank", "4", "--no-embedded"],
    "unlearn": ["--shape", "2x12"],
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
    for name in [*OPTIONS, "demo", "gpu", "harness", "report"]:
        sys.modules.pop(name, None)


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


def test_report(results):
    """After the others: tables and picture are made of what they wrote."""
    if len(list(results.glob("*.json"))) < len(OPTIONS):
        pytest.skip("needs the results of the other tests here")
    (results / "demo.json").write_text((BENCHMARKS / "results" / "demo.json").read_text())
    report = importlib.import_module("report")
    readme = results / "README.md"
    readme.write_text(report.README.read_text(encoding="utf-8"), encoding="utf-8")
    report.main(["--results", str(results), "--readme", str(readme)])
    text = readme.read_text(encoding="utf-8")
    assert "12 x 301 float32" in text and "24 x 16 x 301 bfloat16" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    assert report.render(text, results) == text
    assert 1000 < (results / "scaling_cpu.png").stat().st_size < 100_000


# --- benchmarks/gpu.py ----------------------------------------------------------------------------

SMALL = {
    "forward": [(6, 50), (8, 40)],
    "fused": [(6, 50)],
    "linear": [(12, 8, 60)],
    "fisher": [(2, 3, 8, 6)],
    "fila": [(40, 36, 2)],
}


@pytest.fixture
def gpu(monkeypatch):
    """The command for a GPU, on the CPU and in small: what is tested is how it goes on."""
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "SHAPES", SMALL)
    monkeypatch.setattr(module, "SECONDS", 0)
    monkeypatch.setattr(module, "peak_extra_bytes", lambda function, device: [function()] and 0)
    monkeypatch.setattr(module, "release", lambda: None)
    return module


def test_gpu_plan(capsys):
    gpu = importlib.import_module("gpu")
    gpu.main(["--dry-run", "--card", "H200 SXM"])
    printed = capsys.readouterr().out
    assert set(gpu.SHAPES) == set(gpu.CASES) and {*gpu.CASES, "build", "tests"} == set(gpu.STEPS)
    for step, shapes in gpu.SHAPES.items():
        assert f"\n{step}: " in printed
        for shape in shapes:
            assert f"\n  {gpu.label_of(shape)} " in printed
            assert 0 < gpu.floors(step, shape, "H200 SXM")[2] <= gpu.floors(step, shape, "A100 SXM")[2]


@pytest.mark.skipif(native._core is None, reason="no compiled core")
def test_gpu_measures_what_it_can_and_goes_on(gpu, tmp_path, monkeypatch):
    def too_large(*shape):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(gpu.CASES, "fused", too_large)
    command, path = ["--out", str(tmp_path), "--only", *gpu.CASES], tmp_path / "gpu.json"
    gpu.main([*command, "--minutes", "0"])
    result = json.loads(path.read_text())
    assert not result["rows"] and len(result["left_out"]) == sum(map(len, SMALL.values()))

    gpu.main(command)
    result = json.loads(path.read_text())
    assert not result["left_out"]
    failed = {"step": "fused", "shape": "6x50", "why": "OutOfMemoryError: out of memory"}
    assert failed in result["failed"]
    cases = {(row["step"], row["shape"]) for row in result["rows"]}
    expected = {(step, gpu.label_of(shape)) for step, shapes in SMALL.items() for shape in shapes}
    assert cases == expected - {("fused", "6x50")}
    names = {row["name"] for row in result["rows"]}
    assert names >= {
        "softmax_triplet [native]",
        "linear_ihl_loss [native]",
        "with divisor [native]",
    }
    assert all(row["milliseconds"] > 0 and row["times_floor"] > 0 for row in result["rows"])
    assert (tmp_path / "gpu_linear.png").exists() or not gpu.importable("matplotlib")

    kept = [row for row in result["rows"] if row["step"] != "forward"]
    path.write_text(json.dumps({**result, "rows": kept}))
    measured = []
    monkeypatch.setattr(gpu, "measure", lambda run, *case: measured.append(case))
    gpu.main(command)
    assert measured == [("forward", shape) for shape in SMALL["forward"]]
    path.write_text(json.dumps({**result, "environment": {**result["environment"], "commit": "another"}}))
    with pytest.raises(SystemExit, match="another commit"):
        gpu.main(command)


def test_gpu_loses_no_function_to_another(gpu, tmp_path, monkeypatch):
    calls = iter(range(5))

    def late():
        if next(calls) == 4:
            raise RuntimeError("no more\nof this")

    def never():
        raise ImportError

    functions = {"late": late, "never": never, "ours": lambda: None}
    case = gpu.Case(
        functions, lambda times: times["never"], lambda times: 2 * times["ours"], over=("late", "ours")
    )
    monkeypatch.setitem(gpu.CASES, "forward", lambda *shape: case)
    run = gpu.Run(tmp_path, 1)
    gpu.measure(run, "forward", (6, 50))
    (row,) = run.rows
    assert row["name"] == "ours" and row["times_floor"] is None and row["over"] == {"ours": 1.0}
    assert row["times_target"] == pytest.approx(0.5)
    assert {entry["name"]: entry["why"] for entry in run.failed} == {
        "late": "RuntimeError: no more",
        "never": "ImportError: ",
    }
