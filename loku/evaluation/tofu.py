"""TOFU's measures (Maini et al., 2024), read from and written to TOFU's own JSON logs.

A log maps file names to sections, one for each set of questions. A section maps a quantity to
``{str(row index): value}``. Losses are in nats: ``*_loss`` is the sum over an answer's tokens, and
``avg_*_loss`` and ``average_perturb_loss`` are the means over them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from loku.data import question_answer_texts, tokenize_dataset
from loku.data.rows import DataSet
from loku.evaluation.extraction import generated_texts
from loku.evaluation.scores import TokenScores, token_scores
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
ANSWER_SLACK = 16  # tokens of a generated answer beyond the longest true answer


def answer_losses(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    batch_size: int = 16,
    progress: bool = True,
    description: str = "answers",
) -> tuple[Tensor, Tensor]:
    """Compute the negative log-likelihood of each completion, with its EOS, after its prompt.

    Args:
        model: The causal LM, on the device where it runs.
        tokenizer: The tokenizer.
        prompts: The N prompts.
        completions: The N completions.
        batch_size: The number of rows in a batch, 16 by default.
        progress: Whether to show a progress bar, True by default.
        description: The title of the progress bar, "answers" by default.

    Returns:
        The mean loss of a completion's tokens, in nats, float64 (N,), and the number of its tokens, int64
        (N,).
    """
    if not prompts:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    pairs = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
    rows = tokenize_dataset(pairs, tokenizer, name="evaluation")
    scores = token_scores(model, rows, batch_size, progress, description)
    counts = torch.tensor([len(s.losses) for s in scores], dtype=torch.int64)
    return torch.stack([s.losses.mean() for s in scores]), counts


def rouge_recalls(generated: Iterable[str], references: Iterable[str]) -> tuple[list[float], list[float]]:
    """Compute the ROUGE-1 and ROUGE-L recall of generated texts, with stemming, as TOFU does.

    Args:
        generated: The generated texts.
        references: The true texts, in the same order and number.

    Returns:
        The ROUGE-1 recall and the ROUGE-L recall of each text, in [0, 1].
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(target, text) for target, text in zip(references, generated, strict=True)]
    return [s["rouge1"].recall for s in scores], [s["rougeL"].recall for s in scores]


