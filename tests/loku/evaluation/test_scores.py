"""Measures of token scores against their definitions, and on cases that can be worked out by hand."""

import copy
import math

import pytest
import torch
from naive_measures import naive_scores

from loku.evaluation import (
    TokenScores,
    extraction_likelihood,
    extraction_strength,
    mean_answer_probability,
    membership_auc,
    memorization_accuracy,
    min_k,
    perplexity,
    token_measures,
    token_scores,
)


def test_token_scores_match_their_definition(model, rows):
    model.train()
    scores = token_scores(model, rows, batch_size=4, progress=False)
    assert model.training  # the mode is restored
    model.eval()
    for row, score in zip(rows, scores, strict=True):
        losses, memorized = naive_scores(model, row)
        torch.testing.assert_close(score.losses, torch.tensor(losses, dtype=torch.float64))
        assert score.memorized.tolist() == memorized
        assert torch.equal(
            score.memorized, score.predicted == torch.tensor(row["input_ids"])[score.positions]
        )


def test_memorization_accuracy_and_perplexity(model, rows):
    naive = [naive_scores(model, row) for row in rows]
    accuracy = sum(sum(memorized) / len(memorized) for _, memorized in naive) / len(rows)
    assert 0.3 < accuracy < 0.95  # neither nothing nor everything is memorised, so the test can fail
    assert memorization_accuracy(model, rows, 4, progress=False) == pytest.approx(accuracy, rel=1e-12)
    losses = [loss for row_losses, _ in naive for loss in row_losses]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, rows, 4, progress=False) == pytest.approx(expected, rel=1e-6)


def test_extraction_strength_is_that_of_greedy_decoding(model, rows):
    @torch.no_grad()
    def shortest_prefix(ids, start):
        for known in range(start, len(ids) + 1):
            new = ids[:known]
            while len(new) < len(ids):
                new = new + [model(torch.tensor([new])).logits[0, -1].argmax().item()]
            if new == ids:
                return known - start

    rows = rows[1:]  # the first row has a hole, which greedy decoding cannot know
    expected = []
    for row in rows:
        start = next(i for i in range(1, len(row["labels"])) if row["labels"][i] != -100)
        expected.append(1 - shortest_prefix(row["input_ids"], start) / (len(row["input_ids"]) - start))
    assert extraction_strength(token_scores(model, rows, 4, progress=False)) == expected
    assert len(set(expected)) > 2


def test_memorization_ties_go_to_the_lowest_id():
    class Flat(torch.nn.Module):
        config = None

        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, **kwargs):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 5)})

    rows = [{"input_ids": [4, 0, 1, 3], "labels": [4, 0, 1, 3]}]
    assert memorization_accuracy(Flat(), rows, progress=False) == pytest.approx(1 / 3)


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
            "perplexity": 2 ** (4 / 3),  # a mean over tokens, not over rows
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
        ([True, True, True, False], 0.0),  # no prefix makes the model say the last token
        ([False, False, False, False], 0.0),
    ],
)
def test_extraction_strength(memorized, strength):
    assert extraction_strength([scores_of([1.0] * 4, memorized)]) == [strength]


def test_min_k_is_the_mean_of_the_least_likely_tokens():
    ten = scores_of([3.0, 10.0, 1.0, 2.0, 4.0, 9.0, 5.0, 8.0, 6.0, 7.0])
    assert min_k([ten, scores_of([2.5])]) == [-9.5, -2.5]  # a fifth of the tokens, at least one
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


def test_a_nan_loss_is_refused(model, rows):
    """A NaN matches no token, so the accuracy and the strength would be 0, as if all were forgotten."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[2] = torch.nan
    rows = [{"input_ids": ids, "labels": ids} for ids in ([4, 5, 6], [4, 2, 6, 7])]
    for measure in (token_scores, memorization_accuracy, perplexity, extraction_likelihood):
        with pytest.raises(FloatingPointError, match=r"row 1: the model's loss is NaN at token \d, so"):
            measure(broken, rows, progress=False)
    assert len(token_scores(broken, rows[:1], progress=False)) == 1
