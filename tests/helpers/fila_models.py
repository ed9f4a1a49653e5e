"""Small models with a LoRA adapter that FILA may initialise, and the measures of their weights."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, PhiConfig

from loku.fila.initialize import initialize_from_row_scales
from loku.fila.targets import fila_targets
from loku.target_modules import default_target_modules

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
LLAMA_SIZES = {
    **SMALL,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {
    "gpt_neo": GPTNeoConfig(
        **SMALL,
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
    ),
    "llama": LlamaConfig(**LLAMA_SIZES, num_key_value_heads=2),
    "phi": PhiConfig(**LLAMA_SIZES),
}
MODELS = sorted(CONFIGS)


def make_base(kind, dtype=torch.float32):
    """Make a fresh copy of the untouched base: the same model each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))
        for (
            parameter
        ) in model.parameters():  # with transformers' 0.02 every layer would be a small perturbation
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.to(dtype).eval()


def make_peft(kind, dtype=torch.float32, **options):
    base = make_base(kind, dtype)
    options = {"r": 4, "lora_alpha": 8, "target_modules": default_target_modules(base), **options}
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))


def random_scales(model, adapter_name="default"):
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(layer.out_features, generator=generator).pow(4) + 1e-3
        for name, layer in fila_targets(model, adapter_name).items()
    }


def initialized(kind, dtype=torch.float32, **options):
    model = make_peft(kind, dtype, **options)
    initialize_from_row_scales(model, random_scales(model))
    return model


def token_ids(rows=2, length=9):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(11))


@torch.no_grad()
def logits(model):
    return model(input_ids=token_ids()).logits.double()


def lora_layers(model, adapter_name="default"):
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and adapter_name in module.lora_A
    }


def factors(layer, adapter_name="default"):
    A, B = (f[adapter_name].weight.detach().double() for f in (layer.lora_A, layer.lora_B))
    return A, B, layer.scaling[adapter_name]


def train(model, steps=4):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = token_ids()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def assert_close(actual, expected, relative):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= relative, f"relative error {error:.2e}"
