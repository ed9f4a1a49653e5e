"""The layers and options that FILA refuses."""

import copy

import pytest
import torch
from fila_models import (
    LLAMA_SIZES,
    SMALL,
    assert_close,
    logits,
    make_base,
    make_peft,
    random_scales,
    train,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
)

from loku.adapters import reference_model
from loku.fila.initialize import initialize_from_row_scales, restore_base_
from loku.fila.targets import fila_targets
from loku.target_modules import default_target_modules

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 .* set it to 0"),
        ({"use_dora": True}, "use_dora=True .* set it to False"),
        ({"lora_bias": True}, "lora_bias=True .* set it to False"),
        ({"bias": "lora_only"}, "bias='lora_only' .* bias=\"none\""),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* without FILA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.* without FILA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.* leave it unset"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .* use init_lora_weights=True"),
        ({"lora_alpha": 0}, r"model.layers.0.self_attn.q_proj: scaling is 0.0.* set lora_alpha"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "model.embed_tokens: FILA needs a plain nn.Linear"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_options_are_refused(options, message):
    base = make_base("phi" if "lora_bias" in options else "llama")
    targets = {"target_modules": default_target_modules(base)}
    model = get_peft_model(base, LoraConfig(**{"r": 4, **targets, **options}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        initialize_from_row_scales(model, {})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Linear4bit(nn.Linear):
    """A stand-in for bitsandbytes' class of this name: a subclass of nn.Linear that holds packed bytes."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), False)


def replaced(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def test_quantised_and_meta_weights_are_refused():
    name = "model.layers.1.mlp.up_proj"
    base = make_base("llama")
    targets = default_target_modules(base)
    replaced(base, name, Linear4bit(base.get_submodule(name)))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    with pytest.raises(ValueError, match=rf"{name}: .*Linear4bit.*uint8; .* quantise the residual"):
        fila_targets(model)

    base = make_base("llama")
    replaced(base, name, base.get_submodule(name).to("meta"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    with pytest.raises(ValueError, match=rf"{name}: .*meta device.* without offloading"):
        fila_targets(model)


@pytest.mark.filterwarnings("ignore")
def test_tied_targets_are_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **sizes, tie_word_embeddings=True))
    model = get_peft_model(tied, LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head: .*also that of model\.embed_tokens.* untie"):
        fila_targets(model)


class Clipped(nn.Linear):
    """A linear module that computes something else than x W^T + b."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Spelled(nn.Linear):
    """A linear module with a forward of its own, such as Falcon's."""

    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.parametrize(("kind", "refused"), [(Clipped, True), (Spelled, False)])
def test_only_subclasses_that_compute_the_product_are_targets(kind, refused):
    name = "model.layers.1.mlp.up_proj"
    base = make_base("llama")
    linear = base.get_submodule(name)
    other = kind(linear.in_features, linear.out_features, bias=False)
    other.weight = linear.weight
    replaced(base, name, other)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=default_target_modules(base)))
    if refused:
        with pytest.raises(
            ValueError, match=rf"{name}: a Clipped computes something else .*init=\"default\""
        ):
            fila_targets(model)
    else:
        assert name in fila_targets(model)


def test_experts_keep_default_lora_beside_linears():
    moe = AutoModelForCausalLM.from_config(
        MixtralConfig(**LLAMA_SIZES, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    )
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    other, weights = copy.deepcopy(moe), copy.deepcopy(moe.state_dict())
    model = get_peft_model(moe, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **experts))
    assert sorted({name.rpartition(".")[2] for name in fila_targets(model)}) == ["q_proj", "v_proj"]
    before = logits(model)
    initialize_from_row_scales(model, random_scales(model))
    assert_close(logits(model), before, 1e-5)
    with reference_model(model):
        assert_close(logits(model), before, 1e-5)
    train(model)
    with reference_model(model):
        assert_close(logits(model), before, 1e-5)
    assert (logits(model) - before).abs().max() > 0.01
    base = restore_base_(model)
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())

    model = get_peft_model(other, LoraConfig(r=4, target_modules=[], **experts))
    with pytest.raises(ValueError, match=r"the adapter has none; .*init=\"default\""):
        fila_targets(model)


def test_models_and_adapters_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs a PeftModel"):
        fila_targets(make_base("llama"))
    model = make_peft("llama")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        fila_targets(model, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: .*merged.* call unmerge_adapter"):
        fila_targets(model)
    model.unmerge_adapter()
    initialize_from_row_scales(model, random_scales(model))
    with pytest.raises(ValueError, match=r"already initialised.* restore_base_"):
        fila_targets(model)
    model = make_peft("llama")
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(ValueError, match=r"other adapters \['second'\].* delete them"):
        fila_targets(model)
