"""The table of the fields in docs/deletion.md is that of the code."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from loku.deletion import request as module
from loku.deletion.request import Request, RetainSource, RowSelection, read_request

PAGE = Path(__file__).parents[3] / "docs" / "deletion.md"
# The fields of the file whose fields of the dataclass have another name.
NAMES = {
    "near_duplicates.similarity": "near_duplicate_similarity",
    "near_duplicates.include": "include_near_duplicates",
    "serving.target": "target",
    "serving.rank": "rank",
    "model.revision": "revision",
    "model.tokenizer": "tokenizer",
    "model.arguments": "model_arguments",
}
MAPPINGS = ("near_duplicates", "serving", "retain")  # whose defaults are those of their fields


@pytest.fixture(scope="module")
def section():
    text = PAGE.read_text(encoding="utf-8")
    return re.search(r"^## The request\n(.*?)^## ", text, re.S | re.M)[1]


def defaults(cls):
    return {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(cls)
    }


def test_the_table_has_every_field_with_its_default(section):
    table = dict(re.findall(r"^\| `([a-z_.]+)` \| (.*?) ?\| ", section, re.M))
    names = {*module.FIELDS, *(f"model.{name}" for name in module.MODEL_FIELDS)}
    names |= {f"forget.{name}" for name in module.SELECTION_FIELDS}
    names |= {f"retain.{name}" for name in module.RETAIN_FIELDS if name not in module.SELECTION_FIELDS}
    names |= {"near_duplicates.similarity", "near_duplicates.include", "serving.target", "serving.rank"}
    assert table.keys() == names
    request, selection, retain = defaults(Request), defaults(RowSelection), defaults(RetainSource)
    for name, shown in table.items():
        outer, _, inner = name.rpartition(".")
        if name == "version":
            value = module.VERSION
        elif outer in ("forget", "retain"):
            value = (selection if outer == "forget" else retain)[inner]
        else:
            value = request.get(NAMES.get(name, name), dataclasses.MISSING)
        if name in MAPPINGS or value is dataclasses.MISSING:  # it has none
            assert shown == "", name
        else:
            value = list(value) if isinstance(value, tuple) else value
            assert yaml.safe_load(shown) == value, name


def test_the_example_of_the_page_is_a_request(section, tmp_path):
    for name in ("customers", "retain", "articles", "unseen"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "model").mkdir()
    text = re.search(r"^```yaml\n(.*?)^```", section, re.S | re.M)[1]
    assert len(text.splitlines()) <= 15
    (tmp_path / "request.yaml").write_text(text)
    request = read_request(tmp_path / "request.yaml")
    assert request.forget.contains == request.requester == "Jane Doe"
    assert request.rank == 16
