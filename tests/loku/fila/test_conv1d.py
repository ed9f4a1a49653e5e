"""FILA on transformers' Conv1D (GPT-2), whose weight is stored transposed."""

import copy

import pytest
import torch
from fila_models import SMALL, assert_close, factors, logits, lora_layers, random_scales, train
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from loku.adapters import base_weight, linear_weight, reference_model
from loku.fila.initialize import initialize_from_row_scales, release_base_copy_, restore_base_
from loku.fila.targets import fila_targets
from loku_kernels import row_scaled_svd

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

TARGETS = ["c_attn", "c_fc", "mlp.c_proj"]


def make_peft(dtype=torch.float32):
    model = AutoModelForCausalLM.from_config(GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2, n_inner=48))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[0] ** -0.5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(model.to(dtype).eval(), config)


def stored(model):
    return {name: layer.get_base_layer().weight for name, layer in lora_layers(model).items()}


def test_the_view_of_a_weight_is_the_weight():
    model = make_peft()
    layer = lora_layers(model)["transformer.h.0.attn.c_attn"]
    assert base_weight(layer).shape == (96, 32)
    base_weight(layer).data[5, 7] = 3.0
    assert layer.get_base_layer().weight[7, 5] == 3.0
    linear = nn.Linear(3, 4)
    assert linear_weight(linear) is linear.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factors_are_those_of_the_transposed_weight(dtype):
    model = make_peft(dtype)
    before, outputs = {name: weight.detach().clone() for name, weight in stored(model).items()}, logits(model)
    scales = random_scales(model)
    initialize_from_row_scales(model, scales)
    if dtype == torch.float32:
        assert_close(logits(model), outputs, 1e-5)
        with reference_model(model):
            assert_close(logits(model), outputs, 1e-5)
    for name, layer in lora_layers(model).items():
        A, B, scaling = factors(layer)
        residual = stored(model)[name].double().T
        exact = before[name].double().T - scaling * B @ A
        assert_close(residual, exact, 1e-7 if dtype == torch.float32 else 2**-8)
        _, V = row_scaled_svd([before[name].T], scales[name][None], 4)
        W = before[name].double().T
        assert_close(scaling * B @ A, W @ V[0].double() @ V[0].double().T, 1e-4)


@pytest.mark.parametrize("released", [False, True])
def test_the_base_comes_back(released):
    model = make_peft()
    before = {name: weight.detach().clone() for name, weight in stored(model).items()}
    initialize_from_row_scales(model, random_scales(model))
    train(model)
    if released:
        release_base_copy_(model)
    base = restore_base_(model)
    for name, weight in before.items():
        actual = base.get_submodule(name).weight
        assert torch.equal(actual, weight) if not released else torch.allclose(actual, weight, atol=1e-6)
        assert actual.is_contiguous()


def test_a_failure_puts_the_weights_back(monkeypatch):
    model = make_peft()
    before = copy.deepcopy(model.state_dict())

    def failing(*args):
        raise MemoryError("injected")

    monkeypatch.setattr("loku.fila.initialize.add_frozen_adapter", failing)
    with pytest.raises(MemoryError, match="injected"):
        initialize_from_row_scales(model, random_scales(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(fila_targets(model)) == 6
