"""Membership inference: every score and figure by its definition, in float64."""

import copy
import json
import math
import zlib

import pytest
import torch
from character_tokenizer import character_tokenizer
from taught_models import small_llama, teach_

from loku.attacks import membership_attack
from loku.attacks.membership import _auc_interval, _true_positives
from loku.data import tokenize_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

FORGET = [{"question": "Who?", "answer": "Ann of Oak Road"}, {"question": "Where?", "answer": "in Brill"}]
HOLDOUT = [
    {"question": "Which?", "answer": "a blue lamp"},
    {"question": "When?", "answer": "on a day in winter"},
    {"question": "What?", "answer": "tea"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return teach_(small_llama(tokenizer), tokenizer, FORGET, steps=30).double()


@torch.no_grad()
def naive_scores(model, tokenizer, rows, reference, share):
    """Compute the scores of rows one token at a time, as they are written."""
    found = {name: [] for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")}
    for row in tokenize_dataset(rows, tokenizer):
        ids, labels = row["input_ids"], row["labels"]
        at = [i for i in range(1, len(ids)) if labels[i] != -100]
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        other = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        true, distances = [], []
        for i in at:
            row_p = log_p[i - 1].tolist()
            mean = sum(math.exp(value) * value for value in row_p)
            variance = sum(math.exp(value) * (value - mean) ** 2 for value in row_p)
            true.append(row_p[ids[i]])
            distances.append((row_p[ids[i]] - mean) / math.sqrt(variance))
        loss = -sum(true) / len(true)
        count = max(1, math.floor(share * len(true)))
        text = tokenizer.decode([ids[i] for i in at], skip_special_tokens=True)
        found["loss"].append(-loss)
        found["zlib"].append(-loss / (8 * len(zlib.compress(text.encode()))))
        found["min_k"].append(sum(sorted(true)[:count]) / count)
        found["min_k_plus_plus"].append(sum(sorted(distances)[:count]) / count)
        found["reference"].append(-sum(other[i - 1, ids[i]].item() for i in at) / len(at) - loss)
    return found


def naive_auc(members, others):
    pairs = [(a > b) + (a == b) / 2 for a in members for b in others]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_scores_by_their_definitions(model, tokenizer, share, monkeypatch):
    from loku.attacks import membership

    seen = []
    figures = membership._figures
    monkeypatch.setattr(membership, "_figures", lambda *args: seen.append(args[:2]) or figures(*args))
    monkeypatch.setattr(membership, "BLOCK_VALUES", 3 * len(tokenizer))  # three tokens a block
    reference = small_llama(tokenizer, seed=1).double()
    result = membership_attack(
        model, tokenizer, FORGET, HOLDOUT, reference, min_k_share=share, batch_size=2, resamples=10
    )
    members = naive_scores(model, tokenizer, FORGET, reference, share)
    others = naive_scores(model, tokenizer, HOLDOUT, reference, share)
    assert list(result["scores"]) == list(members)
    for name, (ours, theirs) in zip(members, seen, strict=True):
        assert ours == pytest.approx(members[name], rel=1e-9), name
        assert theirs == pytest.approx(others[name], rel=1e-9), name
        assert result["scores"][name]["auc"] == naive_auc(members[name], others[name])
    assert result["scores"]["loss"]["auc"] == 1  # the forget rows were learnt
    assert (result["forget_rows"], result["holdout_rows"]) == (2, 3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_model_and_the_generators_stay(model, tokenizer):
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    first = membership_attack(model, tokenizer, FORGET, HOLDOUT)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert first == membership_attack(model.eval(), tokenizer, FORGET, HOLDOUT, batch_size=1)


def test_true_positives_at_a_false_positive_rate():
    others = [i / 20 for i in range(20)]  # 0.95 is the greatest, and one of 20 may exceed
    members = [0.99, 0.92, 0.9, 0.1]
    assert _true_positives(members, others, 0.05) == 0.5  # above 0.9, which one other exceeds
    assert _true_positives(members, others, 0.01) is None  # it needs 100
    assert _true_positives(members, others, 1.0) == 1
    assert _true_positives([0.5] * 3, [0.5] * 20, 0.05) == 0  # ties do not count


def test_the_interval_of_the_auc():
    members, others = [0.1, 0.4, 0.7, 0.9, 1.5], [0.0, 0.2, 0.3, 0.8]
    low, high = _auc_interval(members, others, 2000, 0)
    generator = torch.Generator().manual_seed(0)
    areas = []
    for _ in range(2000):
        a = [members[i] for i in torch.randint(5, (5,), generator=generator).tolist()]
        b = [others[i] for i in torch.randint(4, (4,), generator=generator).tolist()]
        areas.append(naive_auc(a, b))
    expected = torch.tensor(areas).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert [low, high] == pytest.approx(expected, abs=0.06)
    assert low < naive_auc(members, others) < high
    assert _auc_interval(members, others, 2000, 0) == (low, high)
    assert _auc_interval([2.0, 3.0], [0.0, 1.0], 50, 0) == (1, 1)
    assert _auc_interval([2.0], [0.0, 1.0], 50, 0) == (None, None)


def test_what_was_not_tested_is_said(model, tokenizer):
    result = membership_attack(model, tokenizer, FORGET, HOLDOUT)
    assert set(result["not_tested"]) == {"reference", "tpr_at_1_percent_fpr", "tpr_at_5_percent_fpr"}
    assert "at least 100" in result["not_tested"]["tpr_at_1_percent_fpr"]
    assert result["scores"]["loss"]["tpr_at_5_percent_fpr"] is None
    tokens = [{"input_ids": [3 + i, 5, 9, 20]} for i in range(20)]
    result = membership_attack(model, None, tokens[:1], tokens)
    assert set(result["not_tested"]) == {
        *("zlib", "reference", "tpr_at_1_percent_fpr", "interval of the AUC"),
    }
    assert result["scores"]["min_k"]["tpr_at_5_percent_fpr"] is not None
    assert "zlib" not in result["scores"] and result["scores"]["loss"]["auc_low"] is None


def test_a_certain_model_has_no_deviation(model, tokenizer):
    """All the mass on one word: the true word is at its mean, another is far below."""
    from loku.attacks.membership import _token_moments

    logits = torch.tensor([[0.0, -4000.0, -math.inf], [0.0, -4000.0, -math.inf]])
    scores = _token_moments(logits, torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert scores.log_probabilities.tolist() == [0, -4000]
    assert scores.standardised[0] == 0 and scores.standardised[1] < -1e300


def test_words_without_probability_give_numbers(tokenizer):
    def forbid(module, arguments, output):
        output.logits[..., tokenizer.convert_tokens_to_ids("t")] = -math.inf  # as padding of the vocabulary

    model = small_llama(tokenizer)
    model.register_forward_hook(forbid)
    scores = membership_attack(model, tokenizer, FORGET, HOLDOUT, model)["scores"]
    assert all(math.isfinite(scores[name][figure]) for name in scores for figure in ("auc", "auc_low"))
    assert scores["reference"]["auc"] == 0.5  # the model is its own reference


def test_bad_arguments_are_refused_by_name(model, tokenizer, monkeypatch):
    for arguments, words in (
        ({"resamples": 0}, "resamples"),
        ({"batch_size": 0}, "batch_size"),
        ({"min_k_share": 0}, "share of Min-K"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=words):
            membership_attack(model, tokenizer, FORGET, HOLDOUT, **arguments)
    with pytest.raises(ValueError, match="the holdout set is empty"):
        membership_attack(model, tokenizer, FORGET, [])
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="forget: membership: row 0"):
        membership_attack(broken, tokenizer, FORGET, HOLDOUT)
    monkeypatch.setattr("loku.attacks.copies.rank_and_size", lambda: (0, 2))
    with pytest.raises(ValueError, match="membership inference runs in one process, and there are 2"):
        membership_attack(model, tokenizer, FORGET, HOLDOUT)
