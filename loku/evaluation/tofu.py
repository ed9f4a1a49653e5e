"""TOFU's measures (Maini et al., 2024), read from and written to TOFU's own JSON logs.

A log maps file names to sections, one for each set of questions. A section maps a quantity to
``{str(row index): value}``. Losses are in nats: ``*_loss`` is the sum over an answer's tokens, and
``avg_*_loss`` and ``average_perturb_loss`` are the means over them.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from loku.data import (
    BadRow,
    RowError,
    TokenLimits,
    labelled_column,
    paraphrased_answer,
    question_answer_texts,
    tokenize_dataset,
    wrong_answers,
)
from loku.data.rows import DataSet
from loku.evaluation.extraction import generated_texts
from loku.evaluation.scores import TokenScores, check_scores, token_scores, unchecked_token_scores
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


class Answer(NamedTuple):
    """An answer that is scored.

    Attributes:
        row: The index of its row, from 0.
        kind: "gt", "paraphrased" or "perturb", as in the quantities of a log.
        tokens: Its tokenised row, with ``input_ids`` and ``labels``.
    """

    row: int
    kind: str
    tokens: Mapping[str, list[int]]


def tokenized_answers(
    rows: DataSet,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    max_length: int | None = None,
    limits: TokenLimits | None = None,
) -> list[Answer]:
    """Tokenise all answers of rows of questions and answers.

    Args:
        rows: The rows, as for ``evaluate_tofu_rows``.
        tokenizer: The tokenizer.
        name: The name of the data set in messages.
        max_length: The greatest number of tokens of a question and an answer; None (default) sets none. They
            are never cut, because half an answer has another probability.
        limits: The limits of a model, from ``loku.data.token_limits``; None (default) sets none.

    Returns:
        The true answers, in the order of the rows; then the paraphrased and wrong ones of the rows that have
        wrong ones.

    Raises:
        ValueError: There are no rows.
        RowError: A row lacks a question or an answer, has one of the wrong type, or is too long.
    """
    if len(rows) == 0:
        raise ValueError(f"the {name} set is empty; it needs at least one row")
    texts: list[tuple[int, str, str]] = []
    others: list[tuple[int, str, str]] = []
    for index, row in enumerate(rows):
        if labelled_column(row) != "answer":
            has = list(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise RowError(name, index, f"TOFU's measures need 'question' and 'answer', and it has {has}")
        try:
            wrong = wrong_answers(row)
            if wrong:
                others.append((index, "paraphrased", paraphrased_answer(row)))
        except BadRow as error:
            raise RowError(name, index, error) from error
        texts.append((index, "gt", row["answer"]))
        others += [(index, "perturb", answer) for answer in wrong]
    texts += others
    columns = [{"question": rows[index]["question"], "answer": answer} for index, _, answer in texts]
    try:
        tokens = tokenize_dataset(columns, tokenizer, name=name)
    except RowError as error:
        raise RowError(name, texts[error.index][0], error.problem) from error
    answers = [Answer(index, kind, ids) for (index, kind, _), ids in zip(texts, tokens, strict=True)]
    bounds = [
        (max_length, "max_length", "raise max_length (--max-length) or drop the row"),
        (None if limits is None else limits.context, "the model's context", "drop the row"),
    ]
    for index, _, ids in answers:
        length = len(ids["input_ids"])
        for greatest, what, instead in bounds:
            if greatest is not None and length > greatest:
                problem = f"a question with its answer has {length} tokens, and {what} is {greatest}"
                raise RowError(name, index, f"{problem}. Answers to questions are not cut: {instead}")
        try:
            if limits is not None:
                limits.check(ids)
        except BadRow as error:
            raise RowError(name, index, error) from error
    return answers


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
        ValueError: There are no rows.
        RowError: A row lacks ``question`` or ``answer``, or has an answer that is no text.
        FloatingPointError: A loss is NaN.
    """
    return measured_section(
        model, tokenizer, rows, range(len(rows)), batch_size, progress, description, scores, max_new_tokens
    )


def measured_section(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: DataSet,
    numbers: Sequence[int],
    batch_size: int,
    progress: bool,
    description: str,
    scores: Sequence[TokenScores] | None,
    max_new_tokens: int | None,
) -> Section:
    """Do the work of ``evaluate_tofu_rows``, with the indices that messages give to the rows."""
    answers = tokenized_answers(rows, tokenizer, description)
    tokens = [answer.tokens for answer in answers]
    # All answers are scored in one list, so that a batch may mix kinds.
    known = scores or []
    to_score = tokens[len(known) :]
    new = unchecked_token_scores(model, to_score, batch_size, progress, f"{description}: scoring")
    scores = [*known, *new]
    check_scores(scores, description, lambda i: f"row {numbers[answers[i].row]}, a {answers[i].kind} answer")
    scored: dict[str, dict[str, list[tuple[float, int]]]] = {"gt": {}, "paraphrased": {}, "perturb": {}}
    for (i, kind, _), score in zip(answers, scores, strict=True):
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
        _log_truth_ratio(_section(log, "forget"), f"the {name} log's forget section")
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
        ValueError: The log has no forget section with perturbed answers, or a value of it is no number.
    """
    _log_truth_ratio(_section(log, "forget"), f"the forget section of {name}")


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
        (question_answer_texts(row["question"], "")[0], row["answer"]) for row in rows if wrong_answers(row)
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
    ratios = np.array(
        [np.mean(np.array(losses, dtype=np.float64)) - np.float64(right[i]) for i, losses in wrong.items()]
    )  # None, by which JSON stands for NaN, becomes NaN
    if broken := [i for i, ratio in zip(wrong, ratios, strict=True) if np.isnan(ratio)]:
        raise ValueError(
            f"{where}: the losses of rows {broken[:5]} are no numbers, so they have no truth ratio"
        )
    return ratios
