"""Ledgers: chains of records."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from deletion_facts import facts

from loku.deletion import ledger as ledgers
from loku.deletion.ledger import (
    LEDGER,
    append,
    check_model,
    earlier_requests,
    latest_state,
    read_ledger,
    verify_ledger,
)
from loku.deletion.record import RECORD, write_record
from loku.deletion.request import RowSelection
from loku.deletion.seal import SUMS, seal, sums_digest


def make_record(ledger, name, state=None, outcome="not forgotten", **replaced):
    """A sealed record in a ledger, with the folder of an adapter or a model if it is asked for."""
    folder = ledger / name
    folder.mkdir(parents=True)
    small = {"measures": None, "training": None, "attacks": None, "outcome": outcome}
    request = {**facts()["request"], "reference": f"reference of {name}", "path": f"{ledger.parent}/17.yaml"}
    write_record(folder, facts(**{**small, "request": request, **replaced}))
    (folder / "request.yaml").write_text(
        "version: 1\nmodel: gone  # it is not read\nforget: {data: rows.jsonl, contains: Someone}\n"
    )
    if state is not None:
        (folder / state).mkdir()
        (folder / state / "weights").write_text(name)
    seal(folder)
    return folder


@pytest.fixture()
def ledger(tmp_path):
    """A ledger of three records: an adapter, a run that was undone, and a model."""
    folder = tmp_path / "ledger"
    for name, state, outcome in (
        ("first", "adapter", "forgotten"),
        ("second", None, "undone"),
        ("third", "model", "not forgotten"),
    ):
        append(folder, make_record(folder, name, state, outcome))
    return folder


def lines_of(ledger):
    return (ledger / LEDGER).read_bytes().splitlines(keepends=True)


def test_a_line_has_the_facts_of_its_record(ledger):
    lines = lines_of(ledger)
    digests = [hashlib.sha256(line).hexdigest() for line in lines]
    for number, (line, name, outcome) in enumerate(
        zip(lines, ("first", "second", "third"), ("forgotten", "undone", "not forgotten"), strict=True), 1
    ):
        assert json.loads(line) == {
            "number": number,
            "record": name,
            "reference": f"reference of {name}",
            "outcome": outcome,
            "sha256": hashlib.sha256((ledger / name / SUMS).read_bytes()).hexdigest(),
            "previous": None if number == 1 else digests[number - 2],
            "time": facts()["times"]["end"],
        }
    found = read_ledger(ledger)
    last = subprocess.run(f"tail -n 1 {LEDGER} | sha256sum", shell=True, cwd=ledger, capture_output=True)
    assert last.stdout.decode().split() == [digests[-1], "-"]  # as the documentation says
    assert found.last_digest == digests[-1] and [entry.number for entry in found.entries] == [1, 2, 3]
    assert verify_ledger(ledger) == []


def test_a_record_is_appended_once(ledger):
    """A run that was killed between its seal and its append appends when it goes on."""
    before = lines_of(ledger)
    entry = append(ledger, ledger / "second")
    assert entry.number == 2 and lines_of(ledger) == before
    late = make_record(ledger, "late")
    assert verify_ledger(ledger) == [f"the record late is not in {LEDGER}"]
    assert append(ledger, late).number == 4 == append(ledger, late).number
    assert lines_of(ledger)[:3] == before and verify_ledger(ledger) == []


def test_a_record_that_was_made_anew_is_not_appended(ledger):
    (ledger / "first" / "more").write_text("x")
    seal(ledger / "first")
    before = lines_of(ledger)
    with pytest.raises(ValueError, match="has another record first: line 1"):
        append(ledger, ledger / "first")
    assert lines_of(ledger) == before


def test_only_good_records_of_the_folder_are_appended(ledger, tmp_path):
    before = lines_of(ledger)
    elsewhere = make_record(tmp_path, "elsewhere")
    with pytest.raises(ValueError, match="must be a folder in that of the ledger"):
        append(ledger, elsewhere)
    (ledger / "link").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="must be a folder in that of the ledger"):
        append(ledger, ledger / "link")
    for name in (".hidden", "nested/record"):
        with pytest.raises(ValueError, match="must be a folder in that of the ledger"):
            append(ledger, make_record(ledger, name))
    changed = make_record(ledger, "changed")
    (changed / "record.md").write_text("All is well.")
    with pytest.raises(ValueError, match=r"does not verify: record\.md was changed"):
        append(ledger, changed)
    assert lines_of(ledger) == before


def test_a_broken_ledger_takes_no_record(ledger):
    record = make_record(ledger, "late")
    lines = lines_of(ledger)
    (ledger / LEDGER).write_bytes(b"".join([lines[0], lines[2]]))
    with pytest.raises(ValueError, match="line 2 does not follow"):
        append(ledger, record)
    assert lines_of(ledger) == [lines[0], lines[2]]


def test_writers_wait_for_each_other(tmp_path):
    folder = tmp_path / "ledger"
    records = [make_record(folder, f"record-{number}") for number in range(6)]
    threads = [threading.Thread(target=append, args=(folder, record)) for record in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_ledger(folder).entries) == 6 and verify_ledger(folder) == []


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_killed_append_leaves_the_ledger_whole(ledger, call):
    """A writer that is killed before its file has its name has written nothing; the next call appends."""
    record = make_record(ledger, "late")
    before = lines_of(ledger)
    code = f"""
        import os, signal
        {call} = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
        from loku.deletion.ledger import append
        append({str(ledger)!r}, {str(record)!r})
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == -9
    assert lines_of(ledger) == before
    assert append(ledger, record).number == 4
    assert verify_ledger(ledger) == []
    assert not [name for name in os.listdir(ledger) if name.endswith(".unfinished")]


