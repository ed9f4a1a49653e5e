"""What one teacher-forced pass tells about rows: probability, perplexity, memorisation, membership.

Rows are what ``loku.data.tokenize_dataset`` returns: ``{"input_ids", "labels"}``, labels aligned with the
tokens. The *answer* of a row is the span from its first to its last labelled token; what comes before is
context. A row's first token cannot be predicted, so in a text without a prompt it is the context.

``token_scores`` runs the model. All else here is arithmetic on what it returns.
"""

import math
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from loku.data import IGNORE_INDEX, collate
from loku.distributed import is_main_process, spread
from loku.models import evaluating, model_device
from loku_kernels import softmax_triplet

MIN_K_SHARE = 0.2


class TokenScores(NamedTuple):
    """One row's labelled tokens, in order, all of shape (tokens,)."""

    losses: torch.Tensor  # float64, -log p of the true token, in nats
    memorized: torch.Tensor  # bool, the true token is the most likely one
    predicted: torch.Tensor  # int64, the most likely token
    positions: torch.Tensor  # int64, where in the row the true token stands


def token_scores(model, rows, batch_size=16, progress=True, description="scoring"):
    """Teacher-forced scores of every labelled token: a list of ``TokenScores``, one a row, on the CPU.

    Batches are sorted by length; one batch of logits exists at a time.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    scores = [None] * len(rows)
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


def spread_token_scores(model, rows, batch_size=16, progress=True, description="scoring"):
    """``token_scores`` of rows that are shared out among processes."""
    progress = progress and is_main_process()
    return spread(lambda rows: token_scores(model, rows, batch_size, progress, description), rows)


def token_measures(scores, min_k_share=MIN_K_SHARE):
    """The measures of a set of rows that need no generation, from its ``token_scores``: a dict of

    - ``probability``: of an answer, exp(-mean token loss), as TOFU has it; mean over rows
    - ``perplexity``: exp(total loss / number of labelled tokens)
    - ``memorization_accuracy``: see ``memorization_accuracy``
    - ``extraction_strength`` and ``min_k``: means over rows of the functions of these names

    Rows without labelled tokens do not count; where no row is left, every value is NaN.
    """
    scores = [score for score in scores if len(score.losses)]
    if not scores:
        names = ("probability", "perplexity", "memorization_accuracy", "extraction_strength", "min_k")
        return dict.fromkeys(names, math.nan)
    return {
        "probability": mean_answer_probability(scores),
        "perplexity": torch.cat([score.losses for score in scores]).mean().exp().item(),
        "memorization_accuracy": _mean(score.memorized.double().mean().item() for score in scores),
        "extraction_strength": _mean(extraction_strength(scores)),
        "min_k": _mean(min_k(scores, min_k_share)),
    }


def mean_answer_probability(scores):
    """exp(-mean token loss) of each row, TOFU's answer probability, averaged over the rows."""
    return torch.stack([(-score.losses.mean()).exp() for score in scores]).mean().item()


def memorization_accuracy(model, rows, batch_size=16, progress=True):
    """Memorisation Accuracy, Eq. 6: the share of answer tokens that are the most likely one given the
    true tokens before them, averaged over a row's tokens and then over rows. Ties go to the lowest id.

    It is what others call exact memorisation (Tirumala et al., NeurIPS 2022)."""
    return token_measures(token_scores(model, rows, batch_size, progress, "memorisation"))[
        "memorization_accuracy"
    ]


def perplexity(model, rows, batch_size=16, progress=True):
    """exp(total negative log-likelihood / number of label tokens) over all rows."""
    return token_measures(token_scores(model, rows, batch_size, progress, "perplexity"))["perplexity"]


def extraction_strength(scores):
    """Extraction strength of each row: a list of floats in [0, 1], after Carlini et al. (USENIX Security
    2021).

        1 - k / T,   k = the least number of answer tokens after which greedy decoding gives all the rest

    of T answer tokens. Greedy decoding gives the rest exactly where each of its tokens is the most likely
    one given the true ones before it, so no text is generated. 1: the prompt alone brings it back; 0: not
    even its last token follows from the others.
    """
    strengths = []
    for score in scores:
        wrong = (~score.memorized).nonzero()
        known_from = int(wrong[-1]) + 1 if len(wrong) else 0
        strengths.append(1 - known_from / len(score.memorized))
    return strengths


def min_k(scores, share=MIN_K_SHARE):
    """Min-K% Prob of each row: a list of floats (Shi et al., ICLR 2024).

    The mean log-probability, in nats, of the ``share`` of its tokens (at least one) that have the lowest.
    The nearer to 0, the likelier the row was trained on.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    # In floating point 0.29 * 100 is a little less than 29.
    counts = [max(1, int(share * len(score.losses) + 1e-9)) for score in scores]
    return [-s.losses.topk(k).values.mean().item() for s, k in zip(scores, counts, strict=True)]


def membership_auc(members, others):
    """Area under the ROC curve of telling ``members`` from ``others`` by a score such as ``min_k``.

        P(member > other) + P(member = other) / 2   over all pairs, as Mann and Whitney's U / (n m)

    1: every member scores higher; 0.5: no better than chance, which is what forgetting aims at. Well below
    0.5 the forget set stands out as well, as what was pushed away. NaN if either is empty or holds a NaN.
    """
    from scipy.stats import mannwhitneyu

    if not len(members) or not len(others):
        return math.nan
    return float(mannwhitneyu(members, others).statistic) / (len(members) * len(others))


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def _batches(order, size):
    return [order[i : i + size] for i in range(0, len(order), size)]
