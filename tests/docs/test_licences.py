"""The distributions have MIT files alone, and the notice of each file of others."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METADATA = """Name: loku-kernels
License-Expression: MIT
License-File: LICENSE
License-File: loku/embedded/LICENSE

License-Expression: another, in the description
"""


@pytest.fixture(scope="module")
def check_distributions():
    spec = importlib.util.spec_from_file_location(
        "check_distributions", ROOT / "scripts" / "check_distributions.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sample_of_wikitext_is_not_distributed(check_distributions):
    """It is under CC BY-SA, which the licence expression does not name."""
    problems = check_distributions.problems_of_licence
    wikitext = "experiments/data/wikitext.jsonl"
    assert problems({"loku/embedded/tofu.jsonl", "loku/models.py"}, METADATA) == []
    assert problems({wikitext}, METADATA) == [f"{wikitext} has no known licence"]
    assert f"exclude {wikitext}\n" in (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    assert not any(map(wikitext.startswith, check_distributions.OWN_DATA))


def test_the_metadata_name_the_licence(check_distributions):
    problems = check_distributions.problems_of_licence
    for line in METADATA.splitlines()[1:4]:
        assert problems(set(), METADATA.replace(f"{line}\n", "", 1)) == [f"the metadata lack {line}"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'license = "MIT"' in project
    assert 'license-files = ["LICENSE", "loku/embedded/LICENSE"]' in project


def test_each_data_file_has_a_known_licence(check_distributions):
    folders = (
        "benchmarks",
        "configs",
        "csrc",
        "docs",
        "experiments",
        "loku",
        "loku_kernels",
        "scripts",
        "tests",
    )
    names = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in check_distributions.DATA
    }
    assert "loku/embedded/tofu.jsonl" in names
    names -= {check_distributions.WIKITEXT}  # of the repository
    assert check_distributions.problems_of_licence(names, METADATA) == []


def test_the_notice_names_the_files_of_others():
    """The notice lists what derives from TOFU, in this package and in the source distribution."""
    notice = (ROOT / "loku" / "embedded" / "LICENSE").read_text(encoding="utf-8")
    for path in (ROOT / "tests" / "data").glob("phi_*.json.gz"):
        assert f"tests/data/{path.name}" in notice
    for name in ("tofu.jsonl", "retain_only.json", "idontknow.txt", "experiments/results/tofu_twins"):
        assert re.search(rf"(?<![\w/]){re.escape(name)}", notice), name
