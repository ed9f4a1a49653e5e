"""A NaN or an Inf stops the run and is named."""

import pytest
import torch
from killed_runs import run
from tiny_models import tiny_model
from transformers import TrainerCallback

from loku.checkpoints import whole_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


def poison(step, act):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step + 1 == step:
                act(model)

    return Poison()


def test_a_loss_that_is_nan_stops_the_run(tmp_path, monkeypatch):
    name = "transformer.h.1.mlp.c_fc"
    models = []
    monkeypatch.setattr("killed_runs.tiny_model", lambda kind: models.append(tiny_model(kind)) or models[0])

    def act(model):
        model.get_base_model().get_submodule(name).base_layer.weight.data[3, 2] = torch.inf

    message = rf"step 4: forget_loss is nan \(it begins in .*{name}.*\).*before the weights changed"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, [poison(4, act)])
    assert [c.name for c in whole_checkpoints(tmp_path)] == ["checkpoint-2"]
    expected = tiny_model("gpt_neo").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in models[0].state_dict().items())


def test_a_parameter_that_is_nan_is_not_saved(tmp_path):
    def act(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: grad * torch.nan)

    with pytest.raises(FloatingPointError, match=r"step 4: the trained parameter .*lora_A.* is not finite"):
        run(tmp_path, [poison(4, act)])
    assert [c.name for c in whole_checkpoints(tmp_path)] == ["checkpoint-2"]
