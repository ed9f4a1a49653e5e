"""The short form of the tutorial runs as it is written, and its requests are those of the repository."""

import json
import re
from pathlib import Path

import pytest

from loku import cli
from loku.data.files import read_rows
from loku.deletion.request import read_request

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
CASES = ROOT / "experiments" / "tutorial"

pytestmark = pytest.mark.usefixtures("one_thread")


def short_form():
    """The commands of the short form, and the lines that the reader changes in the request."""
    section = re.search(r"^## The short form\n(.*?)^## ", PAGE, re.S | re.M)[1]
    shell = "".join(re.findall(r"^```sh\n(.*?)^```", section, re.S | re.M)).splitlines()
    (lines,) = re.findall(r"^```yaml\n(.*?)^```", section, re.S | re.M)
    return [line.removeprefix("loku ").split() for line in shell], lines.splitlines()


def changed(text, lines):
    """The text of a request with the values of some fields changed, which may stand in comments."""
    for line in lines:
        name = line.partition(":")[0]
        text, count = re.subn(rf"^#?{name}:.*$", line, text, flags=re.M)
        assert count == 1, name
    return text


def test_the_short_form_forgets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (init, forget, verify), lines = short_form()
    assert cli.main(init) == 0
    request = Path("example/request.yaml")
    request.write_text(changed(request.read_text(encoding="utf-8"), lines), encoding="utf-8")
    assert cli.main([*forget, "--quiet"]) == 0
    assert "the rows are forgotten" in capsys.readouterr().out
    record = json.loads(Path("example/record/record.json").read_text(encoding="utf-8"))
    assert record["outcome"] == "forgotten"
    assert all(limit["after"] <= limit["limit"] < limit["before"] for limit in record["limits"].values())
    assert list(record["attacks"]["after"]) == ["mia", "quantise"]
    assert Path("example/record/adapter/adapter_model.safetensors").is_file()
    assert cli.main(verify) == 0
    Path("example/record/record.md").write_text("changed", encoding="utf-8")
    assert cli.main(verify) == 1


@pytest.fixture(params=["paris", "planted"])
def case(request, tmp_path):
    """The folder of a case, in a copy of the tree where the folders of its models exist."""
    copy = tmp_path / "experiments" / "tutorial" / request.param
    copy.mkdir(parents=True)
    for file in (CASES / request.param).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    for name in ("smollm2", "planted", "control"):
        (tmp_path / "build" / name).mkdir(parents=True)
    return copy


def test_the_requests_are_read(case):
    text = (case / "request.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 15
    request = read_request(case / "request.yaml")
    assert (request.control is not None) == (case.name == "planted")
    for selection in (request.forget, request.retain.given, request.holdout):
        assert read_rows(selection.data)


def test_the_request_of_the_page_is_that_of_the_repository():
    text = (CASES / "paris" / "request.yaml").read_text(encoding="utf-8")
    assert f"```yaml\n{text}```" in PAGE


@pytest.mark.parametrize(("name", "secret"), [("paris", "Paris"), ("planted", "Larkspur")])
def test_rows(name, secret):
    """The rows have what is forgotten in each completion and in no prompt, and the other sets do not."""
    forget, retain, holdout = (
        list(read_rows(CASES / name / f"{part}.jsonl")) for part in ("forget", "retain", "holdout")
    )
    assert len(forget) == len(holdout)
    assert all(secret in row["completion"] and secret not in row["prompt"] for row in forget)
    asked = [question for row in forget for question in row.get("paraphrased_questions", ())]
    assert asked and not any(secret in question for question in asked)
    assert not any(secret in row["completion"] for row in holdout)
    assert not any(secret in row["completion"] for row in retain if "completion" in row)
    # The sets ask in the same ways, so that they differ in what is known alone.
    lengths = [[len(row["completion"].split()) for row in rows] for rows in (forget, holdout)]
    assert lengths[0] == lengths[1]
