"""The tables of ``docs/tutorial.md``, from the result file of ``experiments/tutorial.py``."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from result_files import markdown_table

Run = Mapping[str, Any]  # a line of the result file


def _figure(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _cell(text: str) -> str:
    """Return a text on one line, for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def answers(run: Run) -> str:
    """Return a table of the questions, with the answers before and after."""
    return markdown_table(
        ["question", "before", "after"],
        [
            [_cell(answer["question"]), _cell(answer["before"]), _cell(answer["after"])]
            for answer in run["answers"]
        ],
    )


def figures(run: Run) -> str:
    """Return a table of the limits, the utility and the general ability, and a line about the run."""
    lines = [
        [f"{name} of the forget rows", *(_figure(limit[key]) for key in ("before", "limit", "after"))]
        for name, limit in run["limits"].items()
    ]
    before, after = (run["measures"][when] for when in ("before", "after"))
    for name in ("retain", "general"):
        if name in before and name in after:
            cells = (before[name]["probability"], None, after[name]["probability"])
            lines.append([f"probability of the {name} rows", *map(_figure, cells)])
    for kind, share in run["probe"]["shares"].items():
        if share is not None:
            lines.append([f"share of the general ability: {kind}", "1.00", "-", _figure(share)])
    steps = run["training"]
    minutes = sum(run["seconds"].values()) / 60
    told = (
        f"The outcome was `{run['outcome']}`. Training took {steps['steps']} steps, and the weights of step "
        f"{steps['chosen_step']} were kept. The whole run took {minutes:.0f} minutes."
    )
    return markdown_table(["measure", "before", "limit", "after"], lines) + f"\n\n{told}"


def attacks(run: Run) -> str:
    """Return a table of what the attacks bring back."""
    after, before = run["attacks"]["after"], run["attacks"]["before"]
    lines: list[list[str]] = []

    def extracted(of: Run, name: str) -> str:
        found = of["extract"]["sets"].get(name)
        return "-" if found is None else _figure(found["any way"]["whole"])

    if "extract" in after:
        lines.append(
            [
                "extraction: share of rows that some way brings back word by word",
                *(extracted(of, "forget") for of in (before, after)),
                extracted(after, "holdout"),
            ]
        )
    if "mia" in after:
        for name in sorted(after["mia"]["scores"]):
            earlier = before["mia"]["scores"].get(name, {}).get("auc")
            now = after["mia"]["scores"][name]["auc"]
            lines.append([f"membership inference: AUC by {name}", _figure(earlier), _figure(now), "0.50"])
    relearn = after.get("relearn")
    if relearn is not None and relearn["unlearned"] is not None:
        control = relearn["control"]
        kind = "no control" if control is None else f"control: {control['kind']}"
        for when in ("before", "best"):
            title = "before relearning" if when == "before" else "after relearning the other half, at best"
            lines.append(
                [
                    f"probability of one half {title} ({kind})",
                    _figure(relearn["original"]),
                    _figure(relearn["unlearned"][when]),
                    "-" if control is None else _figure(control[when]),
                ]
            )
    for name, sets in (after.get("quantise") or {"roundings": {}})["roundings"].items():
        lines.append(
            [
                f"probability of the forget rows, {name}",
                "-",
                _figure(sets["forget"]["probability"]),
                _figure(sets["holdout"]["probability"]) if "holdout" in sets else "-",
            ]
        )
    return markdown_table(["attack", "original model", "unlearned model", "hold-out or control"], lines)


def _of_case(case: str, make: Callable[[Run], str], result: Mapping[str, Any]) -> str:
    (run,) = (row for row in result["rows"] if row["case"] == case)
    return make(run)


# name in the page -> the function from the result file's content to the table
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    f"tutorial_{case}_{make.__name__}": partial(_of_case, case, make)
    for case in ("paris", "planted")
    for make in (answers, figures, attacks)
}
