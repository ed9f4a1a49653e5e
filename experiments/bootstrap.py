"""Intervals of means over runs and authors, by a bootstrap of both."""

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 2000

Values = dict[int, list[float]]  # author -> the values of its rows


def resampled_means(
    groups: Sequence[Sequence[Values]], paired: bool = False, seed: int = 0
) -> "NDArray[np.float64]":
    """Return means of resamples, float64 (resamples, groups), by a bootstrap over runs and authors.

    Args:
        groups: For each group the values of its runs by author. All runs have the same authors.
        paired: Whether the runs of all groups are of the same seeds in the same order, so that a resample
            takes the same ones; False by default.
        seed: The seed of the resampling, 0 by default.
    """
    generator = np.random.default_rng(seed)
    authors = sorted(groups[0][0])
    # [run, author, (sum, count)] of each group
    tables = [
        np.array([[(sum(run[author]), len(run[author])) for author in authors] for run in group], np.float64)
        for group in groups
    ]
    means = np.empty((RESAMPLES, len(groups)))
    for resample in means:
        chosen = generator.integers(len(authors), size=len(authors))
        runs = generator.integers(len(tables[0]), size=len(tables[0]))
        for at, sums in enumerate(tables):
            if at and not paired:
                runs = generator.integers(len(sums), size=len(sums))
            total, count = sums[np.ix_(runs, chosen)].sum((0, 1))
            resample[at] = total / count
    return means


def mean_of(group: Sequence[Values]) -> float:
    """Return the mean over all values of some runs."""
    return mean(value for run in group for values in run.values() for value in values)


def interval(
    group: Sequence[Values], baseline: Sequence[Values] | None = None, paired: bool = False
) -> tuple[float, float, float]:
    """Return a mean and its 95% interval.

    Args:
        group: The values of runs by author.
        baseline: The runs whose mean is subtracted; None (default) for none.
        paired: As for ``resampled_means``.
    """
    if baseline is None:
        value, means = mean_of(group), resampled_means([group])[:, 0]
    else:
        value = mean_of(group) - mean_of(baseline)
        means = -np.diff(resampled_means([group, baseline], paired))[:, 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return value, float(low), float(high)


def shown_interval(
    group: Sequence[Values], baseline: Sequence[Values] | None = None, paired: bool = False
) -> str:
    """Return ``interval`` as text."""
    sign = "" if baseline is None else "+"
    # Adding 0 leaves no "-0.000".
    value, low, high = (format(round(x, 3) + 0.0, f"{sign}.3f") for x in interval(group, baseline, paired))
    return f"{value} ({low} to {high})"
