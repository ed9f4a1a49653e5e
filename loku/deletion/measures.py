"""The measures of the sets of a request, its limits, and whether the model knows the rows at all.

The limits follow the stopping rule of Cha et al. (ICLR 2025, section 4.1), after Jang et al. (ACL 2023): a
model has forgotten the forget set when it knows it no better than the original model knew a hold-out set of
the same kind, by Memorisation Accuracy (MA) and by Extraction Likelihood (EL):

    MA(forget) <= MA(holdout)   and   EL_n(forget) <= EL_n(holdout)

EL_n exists for rows of more than n answer tokens. Extraction strength takes its place for shorter ones. The
rule looks at means, which can hide a single row that is still brought back. So it has a third limit here:

    extracted(forget) <= extracted(holdout)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

from loku.data import (
    TOFU_TEMPLATE,
    QuestionTemplate,
    as_rows,
    split_documents,
    token_limits,
    tokenize_dataset,
)
from loku.deletion.request import HOLDOUT
from loku.evaluation.endings import Endings, content_scores
from loku.evaluation.extraction import end_ids, extracted_tokens, extraction_likelihood
from loku.evaluation.scores import extraction_strength, mean_over_rows, token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loku.models import CausalLM

RowMeasures: TypeAlias = "dict[str, list[float | None]]"
SetMeasures: TypeAlias = "dict[str, float | None]"

LIKELIHOOD = "extraction_likelihood_"  # and n, the length of the n-grams
MEASURES = ("probability", "memorization_accuracy", "extraction_strength", "extracted")  # and LIKELIHOOD
LEVEL = 0.05  # the chance, at most, that rows like those of the hold-out set are said to be known
_LARGEST_LOSS = 700  # nats, whose exponential is a float64
_MOST_ORDERS = 20_000  # ways to draw the forget rows out of both sets that a test counts one by one


def measure_rows(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Any],
    name: str,
    *,
    n: int = 10,
    stride: int = 1,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    count_end: bool = True,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> RowMeasures:
    """Measure each row of a data set.

    Args:
        model: The causal LM, on the device where it runs.
        tokenizer: The tokenizer.
        rows: The rows, as for ``loku.data.tokenize_dataset``.
        name: The name of the set in messages.
        n: The length of Extraction Likelihood's n-grams, in tokens, >= 1; 10 by default.
        stride: The distance between the prefixes that it continues, in tokens, >= 1; 1 by default.
        batch_size: The number of rows in a batch, >= 1; 16 by default.
        max_length: The number of tokens at which texts are cut, >= 2; None (default) does not cut them.
        progress: Whether to show progress bars, False by default.
        count_end: Whether the endings of answers (``loku.evaluation.endings``) count in all measures but
            ``tokens``, ``loss`` and ``probability``, True by default.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        A list of each measure, with one value for each row; None where a row has none. ``tokens`` is the
        number of answer tokens, and ``loss`` their mean negative log-probability, in nats.
        ``extracted_tokens`` is that of ``loku.evaluation.extraction.extracted_tokens``, and ``extracted`` is
        1 where it is above 0. ``probability``, ``memorization_accuracy``, ``extraction_strength`` and
        ``extraction_likelihood_<n>`` are those of ``loku.evaluation``, in [0, 1].

    Raises:
        RowError: A row cannot be used. The message names the set and the row.
        ValueError: A count is out of its range, or the set is empty.
        FloatingPointError: A loss or a logit is NaN.
    """
    tokens = split_documents(
        tokenize_dataset(
            as_rows(rows, name),
            tokenizer,
            max_length=max_length,
            name=name,
            limits=token_limits(model),
            template=template,
        )
    )
    scores = token_scores(model, tokens, batch_size, progress, name)
    counted = scores if count_end else content_scores(tokens, scores, Endings(model, tokenizer, template))
    likelihood = extraction_likelihood(model, tokens, n, stride, batch_size, progress, counted)
    back = extracted_tokens(tokens, counted, end_ids(model, tokenizer, template))
    measures: RowMeasures = {
        "tokens": [], "loss": [], **{measure: [] for measure in MEASURES}, "extracted_tokens": [],
    }  # fmt: skip
    for score, content, count in zip(scores, counted, back, strict=True):
        length, answer = len(score.losses), len(content.losses)
        loss = score.losses.mean().item() if length else None
        values: dict[str, float | None] = {
            "tokens": length,
            "loss": loss,
            "probability": None if loss is None else math.exp(-loss),
            "memorization_accuracy": content.memorized.double().mean().item() if answer else None,
            "extraction_strength": extraction_strength([content])[0] if answer else None,
            "extracted": float(count > 0) if answer else None,
            "extracted_tokens": count,
        }
        for measure, value in values.items():
            measures[measure].append(value)
    measures[f"{LIKELIHOOD}{n}"] = list(likelihood.per_row)
    return measures


def summary(rows: RowMeasures) -> SetMeasures:
    """Summarise the measures of the rows of a set.

    Args:
        rows: The ``measure_rows`` of the set.

    Returns:
        ``rows``, their number; ``perplexity``, exp(total loss / number of answer tokens); and the mean over
        rows of ``probability``, ``memorization_accuracy``, ``extraction_strength``, ``extracted`` and
        ``extraction_likelihood_<n>``. None stands for a measure that no row has, or that is infinite.
    """
    pairs = [
        (loss, count or 0)
        for loss, count in zip(rows["loss"], rows["tokens"], strict=True)
        if loss is not None
    ]
    count = sum(count for _, count in pairs)
    loss = sum(loss * count for loss, count in pairs) / count if count else math.inf
    perplexity = math.exp(loss) if loss < _LARGEST_LOSS else None
    means = {name: _finite(mean_over_rows(rows[name])) for name in (*MEASURES, likelihood_name(rows))}
    return {"rows": len(rows["loss"]), "perplexity": perplexity, **means}


def measure_sets(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Iterable[Any]],
    *,
    n: int = 10,
    stride: int = 1,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> dict[str, SetMeasures]:
    """Return the ``summary`` of the measures of each set.

    It takes the other arguments of ``measure_rows``, and raises its errors.

    Args:
        sets: The rows of each set by its name.
    """
    options: dict[str, Any] = {"n": n, "stride": stride, "batch_size": batch_size, "template": template}
    return {
        name: summary(
            measure_rows(model, tokenizer, rows, name, max_length=max_length, progress=progress, **options)
        )
        for name, rows in sets.items()
    }


def likelihood_name(measures: Iterable[str]) -> str:
    """Return the name of Extraction Likelihood among the names of measures, with its n."""
    return next(name for name in measures if name.startswith(LIKELIHOOD))


def ngram_of(limits: Iterable[str], default: int = 10) -> int:
    """Return the n of the Extraction Likelihood that limits name; the default if they name none."""
    named = [name for name in limits if name.startswith(LIKELIHOOD)]
    return int(named[0].removeprefix(LIKELIHOOD)) if named else default


def limits_of(
    requested: Mapping[str, float | str],
    holdout: Mapping[str, float | None] | None,
    forget: Mapping[str, float | None],
) -> dict[str, float]:
    """Return the greatest value of each measure that the forget set may have after unlearning.

    With a hold-out set the paper's rule holds (see this module). What the request says of a measure takes the
    place of the rule's limit of that measure, or adds one.

    Args:
        requested: The limits of the request: a number, or ``HOLDOUT`` for the hold-out's value.
        holdout: The ``summary`` of the hold-out set under the original model; None without a hold-out.
        forget: The ``summary`` of the forget set under the original model.

    Returns:
        The limit of each measure, in [0, 1].

    Raises:
        ValueError: There is neither a hold-out nor a limit with a number; a measure is not known, or does not
            exist for these rows; or a number is not in [0, 1]. The message says what to give.
    """
    likelihood = likelihood_name(forget)
    known = (*MEASURES, likelihood)
    limits: dict[str, float | str] = {}
    if holdout is not None:
        defined = forget[likelihood] is not None and holdout[likelihood] is not None
        extraction = likelihood if defined else "extraction_strength"
        limits = dict.fromkeys(("memorization_accuracy", extraction, "extracted"), HOLDOUT)
    limits |= requested
    if not limits:
        raise ValueError(
            "nothing says when the rows are forgotten: give a hold-out set, texts of the same kind that the "
            "model was never trained on; or give limits with numbers, such as memorization_accuracy: 0.4"
        )
    resolved: dict[str, float] = {}
    for name, limit in limits.items():
        if name not in known:
            raise ValueError(f"limits: there is no measure {name!r}; the measures are {', '.join(known)}")
        if forget[name] is None:
            raise ValueError(
                f"limits: {name} does not exist for the forget rows, none of which has more than "
                f"{likelihood.removeprefix(LIKELIHOOD)} answer tokens: limit extraction_strength"
            )
        if limit == HOLDOUT:
            value = None if holdout is None else holdout[name]
            if value is None:
                reason = "there is no hold-out set" if holdout is None else "the hold-out set has none"
                raise ValueError(
                    f"limits: {name} is to be that of the hold-out set, and {reason}: give a number"
                )
            resolved[name] = value
        elif isinstance(limit, bool) or not isinstance(limit, Real) or not 0 <= limit <= 1:
            raise ValueError(f"limits: {name} must be {HOLDOUT!r} or a number from 0 to 1, got {limit!r}")
        else:
            resolved[name] = float(limit)
    return resolved


def known(
    forget: RowMeasures,
    holdout: RowMeasures | None,
    requested: Mapping[str, float | str] | None = None,
    level: float = LEVEL,
) -> dict[str, Any]:
    """Decide whether a model knows the forget rows.

    It knows them if one of these holds:

    - A row comes back word by word, and more than n tokens of it, the n of Extraction Likelihood. Nobody
      writes so many tokens of an unseen text by chance.
    - A row comes back word by word, of whatever length, and no row of the hold-out set does.
    - The forget rows are over a limit that the request gives as a number.
    - The forget rows have higher values than the hold-out's by more than chance: by probability, by MA, by EL
      (by extraction strength where EL does not exist) or by the share of rows that come back. The test is
      Mann and Whitney's, one-sided, because a few rows have no known distribution. There are four tests, so
      each has a quarter of ``level`` (Bonferroni). A few rows may not reach that level whatever their values:
      one row of 20 is the highest with a chance of 1/20. Then the least chance that their number can reach
      counts in its place. A single row is known if it is above every row of the hold-out set.

    Args:
        forget: The ``measure_rows`` of the forget set under the original model.
        holdout: Those of the hold-out set; None without one.
        requested: The limits of the request; None (default) for none.
        level: The chance of a wrong "known", 0.05 by default, for sets that are large enough.

    Returns:
        ``known``; and ``reasons``, a dict for each rule that was looked at: ``rule``, its figures, and
        whether it ``holds``.

    Raises:
        ValueError: More than half of the hold-out set comes back word by word by more than n tokens. So the
            model was trained on it, and no rows can be compared with it.
    """
    likelihood = likelihood_name(forget)
    n = int(likelihood.removeprefix(LIKELIHOOD))
    count = len(forget["loss"])
    long = _longer(forget, n)
    reasons: list[dict[str, Any]] = [
        {"rule": "rows that come back by more than n tokens", "n": n, "rows": long, "of": count,
         "holds": long > 0},
    ]  # fmt: skip
    means = summary(forget)
    for measure, limit in (requested or {}).items():
        if not isinstance(limit, str):
            value = means.get(measure)
            over = value is not None and value > limit
            reasons.append(
                {"rule": "over a limit of the request", "measure": measure, "forget": value, "limit": limit,
                 "holds": over}
            )  # fmt: skip
    back = sum(value or 0 for value in forget["extracted"])
    if holdout is not None:
        remembered, others = _longer(holdout, n), len(holdout["loss"])
        if remembered > others / 2:
            raise ValueError(
                f"{remembered} of the {others} rows of the hold-out set come back word by word, so the model "
                "was trained on them: give texts of the same kind that it was never trained on"
            )
        unseen_back = sum(value or 0 for value in holdout["extracted"])
        reasons.append(
            {"rule": "rows that come back, and none of the hold-out", "rows": int(back), "of": count,
             "holdout_rows": int(unseen_back), "holds": back > 0 and unseen_back == 0}
        )  # fmt: skip
        exists = _values(forget[likelihood]) and _values(holdout[likelihood])
        names = ("probability", "memorization_accuracy",
                 likelihood if exists else "extraction_strength", "extracted")  # fmt: skip
        for measure in names:
            reasons.append(_compared(measure, forget, holdout, level / len(names)))
    else:
        reasons.append(
            {"rule": "rows that come back", "rows": int(back), "of": count, "holds": back > 0},
        )
    return {"known": any(reason["holds"] for reason in reasons), "reasons": reasons}


def _compared(measure: str, forget: RowMeasures, holdout: RowMeasures, level: float) -> dict[str, Any]:
    """The one-sided test that the forget rows have higher values of a measure than the hold-out's."""
    members, others = _values(forget[measure]), _values(holdout[measure])
    least = 1 / math.comb(len(members) + len(others), len(members))
    chance = _chance(members, others) if members and others else 1.0
    return {
        "rule": "higher than the hold-out",
        "measure": measure,
        "forget": _finite(mean_over_rows(members)),
        "holdout": _finite(mean_over_rows(others)),
        "p": chance,
        "level": max(level, least),
        "holds": bool(members and others) and chance <= max(level, least) * (1 + 1e-9),
    }


def _chance(members: Sequence[float], others: Sequence[float]) -> float:
    """Mann and Whitney's p-value of "members are higher": exact for small sets, ties included."""
    from scipy.stats import PermutationMethod, mannwhitneyu

    if len(members) == 1:  # all places of the one row are as likely
        return (1 + sum(other >= members[0] for other in others)) / (len(others) + 1)
    if len(others) == 1:
        return (1 + sum(member <= others[0] for member in members)) / (len(members) + 1)
    method: Any = "asymptotic"
    if math.comb(len(members) + len(others), len(members)) <= _MOST_ORDERS:
        method = PermutationMethod(n_resamples=math.inf)
    chance = float(mannwhitneyu(members, others, alternative="greater", method=method).pvalue)
    return 1.0 if math.isnan(chance) else chance  # all values are equal


def _longer(rows: RowMeasures, n: int) -> int:
    return sum((count or 0) > n for count in rows["extracted_tokens"])


def _values(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
