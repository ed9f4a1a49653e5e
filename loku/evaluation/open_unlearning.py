"""The log of open-unlearning (Dorna et al., 2025), made of the measures of ``loku.evaluation.evaluate``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from loku.evaluation.log_forms import PREFIXES, SECTIONS, Log, Section, tofu_log
from loku.evaluation.muse import rouge_l_f1
from loku.evaluation.tofu_logs import (
    CHOICE_SETS,
    EPSILON,
    UTILITY_SETS,
    forget_quality,
    model_utility,
    their_truth_ratio,
)

_ANSWER = "Answer:"

Metric = dict[str, Any]  # {"agg_value": number, "value_by_index": {str(row index): {name: value}}}


def open_unlearning_log(
    log: Log,
    reference_log: Log | None = None,
    rows: Mapping[str, Sequence[float | None]] | None = None,
) -> dict[str, Metric]:
    """Make the log of open-unlearning, its ``TOFU_EVAL.json``, of TOFU's log.

    The metrics have the names and the formulas of open-unlearning. Its truth ratio and its probability among
    options add 1e-10 to the numbers by which they divide.

    Args:
        log: The log of the model, as ``loku.evaluation.evaluate`` returns it.
        reference_log: The log of a model that never saw the forget set, in any form; None (default) leaves
            ``forget_quality`` at None, as open-unlearning does.
        rows: The measures of the rows of the forget set, ``Evaluation.rows["forget"]``, for
            ``exact_memorization`` and ``extraction_strength``; None (default) leaves these two out.
            open-unlearning leaves an EOS out of both, so measure with ``count_end=False``. Its extraction
            strength of a row of T tokens is 1 / T at least.

    Returns:
        The metrics by their names, in alphabetical order: those that the sets of the log allow.

    Raises:
        ValueError: A log has none of the known forms, or the logs are about other questions.
    """
    log = tofu_log(log, "the log")
    metrics: dict[str, Metric] = {}
    for kind, key in SECTIONS.items():
        if key in log:
            metrics |= dict(_metrics(kind, log[key]))
    theirs = tofu_log(metrics, "the log") if metrics else {}
    if rows is not None:
        metrics |= _memorisation(rows)
    if "forget_truth_ratio" in metrics:
        quality = None if reference_log is None else forget_quality(theirs, reference_log)
        metrics["forget_quality"] = {"agg_value": quality}
    needed = [f"{PREFIXES[kind]}_Truth_Ratio" for kind in UTILITY_SETS]
    needed += [f"{PREFIXES[kind]}_Q_A_Prob_normalised" for kind in CHOICE_SETS]  # every row has wrong answers
    if metrics.keys() >= set(needed):
        metrics["model_utility"] = {"agg_value": model_utility(theirs)}
    return dict(sorted(metrics.items()))


def open_unlearning_summary(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return the summary of a log of open-unlearning, its ``TOFU_SUMMARY.json``: each metric's one number.

    Args:
        metrics: The log, from ``open_unlearning_log`` or from ``TOFU_EVAL.json``.
    """
    values = {name: metric.get("agg_value") for name, metric in metrics.items()}
    return {name: value for name, value in values.items() if value is not None}


def _metrics(kind: str, section: Section) -> Iterable[tuple[str, Metric]]:
    """Yield the metrics of a set."""
    prefix = PREFIXES[kind]
    right = _probabilities(section["avg_gt_loss"])
    yield f"{prefix}_Q_A_Prob", _metric(right, "prob")
    if "generated_text" in section:
        yield f"{prefix}_Q_A_ROUGE", _metric(_rouge(section), "rougeL_recall")
    if not section.get("average_perturb_loss"):
        return
    wrong = _probabilities(section["average_perturb_loss"])
    yield f"{prefix}_Q_A_PERT_Prob", _metric(wrong, "prob")
    if kind in CHOICE_SETS:
        if wrong.keys() == right.keys():
            among = {i: _among(right[i]["prob"], wrong[i]["prob"]) for i in right}
            yield f"{prefix}_Q_A_Prob_normalised", _metric({i: {"prob": p} for i, p in among.items()}, "prob")
    else:
        yield f"{prefix}_Q_A_PARA_Prob", _metric(_probabilities(section["avg_paraphrased_loss"]), "prob")
    ratios = their_truth_ratio(section)
    aggregated = np.minimum(ratios, 1 / (ratios + EPSILON)) if kind == "forget" else np.maximum(0, 1 - ratios)
    scores = dict(zip(section["average_perturb_loss"], ratios.tolist(), strict=True))
    yield (
        "forget_truth_ratio" if kind == "forget" else f"{prefix}_Truth_Ratio",
        {
            "agg_value": float(aggregated.mean()),
            "value_by_index": {i: {"score": score} for i, score in scores.items()},
        },
    )


def _probabilities(losses: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the probability, exp(-mean loss), and the mean loss of each row's answer or answers."""
    return {i: {"prob": np.exp(-np.array(loss)).tolist(), "avg_loss": loss} for i, loss in losses.items()}


def _among(right: float, wrong: Iterable[float]) -> float:
    return right / (right + sum(wrong) + EPSILON)


def _rouge(section: Section) -> dict[str, dict[str, Any]]:
    """Return the recalls, the F1 and the texts of each row. TOFU's log has no F1, so it is computed here."""
    found = {}
    for i, (asked, generated, true) in section["generated_text"].items():
        if generated.startswith(_ANSWER):  # TOFU splits prompt and generation before it
            asked, generated = f"{asked}{_ANSWER}", generated.removeprefix(_ANSWER)
        found[i] = {
            "rouge1_recall": section["rouge1_recall"][i],
            "rougeL_f1": rouge_l_f1([generated], [true], stemming=True)[0],
            "rougeL_recall": section["rougeL_recall"][i],
            "input": asked,
            "ground_truth": true,
            "generation": generated.strip(),
        }
    return found


def _memorisation(rows: Mapping[str, Sequence[float | None]]) -> dict[str, Metric]:
    def by_index(values: Iterable[float | None]) -> dict[str, dict[str, Any]]:
        return {str(i): {"score": value} for i, value in enumerate(values)}

    strengths = [
        None if strength is None or not tokens else max(strength, 1 / tokens)
        for strength, tokens in zip(rows["extraction_strength"], rows["tokens"], strict=True)
    ]
    return {
        "exact_memorization": _metric(by_index(rows["memorization_accuracy"]), "score"),
        "extraction_strength": _metric(by_index(strengths), "score"),
    }


def _metric(values: dict[str, dict[str, Any]], name: str) -> Metric:
    """Return a metric whose one number is the mean over rows, and over a row's answers, of one value."""
    means = [np.mean(value[name]) for value in values.values() if value[name] is not None]
    return {"agg_value": float(np.mean(means)) if means else None, "value_by_index": values}
