"""Rows are read from JSON, from lines of JSON, from texts and from the hub."""

import sys
from types import ModuleType

import pytest

from loku.data.files import read_rows


def test_sources(tmp_path, monkeypatch):
    lines = tmp_path / "rows.json"  # TOFU's files have this form
    lines.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert read_rows(lines) == [{"text": "a\u2028b"}, {"text": "c"}]
    lines.write_text('[{"text": "a"},\n {"text": "b"}]', encoding="utf-8")
    assert read_rows(str(lines)) == [{"text": "a"}, {"text": "b"}]
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is not JSON"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.txt").write_text("one\n \ntwo\n")
    assert read_rows(tmp_path / "rows.txt") == ["one", "two"]
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "none.txt")

    hub = ModuleType("datasets")
    hub.load_dataset = lambda name, config, split: (name, config, split)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_rows("locuslab/TOFU:forget10_perturbed") == ("locuslab/TOFU", "forget10_perturbed", "train")
    assert read_rows("wikitext:wikitext-2-v1:test") == ("wikitext", "wikitext-2-v1", "test")
    assert read_rows("some/set") == ("some/set", None, "train")
    with pytest.raises(ValueError, match="CONFIG"):
        read_rows("a:b:c:d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_rows("some/set")
