"""Membership inference: scores that may tell the forgotten rows from rows that the model never saw."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from loku.attacks.copies import check_one_process, reason_not_copied
from loku.attacks.gradient_norms import gradient_norms
from loku.counts import check_counts
from loku.data import (
    IGNORE_INDEX,
    TOFU_TEMPLATE,
    QuestionTemplate,
    RowError,
    check_tokens,
    collate,
    split_documents,
    token_limits,
    tokenize_dataset,
)
from loku.data.rows import DataSet
from loku.evaluation.endings import Endings, content_rows
from loku.evaluation.scores import MIN_K_SHARE, check_share, membership_auc
from loku.models import CausalLM, evaluating, model_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FALSE_POSITIVE_SHARES = (0.01, 0.05)
BLOCK_VALUES = 2**22  # float64 values of a block of log-probabilities: 32 MiB


class _RowScores(NamedTuple):
    """The scores of the labelled tokens of a row, float64 (tokens,).

    Attributes:
        log_probabilities: The log-probability of each true token, in nats.
        standardised: The same less the mean of the log-probability over the vocabulary, in standard
            deviations.
    """

    log_probabilities: Tensor
    standardised: Tensor


def membership_attack(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    forget: DataSet,
    holdout: DataSet,
    reference: CausalLM | None = None,
    *,
    min_k_share: float = MIN_K_SHARE,
    count_end: bool = True,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> dict[str, Any]:
    """Tell the forget rows from the hold-out rows by scores of the model.

    Each score is higher for a row on which the model was more likely trained. l is the mean loss of the
    answer's tokens (of all tokens of a text), in nats:

    - ``loss``: -l (Yeom et al., CSF 2018).
    - ``zlib``: -l / the number of bits of the answer under zlib (Carlini et al., USENIX Security 2021).
    - ``min_k``: the mean log-probability of the least likely tokens (Min-K% Prob, Shi et al., ICLR 2024).
    - ``min_k_plus_plus``: the same with each log-probability less its mean over the vocabulary, in standard
      deviations (Min-K%++, Zhang et al., ICLR 2025).
    - ``gradient_norm``: minus the mean over the weights of the norm of the gradient of l (Wang et al., 2024;
      ``loku.attacks.gradient_norms``). It needs one backward pass for each row.
    - ``reference``: l under the reference model less l under the model (Carlini et al., 2021).

    open-unlearning gives each score the other sign and takes the hold-out rows for the positive class, so its
    AUCs mean the same. It leaves the last labelled token of a row, its EOS, out of the two Min-K scores and
    of the gradient norm, as ``count_end=False`` does. MUSE writes 1 - AUC; ``loku.evaluation.privleak`` takes
    that into account.

    An AUC of 0.5 is the aim. Above it, forget rows look like rows of the training set. Below it, they stand
    out, too: unlearning has pushed them below rows that the model never saw, and an attacker who knows that
    turns the score around. The AUC means nothing unless both sets are of the same kind.

    Only the logits of one batch are in memory, and a block of them in float64. No model is copied.

    Args:
        model: The unlearned causal LM, on the device where it runs.
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``; zlib is not tested then.
        forget: The forget rows.
        holdout: Rows of the same kind on which the model was never trained.
        reference: Another model for the score ``reference``, such as the original one or a smaller one of the
            same tokenizer; None (default) does not test it.
        min_k_share: The share of a row's tokens that the two Min-K scores take, in (0, 1], 0.2 by default; at
            least one token counts.
        count_end: Whether the endings of answers (``loku.evaluation.endings``) count in the two Min-K scores
            and in the gradient norm, True by default. They always count in the other scores.
        resamples: The number of bootstrap resamples of both sets, 1000 by default.
        seed: The seed of the resamples, 0 by default.
        batch_size: The number of rows in a batch, 16 by default.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them.
        progress: Whether to show progress bars, False by default.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        ``settings``; ``forget_rows`` and ``holdout_rows``, the numbers of rows; ``scores``; and
        ``not_tested``, reasons by name. A score has ``auc`` in [0, 1], the bounds ``auc_low`` and
        ``auc_high`` of its 95% bootstrap interval (None if a set has one row), and ``tpr_at_1_percent_fpr``
        and ``tpr_at_5_percent_fpr``: the share of the forget rows that score higher than all but so many
        hold-out rows. They are None if the hold-out set is too small to have one such row.

    Raises:
        ValueError: A set is empty, a number is out of its range, or there are several processes.
        RowError: A row cannot be used, or is nothing but an ending without ``count_end``.
        FloatingPointError: A loss is NaN.
    """
    check_one_process("membership inference")
    check_counts(resamples=resamples, batch_size=batch_size)
    check_counts(0, seed=seed)
    check_share(min_k_share)
    limits = token_limits(model)
    rows: dict[str, Sequence[Mapping[str, Any]]] = {}
    for name, data in (("forget", forget), ("holdout", holdout)):
        tokenised = tokenize_dataset(
            data, tokenizer, max_length=max_length, name=name, limits=limits, template=template
        )
        if reference is not None:
            check_tokens(reference, tokenised, name)
        rows[name] = split_documents(tokenised)

    not_tested: dict[str, str] = {}
    no_gradients = reason_not_copied(model)  # what cannot be merged, or is no number, has no such gradient
    if no_gradients is not None:
        not_tested["gradient_norm"] = no_gradients
    endings = Endings(model, tokenizer, template)
    found: dict[str, dict[str, list[float]]] = {}
    for name, documents in rows.items():
        scores = _row_scores(model, documents, batch_size, progress, f"{name}: membership")
        losses = [-score.log_probabilities.mean().item() for score in scores]
        of_set = {"loss": [-loss for loss in losses]}
        if tokenizer is not None:
            bits = [_zlib_bits(tokenizer, row) for row in documents]
            of_set["zlib"] = [-loss / count for loss, count in zip(losses, bits, strict=True)]
        counted, kept = documents, scores
        if not count_end:
            counted = content_rows(documents, endings)
            kept = _content(name, documents, counted, scores)
        of_set["min_k"] = [_mean_of_least(score.log_probabilities, min_k_share) for score in kept]
        of_set["min_k_plus_plus"] = [_mean_of_least(score.standardised, min_k_share) for score in kept]
        if "gradient_norm" not in not_tested:
            try:
                norms = gradient_norms(model, counted, progress, f"{name}: gradient norms")
                of_set["gradient_norm"] = [-norm for norm in norms]
            except FloatingPointError as error:  # float16 may have losses and no gradients
                not_tested["gradient_norm"] = str(error)
        if reference is not None:
            theirs = _row_scores(reference, documents, batch_size, progress, f"{name}: reference")
            references = [-score.log_probabilities.mean().item() for score in theirs]
            of_set["reference"] = [  # infinite losses are equal, too, and inf - inf is NaN
                0.0 if reference_loss == loss else reference_loss - loss
                for reference_loss, loss in zip(references, losses, strict=True)
            ]
        found[name] = of_set
    if "gradient_norm" in not_tested:
        found["forget"].pop("gradient_norm", None)
    if tokenizer is None:
        not_tested["zlib"] = "there is no tokenizer, so the texts of the rows are not known"
    if reference is None:
        not_tested["reference"] = "no reference model was given"
    size = len(rows["holdout"])
    for share in FALSE_POSITIVE_SHARES:
        if int(share * size + 1e-9) < 1:
            not_tested[_share_name(share)] = (
                f"the hold-out set has {size} rows; a false positive rate of {share:.0%} needs at least "
                f"{round(1 / share)}"
            )
    if min(map(len, rows.values())) < 2:
        not_tested["interval of the AUC"] = "a set has one row"
    return {
        "settings": {
            "min_k_share": min_k_share,
            "count_end": count_end,
            "resamples": resamples,
            "seed": seed,
            "max_length": max_length,
        },
        "forget_rows": len(rows["forget"]),
        "holdout_rows": size,
        "scores": {
            name: _figures(members, found["holdout"][name], resamples, seed)
            for name, members in found["forget"].items()
        },
        "not_tested": not_tested,
    }


def _row_scores(
    model: CausalLM,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    progress: bool,
    description: str,
) -> list[_RowScores]:
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    scores: list[Any] = [None] * len(rows)
    device = model_device(model)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with evaluating(model):
        for chosen in tqdm(batches, desc=description, disable=not progress, leave=False):
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen], pad_token_id=0).items()}
            labels = batch.pop("labels")[:, 1:]  # logits at position i predict token i + 1
            logits = model(**batch, use_cache=False).logits
            for row, index in enumerate(chosen):
                (at,) = (labels[row] != IGNORE_INDEX).nonzero(as_tuple=True)
                scores[index] = _token_moments(logits[row], at, labels[row, at])
            del logits
    for index, score in enumerate(scores):
        if score.log_probabilities.isnan().any() or score.standardised.isnan().any():
            raise FloatingPointError(
                f"{description}: row {index}: a log-probability is NaN, so its scores would mean nothing: "
                "the weights are broken, or the dtype overflows"
            )
    return scores


def _token_moments(logits: Tensor, at: Tensor, labels: Tensor) -> _RowScores:
    """Compute the scores of one row.

    Args:
        logits: The logits of all positions, (positions, V).
        at: The positions that count, int64 (tokens,).
        labels: Their true tokens, int64 (tokens,).
    """
    parts: list[tuple[Tensor, Tensor]] = []
    size = max(1, BLOCK_VALUES // logits.shape[-1])
    for positions, targets in zip(at.split(size), labels.split(size), strict=True):
        log_p = logits[positions].double().log_softmax(-1)
        p = log_p.exp()
        known = log_p.masked_fill(p == 0, 0.0)  # 0 log 0 = 0
        mean = (p * known).sum(-1)
        deviation = (p * (known - mean[:, None]).square()).sum(-1).sqrt()
        true = log_p.gather(-1, targets[:, None]).squeeze(-1)
        # All the mass may lie on one word: the deviation is 0, and so is the distance of that word.
        standardised = (true - mean) / deviation.clamp(min=torch.finfo(torch.float64).tiny)
        parts.append((true.cpu(), standardised.cpu()))
    return _RowScores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _content(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    content: Sequence[Mapping[str, Any]],
    scores: Sequence[_RowScores],
) -> list[_RowScores]:
    """Return the scores of the rows that have labels in ``content``, too."""
    found = []
    for index, (row, left, score) in enumerate(zip(rows, content, scores, strict=True)):
        labels = zip(row["labels"][1:], left["labels"][1:], strict=True)
        kept = torch.tensor(
            [now != IGNORE_INDEX for before, now in labels if before != IGNORE_INDEX], dtype=torch.bool
        )
        if not kept.any():
            raise RowError(
                name, index, "its answer is nothing but an ending; pass count_end=True, or drop it"
            )
        found.append(_RowScores(*(values[kept] for values in score)))
    return found


def _mean_of_least(values: Tensor, share: float) -> float:
    """Return the mean of the least values, as ``loku.evaluation.min_k`` takes them."""
    count = max(1, int(share * len(values) + 1e-9))
    return values.topk(count, largest=False).values.mean().item()


def _zlib_bits(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> int:
    decode: Any = tokenizer.decode
    text = decode([label for label in row["labels"] if label != IGNORE_INDEX], skip_special_tokens=True)
    return 8 * len(zlib.compress(text.encode("utf-8")))


def _figures(
    members: Sequence[float], others: Sequence[float], resamples: int, seed: int
) -> dict[str, float | None]:
    low, high = _auc_interval(members, others, resamples, seed)
    rates = {_share_name(share): _true_positives(members, others, share) for share in FALSE_POSITIVE_SHARES}
    return {"auc": membership_auc(members, others), "auc_low": low, "auc_high": high, **rates}


def _share_name(share: float) -> str:
    return f"tpr_at_{round(100 * share)}_percent_fpr"


def _true_positives(members: Sequence[float], others: Sequence[float], share: float) -> float | None:
    """Return the share of members above the score that at most ``share`` of the others exceed."""
    allowed = int(share * len(others) + 1e-9)
    if allowed < 1:
        return None
    threshold = sorted(others, reverse=True)[allowed] if allowed < len(others) else -np.inf
    return sum(score > threshold for score in members) / len(members)


def _auc_interval(
    members: Sequence[float], others: Sequence[float], resamples: int, seed: int
) -> tuple[float | None, float | None]:
    """Return the 2.5% and the 97.5% quantile of the AUC over resamples of both sets with replacement."""
    n, m = len(members), len(others)
    if min(n, m) < 2:
        return None, None
    generator = np.random.default_rng(seed)
    ours = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    theirs = generator.multinomial(m, np.full(m, 1 / m), size=resamples).astype(np.float64)
    a, b = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    won = np.zeros((resamples, m))
    for begin in range(0, n, 1024):  # blocks of the n m pairs
        block = a[begin : begin + 1024, None]
        won += ours[:, begin : begin + 1024] @ ((block > b) + 0.5 * (block == b))
    low, high = np.quantile((won * theirs).sum(1) / (n * m), [0.025, 0.975])
    return float(low), float(high)
