"""The pages of a record. The first is for a data-protection officer, the rest for an engineer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loku.deletion.attack_figures import figure_at, headlines
from loku.deletion.markup import Block, Code, Heading, Paragraph, Picture, Table
from loku.deletion.statements import ATTACK_TITLES, OUTCOME_STATEMENTS, PROOF, measure_title

_MOST_ROWS = 200  # of a table of a page; record.json has them all
_MOST_ITEMS = 20  # of a list in a cell
_STATES = {"before": "before", "after": "after", "control": "retrained control"}
_TITLES = {
    "cpu": "processor",
    "memory": "memory in bytes",
    "sha256": "SHA-256",
    "mia": "membership inference",
}
_ABSENT = "The record has no such part: the run ended before it, or the request did not ask for it."


def pages(facts: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]]) -> list[Block]:
    """Return the pages of a record.

    Args:
        facts: The facts, which ``validate_record`` has passed.
        pictures: The pictures by the part of the record that they belong to.
    """
    return [*_summary(facts), *_details(facts, pictures)]


# The first page


def _summary(facts: Mapping[str, Any]) -> Iterator[Block]:
    reference = facts["request"].get("reference")
    name, answer, statement = OUTCOME_STATEMENTS[facts["outcome"]]
    yield Heading(1, f"Deletion record {reference}" if reference else "Deletion record")
    yield Paragraph(f"Outcome: {name}.", strong=True)
    yield Paragraph(statement)
    yield Heading(2, "What was asked, and by whom")
    yield Table(("Question", "Answer"), tuple(_asked(facts)))
    yield Heading(2, "What was done")
    yield Table(("Step", "Result"), tuple(_done(facts)))
    yield Heading(2, "Did it work?")
    yield Paragraph(answer, strong=True)
    yield from _limits(facts)
    yield from _attacks_in_short(facts.get("attacks") or {})
    yield from _side_effects(facts)
    yield Heading(2, "What was not tested")
    yield from _not_tested(facts)
    yield Heading(2, "What this record proves, and what it does not")
    yield from map(Paragraph, PROOF)


def _asked(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    request, inputs = facts["request"], facts.get("inputs") or {}
    yield "Who asks", request.get("requester") or "not said"
    yield "Reference number", request.get("reference") or "none"
    yield "Begin of the run", facts["times"]["begin"]
    yield "End of the run", facts["times"]["end"]
    yield "The model", (inputs.get("model") or {}).get("name") or request.get("model") or "not said"
    rows = facts.get("rows") or {}
    selected, total = rows.get("selected"), rows.get("total")
    forget = (inputs.get("data") or {}).get("forget") or {}
    source = forget.get("source") or (request.get("forget") or {}).get("data") or "a source that is not said"
    of = "" if total is None else f" of {total}"
    count = "rows" if selected is None else f"{selected}{of} rows"
    yield "What must be forgotten", f"{count} of {source}"


def _done(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    near = (facts.get("rows") or {}).get("near_duplicates")
    if near is None:
        yield "Search for equal and nearly equal rows", "not done"
    else:
        yield "Search for equal and nearly equal rows", _duplicates(near)
    knowledge = facts.get("knowledge") or {}
    verdict = knowledge.get("verdict") or "not measured"
    yield "Does the model know the rows?", verdict
    yield "Rows to keep", _kept(facts.get("retain") or {})
    training = facts.get("training") or {}
    if training.get("steps") is None:
        yield "Training", "nothing was trained"
    else:
        chosen = training.get("chosen_step")
        kept = "" if chosen is None else f"; the weights of step {chosen} were kept"
        why = f" ({training['reason']})" if training.get("reason") else ""
        yield "Training", f"{training['steps']} steps{kept}{why}"
    serving = facts.get("serving") or {}
    yield "What serves the result", _serving(serving) if serving else "nothing"


def _duplicates(near: Mapping[str, Any]) -> str:
    kinds = Counter(row.get("kind") or "of no kind" for row in near.get("duplicates") or [] if row)
    if not kinds:
        return "none was found"
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    along = sum((numbers or {}).get("taken_along") or 0 for numbers in (near.get("sets") or {}).values())
    return f"found: {counts}; {along or 'none'} of them {'was' if along < 2 else 'were'} forgotten, too"


def _serving(serving: Mapping[str, Any]) -> str:
    rank, problems = serving.get("rank"), serving.get("problems")
    target = f"{serving.get('target') or 'not said'}{'' if rank is None else f', rank {rank}'}"
    return f"{target}, which cannot serve it: {'; '.join(map(_cell, problems))}" if problems else target


def _kept(retain: Mapping[str, Any]) -> str:
    rows, trained = retain.get("rows"), retain.get("trained")
    if rows is None:
        return "see below" if retain else "none"
    return f"{rows} rows" if trained is None else f"{rows} rows, of which {trained} were trained on"


def _limits(facts: Mapping[str, Any]) -> Iterator[Block]:
    limits = facts.get("limits")
    if not limits:
        yield Paragraph("No limits were measured.")
        return
    rows = []
    for name, entry in limits.items():
        entry = entry or {}
        met = entry.get("met")
        values = (_cell(entry.get(key)) for key in ("before", "after", "limit"))
        rows.append((measure_title(name), *values, "not measured" if met is None else "yes" if met else "NO"))
    yield Paragraph(
        "The table has the measures of the rows to forget. A smaller value says that the model shows less of "
        "them. A limit is the greatest value that the request accepts."
    )
    yield Table(
        ("Measure of the rows to forget", "Before", "After", "Limit", "Within the limit?"), tuple(rows)
    )


def _attacks_in_short(attacks: Mapping[str, Any]) -> Iterator[Block]:
    rows = headlines(attacks)
    if not rows:
        yield Paragraph("No attack was tried on the new model.")
        return
    yield Paragraph(
        "Attacks try to bring the rows back from the model. The last column has the same figure of texts "
        "that the model never saw, or of a model that never saw the rows."
    )
    yield from _still_extracted(attacks)
    yield Table(
        ("Attack", "Before", "After", "Hold-out or control"),
        tuple((what, *map(_cell, figures)) for what, *figures in rows),
    )


def _still_extracted(attacks: Mapping[str, Any]) -> Iterator[Block]:
    """What stands out if the outcome says one thing and an attack another."""
    share = figure_at(attacks.get("after"), "extract", "sets", "forget", "any way", "whole")
    if share:
        yield Paragraph(
            f"Some way of asking still brings {share:.1%} of the rows back from the new model, word by word.",
            strong=True,
        )


def _side_effects(facts: Mapping[str, Any]) -> Iterator[Block]:
    relative = (facts.get("probe") or {}).get("relative")
    if relative is not None:
        yield Paragraph(f"The model kept {relative:.0%} of its general ability, as a small test tells.")
    else:
        yield Paragraph("The general ability of the model was not compared.")
    earlier = (facts.get("ledger") or {}).get("earlier") or []
    back = [entry for entry in earlier if entry and entry.get("still_forgotten") is False]
    if back:
        names = ", ".join(entry.get("reference") or "without a number" for entry in back)
        yield Paragraph(f"Rows of earlier requests came back: {names}.", strong=True)
    if earlier:
        kept = sum(entry.get("still_forgotten") is True for entry in earlier if entry)
        yield Paragraph(
            f"Earlier requests in the ledger whose rows are still forgotten: {kept} of {len(earlier)}."
        )


def _not_tested(facts: Mapping[str, Any]) -> Iterator[Block]:
    reasons = dict(facts.get("not_tested") or {})
    done = (facts.get("attacks") or {}).get("after") or {}
    for name in ATTACK_TITLES:
        if not done.get(name) and name not in reasons:
            reasons[name] = "it was not run"
    rows = [(ATTACK_TITLES.get(name, _title(name)), _cell(why)) for name, why in reasons.items()]
    for name, attack in done.items():  # what an attack left out
        parts = (attack or {}).get("not_tested")
        if isinstance(parts, dict):
            title, left_out = ATTACK_TITLES[name].partition(":")[0], _flattened(parts)
            rows += [(f"{title}, {_title(part)}", _cell(why)) for part, why in left_out.items()]
    if rows:
        yield Table(("Test", "Why not"), tuple(rows))
    else:
        yield Paragraph("All tests of this software were run.")
    yield Paragraph("Nothing beside the model was searched or changed. The next part says what that means.")


# The rest


def _details(facts: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]]) -> Iterator[Block]:
    yield Heading(2, "Measures")
    yield from _measures(facts.get("measures"))
    yield from pictures.get("measures", ())
    parts = (
        ("knowledge", "What the model knew"),
        ("rows", "The rows to forget"),
        ("retain", "The rows to keep"),
        ("training", "The training"),
    )
    for name, title in parts:
        yield from _part(facts, name, title, pictures)
    yield Heading(2, "Attacks")
    yield from _attacks(facts.get("attacks"), pictures)
    yield from _part(facts, "probe", "General ability", pictures)
    yield Heading(2, "Serving")
    yield from _serving_details(facts.get("serving"))
    yield from _part(facts, "ledger", "Earlier requests", pictures)
    yield from _part(facts, "request", "The request", pictures)
    yield from _part(facts, "inputs", "What the run read", pictures)
    yield from _part(facts, "machine", "The machine", pictures)
    yield from _part(facts, "versions", "Versions", pictures)
    yield from _part(facts, "times", "Times", pictures)
    yield Heading(2, "How to check this record")
    yield Paragraph(
        "The first line hashes all files again, and checks the signature by a key that you got from "
        "elsewhere. Leave the option out for a record without signature. The other lines need no software of "
        "ours. Only the first line finds files that were added."
    )
    yield Code(
        (
            "loku record verify . --public-key trusted_key.pem",
            "sha256sum --check SHA256SUMS",
            "openssl pkeyutl -verify -pubin -inkey trusted_key.pem -rawin -in SHA256SUMS "
            "-sigfile SHA256SUMS.sig",
        )
    )


def _measures(measures: Mapping[str, Any] | None) -> Iterator[Block]:
    if not measures:
        yield Paragraph(_ABSENT)
        return
    columns = [
        (state, group)
        for state in _STATES
        for group in (measures.get(state) or {})
        if measures[state][group] is not None
    ]
    names = dict.fromkeys(name for state, group in columns for name in measures[state][group])
    head = ("Measure", *(f"{group}, {_STATES[state]}" for state, group in columns))
    yield Table(
        head,
        tuple(
            (measure_title(name), *(_cell(measures[state][group].get(name)) for state, group in columns))
            for name in names
        ),
    )


def _part(
    facts: Mapping[str, Any], name: str, title: str, pictures: Mapping[str, Sequence[Picture]]
) -> Iterator[Block]:
    yield Heading(2, title)
    part = facts.get(name)
    if part:
        yield from pictures.get(name, ())
        yield from _anything(part, "", 3)
    else:
        yield Paragraph(_ABSENT)


def _attacks(attacks: Mapping[str, Any] | None, pictures: Mapping[str, Sequence[Picture]]) -> Iterator[Block]:
    if not attacks:
        yield Paragraph(_ABSENT)
        return
    for name, title in ATTACK_TITLES.items():
        results = {state: (attacks.get(state) or {}).get(name) for state in ("before", "after")}
        if not any(results.values()):
            continue
        yield Heading(3, title)
        yield from pictures.get(f"attacks.{name}", ())
        for state, result in results.items():
            if result:  # the first page has what was not tested
                told = {key: item for key, item in result.items() if key != "not_tested"}
                yield from _anything(told, f"On the model {state}", 4)


def _serving_details(serving: Mapping[str, Any] | None) -> Iterator[Block]:
    if not serving:
        yield Paragraph(_ABSENT)
        return
    yield from _anything({key: value for key, value in serving.items() if key != "lines"}, "", 3)
    if serving.get("lines"):
        yield Paragraph("These lines serve the result:")
        yield Code(tuple(line for text in serving["lines"] for line in text.splitlines()))


def _anything(value: Any, title: str, level: int) -> Iterator[Block]:
    """The tables of any value of JSON: plain values first, then those of what is nested."""
    if not isinstance(value, dict):
        if title:
            yield Heading(min(level, 4), title)
        yield from _list(value) if isinstance(value, list) else [Paragraph(_cell(value))]
        return
    plain = {key: item for key, item in value.items() if not _is_nested(item)}
    alike = _alike({key: item for key, item in value.items() if key not in plain})
    if title and (plain or alike):
        yield Heading(min(level, 4), title)
    yield from _table(("", "Value"), tuple((_title(key), _cell(item)) for key, item in plain.items()))
    for group in alike:
        names = dict.fromkeys(name for item in group.values() for name in item)
        rows: tuple[tuple[str, ...], ...] = tuple(
            (_title(key), *(_cell(item[name]) if name in item else "" for name in names))
            for key, item in group.items()
        )
        yield from _table(("", *map(_title, names)), rows)
    shown = {key for group in alike for key in group}
    for key, item in value.items():
        if key not in plain and key not in shown:
            name = f"{title}: {_title(key)}" if title else _title(key)
            yield from _anything(item, name, level + 1 if title else level)


def _alike(items: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of two or more objects of plain values that share a key. Each is one table."""
    groups: list[tuple[set[str], dict[str, Any]]] = []
    for key, item in items.items():
        if isinstance(item, dict) and not any(map(_is_nested, item.values())):
            group = next((group for group in groups if group[0] & item.keys()), None)
            if group is None:
                groups.append((set(item), {key: item}))
            else:
                group[0].update(item)
                group[1][key] = item
    return [held for _, held in groups if len(held) > 1]


