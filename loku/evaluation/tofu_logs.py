"""TOFU's JSON logs (Maini et al., 2024), and the measures that are computed from them.

A log maps file names to sections, one for each set of questions. A section maps a quantity to
``{str(row index): value}``. Losses are in nats: ``*_loss`` is the sum over an answer's tokens, and
``avg_*_loss`` and ``average_perturb_loss`` are the means over them.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from loku.data import wrong_answers

Section: TypeAlias = dict[str, dict[str, Any]]  # {quantity: {str(row index): value}}
Log: TypeAlias = Mapping[str, Section]

SECTIONS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
CHOICE_SETS = ("real_authors", "world_facts")  # the true answer competes with wrong ones
UTILITY_SETS = ("retain", *CHOICE_SETS)


def forget_quality(unlearned_log: Log, retain_log: Log) -> float:
    """Compute TOFU's forget quality, a p-value; high is good.

    The two-sided Kolmogorov-Smirnov test compares the truth ratios of the forget set, exp(mean perturbed loss
    - paraphrased loss), in the unlearned model and in a model that never saw the set. Its null hypothesis is
    that both come from one distribution. The order of the rows does not count.

    Args:
        unlearned_log: The parsed TOFU log of the unlearned model.
        retain_log: The parsed TOFU log of the model that never saw the forget set.

    Raises:
        ValueError: A log has no forget section with perturbed answers, or a value of it is no number; or the
            logs are about other questions.
    """
    from scipy.stats import ks_2samp

    # The test uses the order alone, so the logarithm gives the same p-value, and it cannot overflow.
    ratios = [
        log_truth_ratio(_section(log, "forget"), f"the {name} log's forget section")
        for name, log in [("unlearned", unlearned_log), ("retain", retain_log)]
    ]
    ours, theirs = (_section(log, "forget") for log in (unlearned_log, retain_log))
    if not _check_same_questions(len(ratios[0]), _asked(ours), theirs, "the retain log"):
        warnings.warn(
            "a log lacks 'generated_text', so its questions could not be compared with the other log's; "
            "forget quality needs the same rows in both",
            stacklevel=2,
        )
    return float(ks_2samp(*ratios).pvalue)


def check_forget_section(log: Log, name: str) -> None:
    """Check that a TOFU log has the section that forget quality needs.

    Args:
        log: The parsed TOFU log.
        name: The name of the log in messages.

    Raises:
        ValueError: The log has not the form of TOFU's or no forget section with perturbed answers, or a value
            of it is no number.
    """
    _check_form(log, name)
    log_truth_ratio(_section(log, "forget"), f"the forget section of {name}")


def _check_form(log: Any, name: str) -> None:
    """Raise ValueError unless the forget section maps quantities to rows, and rows to numbers or texts."""
    try:
        section = log.get(SECTIONS["forget"], {})
        for quantity in ("average_perturb_loss", "avg_paraphrased_loss"):
            for value in section.get(quantity, {}).values():
                np.asarray(value, dtype=np.float64)
        for texts in section.get("generated_text", {}).values():
            "".join((texts[0], texts[2]))  # the prompt and the true answer
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has not the form of TOFU's logs: {error}") from error


def check_reference(log: Log, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Check that a TOFU log is about the questions of a forget set.

    Args:
        log: The parsed TOFU log.
        rows: The rows of the forget set. Those with wrong answers count.
        name: The name of the log in messages.

    Raises:
        ValueError: The log has no forget section with perturbed answers, or it is about other questions.
    """
    check_forget_section(log, name)
    asked = [
        (row["question"], row["answer"])
        for row in rows
        if wrong_answers(row)  # whatever their template is
    ]
    _check_same_questions(len(asked), asked, _section(log, "forget"), name)


def _asked(section: Section) -> list[tuple[str, str]] | None:
    """Return the prompts and true answers of the rows with perturbed answers, if the section has them."""
    texts = section.get("generated_text", {})
    if not section["average_perturb_loss"].keys() <= texts.keys():
        return None
    return [(texts[i][0], texts[i][2]) for i in section["average_perturb_loss"]]


def _check_same_questions(
    count: int, asked: Iterable[tuple[str, str]] | None, reference: Section, name: str
) -> bool:
    """Check that a reference section is about some questions, in any order.

    Other evaluators render prompts by other templates, so a prompt must only contain the question.

    Args:
        count: The number of questions.
        asked: Their prompts and true answers, or None if they are not known.
        reference: The section of the reference log.
        name: The name of the reference log in messages.

    Returns:
        Whether the questions could be compared, and not their number alone.

    Raises:
        ValueError: The section is about other questions.
    """
    instead = "evaluate the same rows with both models"
    others = len(reference["average_perturb_loss"])
    if count != others:
        raise ValueError(
            f"{name} has {others} forget questions with perturbed answers, and the forget set has {count}, "
            f"so a forget quality would compare different questions; {instead}"
        )
    known = _asked(reference)
    if known is None or asked is None:
        return False
    prompts_of = defaultdict(list)
    for prompt, answer in known:
        prompts_of[_letters(answer)].append(_question(prompt))
    missing = []
    for prompt, answer in asked:
        question, candidates = _question(prompt), prompts_of[_letters(answer)]
        same = next((other for other in candidates if question in other or other in question), None)
        if same is None:
            missing.append(prompt.strip())
        else:
            candidates.remove(same)
    if missing:
        raise ValueError(
            f"{name} is about other questions: it lacks {len(missing)} of the {count} forget questions with "
            f"their answers, such as {missing[0]!r}; {instead}"
        )
    return True


