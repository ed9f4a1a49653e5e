"""The record of a deletion: what was asked, what was done, what came out and what was not tested.

``record.json`` holds the facts. ``record.md``, ``record.html`` and the pictures are made of the facts alone.
Equal facts give equal bytes. The facts hold counts, indices, figures and digests, and no text of the rows.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
RECORD = "record.json"
OUTCOMES = ("forgotten", "not forgotten", "undone", "not known", "delete the adapter")
REQUIRED = ("schema", "outcome", "request", "times")
MAX_BYTES = 16 << 20  # of record.json
_MOST_LEVELS = 32


@dataclass(frozen=True)
class Field:
    """A field of a record.

    Attributes:
        path: The keys that lead to it, with points between them. ``*`` stands for any key, and for each item
            of a list.
        kind: One of "text", "number", "count", "flag", "digest", "time", "object" and "list".
        meaning: What it says.
    """

    path: str
    kind: str
    meaning: str


FIELDS = (
    Field("schema", "count", "the version of this schema, 1"),
    Field("outcome", "text", "one of " + ", ".join(f"`{outcome}`" for outcome in OUTCOMES)),
    Field("request", "object", "the fields of the request, as they were read from its file"),
    Field("request.reference", "text", "the reference number; empty for none"),
    Field("request.requester", "text", "who asks; empty if it is not said"),
    Field("request.path", "text", "the file of the request"),
    Field("request.model", "text", "the path or hub name of the model"),
    Field("request.forget", "object", "where the rows to forget are, and by which conditions they are found"),
    Field("request.attacks", "list", "the attacks that were asked for"),
    Field("times", "object", "the only part that differs between two runs of the same request"),
    Field("times.begin", "time", "the begin of the run, in ISO 8601 with its time zone"),
    Field("times.end", "time", "the end of the run"),
    Field("times.seconds", "object", "the seconds of each stage"),
    Field("times.seconds.*", "number", "the seconds of a stage"),
    Field("machine", "object", "the machine of the run"),
    Field("machine.cpu", "text", "the name of the processor"),
    Field("machine.device", "text", "the name of the accelerator, or `cpu`"),
    Field("machine.threads", "count", "the threads of torch"),
    Field("machine.memory", "count", "the memory of the machine, in bytes"),
    Field("versions", "object", "the versions of the packages, by their names"),
    Field("versions.*", "text", "the version of a package"),
    Field("inputs", "object", "what the run read"),
    Field("inputs.model", "object", "the model before the run"),
    Field("inputs.model.name", "text", "its path or hub name"),
    Field("inputs.model.revision", "text", "the commit of a model on the hub"),
    Field("inputs.model.files", "object", "the SHA-256 of its files, by their paths"),
    Field("inputs.model.files.*", "digest", "the SHA-256 of a file"),
    Field("inputs.data", "object", "the data sets, by what they were for"),
    Field("inputs.data.*", "object", "a data set"),
    Field("inputs.data.*.source", "text", "its file, folder or hub name"),
    Field("inputs.data.*.sha256", "digest", "the SHA-256 of the file, or of the list of a folder's digests"),
    Field("inputs.code", "object", "the code of `loku` and `loku_kernels`"),
    Field("inputs.code.version", "text", "its version"),
    Field("inputs.code.sha256", "digest", "the SHA-256 of the list of the digests of its files"),
    Field("rows", "object", "the rows to forget"),
    Field("rows.selected", "count", "the number of rows that the request selects"),
    Field("rows.total", "count", "the number of all rows of their source"),
    Field("rows.indices", "list", "the indices of the selected rows in the source, from 0"),
    Field("rows.indices.*", "count", "an index"),
    Field("rows.near_duplicates", "object", "the search for rows that are equal or nearly equal to them"),
    Field("rows.near_duplicates.included", "flag", "whether nearly equal rows were forgotten, too"),
    Field(
        "rows.near_duplicates.forget_rows", "object", "the number of rows to forget, with and without them"
    ),
    Field("rows.near_duplicates.sets", "object", "the number of such rows in each data set"),
    Field("rows.near_duplicates.sets.*", "object", "the numbers of one data set"),
    Field(
        "rows.near_duplicates.sets.*.taken_along", "count", "the number of its rows that are forgotten, too"
    ),
    Field("rows.near_duplicates.duplicates", "list", "these rows"),
    Field("rows.near_duplicates.duplicates.*", "object", "such a row"),
    Field("rows.near_duplicates.duplicates.*.set", "text", "the data set that has it"),
    Field("rows.near_duplicates.duplicates.*.index", "count", "its index there, from 0"),
    Field("rows.near_duplicates.duplicates.*.forget_index", "count", "the index of the row to forget"),
    Field("rows.near_duplicates.duplicates.*.kind", "text", "`exact`, `normalised` or `near`"),
    Field("rows.near_duplicates.duplicates.*.similarity", "number", "their Jaccard similarity"),
    Field("retain", "object", "the rows to keep: their sources and numbers"),
    Field("retain.rows", "count", "the number of rows"),
    Field("retain.trained", "count", "the number of rows that were trained on; the others were measured"),
    Field("knowledge", "object", "whether the model knew the rows before the run"),
    Field("knowledge.verdict", "text", "the answer"),
    Field("knowledge.reasons", "list", "the measures that decided it"),
    Field("measures", "object", "the measures of the model `before`, `after`, and of the `control`"),
    Field("measures.*", "object", "the measures of one model, by data set"),
    Field("measures.*.*", "object", "the measures of one data set"),
    Field("measures.*.*.*", "number", "a measure; null where it is not defined"),
    Field("limits", "object", "the greatest value of each measure of the forget rows"),
    Field("limits.*", "object", "the limit of a measure"),
    Field("limits.*.limit", "number", "the greatest value that is accepted"),
    Field("limits.*.before", "number", "the value before the run"),
    Field("limits.*.after", "number", "the value after the run"),
    Field("limits.*.met", "flag", "whether the value after the run is at most the limit"),
    Field("probe", "object", "the general ability of the model"),
    Field("probe.before", "object", "its measures before the run"),
    Field("probe.after", "object", "its measures after the run"),
    Field("probe.relative", "number", "the share of the ability that is left"),
    Field("training", "object", "the training"),
    Field("training.steps", "count", "the number of optimiser steps"),
    Field("training.chosen_step", "count", "the step whose weights were kept"),
    Field("training.history", "list", "the measures by step"),
    Field("training.history.*", "object", "the measures at a `step`"),
    Field("training.reason", "text", "why the training ended"),
    Field("training.utility", "object", "the utility, as the mean answer probability of rows to keep"),
    Field("training.utility.original", "object", "its values before the run, by data set"),
    Field("training.utility.original.*", "number", "the value of a data set"),
    Field("training.utility.floors", "object", "the least values that are accepted"),
    Field("training.utility.floors.*", "number", "the least value of a data set"),
    Field("training.training", "object", "the settings of the training"),
    Field("attacks", "object", "the attacks on the model `before` and `after`"),
    Field("attacks.*", "object", "the attacks on one model"),
    Field("attacks.*.*", "object", "an attack: `extract`, `mia`, `relearn` or `quantise`"),
    Field("serving", "object", "what serves the result"),
    Field("serving.target", "text", "`peft`, `vllm`, `gguf` or `merged`"),
    Field("serving.rank", "count", "the rank of the served adapter"),
    Field("serving.error", "object", "the error of the served adapter against the exact one"),
    Field("serving.problems", "list", "the reasons for which the target cannot serve it; empty for none"),
    Field("serving.problems.*", "text", "a reason"),
    Field("serving.lines", "list", "the lines that serve it"),
    Field("serving.lines.*", "text", "a line"),
    Field("ledger", "object", "the earlier requests of the ledger"),
    Field("ledger.earlier", "list", "the earlier requests, measured again on the new model"),
    Field("ledger.earlier.*", "object", "an earlier request"),
    Field("ledger.earlier.*.reference", "text", "its reference number"),
    Field("ledger.earlier.*.record", "text", "the folder of its record in the ledger"),
    Field("ledger.earlier.*.still_forgotten", "flag", "whether its rows are still at or under their limits"),
    Field("ledger.earlier.*.reason", "text", "why its rows were not measured"),
    Field("ledger.earlier.*.measures", "object", "the measures of its rows on the new model"),
    Field("not_tested", "object", "what was not tested, and why"),
    Field("not_tested.*", "text", "the reason"),
)
_NAMES = {"measures": ("before", "after", "control"), "attacks": ("before", "after")}
_ATTACKS = ("extract", "mia", "relearn", "quantise")


def _tree() -> dict[str, Any]:
    """The fields by their keys: ``{key: (field, tree)}``."""
    tree: dict[str, Any] = {}
    for field in FIELDS:
        *parents, name = field.path.split(".")
        level = tree
        for parent in parents:
            level = level[parent][1]
        level[name] = (field, {})
    return tree


_FIELD_TREE = _tree()


def validate_record(facts: Any) -> None:
    """Check that the facts of a record have the shape of the schema (``FIELDS``).

    Optional fields may be absent or null. Objects may have further entries, except for the record itself and
    for those with fixed names (``measures``, ``attacks``).

    Args:
        facts: The facts, as JSON has them.

    Raises:
        ValueError: A field is missing, unknown or of another kind; a number is not finite; or two fields
            contradict each other. The message names the field.
    """
    if not isinstance(facts, Mapping):
        raise ValueError(f"a record must be an object, got {type(facts).__name__}")
    if missing := [name for name in REQUIRED if facts.get(name) is None]:
        raise ValueError(f"the record has no {missing[0]!r}")
    if unknown := [name for name in facts if name not in _FIELD_TREE]:
        raise ValueError(f"the record has an unknown field, {unknown[0]!r:.100}")
    if facts["schema"] != SCHEMA or isinstance(facts["schema"], bool):
        raise ValueError(f"the schema of the record must be {SCHEMA}, got {facts['schema']!r:.100}")
    if facts["outcome"] not in OUTCOMES:
        raise ValueError(f"the outcome must be one of {OUTCOMES}, got {facts['outcome']!r:.100}")
    _check(facts, Field("", "object", ""), _FIELD_TREE, ())
    for name, known in _NAMES.items():
        _check_names(facts.get(name) or {}, known, name)
    for state, attacks in (facts.get("attacks") or {}).items():
        _check_names(attacks or {}, _ATTACKS, f"attacks.{state}")
    _check_times(facts["times"])
    _check_limits(facts)


def _check(value: Any, field: Field | None, tree: Mapping[str, Any], path: tuple[str, ...]) -> None:
    """Check a value against its field, None for an undeclared one, and what the value holds."""
    if field is not None and value is not None and not _is_of_kind(value, field.kind):
        raise ValueError(f"{_quoted(path)} must be {_KINDS[field.kind]}, got {value!r:.100}")
    if len(path) > _MOST_LEVELS:
        raise ValueError(f"{_quoted(path[:3])} has more than {_MOST_LEVELS} levels")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{_quoted(path)} has a key that is no text, {key!r:.100}")
            child, below = tree.get(key) or tree.get("*") or (None, {})
            _check(item, child, below, (*path, key))
    elif isinstance(value, (list, tuple)):
        child, below = tree.get("*") or (None, {})
        for index, item in enumerate(value):
            _check(item, child, below, (*path, str(index)))
    elif not (value is None or isinstance(value, (str, int)) or _is_finite(value)):
        raise ValueError(f"{_quoted(path)} is not a value of JSON: {value!r:.100}")


_KINDS = {
    "text": "a text",
    "number": "a finite number or null",
    "count": "a whole number, at least 0",
    "flag": "true or false",
    "digest": "a SHA-256 in 64 small hexadecimal digits",
    "time": "a time in ISO 8601 with its time zone",
    "object": "an object",
    "list": "a list",
}


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "number":
        return _is_finite(value) or (isinstance(value, int) and not isinstance(value, bool))
    if kind == "count":
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "digest":
        return is_digest(value)
    if kind == "time":
        return _time(value) is not None
    return isinstance(value, Mapping if kind == "object" else (list, tuple))


def is_digest(value: Any) -> bool:
    """Whether a value is a SHA-256 in small hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _time(value: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo is not None else None


def _quoted(path: tuple[str, ...]) -> str:
    return f"{'.'.join(path) or 'the record'!s:.200}"


def _check_names(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := [name for name in value if name not in known]:
        raise ValueError(f"{where} has an unknown field, {unknown[0]!r:.100}; known are {', '.join(known)}")


def _check_times(times: Mapping[str, Any]) -> None:
    begin, end = (_time(times.get(name)) for name in ("begin", "end"))
    if begin is None or end is None:
        raise ValueError("times must have a begin and an end")
    if end < begin:
        raise ValueError(f"times.end, {times['end']}, is before times.begin, {times['begin']}")


def _check_limits(facts: Mapping[str, Any]) -> None:
    """A record must not say that the rows are forgotten where its own figures say otherwise."""
    if facts["outcome"] == "forgotten" and not facts.get("limits"):
        raise ValueError("the outcome is 'forgotten', but there are no limits that could be met")
    for name, entry in (facts.get("limits") or {}).items():
        limit, after, met = (entry.get(key) if entry else None for key in ("limit", "after", "met"))
        if met is not None and limit is not None and after is not None and met != (after <= limit):
            raise ValueError(f"limits.{name:.100}.met is {met}, but {after} is after and {limit} the limit")
        if met is False and facts["outcome"] == "forgotten":
            raise ValueError(f"the outcome is 'forgotten', but limits.{name:.100} is not met")


def without_times(facts: Any) -> Any:
    """Return the facts without every entry called ``times`` or ``seconds``: what two runs have in common.

    Args:
        facts: The facts, or a part of them.
    """
    if isinstance(facts, Mapping):
        return {key: without_times(value) for key, value in facts.items() if key not in ("times", "seconds")}
    return [without_times(item) for item in facts] if isinstance(facts, (list, tuple)) else facts


def write_record(directory: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    """Write ``record.json``, ``record.md``, ``record.html`` and the pictures of both.

    Equal facts give equal bytes with the same versions of the packages. Each file is whole or absent.

    Args:
        directory: The folder of the record, which exists.
        facts: The facts (``FIELDS``).

    Raises:
        ValueError: ``validate_record`` refuses the facts. Nothing was written.
        OSError: A file cannot be written.
    """
    from loku.deletion.markup import to_html, to_markdown
    from loku.deletion.pages import pages
    from loku.deletion.pictures import draw_pictures
    from loku.saving.directories import whole_file

    validate_record(facts)
    directory = Path(directory)
    facts = json.loads(json.dumps(facts, allow_nan=False))  # tuples are lists, as for a reader of the file
    blocks = pages(facts, draw_pictures(directory, facts))
    contents = {
        "record.md": to_markdown(blocks),
        "record.html": to_html(blocks, directory),
        RECORD: json.dumps(facts, indent=2, sort_keys=True, allow_nan=False) + "\n",
    }
    for name, text in contents.items():
        with whole_file(directory / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8", newline="\n")


def read_record(directory: str | os.PathLike) -> dict[str, Any]:
    """Read and check the ``record.json`` of a folder, which may come from anybody.

    Args:
        directory: The folder of the record.

    Returns:
        The facts.

    Raises:
        ValueError: It is no regular file, larger than ``MAX_BYTES``, not JSON, or not of the schema.
        OSError: It cannot be read.
    """
    return parse_record(read_regular(Path(directory) / RECORD, MAX_BYTES))


def parse_record(data: bytes) -> dict[str, Any]:
    """Parse and check the contents of a ``record.json``.

    Args:
        data: The bytes of the file.

    Raises:
        ValueError: They are not JSON, have a key twice, or are not of the schema.
    """
    try:
        facts = json.loads(data.decode("utf-8"), object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{RECORD} is not JSON: {str(error) or type(error).__name__:.200}") from error
    validate_record(facts)
    return facts


def read_regular(file: Path, most_bytes: int) -> bytes:
    """Read a regular file. No symbolic link is followed, and nothing waits for a pipe.

    Args:
        file: The file.
        most_bytes: The greatest size, in bytes.

    Raises:
        ValueError: It is no regular file, or larger.
        OSError: It cannot be read.
    """
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name} is not a regular file")
    if status.st_size > most_bytes:
        raise ValueError(f"{file.name} has {status.st_size} bytes, more than {most_bytes}")
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        return stream.read(most_bytes)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of JSON; a key that comes twice would mean one thing here and another elsewhere."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")
