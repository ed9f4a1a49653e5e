"""The ledger: a folder of records, and the list of them in the order in which they were made.

``ledger.jsonl`` has a line for each record. A line has the digest of the ``SHA256SUMS`` of its record, which
stands for all its files, and the digest of the line before it. So no line and no record can be changed, taken
out or put in between without a trace. The chain alone does not show that lines are missing at its end. A
reader who keeps the digest of the last line elsewhere can tell (``Ledger.last_digest``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loku.deletion.record import MAX_BYTES, RECORD, is_digest, read_record, read_regular
from loku.deletion.seal import SUMS, shown, sums_digest, verify

if TYPE_CHECKING:
    from loku.deletion.request import RowSelection

LEDGER = "ledger.jsonl"
REQUEST = "request.yaml"  # in a record: the copy of the request's file
STATES = ("adapter", "model")  # the folders of a record that hold what the request left
_LOCK = ".ledger.lock"
_LONGEST_WAIT = 60.0  # seconds; an append takes less


@dataclass(frozen=True)
class Entry:
    """A line of a ledger.

    Attributes:
        number: Its number, from 1.
        record: The name of the record's folder, which lies in the folder of the ledger.
        reference: The reference number of the request; "" for none.
        outcome: The outcome of the record.
        sha256: The SHA-256 of the ``SHA256SUMS`` of the record.
        previous: The SHA-256 of the line before, with its end; None for the first.
        time: The end of the run, in ISO 8601.
    """

    number: int
    record: str
    reference: str
    outcome: str
    sha256: str
    previous: str | None
    time: str


@dataclass(frozen=True)
class Ledger:
    """The lines of a ledger, as ``read_ledger`` returns them.

    Attributes:
        entries: The lines.
        last_digest: The SHA-256 of the last line, with its end; None for an empty ledger.
    """

    entries: tuple[Entry, ...]
    last_digest: str | None


@dataclass(frozen=True)
class EarlierRequest:
    """An earlier request of a ledger whose rows must stay forgotten.

    Attributes:
        entry: Its line.
        record: The folder of its record.
        forget: The rows that it selects; None if they cannot be found any more.
        reason: Why they cannot be found; "" if they can.
        limits: The greatest value of each measure of its rows, as its record has them.
        data_digest: The digest of the data from which they were selected; None if its record has none.
    """

    entry: Entry
    record: Path
    forget: RowSelection | None
    reason: str
    limits: Mapping[str, float]
    data_digest: str | None = None


def append(ledger: str | os.PathLike, record: str | os.PathLike) -> Entry:
    """Append a sealed record to a ledger.

    A record that is the ledger's already is not appended again. So a run that was killed after its seal goes
    on by a second call. Writers wait for each other.

    Args:
        ledger: The folder of the ledger.
        record: The folder of the record, which lies in the folder of the ledger.

    Returns:
        The line of the record.

    Raises:
        ValueError: The record lies elsewhere or does not verify. Or the ledger is broken, or has another
            record of the same folder. Nothing was written.
        TimeoutError: Another process has held the ledger for a minute.
        OSError: The ledger cannot be written.
    """
    from filelock import FileLock

    from loku.saving.directories import whole_file

    ledger, record = Path(ledger), Path(record)
    name = record.resolve().name
    if record.resolve().parent != ledger.resolve() or not _is_name(name):
        raise ValueError(f"the record {record} must be a folder in that of the ledger, {ledger}")
    with FileLock(ledger / _LOCK, timeout=_LONGEST_WAIT):
        if problems := verify(record):
            raise ValueError(f"the record {record} does not verify: {problems[0]}")
        facts, digest = read_record(record), sums_digest(record)
        data, found = _read(ledger)
        for entry in found.entries:
            if entry.sha256 == digest and entry.record == name:
                return entry
            if entry.record == name:
                raise ValueError(f"{ledger / LEDGER} has another record {name}: line {entry.number}")
        entry = Entry(
            number=len(found.entries) + 1,
            record=name,
            reference=facts["request"].get("reference") or "",
            outcome=facts["outcome"],
            sha256=digest,
            previous=found.last_digest,
            time=facts["times"]["end"],
        )
        with whole_file(ledger / LEDGER) as unfinished:
            unfinished.write_bytes(data + _line(entry))
    return entry


def read_ledger(ledger: str | os.PathLike) -> Ledger:
    """Read the lines of a ledger and check their chain. The records are not read.

    Args:
        ledger: The folder of the ledger.

    Raises:
        ValueError: A line is broken, or the chain is. The message names the line.
        OSError: ``ledger.jsonl`` cannot be read.
    """
    return _read(Path(ledger), must_exist=True)[1]


def verify_ledger(ledger: str | os.PathLike, public_key: str | os.PathLike | None = None) -> list[str]:
    """Check the chain of a ledger and all its records.

    Args:
        ledger: The folder of the ledger. Nothing of it is trusted.
        public_key: The file of the public key by which all records must be signed; None (default) for none.

    Returns:
        What is wrong, in words; [] for a good ledger. Lines that are missing at the end are not noticed.

    Raises:
        ValueError: ``public_key`` is no Ed25519 key.
        OSError: The folder, or ``public_key``, cannot be read.
        ImportError: A record is signed, and the package ``cryptography`` is missing.
    """
    ledger = Path(ledger)
    try:
        entries = read_ledger(ledger).entries
    except FileNotFoundError:
        return [f"{LEDGER} is missing"]
    except ValueError as error:
        return [str(error)]
    problems = []
    for entry in entries:
        record = ledger / entry.record
        if record.is_symlink() or not record.is_dir():
            problems.append(f"line {entry.number}: the record {shown(entry.record)} is missing")
            continue
        wrong = verify(record, public_key) or _contradictions(entry, record)
        problems += [f"{shown(entry.record)}: {problem}" for problem in wrong]
    problems += [f"the record {shown(name)} is not in {LEDGER}" for name in _unlisted(ledger, entries)]
    return problems


def _unlisted(ledger: Path, entries: Iterable[Entry]) -> list[str]:
    """The names of the folders with a record that no line has."""
    listed = {entry.record for entry in entries}
    return [
        name
        for name in sorted(os.listdir(ledger))
        if name not in listed and any(os.path.lexists(ledger / name / file) for file in (RECORD, SUMS))
    ]


def _contradictions(entry: Entry, record: Path) -> list[str]:
    """What the line of a good record says and the record does not."""
    if sums_digest(record) != entry.sha256:
        return [f"it is not the record that line {entry.number} of {LEDGER} was written for"]
    facts = read_record(record)
    told = (entry.reference, entry.outcome, entry.time)
    known = (facts["request"].get("reference") or "", facts["outcome"], facts["times"]["end"])
    return [] if told == known else [f"line {entry.number} of {LEDGER} says something else than the record"]


def latest_state(ledger: str | os.PathLike) -> Path | None:
    """Return the folder of the adapter or model from which the next request starts.

    It is that of the newest record that has one: some outcomes, such as "undone", leave no model.

    Args:
        ledger: The folder of the ledger. It need not exist.

    Returns:
        The folder, or None if no record has one.

    Raises:
        ValueError: The ledger is broken, the record does not verify, or a record of the folder has no line.
    """
    entries = _entries(ledger)
    if os.path.isdir(ledger) and (unlisted := _unlisted(Path(ledger), entries)):
        # Its run was stopped before its line, or lines are missing: what it forgot would come back.
        raise ValueError(
            f"the record {shown(unlisted[0])} in {ledger} is not in {LEDGER}. Nothing was started; start its "
            "request again, which adds the line, or restore the lines, or move the record away"
        )
    for entry in reversed(entries):
        record = Path(ledger) / entry.record
        _refuse_broken(entry, record)  # also one without a state: somebody may have deleted it
        if (state := _state(record)) is not None:
            return state
    return None


def earlier_requests(ledger: str | os.PathLike) -> list[EarlierRequest]:
    """Return the requests of a ledger whose rows must stay forgotten: those that left a model.

    Args:
        ledger: The folder of the ledger. It need not exist.

    Raises:
        ValueError: The ledger is broken, or a record does not verify.
    """
    from loku.deletion.request import read_forget  # it imports the settings of a training

    found = []
    for entry in _entries(ledger):
        record = Path(ledger) / entry.record
        _refuse_broken(entry, record)
        if _state(record) is None:
            continue
        facts = read_record(record)
        limits = {
            name: limit["limit"]
            for name, limit in (facts.get("limits") or {}).items()
            if limit and limit.get("limit") is not None
        }
        forget, reason = None, ""
        try:
            forget = read_forget(record / REQUEST, Path(facts["request"].get("path") or record).parent)
        except (OSError, ValueError) as error:  # the data may be deleted, too, as it should be
            reason = str(error)
        data = ((facts.get("inputs") or {}).get("data") or {}).get("forget") or {}
        found.append(EarlierRequest(entry, record, forget, reason, limits, data.get("sha256")))
    return found


def check_model(first: EarlierRequest, model: Mapping[str, Any]) -> None:
    """Refuse another model than that with which a ledger began: its states are changes of that one.

    Args:
        first: The first request of the ledger.
        model: The ``loku.deletion.facts.model_digests`` of the model of the next request.

    Raises:
        ValueError: The files of the model, or of its base, differ.
    """
    began = (read_record(first.record).get("inputs") or {}).get("model") or {}
    if began and any(began.get(name) != model.get(name) for name in ("files", "base")):
        raise ValueError(
            f"the ledger {first.record.parent} began with the model {began.get('name')}, and its requests go "
            f"on from one another. The files of the model {model['name']} differ from those it began with. "
            "Nothing was started; name that model, or another ledger"
        )


def _state(record: Path) -> Path | None:
    folders = [record / name for name in STATES]
    return next((folder for folder in folders if folder.is_dir() and not folder.is_symlink()), None)


def _refuse_broken(entry: Entry, record: Path) -> None:
    try:
        problems = verify(record) or _contradictions(entry, record)
    except OSError as error:
        problems = [str(error)]
    if problems:
        raise ValueError(
            f"the record {record} of the ledger does not verify: {problems[0]}. Nothing was started; "
            "loku record verify shows all"
        )


def _entries(ledger: str | os.PathLike) -> tuple[Entry, ...]:
    return _read(Path(ledger))[1].entries


def _read(ledger: Path, must_exist: bool = False) -> tuple[bytes, Ledger]:
    """The bytes and the lines of a ledger, whose chain holds."""
    try:
        data = read_regular(ledger / LEDGER, MAX_BYTES)
    except FileNotFoundError:
        if must_exist:
            raise
        return b"", Ledger((), None)
    entries: list[Entry] = []
    previous = None
    names = set()
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        entry = _parsed(line, number)
        if entry.number != number or entry.previous != previous:
            raise ValueError(f"{LEDGER}, line {number} does not follow the line before it")
        if entry.record in names:
            raise ValueError(f"{LEDGER}, line {number} has the record of another line")
        names.add(entry.record)
        entries.append(entry)
        previous = hashlib.sha256(line).hexdigest()
    return data, Ledger(tuple(entries), previous)


def _line(entry: Entry) -> bytes:
    return json.dumps(asdict(entry), allow_nan=False).encode() + b"\n"


def _parsed(line: bytes, number: int) -> Entry:
    """The entry of a line. The line must have the very bytes that ``append`` writes."""
    try:
        entry = Entry(**json.loads(line))
    except (TypeError, ValueError, RecursionError):
        entry = None
    if (
        entry is None
        or type(entry.number) is not int
        or not all(isinstance(text, str) for text in (entry.reference, entry.outcome, entry.time))
        or not (is_digest(entry.sha256) and (entry.previous is None or is_digest(entry.previous)))
        or not _is_name(entry.record)
        or _line(entry) != line
    ):
        raise ValueError(f"{LEDGER}, line {number} is broken")
    return entry


def _is_name(name: Any) -> bool:
    """Whether the name of a record is that of a folder in the ledger's, and not a hidden one."""
    return (
        isinstance(name, str)
        and name not in ("", LEDGER)
        and not name.startswith(".")
        and not (set(name) & {"/", "\0"})
    )