def _list(items: list[Any]) -> Iterator[Block]:
    if not all(isinstance(item, dict) for item in items):
        if any(_is_nested(item) for item in items):
            for number, item in enumerate(items[:_MOST_ITEMS], 1):
                yield from _anything(item, f"{number}", 4)
        else:
            yield Paragraph(_cell(items))
        return
    flat = [_flattened(item) for item in items]
    names = dict.fromkeys(name for item in flat for name in item)
    rows = tuple(tuple(_cell(item[name]) if name in item else "" for name in names) for item in flat)
    yield from _table(tuple(map(_title, names)), rows)


def _table(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> Iterator[Block]:
    if columns and rows:
        yield Table(columns, rows[:_MOST_ROWS])
    if len(rows) > _MOST_ROWS:
        yield Paragraph(f"{len(rows) - _MOST_ROWS} further rows are in record.json.")


def _is_nested(value: Any) -> bool:
    """Whether a value needs a table of its own."""
    if isinstance(value, list):
        return any(isinstance(item, (dict, list)) for item in value)
    return isinstance(value, dict) and bool(value)


def _flattened(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The plain values of nested objects, with their keys joined by points."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict) and value:
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _title(key: str) -> str:
    return _TITLES.get(key) or (key.replace("_", " ") if key.isidentifier() else key)


def _cell(value: Any) -> str:
    """A value as a text: numbers to four digits, a long list cut."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        more = f" and {len(value) - _MOST_ITEMS} more" if len(value) > _MOST_ITEMS else ""
        return (", ".join(map(_cell, value[:_MOST_ITEMS])) + more) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{_title(key)}: {_cell(item)}" for key, item in value.items()) or "none"
    return str(value)
