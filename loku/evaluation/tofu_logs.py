"""The measures that are computed from TOFU's logs (Maini et al., 2024).

The functions take a log in any of the forms of ``loku.evaluation.log_forms``. If it is open-unlearning's, its
own truth ratios count, and the figures are those of open-unlearning. Its ratio is wrong / (true + 1e-10), of
the probabilities exp(-mean loss). TOFU's has no such constant, so the two differ where a mean loss is more
than about 15 nats.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, KeysView, Mapping, Sequence
from typing import Any

import numpy as np

from loku.data import wrong_answers
from loku.evaluation.log_forms import SECTIONS, TRUTH_RATIO, Log, Section, tofu_log

__all__ = [
    "CHOICE_SETS",
    "SECTIONS",
    "UTILITY_SETS",
    "Log",
    "Section",
    "check_forget_section",
    "check_reference",
    "forget_quality",
    "log_truth_ratio",
    "model_utility",
    "section_metrics",
    "utility_table",
]

EPSILON = 1e-10  # open-unlearning adds it to the numbers by which it divides
CHOICE_SETS = ("real_authors", "world_facts")  # the true answer competes with wrong ones
UTILITY_SETS = ("retain", *CHOICE_SETS)


def forget_quality(unlearned_log: Log, retain_log: Log) -> float:
    """Compute TOFU's forget quality, a p-value; high is good.

    The two-sided Kolmogorov-Smirnov test compares the truth ratios of the forget set, exp(mean perturbed loss
    - paraphrased loss), in the unlearned model and in a model that never saw the set. Its null hypothesis is
    that both come from one distribution. The order of the rows does not count. If one of the logs is
    open-unlearning's, the test compares its truth ratios, which are computed for the other log as well.

    Args:
        unlearned_log: The parsed log of the unlearned model, in any form.
        retain_log: The parsed log of the model that never saw the forget set, in any form.

    Raises:
        ValueError: A log has no forget section with perturbed answers, or a value of it is no number; or the
            logs are about other questions.
    """
    from scipy.stats import ks_2samp

    sections = [
        _section(tofu_log(log, f"the {name} log"), "forget")
        for name, log in [("unlearned", unlearned_log), ("retain", retain_log)]
    ]
    places = [f"the {name} log's forget section" for name in ("unlearned", "retain")]
    if any(TRUTH_RATIO in section for section in sections):
        ratios = [their_truth_ratio(*pair) for pair in zip(sections, places, strict=True)]
    else:
        # The test uses the order alone, so the logarithm gives the same p-value, and it cannot overflow.
        ratios = [log_truth_ratio(*pair) for pair in zip(sections, places, strict=True)]
    if not _check_same_questions(len(ratios[0]), _asked(sections[0]), sections[1], "the retain log"):
        warnings.warn(
            "a log lacks 'generated_text', so its questions could not be compared with the other log's; "
            "forget quality needs the same rows in both",
            stacklevel=2,
        )
    return float(ks_2samp(*ratios).pvalue)


def check_forget_section(log: Log, name: str) -> None:
    """Check that a log has the section that forget quality needs.

    Args:
        log: The parsed log, in any form.
        name: The name of the log in messages.

    Raises:
        ValueError: The log has not the form of TOFU's or no forget section with perturbed answers, or a value
            of it is no number.
    """
    log = tofu_log(log, name)
    _check_form(log, name)
    section, where = _section(log, "forget"), f"the forget section of {name}"
    if TRUTH_RATIO in section:
        their_truth_ratio(section, where)
    else:
        log_truth_ratio(section, where)


def _check_form(log: Any, name: str) -> None:
    """Raise ValueError unless the forget section maps quantities to rows, and rows to numbers or texts."""
    try:
        section = log.get(SECTIONS["forget"], {})
        for quantity in ("average_perturb_loss", "avg_paraphrased_loss", TRUTH_RATIO):
            for value in section.get(quantity, {}).values():
                np.asarray(value, dtype=np.float64)
        for texts in section.get("generated_text", {}).values():
            "".join((texts[0], texts[2]))  # the prompt and the true answer
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has not the form of TOFU's logs: {error}") from error


def check_reference(log: Log, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Check that a log is about the questions of a forget set.

    Args:
        log: The parsed log, in any form.
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
    _check_same_questions(len(asked), asked, _section(tofu_log(log, name), "forget"), name)


def _asked(section: Section) -> list[tuple[str, str]] | None:
    """Return the prompts and true answers of the rows with perturbed answers, if the section has them."""
    texts = section.get("generated_text", {})
    if not _compared(section) <= texts.keys():
        return None
    return [(texts[i][0], texts[i][2]) for i in _compared(section)]


def _compared(section: Section) -> KeysView[str]:
    """Return the indices of the rows that forget quality compares."""
    return section[TRUTH_RATIO if TRUTH_RATIO in section else "average_perturb_loss"].keys()


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
    others = len(_compared(reference))
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

        A section of open-unlearning's log has the figures of open-unlearning, which adds 1e-10 to the
        numbers by which it divides.

    Raises:
        ValueError: With ``choice``, a row has no perturbed answers; or the section lacks the losses or the
            ROUGE recalls of the answers.
    """
    for quantity in ("avg_gt_loss", "rougeL_recall"):
        if quantity not in section:
            raise ValueError(f"a section of the log has no {quantity!r}; it has {sorted(section)}")
    loss, theirs = _values(section, "avg_gt_loss"), TRUTH_RATIO in section
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
        if theirs:
            right = np.exp(-loss)
            others = [np.exp(-np.array(wrong[i], dtype=np.float64)).sum() for i in section["avg_gt_loss"]]
            probability = right / (right + np.array(others) + EPSILON)
    else:
        probability = np.exp(-loss)
    rouge = _values(section, "rougeL_recall")
    metrics = {"probability": float(probability.mean()), "rouge": float(rouge.mean())}
    if theirs:
        ratio = their_truth_ratio(section)
        truth = np.minimum(ratio, 1 / (ratio + EPSILON)) if forget else np.maximum(0, 1 - ratio)
        metrics["truth_ratio"] = float(truth.mean())
    elif "average_perturb_loss" in section:
        log_ratio = log_truth_ratio(section)
        truth = np.exp(-np.abs(log_ratio)) if forget else -np.expm1(-np.maximum(log_ratio, 0))
        metrics["truth_ratio"] = float(truth.mean())
    return metrics


