"""Measures of rows from one teacher-forced pass: probability, perplexity, memorisation, membership.

Rows are tokenised, as ``loku.data.tokenize_dataset`` returns them: ``{"input_ids", "labels"}``, with the
labels aligned with the tokens. The *answer* of a row is the span from its first to its last labelled token.
The tokens before it are context. A row's first token cannot be predicted, so it is the context of a text
without a prompt.

``token_scores`` runs the model. The other functions compute with its scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from loku.counts import check_counts
from loku.data import IGNORE_INDEX, collate
from loku.distributed import has_shards, is_main_process, reshard_, spread
from loku.models import CausalLM, evaluating, model_device
from loku_kernels import softmax_triplet

MIN_K_SHARE = 0.2  # share of a row's tokens


class TokenScores(NamedTuple):
    """The scores of one row's labelled tokens, in order.

    Attributes:
        losses: The negative log-probability of each true token, in nats, float64 (tokens,).
        memorized: Whether each true token is the most likely one, bool (tokens,).
        predicted: The most likely tokens, int64 (tokens,).
        positions: The positions of the true tokens in the row, from 0, int64 (tokens,).
    """

    losses: torch.Tensor
    memorized: torch.Tensor
    predicted: torch.Tensor
    positions: torch.Tensor


def token_scores(
    model: CausalLM,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
    progress: bool = True,
    description: str = "scoring",
) -> list[TokenScores]:
    """Score every labelled token of some rows, given the true tokens before it.

    Batches hold rows of similar lengths. The logits of one batch are in memory at a time.

    Args:
        model: The causal LM, on the device where it runs.
        rows: The tokenised rows.
        batch_size: The number of rows in a batch, 16 by default.
        progress: Whether to show a progress bar, True by default.
        description: The title of the progress bar, "scoring" by default.

    Returns:
        The scores of each row, on the CPU.

    Raises:
        ValueError: ``batch_size`` is less than 1.
        FloatingPointError: A loss is NaN. NaN matches no token, so the model would seem to have forgotten.
    """
    scores = unchecked_token_scores(model, rows, batch_size, progress, description)
    check_scores(scores, description)
    return scores


def unchecked_token_scores(
    model: CausalLM, rows: Sequence[Mapping[str, Any]], batch_size: int, progress: bool, description: str
) -> list[TokenScores]:
    """Compute ``token_scores`` without its check for NaN."""
    check_counts(batch_size=batch_size)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    scores: list[Any] = [None] * len(rows)
    device = model_device(model)
    with evaluating(model):
        for chosen in tqdm(_batches(order, batch_size), desc=description, disable=not progress, leave=False):
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen], pad_token_id=0).items()}
            # Logits at position i predict token i + 1: shift the labels, which leaves the logits in place.
            labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
            logits = model(**batch, use_cache=False).logits
            triplet, runner_up = softmax_triplet(logits, labels)
            del logits
            losses = -triplet.log_softmax(-1)[..., 0]
            # Ties go to the lowest index, as in argmax.
            memorized = (triplet[..., 0] > triplet[..., 1]) | (
                (triplet[..., 0] == triplet[..., 1]) & (labels < runner_up)
            )
            predicted = torch.where(memorized, labels, runner_up)
            losses, memorized, predicted, labels = (x.cpu() for x in (losses, memorized, predicted, labels))
            for row, index in enumerate(chosen):
                (at,) = (labels[row] != IGNORE_INDEX).nonzero(as_tuple=True)
                scores[index] = TokenScores(losses[row, at], memorized[row, at], predicted[row, at], at + 1)
    return scores


def spread_token_scores(
    model: CausalLM,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
    progress: bool = True,
    description: str = "scoring",
) -> list[TokenScores]:
    """Compute ``token_scores`` with the rows shared out among the processes; all of them must call this.

    It takes the arguments of ``token_scores``. Only the main process shows progress.
    """
    check_counts(batch_size=batch_size)  # in every process, also in one without rows
    progress = progress and is_main_process()

    def score(rows: Sequence[Mapping[str, Any]]) -> list[TokenScores]:
        return unchecked_token_scores(model, rows, batch_size, progress, description)

    sharded = has_shards(model)
    scores = spread(score, rows, equal=sharded)
    if sharded:
        reshard_(model)
    check_scores(scores, description)  # after the gathering, so that all processes stop
    return scores


def check_scores(
    scores: Iterable[TokenScores], description: str, names: Callable[[int], str] = "row {}".format
) -> None:
    """Check that no loss is NaN.

    Args:
        scores: The scores of rows.
        description: The set of the rows, for the message.
        names: A function of the index of a row, from 0, that names it for the message; "row 3" by default.

    Raises:
        FloatingPointError: A loss is NaN. The message names the first row.
    """
    for index, score in enumerate(scores):
        if score.losses.isnan().any():
            position = int(score.positions[score.losses.isnan()][0])
            raise FloatingPointError(
                f"{description}: {names(index)}: the model's loss is NaN at token {position}, so its "
                f"measures would mean nothing: the weights are broken, or the dtype overflows"
            )


def token_measures(
    scores: Iterable[TokenScores],
    min_k_share: float = MIN_K_SHARE,
    content: Iterable[TokenScores] | None = None,
) -> dict[str, float]:
    """Compute the measures of a set of rows that need no generation.

    Rows without labelled tokens do not count. A measure is NaN if no row counts.

    Args:
        scores: The ``token_scores`` of the rows.
        min_k_share: The share of a row's tokens that ``min_k`` takes, in (0, 1], 0.2 by default.
        content: The scores without the endings of the answers, from
            ``loku.evaluation.endings.content_scores``. They count for Memorisation Accuracy, extraction
            strength and Min-K%. None (default) counts the endings as well.

    Returns:
        Five measures. ``probability`` is the mean over rows of TOFU's answer probability,
        exp(-mean token loss). ``perplexity`` is exp(total loss / number of labelled tokens).
        ``memorization_accuracy`` is Eq. 6; see the function of this name. ``extraction_strength`` and
        ``min_k`` are the means over rows of the functions of these names.
    """
    scores = [score for score in scores if len(score.losses)]
    content = scores if content is None else [score for score in content if len(score.losses)]
    return {
        "probability": mean_answer_probability(scores) if scores else math.nan,
        "perplexity": torch.cat([s.losses for s in scores]).mean().exp().item() if scores else math.nan,
        "memorization_accuracy": mean_over_rows(s.memorized.double().mean().item() for s in content),
        "extraction_strength": mean_over_rows(extraction_strength(content)),
        "min_k": mean_over_rows(min_k(content, min_k_share)),
    }


def row_measures(scores: Iterable[TokenScores]) -> dict[str, list[float | None]]:
    """Return measures of each row: ``tokens``, ``memorization_accuracy`` and ``extraction_strength``.

    Args:
        scores: The ``token_scores`` of the rows. ``tokens`` is the number of the scored tokens. A row without
            one has no measures, None.
    """
    found: dict[str, list[float | None]] = {
        "tokens": [],
        "memorization_accuracy": [],
        "extraction_strength": [],
    }
    for score in scores:
        known = len(score.losses) > 0
        found["tokens"].append(len(score.losses))
        found["memorization_accuracy"].append(score.memorized.double().mean().item() if known else None)
        found["extraction_strength"].append(extraction_strength([score])[0] if known else None)
    return found


def mean_answer_probability(scores: Iterable[TokenScores]) -> float:
    """Return the mean over rows of TOFU's answer probability, exp(-mean token loss), in [0, 1].

    Args:
        scores: The ``token_scores`` of the rows.
    """
    return torch.stack([(-score.losses.mean()).exp() for score in scores]).mean().item()


def memorization_accuracy(
    model: CausalLM, rows: Sequence[Mapping[str, Any]], batch_size: int = 16, progress: bool = True
) -> float:
    """Compute Memorisation Accuracy, Eq. 6, in [0, 1].

    It is the share of answer tokens that are the most likely token given the true tokens before them,
    averaged over the tokens of a row and then over rows. Ties go to the lowest id. Others call it exact
    memorisation (Tirumala et al., NeurIPS 2022).

    Args:
        model: The causal LM, on the device where it runs.
        rows: The tokenised rows.
        batch_size: The number of rows in a batch, 16 by default.
        progress: Whether to show a progress bar, True by default.
    """
    return token_measures(token_scores(model, rows, batch_size, progress, "memorisation"))[
        "memorization_accuracy"
    ]


def perplexity(
    model: CausalLM, rows: Sequence[Mapping[str, Any]], batch_size: int = 16, progress: bool = True
) -> float:
    """Compute exp(total negative log-likelihood / number of labelled tokens) over all rows.

    It takes the arguments of ``memorization_accuracy``.
    """
    return token_measures(token_scores(model, rows, batch_size, progress, "perplexity"))["perplexity"]


def extraction_strength(scores: Iterable[TokenScores]) -> list[float]:
    """Compute the extraction strength of each row, after Carlini et al. (USENIX Security 2021).

        1 - k / T

    T is the number of answer tokens. k is the least number of answer tokens after which greedy decoding gives
    all the rest. Greedy decoding gives the rest if and only if each of its tokens is the most likely token
    given the true tokens before it, so no text is generated.

    Args:
        scores: The ``token_scores`` of the rows.

    Returns:
        The strength of each row, in [0, 1]. At 1 the prompt alone brings the answer back. At 0 not even the
        last token follows from the others.
    """
    strengths = []
    for score in scores:
        wrong = (~score.memorized).nonzero()
        known_from = int(wrong[-1]) + 1 if len(wrong) else 0
        strengths.append(1 - known_from / len(score.memorized))
    return strengths


def check_share(share: float) -> None:
    """Check the share of a row's tokens that ``min_k`` takes.

    Raises:
        ValueError: It is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of Min-K% must be in (0, 1], got {share}")


