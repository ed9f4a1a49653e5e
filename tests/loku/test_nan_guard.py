"""A NaN or an Inf stops the run and is named."""

import pytest
import torch
from killed_runs import run
from peak_memory import PeakMemory, needs_proc
from tiny_models import tiny_model
from transformers import TrainerCallback, TrainerState

import loku
from loku.checkpoints import whole_checkpoints
from loku.nan_guard import LossCheck, check_parameters, check_weights, first_module_not_finite

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


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_first_module_that_is_not_finite_is_named(value):
    model = tiny_model("llama")
    ids = torch.arange(3, 9)[None]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert first_module_not_finite(model, lambda: model(ids)) is None
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = value
    assert first_module_not_finite(model, lambda: model(ids)) == "model.layers.1.mlp.up_proj"

    def fails():
        model(ids)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        first_module_not_finite(model, fails)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_a_given_model_are_finite(value, dtype):
    model = tiny_model("llama").to(dtype)
    check_weights(model)
    model.lm_head.weight.data[:] = torch.finfo(dtype).max  # finite, although their sum is not
    check_weights(model)
    model.model.layers[1].mlp.up_proj.weight.data[2, 3:5] = value
    model.model.norm.weight.data[0] = value
    message = (
        r"LlamaForCausalLM are not finite: 2 of the \d+ values of model\.layers\.1\.mlp\.up_proj\.weight are"
    )
    with pytest.raises(FloatingPointError, match=rf"{message} NaN or Inf, and 1 other parameters have some"):
        check_weights(model)
    with pytest.raises(FloatingPointError, match=message):
        loku.unlearn(model, None, None)  # before the rows are looked at
    assert not hasattr(model, "peft_config") and len(model.state_dict()) == len(
        tiny_model("llama").state_dict()
    )


def test_weights_that_are_packed_empty_or_elsewhere_are_passed_over():
    model = torch.nn.Module()
    for name, tensor in {
        "packed": torch.ones(3, dtype=torch.uint8),
        "empty": torch.empty(0),
        "meta": torch.empty(3, device="meta"),
        "eighths": torch.ones(3).to(torch.float8_e4m3fn),
    }.items():
        model.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    check_weights(model)
    model.eighths.data = torch.tensor([1, torch.nan]).to(torch.float8_e4m3fn)
    with pytest.raises(FloatingPointError, match="1 of the 2 values of eighths are NaN or Inf"):
        check_weights(model)


@needs_proc
def test_the_check_of_weights_allocates_nothing(one_thread):
    model = torch.nn.Linear(4096, 4096)
    check_weights(model)
    peak = PeakMemory()
    check_weights(model)
    assert peak.extra() < 2**20  # the weight has 64 MiB


def test_only_trained_parameters_are_checked():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    check_parameters(model, 1)
    model[0].weight.requires_grad_(False)[1, 1] = torch.nan
    check_parameters(model, 2)
    model[1].bias.data[0] = -torch.inf
    with pytest.raises(FloatingPointError, match=r"step 3: the trained parameter 1\.bias is not finite"):
        check_parameters(model, 3)


def test_the_loss_and_its_batch_are_named():
    """One look at the losses of all micro-batches of a step; the bad batch alone is searched."""
    located = []
    check = LossCheck(lambda batch: located.append(batch))
    state = TrainerState(global_step=6)

    def step(*losses):
        for number, (forget, retain) in enumerate(losses):
            check.add(
                {"forget_loss": torch.tensor(forget), "retain_loss": torch.tensor(retain)}, f"batch {number}"
            )
        check.on_pre_optimizer_step(None, state, None)

    step((1.0, 2.0), (3.0, 4.0))
    step()
    assert located == []
    with pytest.raises(
        FloatingPointError, match=r"step 7: retain_loss is -inf \(every module's output is finite"
    ):
        step((1.0, 2.0), (3.0, -torch.inf), (torch.nan, 1.0))
    assert located == ["batch 1"]
    step((1.0, 2.0))  # the bad losses are gone
