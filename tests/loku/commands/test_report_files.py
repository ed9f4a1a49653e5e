"""``loku evaluate --out`` writes three files, and overwrites nothing but an earlier report's."""

import json
import os

import pytest

from loku import cli
from loku.commands.report_files import check_report_files, report_files, write_report_files

REPORT = {
    "model": "m",
    "adapter": None,
    "data": {"forget": "forget.jsonl"},
    "settings": {},
    "sets": {"forget": {"probability": 0.5}},
    "whole": {},
    "not_available": {},
}
LOG = {"eval_log_forget.json": {"avg_gt_loss": {"0": 1.0}}}


@pytest.fixture
def out(tmp_path):
    """An earlier report with its log and its picture."""
    write_report_files(tmp_path / "one.json", REPORT, LOG)
    return tmp_path / "one.json"


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_earlier_report_is_overwritten(out):
    assert sorted(file.name for file in out.parent.iterdir()) == ["one.json", "one.png", "one_log.json"]
    for log in (LOG, None):
        check_report_files(out, ["forget.jsonl", ""])
        assert write_report_files(out, REPORT, log)[0] == out
    report = json.loads(out.read_text())
    assert report.pop("sha256").keys() == {"picture"} and report == REPORT
    (out.parent / "one_log.json").unlink()  # of the report before
    check_report_files(out)
    (out.parent / "empty.json").touch()  # as mktemp makes it
    check_report_files(out.parent / "empty.json")
    check_report_files(out.parent / "new" / "newer" / "two.json")
    assert not (out.parent / "new").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.json", '{"sets": {}}'),
        ("one.json", '{"question": "a user\'s row"}\n'),
        ("one.json", "[" * 100_000),
        ("one_log.json", "{}"),
        ("one.png", "a photograph"),
    ],
)
def test_the_files_of_others_are_not_overwritten(name, text, out, capsys):
    (out.parent / name).write_text(text)
    before = contents(out.parent)
    with pytest.raises(ValueError, match=f"would overwrite {out.parent / name}, which is not .*move it away"):
        check_report_files(out)
    assert cli.main(["evaluate", "absent", "--data", "forget=absent.jsonl", "--out", str(out)]) == 2
    assert f"would overwrite {out.parent / name}" in capsys.readouterr().err
    assert contents(out.parent) == before


def test_a_log_or_a_picture_without_its_report_is_not_overwritten(out):
    log, picture = report_files(out)[1:]
    out.unlink()
    with pytest.raises(ValueError, match=f"would overwrite {log}, which is not a file of the report {out}"):
        check_report_files(out)
    with pytest.raises(ValueError, match=f"would overwrite {log}, which is not an earlier report"):
        check_report_files(log)
    log.unlink()
    with pytest.raises(ValueError, match=f"would overwrite {picture}, which is not a file of the report"):
        check_report_files(out)


def test_an_input_is_not_overwritten(out, monkeypatch):
    log = report_files(out)[1]
    for read in (out, log, os.path.relpath(log)):
        with pytest.raises(
            ValueError, match=f"--out {out} would write .*, which is read; pass another --out"
        ):
            check_report_files(out, [read])
    (out.parent / "link.jsonl").symlink_to(log)
    with pytest.raises(ValueError, match=f"would write {log}, which is read"):
        check_report_files(out, [out.parent / "link.jsonl"])


def test_what_is_no_file_is_not_overwritten(out):
    for name in ("one.png", "one.PNG"):
        with pytest.raises(ValueError, match=f"{name} must be the file of a JSON report"):
            check_report_files(out.parent / name)
    with pytest.raises(ValueError, match="must be the file of a JSON report"):
        check_report_files(out.parent)
    with pytest.raises(ValueError, match="--out /dev/null would write /dev/null, which is no file"):
        check_report_files("/dev/null")
    for file in report_files(out)[1:]:
        file.unlink()
        file.mkdir()
        with pytest.raises(ValueError, match=f"would write {file}, which is no file"):
            check_report_files(out)
        file.rmdir()
        file.symlink_to(out)
        with pytest.raises(ValueError, match=f"would write two files to {out}"):
            check_report_files(out)
        file.unlink()


def test_a_place_that_cannot_be_written_is_found_first(out):
    with pytest.raises(NotADirectoryError, match="nothing was started"):
        check_report_files(out / "two.json")


def test_measures_that_cannot_be_drawn_are_written(tmp_path):
    with pytest.raises(ValueError, match="there is no measure to plot"):
        write_report_files(tmp_path / "one.json", {**REPORT, "sets": {"text": {"perplexity": 2.0}}}, None)
    assert json.loads((tmp_path / "one.json").read_text())["sets"] == {"text": {"perplexity": 2.0}}
    check_report_files(tmp_path / "one.json")
