"""UNDIAL against plain torch and against open-unlearning."""

import pytest
import torch
from peer_batches import changed, losses_of, original, projection, token_batch
from small_trainers import greedy_rows, trainer_of, with_lora
from tiny_models import tiny_model
from torch.nn.functional import one_hot

from loku import UnlearnConfig
from loku.objectives import OBJECTIVES


def lowered_target(tokens, beta):
    """The softmax (B, T - 1, V) of the original's logits after the labels' are lowered."""
    with torch.no_grad():
        logits = original()(input_ids=tokens["input_ids"]).logits[:, :-1]
    return (logits - beta * one_hot(tokens["labels"][:, 1:], logits.shape[-1])).softmax(-1)


def test_value_and_gradient_are_those_of_open_unlearning():
    """``trainer/utils.py: compute_undial_loss`` with beta 10.

    It is a mean over all positions, so all are labelled. It is a cross entropy, which has the entropy of the
    target beside the divergence.
    """
    model, tokens = changed(), token_batch(3, prompts=(0, 0, 0))
    objective = UnlearnConfig(method="undial", use_cpu=True).objective()
    loss = losses_of(objective, model, {"forget": tokens, "retain": token_batch(4)}, beta=10.0)["forget_loss"]
    loss.backward()
    target = lowered_target(tokens, 10.0)
    entropy = -(target * target.log()).sum(-1).mean()
    assert loss.item() + entropy.item() == pytest.approx(1.689420525375076, rel=1e-9)
    assert projection(model) == pytest.approx(5.175876002722054, rel=1e-7)


def test_unlabelled_tokens_do_not_count():
    model, tokens = changed(), token_batch(3)
    objective = UnlearnConfig(method="undial", beta=4.0, use_cpu=True).objective()
    loss = losses_of(objective, model, {"forget": tokens, "retain": token_batch(4)}, beta=4.0)["forget_loss"]
    counted = tokens["labels"][:, 1:] != -100
    q = lowered_target({**tokens, "labels": tokens["labels"].clamp(min=0)}, 4.0)[counted]
    log_p = model(input_ids=tokens["input_ids"]).logits[:, :-1].log_softmax(-1)[counted]
    torch.testing.assert_close(loss, (q * (q.log() - log_p)).sum(-1).mean())


def test_beta_is_the_methods_own():
    (quantity,) = UnlearnConfig(method="undial", use_cpu=True).objective().quantities["forget"]
    assert quantity.lowering == OBJECTIVES["undial"].beta == 10.0
    (quantity,) = UnlearnConfig(method="undial", beta=3.0, use_cpu=True).objective().quantities["forget"]
    assert quantity.lowering == 3.0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_training_lowers_the_forget_probability(tuning, tmp_path):
    """The original model is that before training, with an adapter or without."""
    model = tiny_model("llama")
    model.lm_head.weight.data.mul_(5)  # it is sure of its own words
    if tuning == "lora":
        model = with_lora(model)
    options = {"beta": 10.0, "num_train_epochs": 8, "learning_rate": 1e-2}
    trainer = trainer_of(model, "undial", tmp_path, greedy_rows(model), **options)
    trainer.train()
    log = [line for line in trainer.state.log_history if "forget_loss" in line]
    assert log[-1]["forget_loss"] < 0.5 * log[0]["forget_loss"]
    assert log[-1]["forget_probability"] < 0.5 * log[0]["forget_probability"]
