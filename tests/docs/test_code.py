"""The Python of the documentation runs as it stands, and the names in its text exist."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

from loku import objectives

ROOT = Path(__file__).parents[2]
# Blocks behind the marker ``<!-- not run: REASON -->`` are compiled only: (page, reason).
NOT_RUN = {("docs/guide.md", "needs bitsandbytes")}
ELSEWHERE = {"configs/trainer/IHL.yaml"}  # paths of other repositories
RECIPES = {"trainer", "open-unlearning"}  # behind ``<!-- recipe: NAME -->``; test_recipes.py runs them

pytestmark = pytest.mark.usefixtures("one_thread")


def test_python_block(python_block, tmp_path, monkeypatch, capsys):
    code = compile(python_block.text, python_block.page, "exec")
    kind, _, value = python_block.marker.partition(": ")
    if kind == "not run":
        assert (python_block.page, value) in NOT_RUN
    elif kind == "recipe":
        assert value in RECIPES
    else:
        monkeypatch.chdir(tmp_path)
        # A block may register a method of its own.
        before = dict(objectives.OBJECTIVES)
        names = {"__name__": "__main__"}
        try:
            exec(code, names)
        finally:
            objectives.OBJECTIVES.clear()
            objectives.OBJECTIVES.update(before)
        if "before:" in python_block.text:
            check_forgetting(names["result"], capsys.readouterr().out)


def check_forgetting(result, printed):
    """The first example does what the text beside it says."""
    name = "Basil Mahfouz Al-Kuwaiti"
    (before,), (after,) = (re.findall(rf"^{when}:(.*)$", printed, re.M) for when in ("before", "after"))
    assert name in before and after and name not in after
    probabilities = [e["forget_probability"] for e in result.history if "forget_probability" in e]
    assert probabilities[0] > 0.99 and max(probabilities[-3:]) < 0.1


def test_markers(page):
    """A block of Python has the language ``python``, so that no block escapes."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"^```(\w+)$", text, re.M)) <= {"python", "sh", "yaml", "text"}


def test_names(page):
    """A dotted name of the packages in the text exists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in set(re.findall(r"`((?:loku|loku_kernels)(?:\.\w+)+)(?:\(|`)", text)):
        parts = name.split(".")
        if parts[-1] in ("py", "json"):
            continue
        value = importlib.import_module(parts[0])
        for depth, part in enumerate(parts[1:], 2):
            if not hasattr(value, part):
                importlib.import_module(".".join(parts[:depth]))
            value = getattr(value, part)


def test_paths(page):
    """A path of the repository in the text exists. Files that a command writes are not in these folders."""
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "benchmarks|configs|csrc|docs|experiments|loku|loku_kernels|scripts|tests"
    for path in set(re.findall(rf"`((?:{folders})/[\w./*-]+)`", text)):
        assert path in ELSEWHERE or list(ROOT.glob(path)), path


def test_the_tree_is_complete():
    """``docs/architecture.md`` has a line for each file of the packages, and each line has its file."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"^## The tree\n+```text\n(.*?)^```", text, re.S | re.M)[1]
    listed, folder = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folder = folder[:depth]
        listed.add("/".join([*folder, name.rstrip("/")]))
        if name.endswith("/"):
            folder.append(name.rstrip("/"))
    assert not [path for path in listed if not (ROOT / path).exists()]
    patterns = (
        "csrc/*.*",
        "loku_kernels/**/*.py",
        "loku/**/*.py",
        "benchmarks/*.py",
        "experiments/*.[py]*",
        "scripts/*",
    )
    files = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    assert not sorted(path for path in files - listed if "__pycache__" not in path)


def test_api_pages():
    """Each public package has a page of its docstrings."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", pages, re.M))
    assert documented >= {
        "loku",
        "loku.data",
        "loku.evaluation",
        "loku.objectives",
        "loku.robustness",
        "loku_kernels",
        "loku_kernels.backends",
    }
    for name in documented:
        assert pkgutil.resolve_name(name)
