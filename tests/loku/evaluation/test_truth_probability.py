"""The probability of the true answer against wrong ones, by open-unlearning's figures."""

import pytest

from loku.evaluation import truth_probability


def section(right, wrong):
    rows = map(str, range(len(right)))
    return {
        "avg_paraphrased_loss": dict(zip(map(str, range(len(right))), right, strict=True)),
        "average_perturb_loss": dict(zip(rows, wrong, strict=True)),
    }


def test_figures_of_open_unlearning():
    """locuslab/open-unlearning at d3d7cf9, src/evals/metrics/memorization.py: truth_ratio by prob_mean."""
    rows = [0.7, 2.5, 0.01], [[1.2, 0.4, 3.0], [0.5, 0.6, 0.1], [4.0, 6.0, 5.5]]
    theirs = [0.6970592838675607, 0.1090968211811132, 0.9942721268174866]
    assert truth_probability(section(*rows)) == pytest.approx(0.6001427439553868, rel=1e-8)
    for right, wrong, figure in zip(*rows, theirs, strict=True):
        assert truth_probability(section([right], [wrong])) == pytest.approx(figure, rel=1e-8)


def test_great_losses_keep_their_difference():
    assert truth_probability(section([900.0], [[900.0, 900.0]])) == 0.5
    assert truth_probability(section([900.0], [[1.0]])) == 0
    assert truth_probability(section([1.0], [[900.0]])) == 1
    with pytest.raises(ValueError, match="average_perturb_loss"):
        truth_probability({})
