"""Measures on cases small enough to be worked out by hand."""

import math

import pytest
import torch

from loku.evaluation import (
    TokenScores,
    dialogue_f1,
    extraction_strength,
    mean_answer_probability,
    membership_auc,
    min_k,
    token_measures,
)


def scores_of(losses, memorized=None):
    count = len(losses)
    memorized = torch.tensor([False] * count if memorized is None else memorized, dtype=torch.bool)
    losses = torch.tensor(losses, dtype=torch.float64)
    return TokenScores(losses, memorized, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def test_token_measures():
    ln2 = math.log(2)
    scores = [
        scores_of([ln2, ln2], [True, False]),
        scores_of([]),  # a row without labelled tokens does not count
        scores_of([2 * ln2], [True]),
    ]
    assert token_measures(scores) == pytest.approx(
        {
            "probability": (1 / 2 + 1 / 4) / 2,
            "perplexity": 2 ** (4 / 3),  # of tokens, not of rows
            "memorization_accuracy": (1 / 2 + 1) / 2,
            "extraction_strength": (0 + 1) / 2,
            "min_k": -(ln2 + 2 * ln2) / 2,
        }
    )
    assert all(math.isnan(value) for value in token_measures([scores_of([])]).values())


def test_mean_answer_probability_is_of_rows():
    scores = [scores_of([math.log(2), math.log(8)]), scores_of([0.0])]
    assert mean_answer_probability(scores) == pytest.approx((1 / 4 + 1) / 2)


@pytest.mark.parametrize(
    ("memorized", "strength"),
    [
        ([True, True, True, True], 1.0),
        ([False, True, True, True], 3 / 4),
        ([True, False, True, True], 1 / 2),
        ([True, True, True, False], 0.0),  # nothing brings back the last token
        ([False, False, False, False], 0.0),
    ],
)
def test_extraction_strength(memorized, strength):
    assert extraction_strength([scores_of([1.0] * 4, memorized)]) == [strength]


def test_min_k_is_the_mean_of_the_least_likely_tokens():
    ten = scores_of([3.0, 10.0, 1.0, 2.0, 4.0, 9.0, 5.0, 8.0, 6.0, 7.0])
    assert min_k([ten, scores_of([2.5])]) == [-9.5, -2.5]  # a fifth; at least one token
    assert min_k([ten], share=0.39) == [-9.0]
    assert min_k([ten], share=1) == [-5.5]
    # 0.29 * 100 is 28.999... in floating point: the 29 greatest of 1 to 100 have the mean 86.
    assert min_k([scores_of([float(i) for i in range(1, 101)])], share=0.29) == [-86.0]
    for share in (0, 1.1):
        with pytest.raises(ValueError, match="share"):
            min_k([ten], share)


def test_membership_auc_counts_pairs():
    # -1 beats both others; -2 beats one and ties with the other.
    assert membership_auc([-1.0, -2.0], [-3.0, -2.0]) == 3.5 / 4
    assert membership_auc([0.0], [-1.0, -2.0]) == 1.0
    assert membership_auc([-3.0], [-1.0, -2.0]) == 0.0
    assert math.isnan(membership_auc([], [1.0]))
    assert math.isnan(membership_auc([math.nan, 1.0], [0.0]))


@pytest.mark.parametrize(
    ("generated", "reference", "f1"),
    [
        ("The cat sat, on a mat!", "a cat sat on the red mat", 8 / 9),  # 4 of 4 and 4 of 5 words
        ("no no no", "No way.", 2 / 5),  # one in common: 1 of 3 and 1 of 2
        ("It's here", "it s there", 4 / 6),
        ("an aunt", "aunt", 1.0),
        ("theatre", "atre", 0.0),  # an article is a word
        ("", "yes", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_dialogue_f1(generated, reference, f1):
    assert dialogue_f1([generated], [reference]) == [pytest.approx(f1)]