def min_k(scores: Sequence[TokenScores], share: float = MIN_K_SHARE) -> list[float]:
    """Compute the Min-K% Prob of each row (Shi et al., ICLR 2024).

    It is the mean log-probability of the least likely tokens of the row. A value nearer to 0 makes it more
    likely that the model was trained on the row.

    Args:
        scores: The ``token_scores`` of the rows.
        share: The share of the tokens that counts, in (0, 1], 0.2 by default; at least one token counts.

    Returns:
        The mean log-probability of each row, in nats.

    Raises:
        ValueError: The share is not in (0, 1].
    """
    check_share(share)
    # In floating point 0.29 * 100 is a little less than 29.
    counts = [max(1, int(share * len(score.losses) + 1e-9)) for score in scores]
    return [-s.losses.topk(k).values.mean().item() for s, k in zip(scores, counts, strict=True)]


def membership_auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Compute the area under the ROC curve of telling members from others by a score such as ``min_k``.

        P(member > other) + P(member = other) / 2   over all pairs: Mann and Whitney's U / (n m)

    Args:
        members: The n scores of texts that the model was trained on.
        others: The m scores of texts that it was not trained on.

    Returns:
        The area, in [0, 1]; NaN if either set is empty or holds a NaN. At 1 every member scores higher. At
        0.5 the score tells no better than chance, the aim of forgetting. Well below 0.5 the forget set stands
        out again, because it was pushed away.
    """
    from scipy.stats import mannwhitneyu

    if not len(members) or not len(others):
        return math.nan
    return float(mannwhitneyu(members, others).statistic) / (len(members) * len(others))


def mean_over_rows(values: Iterable[float | None]) -> float:
    """Return the mean of the values that are not None; NaN if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]