# Verification


def test_a_changed_byte_of_the_list_is_found(ledger):
    """The last line, too, although no line has its digest: its record has what it says."""
    whole = (ledger / LEDGER).read_bytes()
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 1
        (ledger / LEDGER).write_bytes(changed)
        assert verify_ledger(ledger), f"byte {place}"


def test_what_was_done_to_records_is_named(ledger):
    (ledger / "first" / "adapter" / "weights").write_text("other weights")
    shutil.rmtree(ledger / "second")
    (ledger / "third" / "more").write_text("x")
    seal(ledger / "third")
    make_record(ledger, "unlisted")
    (ledger / "notes").mkdir()  # no record
    assert verify_ledger(ledger) == [
        "first: adapter/weights was changed",
        "line 2: the record second is missing",
        f"third: it is not the record that line 3 of {LEDGER} was written for",
        f"the record unlisted is not in {LEDGER}",
    ]


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ([1, 0, 2], "line 1 does not follow"),
        ([1, 2], "line 1 does not follow"),
        ([0, 2], "line 2 does not follow"),
        ([0, 0, 1, 2], "line 2 does not follow"),
    ],
    ids=["swapped", "first gone", "middle gone", "twice"],
)
def test_lines_that_were_moved_are_found(ledger, order, problem):
    lines = lines_of(ledger)
    (ledger / LEDGER).write_bytes(b"".join(lines[number] for number in order))
    (found,) = verify_ledger(ledger)
    assert problem in found


def test_a_missing_end_is_not_noticed_but_its_digest_is_another(ledger):
    """The docstring says so, and so does the command."""
    kept = read_ledger(ledger).last_digest
    lines = lines_of(ledger)
    (ledger / LEDGER).write_bytes(b"".join(lines[:2]))
    shutil.rmtree(ledger / "third")
    assert verify_ledger(ledger) == []
    assert read_ledger(ledger).last_digest != kept


def test_a_line_cannot_say_something_else_than_its_record(ledger):
    """A forger can write the last line anew, with its own digests right."""
    lines = lines_of(ledger)
    for name, value in (("outcome", "forgotten"), ("reference", ""), ("time", "2030-01-01T00:00:00+00:00")):
        entry = json.loads(lines[2]) | {name: value}
        (ledger / LEDGER).write_bytes(b"".join(lines[:2]) + json.dumps(entry).encode() + b"\n")
        assert verify_ledger(ledger) == [f"third: line 3 of {LEDGER} says something else than the record"]


@pytest.mark.parametrize(
    "change",
    [
        {"record": "../third"},
        {"record": "/etc"},
        {"record": ".."},
        {"record": ".hidden"},
        {"record": "a/b"},
        {"record": ["third"]},
        {"number": True},
        {"number": 3.0},
        {"sha256": "x"},
        {"previous": 5},
        {"time": None},
        {"more": 1},
    ],
    ids=lambda change: "-".join(f"{name} {value}" for name, value in change.items()).replace("/", "|"),
)
def test_a_hostile_line_is_refused(ledger, change):
    lines = lines_of(ledger)
    entry = json.dumps(json.loads(lines[2]) | change).encode() + b"\n"
    (ledger / LEDGER).write_bytes(b"".join(lines[:2]) + entry)
    assert verify_ledger(ledger) == [f"{LEDGER}, line 3 is broken"]
    with pytest.raises(ValueError, match="line 3 is broken"):
        latest_state(ledger)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\n", b"null\n", b"{}\n", b"\n"])