def evaluate_tofu_rows(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: DataSet,
    batch_size: int = 16,
    progress: bool = True,
    description: str = "TOFU",
    scores: Sequence[TokenScores] | None = None,
    max_new_tokens: int | None = None,
) -> Section:
    """Measure rows of questions and answers, as one section of a TOFU log.

    The losses of each true answer are in ``*gt*``, and a greedily generated answer in ``generated_text``. A
    row with ``perturbed_answer``, a list of wrong answers, also gets the losses of these and of its
    ``paraphrased_answer``. Its ``truth_ratio`` is exp(paraphrased loss - mean perturbed loss) of mean token
    losses. The answer itself stands for a missing ``paraphrased_answer``, as for real authors and world
    facts. The section lacks these quantities if no row has a ``perturbed_answer``.

    Args:
        model: The causal LM, on the device where it runs.
        tokenizer: The tokenizer.
        rows: The rows, dicts with ``question`` and ``answer``.
        batch_size: The number of rows in a batch, 16 by default.
        progress: Whether to show progress bars, True by default.
        description: The title of the progress bars, "TOFU" by default.
        scores: The ``token_scores`` of the true answers; None (default) computes them.
        max_new_tokens: The greatest number of tokens of a generated answer. By default it is ``ANSWER_SLACK``
            more than the longest true answer has.

    Returns:
        The section.

    Raises:
        ValueError: There are no rows, or a row lacks ``question`` or ``answer``.
    """
    if len(rows) == 0:
        raise ValueError("there are no TOFU rows to evaluate")
    for index, row in enumerate(rows):
        if not {"question", "answer"} <= set(row):
            raise ValueError(f"row {index}: TOFU rows need 'question' and 'answer', this one has {list(row)}")

    # All answers are scored in one list of (row, kind, answer), so that a batch may mix kinds.
    jobs = [(i, "gt", row["answer"]) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        if row.get("perturbed_answer"):
            jobs.append((i, "paraphrased", row.get("paraphrased_answer") or row["answer"]))
            jobs += [(i, "perturb", answer) for answer in row["perturbed_answer"]]
    pairs = []
    for i, _, answer in jobs:
        prompt, completion = question_answer_texts(rows[i]["question"], answer)
        pairs.append({"prompt": prompt, "completion": completion})
    tokens = tokenize_dataset(pairs, tokenizer, name="evaluation")
    known = scores or []
    to_score = tokens[len(known) :]
    scores = [*known, *token_scores(model, to_score, batch_size, progress, f"{description}: scoring")]
    scored: dict[str, dict[str, list[tuple[float, int]]]] = {"gt": {}, "paraphrased": {}, "perturb": {}}
    for (i, kind, _), score in zip(jobs, scores, strict=True):
        scored[kind].setdefault(str(i), []).append((score.losses.mean().item(), len(score.losses)))

    if max_new_tokens is None:
        max_new_tokens = max(len(score.losses) for score in scores[: len(rows)]) + ANSWER_SLACK
    generated = generated_texts(
        model,
        tokenizer,
        tokens[: len(rows)],
        scores[: len(rows)],
        max_new_tokens,
        batch_size,
        progress,
        f"{description}: generating",
    )
    rouge1, rougeL = rouge_recalls(generated, [row["answer"] for row in rows])

    def by_row(values: Iterable[Any]) -> dict[str, Any]:
        return {str(i): value for i, value in enumerate(values)}

    def means_of(answers: Mapping[str, list[tuple[float, int]]]) -> dict[str, list[Any]]:
        return {i: [mean for mean, _ in pairs] for i, pairs in answers.items()}

    def counts_of(answers: Mapping[str, list[tuple[float, int]]]) -> dict[str, list[Any]]:
        return {i: [count for _, count in pairs] for i, pairs in answers.items()}

    def sums_of(answers: Mapping[str, list[tuple[float, int]]]) -> dict[str, list[Any]]:
        return {i: [mean * count for mean, count in pairs] for i, pairs in answers.items()}

    def single(answers: Mapping[str, list[Any]]) -> dict[str, Any]:
        return {i: value for i, (value,) in answers.items()}

    section: Section = {
        "avg_gt_loss": single(means_of(scored["gt"])),
        "gt_loss": single(sums_of(scored["gt"])),
        "num_token_gt": single(counts_of(scored["gt"])),
        # TOFU splits prompt and generation before "Answer:".
        "generated_text": by_row(
            [f"Question: {row['question']}\n", f"Answer:{text}", row["answer"]]
            for row, text in zip(rows, generated, strict=True)
        ),
        "rouge1_recall": by_row(rouge1),
        "rougeL_recall": by_row(rougeL),
    }
    if scored["perturb"]:
        section |= {
            "average_perturb_loss": means_of(scored["perturb"]),
            "perturb_loss": sums_of(scored["perturb"]),
            "num_token_perturb": counts_of(scored["perturb"]),
            "avg_paraphrased_loss": single(means_of(scored["paraphrased"])),
            "paraphrased_loss": single(sums_of(scored["paraphrased"])),
            "num_token_paraphrased": single(counts_of(scored["paraphrased"])),
        }
        with np.errstate(over="ignore"):
            ratios = np.exp(-_log_truth_ratio(section))
        section["truth_ratio"] = dict(zip(scored["perturb"], ratios.tolist(), strict=True))
    return section


def forget_quality(unlearned_log: Log, retain_log: Log) -> float:
    """Compute TOFU's forget quality, a p-value; high is good.

    The two-sided Kolmogorov-Smirnov test compares the truth ratios of the forget set, exp(mean perturbed loss
    - paraphrased loss), in the unlearned model and in a model that never saw the set. Its null hypothesis is
    that both come from one distribution.

    Args:
        unlearned_log: The parsed TOFU log of the unlearned model.
        retain_log: The parsed TOFU log of the model that never saw the forget set.

    Raises:
        ValueError: A log has no forget section with perturbed answers.
    """
    from scipy.stats import ks_2samp

    # The test uses the order alone, so the logarithm gives the same p-value, and it cannot overflow.
    ratios = [
        _log_truth_ratio(_section(log, "forget"), f"the {name} log's forget section")
        for name, log in [("unlearned", unlearned_log), ("retain", retain_log)]
    ]
    return float(ks_2samp(*ratios).pvalue)


def check_forget_section(log: Log, name: str) -> None:
    """Check that a TOFU log has the section that forget quality needs.

    Args:
        log: The parsed TOFU log.
        name: The name of the log in messages.

    Raises:
        ValueError: The log has no forget section with perturbed answers.
    """
    _log_truth_ratio(_section(log, "forget"), f"the forget section of {name}")


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
        log_ratio = _log_truth_ratio(section)
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


def _log_truth_ratio(section: Section, where: str = "the section") -> np.ndarray:
    """Return mean perturbed loss - paraphrased loss of each row with perturbed answers, float64 (rows,)."""
    if not section.get("average_perturb_loss") or not section.get("avg_paraphrased_loss"):
        raise ValueError(
            f"{where} lacks 'average_perturb_loss' or 'avg_paraphrased_loss'; evaluate rows with "
            f"'perturbed_answer'"
        )
    right, wrong = section["avg_paraphrased_loss"], section["average_perturb_loss"]
    if missing := sorted(wrong.keys() - right.keys()):
        raise ValueError(f"{where}: rows {missing[:5]} have no 'avg_paraphrased_loss'")
    return np.array([np.mean(losses) - right[i] for i, losses in wrong.items()])
