"""Links of the documentation: their files and anchors exist, and README stays short."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```.*?^```", re.S | re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(path):
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*?)(?: \{ #([\w-]+) \})?$", text_of(path), re.M)
    return {
        given or re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())
        for title, given in headings
    }


def test_links(page):
    source = ROOT / page
    for link in LINK.findall(text_of(source)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (source.parent / file).resolve() if file else source
        assert target.is_file() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_one_version():
    """CITATION.cff repeats the version of the package."""
    import loku_kernels

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == loku_kernels.__version__
    assert f"## {loku_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