def test_a_hostile_list_is_refused(tmp_path, text):
    (tmp_path / LEDGER).write_bytes(text)
    assert verify_ledger(tmp_path) == [f"{LEDGER}, line 1 is broken"]


def test_a_list_that_is_no_file_is_refused(ledger, tmp_path):
    (ledger / LEDGER).unlink()
    assert verify_ledger(ledger) == [f"{LEDGER} is missing"]
    (ledger / LEDGER).symlink_to("/dev/zero")
    assert verify_ledger(ledger) == [f"{LEDGER} is not a regular file"]
    (ledger / LEDGER).unlink()
    with open(ledger / LEDGER, "wb") as stream:
        stream.truncate(ledgers.MAX_BYTES + 1)
    assert "more than" in verify_ledger(ledger)[0]


def test_a_record_that_became_a_link_is_missing(ledger, tmp_path):
    (ledger / "first").rename(tmp_path / "moved")
    (ledger / "first").symlink_to(tmp_path / "moved")
    assert verify_ledger(ledger) == ["line 1: the record first is missing"]


# The next request


def test_the_next_request_starts_from_the_newest_state(ledger):
    assert latest_state(ledger) == ledger / "third" / "model"
    append(ledger, make_record(ledger, "fourth", None, "not known"))
    assert latest_state(ledger) == ledger / "third" / "model"
    append(ledger, make_record(ledger, "fifth", "adapter", "forgotten"))
    assert latest_state(ledger) == ledger / "fifth" / "adapter"


def test_a_new_ledger_has_no_state(tmp_path):
    assert latest_state(tmp_path) is None and earlier_requests(tmp_path) == []
    assert latest_state(tmp_path / "nothing") is None
    folder = tmp_path / "ledger"
    append(folder, make_record(folder, "first", None, "undone"))
    assert latest_state(folder) is None and earlier_requests(folder) == []


@pytest.mark.parametrize("damage", ["weights", "state", "record"])
def test_nothing_starts_from_a_state_that_was_changed(ledger, damage):
    if damage == "weights":
        (ledger / "third" / "model" / "weights").write_text("other weights")
    else:  # an older state would be taken in silence
        shutil.rmtree(ledger / "third" / "model" if damage == "state" else ledger / "third")
    for find in (latest_state, earlier_requests):
        with pytest.raises(ValueError, match=r"does not verify: .*Nothing was started"):
            find(ledger)


def test_earlier_requests_are_those_that_left_a_model(ledger, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    first, third = earlier_requests(ledger)
    assert [found.entry.record for found in (first, third)] == ["first", "third"]
    assert first.record == ledger / "first"
    # A relative path begins at the folder of the original request, not at that of the copy.
    assert first.forget == RowSelection(f"{tmp_path}/rows.jsonl", contains="Someone") and first.reason == ""
    assert first.limits == {"memorization_accuracy": 0.3, "extraction_strength": 0.05}


def test_rows_that_were_deleted_since_are_said(ledger):
    for found in earlier_requests(ledger):
        assert found.forget is None and "rows.jsonl" in found.reason


def test_the_digest_of_a_record_is_that_of_its_list(ledger):
    record = ledger / "first"
    assert read_ledger(ledger).entries[0].sha256 == sums_digest(record)
    assert Path(record / RECORD).is_file()


def test_no_request_starts_beside_a_record_that_has_no_line(ledger):
    """Its run was stopped before its line, or the list was cut: what it forgot would come back."""
    make_record(ledger, "fourth", "adapter")
    with pytest.raises(ValueError, match=r"the record fourth in .* is not in ledger\.jsonl"):
        latest_state(ledger)
    append(ledger, ledger / "fourth")
    assert latest_state(ledger) == ledger / "fourth" / "adapter"
    (ledger / LEDGER).unlink()
    with pytest.raises(ValueError, match="the record first in"):
        latest_state(ledger)


def test_another_model_than_that_of_the_ledger_is_refused(tmp_path):
    ledger = tmp_path / "ledger"
    append(ledger, make_record(ledger, "first", "adapter"))
    [first] = earlier_requests(ledger)
    model = facts()["inputs"]["model"]
    check_model(first, {**model, "name": "moved"})
    with pytest.raises(ValueError, match="differ from those it began with"):
        check_model(first, {**model, "files": {**model["files"], "model.safetensors": "0" * 64}})
