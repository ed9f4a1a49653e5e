"""Small deletion requests on the embedded model."""

import json
from pathlib import Path

import yaml

from loku.demo import EMBEDDED, load_rows

FORGET_ROWS = 3


def rows_of_authors():
    """Return rows that the embedded model knows, and rows that it has never seen."""
    forget, retain = load_rows()
    known = [{name: row[name] for name in ("question", "answer")} for row in (*retain, *forget)]
    with open(EMBEDDED / "holdout.jsonl", encoding="utf-8") as file:
        return known, [json.loads(line) for line in file]


def write_rows(path, rows):
    """Write a .jsonl file."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_request(directory, name="request", forget=None, **fields):
    """Write a request and its data; some fields may differ. A field that is None is left out.

    By default the embedded model forgets three rows of one author, and nothing attacks the result.
    """
    known, unseen = rows_of_authors()
    directory = Path(directory)
    write_rows(directory / f"{name}-forget.jsonl", known[-FORGET_ROWS:] if forget is None else forget)
    write_rows(directory / "retain.jsonl", known[:600:40])
    write_rows(directory / "holdout.jsonl", unseen[:24:6])
    request = {
        "version": 1,
        "reference": name,
        "model": str(EMBEDDED),
        "forget": f"{name}-forget.jsonl",
        "retain": {"data": "retain.jsonl", "sampled": 0},
        "holdout": "holdout.jsonl",
        "attacks": [],
        "training": {"max_steps": 30, "fisher_samples": 8, "learning_rate": 0.003},
        "limits": {"memorization_accuracy": 0.5, "extraction_likelihood_10": 0.2},
        "utility_floor": 0.5,
        **fields,
    }
    path = directory / f"{name}.yaml"
    given = {field: value for field, value in request.items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return path
