"""The layers of decoders, by number and by name."""

import pytest
import torch
from tiny_models import KINDS, tiny_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
)

from loku.adapters import unwrapped
from loku.decoder_layers import decoder_layers, find_layer

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
CONFIGS = {
    "transformer.h": GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2),
    "gpt_neox.layers": GPTNeoXConfig(**SMALL, num_attention_heads=2),
    "model.decoder.layers": OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    ),
    "backbone.layers": MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, state_size=4),
    "model.layers": MixtralConfig(
        **SMALL, num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
    ),
}


@pytest.mark.parametrize("parent", CONFIGS)
def test_layers_are_numbered(parent):
    model = AutoModelForCausalLM.from_config(CONFIGS[parent])
    assert list(decoder_layers(model)) == [f"{parent}.{number}" for number in range(3)]
    assert find_layer(model, 1) is model.get_submodule(f"{parent}.1")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_no_number(kind):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(kind)
    before = decoder_layers(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    assert decoder_layers(unwrapped(wrapped)) == before


def test_a_regular_expression_matches_one_whole_name():
    model = tiny_model("llama")
    assert find_layer(model, r"model\.layers\.1") is model.model.layers[1]
    assert find_layer(model, r".*layers\.0\.mlp") is model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"it matches 2 modules, the first of them 'model.layers.0'"):
        find_layer(model, r"model\.layers\.\d")
    with pytest.raises(ValueError, match="it matches no module"):
        find_layer(model, "layers.1")


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_of_no_layer_is_refused(number):
    with pytest.raises(ValueError, match=rf"no layer {number}: LlamaForCausalLM has the layers 0 to 1"):
        find_layer(tiny_model("llama"), number)


def test_layers_that_cannot_be_numbered_are_refused():
    model = tiny_model("llama")
    model.model.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    with pytest.raises(ValueError, match=r"2 under 'model.layers', 2 under 'model.norms'\. Name the layer"):
        find_layer(model, 0)
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="its config has num_hidden_layers=5"):
        find_layer(model, 0)