def utility_table(log: Log) -> dict[str, dict[str, float]]:
    """Compute the ``section_metrics`` of a log.

    Args:
        log: The parsed log, in any form.

    Returns:
        ``{set: {"probability", "rouge", "truth_ratio"}}`` for each of the sets retain, real_authors,
        world_facts and forget that the log has.
    """
    log = tofu_log(log, "the log")
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
        log: The parsed log, in any form.
        sets: The sets that count, all three by default. A model that never saw some of them, such as the
            embedded one, has fewer; its utility is not comparable with published figures.

    Returns:
        The utility, in [0, 1].

    Raises:
        ValueError: The log lacks one of the sets, or the set's perturbed answers.
    """
    log = tofu_log(log, "the log")
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
    wrong, right = _mean_losses(section, where)
    return wrong - right


def their_truth_ratio(section: Section, where: str = "the section") -> np.ndarray:
    """Return the truth ratios of open-unlearning, float64 (rows,).

    They are those that its log has. Without them they are exp(-mean perturbed loss) / (exp(-paraphrased
    loss) + 1e-10).
    """
    if TRUTH_RATIO not in section:
        wrong, right = _mean_losses(section, where)
        return np.exp(-wrong) / (np.exp(-right) + EPSILON)
    ratios = _values(section, TRUTH_RATIO)
    if broken := [i for i, ratio in zip(section[TRUTH_RATIO], ratios, strict=True) if np.isnan(ratio)]:
        raise ValueError(f"{where}: the truth ratios of rows {broken[:5]} are no numbers")
    return ratios


def _mean_losses(section: Section, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean perturbed and the paraphrased loss of each row with perturbed answers."""
    if not section.get("average_perturb_loss") or not section.get("avg_paraphrased_loss"):
        raise ValueError(
            f"{where} lacks 'average_perturb_loss' or 'avg_paraphrased_loss'; evaluate rows with "
            f"'perturbed_answer'"
        )
    rights, wrongs = section["avg_paraphrased_loss"], section["average_perturb_loss"]
    if missing := sorted(wrongs.keys() - rights.keys()):
        raise ValueError(f"{where}: rows {missing[:5]} have no 'avg_paraphrased_loss'")
    # None, by which JSON stands for NaN, becomes NaN
    wrong = np.array([np.mean(np.array(losses, dtype=np.float64)) for losses in wrongs.values()])
    right = np.array([rights[i] for i in wrongs], dtype=np.float64)
    if broken := [i for i, ratio in zip(wrongs, wrong - right, strict=True) if np.isnan(ratio)]:
        raise ValueError(
            f"{where}: the losses of rows {broken[:5]} are no numbers, so they have no truth ratio"
        )
    return wrong, right
