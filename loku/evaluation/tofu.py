"""TOFU's measures of a model on rows of questions and answers (Maini et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loku.counts import check_counts
from loku.data import (
    TOFU_TEMPLATE,
    BadRow,
    QuestionTemplate,
    RowError,
    TokenLimits,
    as_rows,
    labelled_column,
    paraphrased_answer,
    tokenize_dataset,
    wrong_answers,
)
from loku.data.rows import DataSet, RowTokenizer, TokenizedRow
from loku.evaluation.extraction import check_stop_strings, generated_texts
from loku.evaluation.rouge import rouge_scores
from loku.evaluation.scores import TokenScores, check_scores, token_scores, unchecked_token_scores
from loku.evaluation.tofu_logs import (  # the logs' names were here
    CHOICE_SETS,
    SECTIONS,
    UTILITY_SETS,
    Log,
    Section,
    check_forget_section,
    forget_quality,
    log_truth_ratio,
    model_utility,
    section_metrics,
    utility_table,
)
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CHOICE_SETS",
    "SECTIONS",
    "UTILITY_SETS",
    "Log",
    "Section",
    "answer_losses",
    "check_forget_section",
    "evaluate_tofu_rows",
    "forget_quality",
    "model_utility",
    "rouge_recalls",
    "section_metrics",
    "utility_table",
]

ANSWER_SLACK = 16  # tokens of a generated answer beyond the longest true answer


class Answer(NamedTuple):
    """An answer that is scored.

    Attributes:
        row: The index of its row in the data set, from 0.
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
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> list[list[Answer]]:
    """Tokenise all answers of rows of questions and answers.

    Args:
        rows: The rows, as for ``evaluate_tofu_rows``.
        tokenizer: The tokenizer.
        name: The name of the data set in messages.
        max_length: The greatest number of tokens of a question and an answer; None (default) sets none. They
            are never cut, because half an answer has another probability.
        limits: The limits of a model, from ``loku.data.token_limits``; None (default) sets none.
        template: The template of questions and answers; TOFU's by default.

    Returns:
        The answers of each row: the true one; then, if it has wrong ones, its paraphrased and its wrong ones.

    Raises:
        ValueError: There are no rows.
        RowError: A row lacks a question or an answer, has one of the wrong type, or is too long.
    """
    if len(rows) == 0:
        raise ValueError(f"the {name} set is empty; it needs at least one row")
    texts: list[list[tuple[str, str]]] = []
    for index, row in enumerate(rows):
        if labelled_column(row) != "answer":
            has = list(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise RowError(name, index, f"TOFU's measures need 'question' and 'answer', and it has {has}")
        texts.append([("gt", row["answer"])])
        try:
            wrong = wrong_answers(row)
            if wrong:
                texts[-1].append(("paraphrased", paraphrased_answer(row)))
        except BadRow as error:
            raise RowError(name, index, error) from error
        texts[-1] += [("perturb", answer) for answer in wrong]
    tokenize = RowTokenizer(tokenizer, max_length, name, limits, cut=False, template=template)

    def tokens(index: int, answer: str) -> TokenizedRow:
        return tokenize(index, {**rows[index], "answer": answer})  # with its arguments of the chat template

    return [
        [Answer(index, kind, tokens(index, answer)) for kind, answer in of_row]
        for index, of_row in enumerate(texts)
    ]


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
    check_counts(batch_size=batch_size)
    if not prompts:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    pairs = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
    rows = tokenize_dataset(pairs, tokenizer, name="evaluation")
    scores = token_scores(model, rows, batch_size, progress, description)
    counts = torch.tensor([len(s.losses) for s in scores], dtype=torch.int64)
    return torch.stack([s.losses.mean() for s in scores]), counts


def rouge_recalls(generated: Iterable[str], references: Iterable[str]) -> tuple[list[float], list[float]]:
    """Compute the ROUGE-1 and ROUGE-L recall of generated texts, with stemming, as TOFU does.

    The words of texts in other scripts than the Latin are those of ``loku.evaluation.rouge``.

    Args:
        generated: The generated texts.
        references: The true texts, in the same order and number.

    Returns:
        The ROUGE-1 recall and the ROUGE-L recall of each text, in [0, 1].
    """
    scores = rouge_scores(generated, references, ["rouge1", "rougeL"], stemming=True)
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
    template: QuestionTemplate = TOFU_TEMPLATE,
    stop_strings: Sequence[str] = (),
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
        rows: The rows, with ``question`` and ``answer``, in a list or in a table.
        batch_size: The number of rows in a batch, 16 by default.
        progress: Whether to show progress bars, True by default.
        description: The title of the progress bars, "TOFU" by default.
        scores: The ``token_scores`` of the true answers; None (default) computes them.
        max_new_tokens: The greatest number of tokens of a generated answer. By default it is ``ANSWER_SLACK``
            more than the longest true answer has.
        template: The template of questions and answers; TOFU's by default. ``generated_text`` splits text
            before the completion, and for the default before ``"Answer:"``, as TOFU does.
        stop_strings: Texts before the first of which a generated answer ends, such as ``["\\nQuestion:"]``;
            none by default.

    Returns:
        The section.

    Raises:
        ValueError: There are no rows, ``batch_size`` or ``max_new_tokens`` is less than 1, or a stop
            string is no text or empty.
        RowError: A row lacks ``question`` or ``answer``, or has an answer that is no text.
        FloatingPointError: A loss is NaN.
    """
    check_counts(batch_size=batch_size)
    if max_new_tokens is not None:
        check_counts(max_new_tokens=max_new_tokens)
    check_stop_strings(stop_strings)
    rows = as_rows(rows, description)
    answers = tokenized_answers(rows, tokenizer, description, template=template)
    return measured_section(
        model,
        tokenizer,
        rows,
        answers,
        batch_size,
        progress,
        description,
        scores,
        max_new_tokens,
        template,
        stop_strings,
    )


def measured_section(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: DataSet,
    answers: Sequence[Sequence[Answer]],
    batch_size: int,
    progress: bool,
    description: str,
    scores: Sequence[TokenScores] | None,
    max_new_tokens: int | None,
    template: QuestionTemplate = TOFU_TEMPLATE,
    stop_strings: Sequence[str] = (),
) -> Section:
    """Do the work of ``evaluate_tofu_rows`` on some rows of a set, with their ``tokenized_answers``."""
    numbered = [
        *((i, true) for i, (true, *_) in enumerate(answers)),
        *((i, other) for i, (_, *others) in enumerate(answers) for other in others),
    ]
    tokens = [answer.tokens for _, answer in numbered]
    # All answers are scored in one list, so that a batch may mix kinds.
    known = scores or []
    to_score = tokens[len(known) :]
    new = unchecked_token_scores(model, to_score, batch_size, progress, f"{description}: scoring")
    scores = [*known, *new]
    check_scores(scores, description, lambda i: f"row {numbered[i][1].row}, a {numbered[i][1].kind} answer")
    scored: dict[str, dict[str, list[tuple[float, int]]]] = {"gt": {}, "paraphrased": {}, "perturb": {}}
    for (i, answer), score in zip(numbered, scores, strict=True):
        scored[answer.kind].setdefault(str(i), []).append((score.losses.mean().item(), len(score.losses)))

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
        template,
        stop_strings,
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
        "generated_text": by_row(
            [*template.split(row, text, tokenizer), row["answer"]]
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
            ratios = np.exp(-log_truth_ratio(section))
        section["truth_ratio"] = dict(zip(scored["perturb"], ratios.tolist(), strict=True))
    return section
