"""The README's Python runs as it stands, and its tables are those of the committed results."""

import re
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
# Those behind a marker are tested where their surroundings are: see test_recipes.py.
SNIPPETS = re.findall(r"(?<!-->\n)^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.split("\n", 1)[0])
def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, str(README), "exec"), {"__name__": "__main__"})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


def test_tables_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(README.parent / "benchmarks")
    import report

    try:
        text = README.read_text(encoding="utf-8")
        assert text == report.render(text), "run: python benchmarks/report.py"
    finally:
        for name in ("report", "harness"):
            sys.modules.pop(name, None)
