"""PDU against open-unlearning, and its dual weight."""

import json

import pytest
import torch
from peer_batches import changed, losses_of, projection, token_batch
from small_trainers import FORGET, RETAIN, trainer_of, with_lora
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PhiConfig

from loku import UnlearnConfig, UnlearnTrainer
from loku.objectives import At, DualRetainWeight, pdu_loss
from loku.objectives.pdu import MeanLogit

BOUND, STEP = 0.3, 0.5
ARGUMENTS = {"retain_loss_eps": BOUND, "dual_step_size": STEP, "dual_warmup_epochs": 0}


def pdu_objective():
    return UnlearnConfig(method="pdu", method_args=ARGUMENTS, use_cpu=True).objective()


def test_value_and_gradient_are_those_of_open_unlearning():
    """``trainer/unlearn/pdu.py: PDU.compute_loss`` with preferences 1 and 1, eps 0.3 and step size 0.5.

    It takes the logits at the labelled tokens themselves. So its labels were ours, moved to the positions
    that predict them.
    """
    model = changed()
    losses = losses_of(pdu_objective(), model, {"forget": token_batch(3), "retain": token_batch(4)})
    sum(losses.values()).backward()
    assert losses["forget_loss"].item() == pytest.approx(21.980476766130938, rel=1e-9)
    assert losses["retain_loss"].item() == pytest.approx(8.240137100219727, rel=1e-6)  # theirs is float32
    assert projection(model) == pytest.approx(-33.72502041452301, rel=1e-6)
    weight = DualRetainWeight(1.0, BOUND, STEP, 0)
    assert one_update(weight, losses["retain_loss"]) == pytest.approx(4.970068454742432, rel=1e-6)


class State:
    """A stand-in for ``transformers.TrainerState``."""

    def __init__(self, epoch=0.0):
        self.epoch, self.stateful_callbacks = epoch, {}


def one_update(weight, *parts, epoch=0.0):
    state = State(epoch)
    weight.on_step_begin(None, state, None)
    for part in parts:
        weight.add(torch.as_tensor(part))
    weight.on_step_end(None, state, None)
    return weight.value


def test_the_weight_goes_up_above_the_bound_and_down_to_zero():
    weight = DualRetainWeight(1.0, 2.0, 0.5, warmup_epochs=1)
    assert one_update(weight, 9.0, epoch=0.75) == 1.0  # the warm-up
    assert one_update(weight, 2.0, 1.0, epoch=1.0) == 1.5  # two micro-batches
    assert one_update(weight, 1.0, epoch=1.25) == 1.0
    assert one_update(weight, -5.0, epoch=1.5) == 0.0
    assert one_update(weight, 2.5, epoch=1.75) == 0.25
    weight.on_train_begin(None, State(), None)
    assert weight.value == 1.0  # a second run begins anew


SIZES = {
    **{"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
}


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES))


def test_autocast_does_not_round_the_mean_logit():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (5, 97))
    at = At(hidden, torch.zeros(5, dtype=torch.int64), weight, None, {}, None, (weight, None))
    exact = (hidden.double() @ weight.double().T).mean(-1)
    with torch.autocast("cpu", torch.bfloat16):
        mean = MeanLogit().of_model(at, None)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [CohereConfig, PhiConfig])
def test_models_with_a_scale_or_a_bias(config):
    model = model_of(config)
    if config is CohereConfig:
        model.logit_scale = 0.25
    else:
        model.lm_head.bias.data.uniform_(0, 3)
    args = UnlearnConfig(method="pdu", use_cpu=True, disable_tqdm=True)
    trainer = UnlearnTrainer(model, args, FORGET, RETAIN)
    draws = list(trainer._get_train_sampler())[:3]
    tokens = trainer.data_collator([trainer.train_dataset[draw] for draw in draws])
    batch, _ = trainer._batch(model, tokens)
    ids, mask, labels = (
        tokens[name][tokens["is_forget"]] for name in ("input_ids", "attention_mask", "labels")
    )
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][labels[:, 1:] != -100]
    torch.testing.assert_close(pdu_loss(batch).float(), ((logits.amax(-1) - logits.mean(-1)) ** 2).mean())


def test_a_softcap_is_refused_before_anything_is_touched():
    args = UnlearnConfig(method="pdu", use_cpu=True, disable_tqdm=True)
    with pytest.raises(ValueError, match=r'caps its logits softly .at 30.*method "pdu" does not train'):
        UnlearnTrainer(model_of(Gemma2Config), args, FORGET, RETAIN)


def test_a_run_follows_its_dual_weight(tmp_path):
    """The log has the weight after each step, and the next loss is weighed by it."""
    model = with_lora(tiny_model("llama"))
    trainer = trainer_of(
        model,
        "pdu",
        tmp_path,
        method_args=ARGUMENTS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    log = [line for line in trainer.state.log_history if "forget_loss" in line]
    assert len(log) == 2
    weight = trainer.args.retain_weight
    for line in log:
        total = line["forget_loss"] + weight * line["retain_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        weight = weight + STEP * (line["retain_loss"] - BOUND)
        assert line["retain_weight"] == pytest.approx(weight, rel=1e-9)
    assert "retain_weight" not in str(trainer_of(model, "gd", tmp_path)._retain_weight.logged())


def test_a_resumed_run_has_the_same_bits(tmp_path):
    """The warm-up ends after a step of the second epoch, and the checkpoint lies after it."""
    options = {
        "method_args": {**ARGUMENTS, "dual_warmup_epochs": 1},
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 3,
    }

    def run(folder, **further):
        trainer = trainer_of(with_lora(tiny_model("llama")), "pdu", folder, **options, **further)
        trainer.train()
        weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        return trainer, weights

    whole, expected = run(tmp_path)
    log = [line["retain_weight"] for line in whole.state.log_history if "retain_weight" in line]
    assert log[:2] == [whole.args.retain_weight] * 2 and len(set(log)) > 3
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["loku retain weight"] == {"value": log[2]}
    resumed, found = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed._retain_weight.value == whole._retain_weight.value
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_wrong_arguments():
    for name in ARGUMENTS:
        with pytest.raises(ValueError, match=rf"{name} of method 'pdu' must be a finite number >= 0"):
            UnlearnConfig(method="pdu", method_args={name: -1.0}, use_cpu=True)
