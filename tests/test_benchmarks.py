"""Every benchmark runs, in a tiny configuration, and the report reads what they write. No speed is tested."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OPTIONS = {
    "ihl_kernel": ["--shape", "12x301", "--dtype", "float32", "bfloat16", "float16"],
    "linear": ["--shape", "24x16x301", "--dtype", "float32", "bfloat16"],
    "fisher": ["--shape", "2x3x8x6", "--models"],
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
    for name in [*OPTIONS, "demo", "harness", "report"]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", OPTIONS)
def test_it_runs(name, results):
    path = results / f"{name}_cpu.json"
    options = {"build_model": lambda: tiny_model("gpt_neo")} if name == "unlearn" else {}
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
