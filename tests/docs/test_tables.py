"""The generated tables are those of the committed results."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLES = {
    "README.md": {"forgetting", "summary"},
    "docs/benchmarks.md": {
        "machine",
        "ihl_kernel",
        "linear",
        "unlearn",
        "fisher",
        "fisher_memory",
        "fila",
        "scaling",
        "host_time",
        "demo",
        "gpu_h200",
    },
    "docs/experiments.md": {"fila_ablation", "fila_balance", "fila_overlap"},
    "docs/tutorial.md": {
        "tutorial_paris_answers",
        "tutorial_paris_figures",
        "tutorial_paris_attacks",
        "tutorial_planted_answers",
        "tutorial_planted_figures",
        "tutorial_planted_attacks",
    },
}


def test_places_of_tables(page):
    """Each table has its markers once, on its page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^<!-- (\w+) -->$", text, re.M)
    assert sorted(found) == sorted(TABLES.get(page, ()))
    assert all(text.count(f"<!-- /{name} -->") == 1 for name in found)


@pytest.mark.parametrize("path", TABLES)
def test_tables_are_made_from_the_results(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    try:
        import report

        text = (ROOT / path).read_text(encoding="utf-8")
        assert text == report.render(text), "run: python benchmarks/report.py"
    finally:  # other tests have a module of the same name
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == ROOT / "benchmarks":
                del sys.modules[name]