def _question(prompt: str) -> str:
    return _letters(re.sub(r"^\s*Question:|Answer:\s*$", "", prompt))


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text.lower())


def section_metrics(section: Section, choice: bool = False, forget: bool = False) -> dict[str, float]:
    """Compute the three numbers of one section, each a mean over rows.

    Args:
        section: The section of a parsed TOFU log.
        choice: Whether the answer's probability is normalised over the answer and its wrong alternatives, as
            for real authors and world facts; False by default.
        forget: Whether the section belongs to the forget set; False by default.

    Returns:
        ``probability`` is the answer's, exp(-mean token loss). ``rouge`` is ROUGE-L recall. With R = exp(mean
        perturbed loss - paraphrased loss), ``truth_ratio`` is max(0, 1 - 1/R), or min(R, 1/R) with
        ``forget``; it is absent if no row has perturbed answers.

    Raises:
        ValueError: With ``choice``, a row has no perturbed answers.
    """
    loss = _values(section, "avg_gt_loss")
    if choice:
        wrong = section.get("average_perturb_loss", {})
        missing = sorted(set(section["avg_gt_loss"]) - set(wrong))
        if missing:
            raise ValueError(f"rows {missing[:5]} have no perturbed answers to choose among")
        # This is a softmax over the alternatives. exp(-loss) may underflow for all of them.
        with np.errstate(over="ignore"):
            odds = [
                np.exp(right - np.array([right, *wrong[i]])) for i, right in section["avg_gt_loss"].items()
            ]
        probability = np.array([1 / each.sum() for each in odds])
    else:
        probability = np.exp(-loss)
    rouge = _values(section, "rougeL_recall")
    metrics = {"probability": float(probability.mean()), "rouge": float(rouge.mean())}
    if "average_perturb_loss" in section:
        log_ratio = log_truth_ratio(section)
        truth = np.exp(-np.abs(log_ratio)) if forget else -np.expm1(-np.maximum(log_ratio, 0))
        metrics["truth_ratio"] = float(truth.mean())
    return metrics


def utility_table(log: Log) -> dict[str, dict[str, float]]:
    """Compute the ``section_metrics`` of a parsed TOFU log.

    Returns:
        ``{set: {"probability", "rouge", "truth_ratio"}}`` for each of the sets retain, real_authors,
        world_facts and forget that the log has.
    """
    return {
        name: section_metrics(log[key], name in CHOICE_SETS, name == "forget")
        for name, key in SECTIONS.items()
        if key in log
    }


def model_utility(log: Log, sets: Collection[str] = UTILITY_SETS) -> float:
    """Compute TOFU's model utility.

    It is the harmonic mean of nine numbers: probability, ROUGE-L recall and truth ratio on retain, real
    authors and world facts.

    Args:
        log: The parsed TOFU log.
        sets: The sets that count, all three by default. A model that never saw some of them, such as the
            embedded one, has fewer; its utility is not comparable with published figures.

    Returns:
        The utility, in [0, 1].

    Raises:
        ValueError: The log lacks one of the sets, or the set's perturbed answers.
    """
    for name in sets:
        _section(log, name)
    table = utility_table(log)
    values: list[float] = []
    for name in sets:
        if "truth_ratio" not in table[name]:
            raise ValueError(f"the log's {name} section has no perturbed answers, so no truth ratio")
        values += table[name].values()
    return len(values) / sum(1 / v for v in values) if all(v != 0 for v in values) else 0.0


def _section(log: Log, name: str) -> Section:
    if SECTIONS[name] not in log:
        raise ValueError(f"the log has no {name} section {SECTIONS[name]!r}; it has {list(log)}")
    return log[SECTIONS[name]]


def _values(section: Section, key: str) -> np.ndarray:
    return np.array(list(section[key].values()), dtype=np.float64)


def log_truth_ratio(section: Section, where: str = "the section") -> np.ndarray:
    """Return mean perturbed loss - paraphrased loss of each row with perturbed answers, float64 (rows,)."""
    if not section.get("average_perturb_loss") or not section.get("avg_paraphrased_loss"):
        raise ValueError(
            f"{where} lacks 'average_perturb_loss' or 'avg_paraphrased_loss'; evaluate rows with "
            f"'perturbed_answer'"
        )
    right, wrong = section["avg_paraphrased_loss"], section["average_perturb_loss"]
    if missing := sorted(wrong.keys() - right.keys()):
        raise ValueError(f"{where}: rows {missing[:5]} have no 'avg_paraphrased_loss'")
    ratios = np.array(
        [np.mean(np.array(losses, dtype=np.float64)) - np.float64(right[i]) for i, losses in wrong.items()]
    )  # None, by which JSON stands for NaN, becomes NaN
    if broken := [i for i, ratio in zip(wrong, ratios, strict=True) if np.isnan(ratio)]:
        raise ValueError(
            f"{where}: the losses of rows {broken[:5]} are no numbers, so they have no truth ratio"
        )
    return ratios
