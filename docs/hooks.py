"""Hooks of mkdocs: pages and pictures of the repository that lie outside ``docs``.

A link in the Markdown names the file where it lies in the repository. So it works there as well as in the
built site, and no file is committed twice.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")
RESULTS = (
    "benchmarks/results/*.png",
    "experiments/results/*.png",
    "experiments/results/*.md",
    "experiments/records/*/*.png",
    "experiments/records/*/*.md",
)
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def outside_files() -> list[str]:
    """The paths, relative to the repository, of the files that the site takes from outside ``docs``."""
    found = (path.relative_to(ROOT).as_posix() for pattern in RESULTS for path in sorted(ROOT.glob(pattern)))
    return [*PAGES, *found]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the outside files, under their paths in the repository."""
    for path in outside_files():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between repository files into links between pages of the site."""
    inside = Path(page.file.abs_src_path).is_relative_to(config.docs_dir)
    folder = posixpath.dirname(page.file.src_uri)
    source = posixpath.join("docs", folder) if inside else folder

    def site_link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(source, match[2]))
        if target == "README.md":
            target = "docs/index.md"
        target = target.removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            return match[0]
        return f"{match[1]}{os.path.relpath(target, folder or '.')}{match[3] or ''}{match[4]}"

    return LINK.sub(site_link, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write one colon before a code block of a docstring, where Google's style has two."""
    return re.sub(r"::(</p>\s*<div class=\"[^\"]*highlight)", r":\1", html)
