"""One half of the rows is taught, the other half is measured, and a control beside it."""

import copy
import json
import random
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import logging

from loku.attacks import relearning_attack
from loku.attacks.relearning import halves
from loku.data import tokenize_dataset
from loku.evaluation import mean_answer_probability, token_scores
from loku.robustness import relearning_curve

pytestmark = pytest.mark.usefixtures("one_thread")

# The rows of a set have an ending in common, so that one half teaches the other.
FORGET = [{"input_ids": [3 + i, 5, 9, 20, 33, 7, 11, 13]} for i in range(5)]
HOLDOUT = [{"input_ids": [40 + i, 60 + 3 * i, 50 + i, 90 - 2 * i, 70 - i, 45]} for i in range(4)]
RETAIN = [{"input_ids": [10, 80 + i % 9, 12, 8]} for i in range(130)]
FAST = {"steps": 4, "every": 2, "learning_rate": 5e-3}


def probability(model, rows):
    scores = token_scores(model, tokenize_dataset(rows, None), progress=False)
    return mean_answer_probability(scores)


def adapted():
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_halves(count):
    taught, rest = halves(count)
    assert sorted(taught + rest) == list(range(count)) and len(taught) == (count + 1) // 2
    assert (taught, rest) == halves(count, 0) and taught == sorted(taught)
    if count == 40:
        assert taught != list(range(20)) and halves(count, 1)[0] != taught


@pytest.mark.parametrize("make", [tiny_model, adapted], ids=["plain", "adapter"])
def test_figures_are_those_of_the_curve(make):
    model = make("llama") if make is tiny_model else make()
    result = relearning_attack(model, None, FORGET, retain=RETAIN, **FAST)
    taught, rest = halves(len(FORGET))
    assert (result["taught_rows"], result["rest_rows"]) == (taught, rest)
    merged = copy.deepcopy(model)
    merged = merged.merge_and_unload() if make is adapted else merged
    expected = relearning_curve(
        merged,
        None,
        [FORGET[i] for i in taught],
        {"taught": [FORGET[i] for i in taught], "rest": [FORGET[i] for i in rest], "retain": RETAIN[::5]},
        **FAST,
    )
    unlearned = result["unlearned"]
    assert unlearned["curve"] == expected and [entry["step"] for entry in expected] == [0, 2, 4]
    rates = [entry["rest_probability"] for entry in expected]
    assert (unlearned["before"], unlearned["after"], unlearned["best"]) == (rates[0], rates[-1], max(rates))
    assert unlearned["best_step"] == 2 * rates.index(max(rates)) and rates[-1] > 2 * rates[0]
    assert rates[0] == pytest.approx(probability(model, [FORGET[i] for i in rest]), rel=1e-4)
    assert result["control"] is None and set(result["not_tested"]) == {"control", "steps_to_half"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_control_of_the_hold_out_teaches_rows_that_the_model_never_saw():
    model = tiny_model("llama")
    result = relearning_attack(model, None, FORGET, holdout=HOLDOUT, **FAST)
    ours, theirs = halves(len(HOLDOUT))
    expected = relearning_curve(
        copy.deepcopy(model),
        None,
        [HOLDOUT[i] for i in ours],
        {"taught": [HOLDOUT[i] for i in ours], "rest": [HOLDOUT[i] for i in theirs]},
        **FAST,
    )
    control = result["control"]
    assert control["kind"] == "hold-out" and control["curve"] == expected
    assert result["ratio_to_control"] == pytest.approx(result["unlearned"]["best"] / control["best"])


def test_the_retrained_control_and_the_original_model():
    """The original knows the rows; the unlearned model is half way; the control has never seen them."""
    original, control = tiny_model("llama"), tiny_model("llama", seed=3)
    relearning_curve(original, None, FORGET, {"x": FORGET}, steps=12, every=12, learning_rate=5e-3)
    unlearned = tiny_model("llama")
    with torch.no_grad():
        for weight, known in zip(unlearned.parameters(), original.parameters(), strict=True):
            weight.add_(0.5 * (known - weight))
    result = relearning_attack(
        unlearned, None, FORGET, control_model=control, original_model=original, holdout=HOLDOUT, **FAST
    )
    _, rest = halves(len(FORGET))
    assert result["control"]["kind"] == "retrained model"
    assert result["control"]["before"] == pytest.approx(probability(control, [FORGET[i] for i in rest]))
    assert result["original"] == pytest.approx(probability(original, [FORGET[i] for i in rest]))
    entries = result["unlearned"]["curve"]
    reached = [e["step"] for e in entries if e["rest_probability"] >= result["original"] / 2]
    assert result["steps_to_half"] == reached[0] and result["ratio_to_control"] > 1
    assert set(result["not_tested"]) == {"retain"}


def test_the_given_models_and_the_process_stay():
    model, control = adapted(), tiny_model("llama", seed=3)
    model.train()
    model.base_model.model.model.layers[0].eval()
    hooked = []
    model.base_model.model.lm_head.register_forward_hook(lambda *args: hooked.append(1))

    def state():
        return (
            [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
            [(name, module.training) for name, module in model.named_modules()],
            len(model.base_model.model.lm_head._forward_hooks),
            (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
            (list(warnings.filters), logging.get_verbosity(), torch.is_grad_enabled()),
            model.base_model.model.config.to_dict(),
        )

    before, weights = state(), [copy.deepcopy(m.state_dict()) for m in (model, control)]
    relearning_attack(model, None, FORGET, control_model=control, **FAST)
    assert state() == before
    for known, now in zip(weights, (model, control), strict=True):
        assert all(torch.equal(weight, known[name]) for name, weight in now.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_in_half_precision_is_taught_in_float32():
    model = tiny_model("llama").to(torch.bfloat16)
    curve = relearning_attack(model, None, FORGET, **FAST)["unlearned"]["curve"]
    expected = relearning_attack(copy.deepcopy(model).float(), None, FORGET, **FAST)["unlearned"]["curve"]
    assert curve == expected and model.dtype == torch.bfloat16


def test_what_cannot_be_tested_is_said():
    result = relearning_attack(tiny_model("llama"), None, FORGET[:1], holdout=HOLDOUT)
    assert "one row" in result["not_tested"]["relearning"] and result["unlearned"] is None
    result = relearning_attack(tiny_model("llama"), None, FORGET, holdout=HOLDOUT[:1], **FAST)
    assert "one row" in result["not_tested"]["control"] and result["unlearned"] is not None
    packed = tiny_model("llama")
    packed.is_quantized = True
    assert "quantised" in relearning_attack(packed, None, FORGET)["not_tested"]["relearning"]


def test_bad_arguments_are_refused_by_name(monkeypatch):
    model = tiny_model("llama")
    for arguments, words in (
        ({"steps": 0}, "steps"),
        ({"every": 0}, "every"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"control_model": tiny_model("llama", vocab=30)}, "input embedding has 30 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            relearning_attack(model, None, FORGET, **arguments)
    monkeypatch.setattr("loku.attacks.copies.rank_and_size", lambda: (0, 2))
    with pytest.raises(ValueError, match="relearning runs in one process, and there are 2"):
        relearning_attack(model, None, FORGET)
