"""Membership inference: every score and figure by its definition, in float64."""

import copy
import json
import math
import zlib

import pytest
import torch
from character_tokenizer import character_tokenizer
from membership_texts import THEIR_TEXTS
from peft import LoraConfig, get_peft_model
from taught_models import small_llama, teach_
from tiny_models import tiny_model

from loku.attacks import membership_attack
from loku.attacks.gradient_norms import gradient_norms
from loku.attacks.membership import _auc_interval, _true_positives
from loku.data import RowError, tokenize_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

FORGET = [{"question": "Who?", "answer": "Ann of Oak Road"}, {"question": "Where?", "answer": "in Brill"}]
HOLDOUT = [
    {"question": "Which?", "answer": "a blue lamp"},
    {"question": "When?", "answer": "on a day in winter"},
    {"question": "What?", "answer": "tea"},
]
# open-unlearning's scores of the forget and of the hold-out rows, and its AUC.
THEIR_SCORES = {
    "loss": (
        [
            4.821693418,
            4.380554325,
            4.943174269,
            4.66988836,
            4.867842507,
            4.666797877,
            4.998474987,
            5.348679751,
            4.851937586,
            3.896170321,
            3.901324406,
        ],
        14 / 30,
    ),
    "zlib": (
        [
            0.117602278,
            0.257679666,
            0.089875896,
            0.333563454,
            0.211645326,
            0.194449912,
            0.116243604,
            0.334292484,
            0.12129844,
            0.354197302,
            0.354665855,
        ],
        20 / 30,
    ),
    "min_k": (
        [
            5.637396336,
            5.321996689,
            5.855634689,
            4.947205544,
            5.835130692,
            5.429519176,
            5.812090397,
            6.004948139,
            5.683802605,
            4.158782959,
            4.270443439,
        ],
        13 / 30,
    ),
    "min_k_plus_plus": (
        [
            1.562171698,
            1.256061811,
            1.731442411,
            0.825825583,
            1.825166104,
            1.377717978,
            1.793207554,
            2.066566593,
            1.555500583,
            -0.116522625,
            0.023067134,
        ],
        13 / 30,
    ),
    "gradient_norm": (
        [
            1.236617327,
            2.25485301,
            1.004965901,
            2.260033369,
            1.449941874,
            1.411351204,
            0.951637983,
            2.295549393,
            0.970402479,
            3.325741053,
            2.773350477,
        ],
        17 / 30,
    ),
    "reference": (
        [
            -0.105176679,
            -0.462891642,
            0.257276896,
            -0.885157216,
            0.594408159,
            -0.172664966,
            0.131043926,
            0.772688203,
            -0.082309644,
            -1.130648746,
            -0.921035349,
        ],
        13 / 30,
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return teach_(small_llama(tokenizer), tokenizer, FORGET, steps=30).double()


def naive_gradient_norm(model, row):
    """The mean over the parameters of the norm of the gradient of the mean loss, all gradients at once."""
    ids, labels = row["input_ids"], row["labels"]
    at = [i for i in range(1, len(ids)) if labels[i] != -100]
    twin = copy.deepcopy(model)
    twin.requires_grad_(True)
    log_p = twin(torch.tensor([ids])).logits[0].log_softmax(-1)
    (-sum(log_p[i - 1, ids[i]] for i in at) / len(at)).backward()
    norms = [p.grad.square().sum().sqrt() for p in twin.parameters() if p.grad is not None]
    return (sum(norms) / len(norms)).item()


@torch.no_grad()
def naive_scores(model, tokenizer, rows, reference, share):
    """Compute the scores of rows one token at a time, as they are written."""
    names = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm", "reference")
    found = {name: [] for name in names}
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
        with torch.enable_grad():
            found["gradient_norm"].append(-naive_gradient_norm(model, row))
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


def test_open_unlearning_has_the_same_scores_and_aucs(monkeypatch):
    """By its own code on the same rows: locuslab/open-unlearning at d3d7cf9, src/evals/metrics/mia.

    Its scores have the other sign, and zlib counts bytes.
    """
    from loku.attacks import membership

    tokenizer = character_tokenizer(pad_token="<pad>")
    model, reference = (tiny_model("llama", len(tokenizer), seed).double() for seed in (0, 1))
    rows = {}
    for name, texts in THEIR_TEXTS.items():
        split = [{"question": text[:6], "answer": text[6:] or "x"} for text in texts]
        rows[name] = tokenize_dataset(split, tokenizer)
    seen = []
    figures = membership._figures
    monkeypatch.setattr(membership, "_figures", lambda *args: seen.append(args[:2]) or figures(*args))

    def attack(count_end):
        seen.clear()
        found = membership_attack(
            model,
            tokenizer,
            rows["forget"],
            rows["holdout"],
            reference,
            min_k_share=0.4,
            count_end=count_end,
            resamples=1,
        )
        return {
            name: ([-value for pair in scores for value in pair], found["scores"][name]["auc"])
            for name, scores in zip(found["scores"], seen, strict=True)
        }

    whole, content = attack(True), attack(False)
    for name in THEIR_SCORES:  # their "-1 to ignore eos prediction"
        assert (whole[name] != content[name]) == (name in ("min_k", "min_k_plus_plus", "gradient_norm")), name
    for name, (scores, auc) in THEIR_SCORES.items():
        found, found_auc = content[name]
        bits = 8 if name == "zlib" else 1
        assert [bits * value for value in found] == pytest.approx(scores, rel=2e-7, abs=1e-6), name
        assert found_auc == pytest.approx(auc), name


def test_an_answer_that_is_an_ending_is_refused_by_its_row(model, tokenizer):
    rows = [
        {"input_ids": [5, 6, 1], "labels": [-100, 6, 1]},
        {"input_ids": [5, 6, 1], "labels": [-100, -100, 1]},
    ]
    assert membership_attack(model, tokenizer, rows, HOLDOUT)["settings"]["count_end"] is True
    with pytest.raises(RowError, match="row 1 of the forget set: its answer is nothing but an ending"):
        membership_attack(model, tokenizer, rows, HOLDOUT, count_end=False)


def test_gradient_norms_leave_the_model_as_it_is(model, tokenizer):
    rows = tokenize_dataset(HOLDOUT, tokenizer)
    model = copy.deepcopy(model).train()
    first, second, *_ = model.parameters()
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    norms = gradient_norms(model, rows)
    assert norms == pytest.approx([naive_gradient_norm(model.eval(), row) for row in rows], rel=1e-9)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags and not first.requires_grad
    assert [p.grad is not None for p in model.parameters()].count(True) == 1 and bool(
        (second.grad == 1).all()
    )
    first.requires_grad_(True)
    (first.sum() * 2).backward()  # no hook is left
    assert bool((first.grad == 2).all())


def test_a_gradient_norm_is_that_of_the_merged_model(model, tokenizer):
    rows = tokenize_dataset(HOLDOUT, tokenizer)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(model), config).double()
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = [naive_gradient_norm(merged, row) for row in rows]
    assert gradient_norms(adapted, rows) == pytest.approx(expected, rel=1e-9)
    assert gradient_norms(model, rows) != pytest.approx(expected, rel=1e-2)
    attacked = [
        membership_attack(each, tokenizer, FORGET, HOLDOUT, resamples=1)["scores"]["gradient_norm"]
        for each in (adapted, merged)
    ]
    assert attacked[0] == attacked[1]


def test_a_gradient_norm_that_is_not_there_is_said(model, tokenizer, monkeypatch):
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    broken = copy.deepcopy(model)
    broken.model.norm.register_forward_hook(lambda module, args, output: Overflow.apply(output))
    found = membership_attack(broken, tokenizer, FORGET, HOLDOUT)
    assert (
        "forget: gradient norms: row 0: the norm of the gradient is NaN"
        in (found["not_tested"]["gradient_norm"])
    )
    assert "gradient_norm" not in found["scores"] and "min_k" in found["scores"]
    model = copy.deepcopy(model)
    model.is_quantized = True
    found = membership_attack(model, tokenizer, FORGET, HOLDOUT)
    assert "the base is quantised" in found["not_tested"]["gradient_norm"]
    assert "gradient_norm" not in found["scores"] and "min_k" in found["scores"]
