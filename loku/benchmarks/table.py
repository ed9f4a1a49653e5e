"""The table of a benchmark's results in Markdown, and the rows of open-unlearning's leaderboard."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from loku.benchmarks.protocol import Benchmark

ARROWS = {"higher": "↑", "lower": "↓", "near 0": "→ 0"}
KINDS = {"before": "before unlearning", "retain": "retain-only model"}
_LEADERBOARD_KINDS = {"before": "Finetuned", "retain": "Retain"}
_MANY = "mean"  # of the splits that are samples of one kind
_Entries = list[Mapping[str, Any]]

Entries = Sequence[Mapping[str, Any]]


class _Row(NamedTuple):
    """The entries that one row of the table is made of: they differ in the seed, or in sampled splits."""

    split: str
    label: str
    entries: list[Mapping[str, Any]]
    number: int  # among the rows of this split and label, from 1


def markdown_table(benchmark: Benchmark, entries: Entries) -> str:
    """Return the table of a benchmark's entries.

    A row has the mean of the runs that differ in their seeds alone, with the standard deviation behind ±. Of
    a benchmark whose splits are samples, such as the people of RWKU, it has the mean over these, too.

    Args:
        benchmark: The benchmark.
        entries: The entries of its result file.
    """
    rows = _rows(benchmark, entries)
    arrows = [f"{column.name} {ARROWS[column.better]}" for column in benchmark.columns]
    lines = [["split", "model", *arrows, "runs"]]
    lines += [
        [row.split, row.label]
        + [_mean(_values(row.entries, "measures", column.name)) for column in benchmark.columns]
        + [str(len(row.entries))]
        for row in rows
    ]
    parts = [f"# {benchmark.title}", _head(entries), _markdown(lines), _notes(benchmark, entries, rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def leaderboard_rows(benchmark: Benchmark, entries: Entries) -> str:
    """Return the rows of open-unlearning's ``community/leaderboard.md``, in HTML.

    A model has one row. Rows that the table tells apart, such as those of the first N rows of each set, stay
    apart.

    Args:
        benchmark: The benchmark.
        entries: The entries of its result file.

    Raises:
        ValueError: The leaderboard has no table of this benchmark, or none of its splits was run.
    """
    if not benchmark.leaderboard:
        raise ValueError(f"open-unlearning's leaderboard has no table of {benchmark.name}")
    splits = dict.fromkeys(split for split, _ in benchmark.leaderboard)
    by_label: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in _rows(benchmark, entries, of_one_model=True):
        kind = row.entries[0]["kind"]
        if row.split in splits:
            label = row.label
            if kind in _LEADERBOARD_KINDS:
                label = label.replace(KINDS[kind], _LEADERBOARD_KINDS[kind], 1)
            by_label.setdefault(label, {}).setdefault(row.split, []).extend(row.entries)
    if not by_label:
        raise ValueError(
            f"open-unlearning's leaderboard has {', '.join(splits)} alone, and there are no results of it"
        )
    lines = []
    for label, of_split in by_label.items():
        lines += ["<tr>", f"  <th>{html.escape(label)}</th>"]
        for split, name in benchmark.leaderboard:
            values = _values(of_split.get(split, []), "leaderboard", name)
            lines.append(f"  <td>{_rounded(fmean(values)) if values else ''}</td>")
        lines.append("</tr>")
    return "\n".join(lines) + "\n"


def _rows(benchmark: Benchmark, entries: Entries, of_one_model: bool = False) -> list[_Row]:
    """Return the rows of a table.

    Args:
        benchmark: The benchmark.
        entries: The entries of its result file.
        of_one_model: Whether the models of different splits are one, such as a news and a books model of
            MUSE, so that a label names its model only where one split has several. False by default.
    """
    groups = _groups(entries)
    runs = [group[0] for group in groups if group[0]["kind"] == "unlearned"]
    varied = _varied(runs)
    models: dict[str, set[str]] = {}
    for entry in entries:
        if entry["kind"] == "before":
            models.setdefault(entry["split"] if of_one_model else "", set()).add(entry["model"])
    rows: list[_Row] = []
    labels: dict[tuple[str, str], int] = {}
    for group in groups:
        first = group[0]
        names = dict.fromkeys(entry["split"] for entry in group)
        split = next(iter(names))
        if len(names) > 1:
            split = " ".join(filter(None, [f"{_MANY} of {len(names)}", benchmark.sample_kind(split)]))
        label = KINDS.get(first["kind"]) or _label(first, varied)
        if len(models.get(first["split"] if of_one_model else "", ())) > 1:
            label += f", {first['model']}"
        if first["limit"] is not None:
            label += f", first {first['limit']} rows"
        count = labels[split, label] = labels.get((split, label), 0) + 1
        rows.append(_Row(split, label if count == 1 else f"{label} ({count})", group, count))
    order = list(dict.fromkeys(row.split for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.split), row.entries[0]["kind"] == "unlearned"))


def _groups(entries: Entries) -> list[_Entries]:
    """Return the entries of each row, in their order.

    One split with one seed is in a row once. It comes again if its data or its retain-only model has changed,
    and the changed figures are no sample of the same kind.
    """
    groups: dict[tuple[str, int], _Entries] = {}
    times: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        same = entry["group"], entry["split"], repr(sorted(entry["settings"].items()))
        times[same] = times.get(same, 0) + 1
        groups.setdefault((entry["group"], times[same]), []).append(entry)
    return list(groups.values())


def _varied(runs: Entries) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run["settings"])
    return [
        name
        for name in names
        if name not in ("seed", "method") and len({repr(run["settings"].get(name)) for run in runs}) > 1
    ]


def _label(run: Mapping[str, Any], varied: Iterable[str]) -> str:
    settings = [f"{name} {run['settings'][name]}" for name in varied if name in run["settings"]]
    return ", ".join([run["method"], *settings])


def _head(entries: Entries) -> str:
    models = dict.fromkeys(entry["model"] for entry in entries if entry["kind"] != "retain")
    shared = [run for run in entries if run["kind"] == "unlearned"]
    varied = _varied(shared)
    same = {
        name: value
        for name, value in (shared[0]["settings"] if shared else {}).items()
        if name not in (*varied, "seed", "method")
    }
    text = f"Model: {', '.join(f'`{model}`' for model in models)}."
    if same:
        text += f" Settings of all runs: {', '.join(f'{name} {value}' for name, value in same.items())}."
    return text


def _notes(benchmark: Benchmark, entries: Entries, rows: Sequence[_Row]) -> str:
    lines = [f"- {column.name}: {column.meaning}" for column in benchmark.columns]
    reasons = dict.fromkeys(
        (name, reason) for entry in entries for name, reason in entry["not_available"].items()
    )
    lines += [f"- {name} is not available: {reason}." for name, reason in reasons]
    if any(row.number > 1 for row in rows):
        lines.append(
            "- A number in brackets tells rows of one name apart: they differ in the data, in the version of "
            "the model or in the retain-only model."
        )
    if any(entry["limit"] is not None for entry in entries):
        lines.append("- A row of the first N rows was measured on the first N rows of each set alone.")
    return "\n".join(lines)


def _values(entries: Entries, of: str, name: str) -> list[float]:
    return [value for entry in entries if (value := entry[of].get(name)) is not None]


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = _shown(fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {_shown(stdev(values))}"


def _shown(value: float) -> str:
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"


def _rounded(value: float) -> str:
    """Return a number as the leaderboard writes it."""
    return f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    rows = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |" for row in rows)
