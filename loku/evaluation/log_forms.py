"""The forms of logs of TOFU's measures, and their reading.

There are four forms, and ``tofu_log`` makes the first of each:

- TOFU's log (Maini et al., 2024), ``eval_log_aggregated.json``. It maps file names to sections, one for
  each set of questions. A section maps a quantity to ``{str(row index): value}``. Losses are in nats:
  ``*_loss`` is the sum over an answer's tokens, and ``avg_*_loss`` and ``average_perturb_loss`` are the means
  over them.
- The same with lists, ``[value]``, in place of ``{str(row index): value}``. Earlier code of TOFU wrote it.
- The section of one set alone, by index or with lists, such as ``eval_log_forget.json``.
- The log of open-unlearning (Dorna et al., 2025), ``TOFU_EVAL.json``. It maps a metric to
  ``{"agg_value": number, "value_by_index": {str(row index): {name: value}}}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

Section: TypeAlias = dict[str, dict[str, Any]]  # {quantity: {str(row index): value}}
Log: TypeAlias = Mapping[str, Section]

SECTIONS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
# What open-unlearning puts before the names of a set's metrics.
PREFIXES = {"retain": "retain", "real_authors": "ra", "world_facts": "wf", "forget": "forget"}
# The quantity of a section with open-unlearning's truth ratios, wrong / (true + 1e-10) of probabilities.
TRUTH_RATIO = "open_unlearning_truth_ratio"
_TASK = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss")  # a section has one of them
_SUMMARY = ("forget_truth_ratio", "forget_quality", "model_utility", "forget_Q_A_Prob", "forget_Q_A_ROUGE")


def read_log(path: str | os.PathLike) -> Log:
    """Read the file of a log, in any of its forms, as TOFU's log.

    The section of one set alone has no name, so the name of its file tells the set. It must be TOFU's.

    Args:
        path: The file.

    Raises:
        ValueError: The file is no JSON, or the log has none of the forms.
        OSError: The file cannot be read.
    """
    path = Path(path)
    try:
        log = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if _is_section(log) and path.name in SECTIONS.values():
        log = {path.name: log}
    return tofu_log(log, os.fspath(path))


def tofu_log(log: Any, name: str) -> Log:
    """Return a parsed log, in any of its forms, as TOFU's log.

    A log of TOFU's own form comes back as it is. The sections of a log of open-unlearning have the quantities
    that its metrics tell: the losses of the true, the paraphrased and the wrong answers, the recalls of
    ROUGE, the generated texts, and ``TRUTH_RATIO``.

    Args:
        log: The parsed log.
        name: The name of the log in messages.

    Raises:
        ValueError: The log has none of the forms, or it is the summary of open-unlearning or the section of
            one set. The message says what to pass instead.
    """
    if not isinstance(log, Mapping):
        raise ValueError(f"{name} has not the form of TOFU's logs: it is a {type(log).__name__}")
    if _is_section(log):
        raise ValueError(
            f"{name} is the log of one of TOFU's sets, and does not say which: pass "
            f"eval_log_aggregated.json, or name the file as TOFU does, such as {SECTIONS['forget']}"
        )
    if any(isinstance(log.get(metric), (int, float)) for metric in _SUMMARY):
        raise ValueError(
            f"{name} is a summary of open-unlearning, which has means and no values of rows: pass the log "
            "beside it, TOFU_EVAL.json"
        )
    if any(
        isinstance(value, Mapping) and value.keys() & {"agg_value", "value_by_index"}
        for value in log.values()
    ):
        return _of_open_unlearning(log, name)
    if any(_has_lists(section) for section in log.values()):
        return {key: _by_index(section, key, name) for key, section in log.items()}
    return log


def _is_section(log: Any) -> bool:
    return isinstance(log, Mapping) and any(
        isinstance(log.get(quantity), (Mapping, list)) for quantity in _TASK
    )


def _has_lists(section: Any) -> bool:
    return isinstance(section, Mapping) and any(isinstance(values, list) for values in section.values())


def _by_index(section: Any, key: str, name: str) -> Any:
    """Turn the lists of a section into ``{str(row index): value}``.

    Raises:
        ValueError: Not all quantities are lists of one length, so it is not known which values belong to one
            row.
    """
    if not _has_lists(section):
        return section
    lengths = {
        quantity: len(values) if isinstance(values, list) else f"a {type(values).__name__}"
        for quantity, values in section.items()
    }
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{name} has not the form of TOFU's logs: the quantities of {key} are not lists of one "
            f"length, but {lengths}, so it is not known which values belong to one row"
        )
    return {
        quantity: {str(i): value for i, value in enumerate(values)} for quantity, values in section.items()
    }


def _of_open_unlearning(log: Mapping[str, Any], name: str) -> Log:
    found: dict[str, Section] = {}
    try:
        for kind, prefix in PREFIXES.items():
            section = dict(_quantities(log, prefix))
            if kind in ("real_authors", "world_facts") and "average_perturb_loss" in section:
                section.setdefault("avg_paraphrased_loss", section.get("avg_gt_loss", {}))
            if section:
                found[SECTIONS[kind]] = section
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{name} has not the form of open-unlearning's logs: {error!r}") from error
    if not found:
        raise ValueError(
            f"{name} is a log of open-unlearning without TOFU's metrics, such as forget_truth_ratio; it has "
            f"{sorted(log)}"
        )
    return found


def _quantities(log: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield TOFU's quantities of the metrics of one set that the log has."""

    def values(metric: str, value: str) -> dict[str, Any]:
        rows = log[metric]["value_by_index"]
        return {i: row[value] for i, row in rows.items() if row is not None}

    for metric, quantity in (
        (f"{prefix}_Q_A_Prob", "avg_gt_loss"),
        (f"{prefix}_Q_A_PARA_Prob", "avg_paraphrased_loss"),
        (f"{prefix}_Q_A_PERT_Prob", "average_perturb_loss"),
    ):
        if metric in log:
            losses = values(metric, "avg_loss")
            if quantity == "average_perturb_loss":  # a row with one wrong answer has no list
                losses = {i: loss if isinstance(loss, list) else [loss] for i, loss in losses.items()}
            yield quantity, losses
    if (metric := f"{prefix}_Q_A_ROUGE") in log:
        yield "rouge1_recall", values(metric, "rouge1_recall")
        yield "rougeL_recall", values(metric, "rougeL_recall")
        texts = [values(metric, part) for part in ("input", "generation", "ground_truth")]
        yield "generated_text", {i: [part[i] for part in texts] for i in texts[0]}
    for metric in (f"{prefix}_truth_ratio", f"{prefix}_Truth_Ratio"):
        if metric in log:
            yield TRUTH_RATIO, values(metric, "score")
