"""Small models of several classes, with an adapter that changes the outputs of every module it has."""

import copy

import torch
from fila_models import LLAMA_SIZES, SMALL
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig

CONFIGS = {
    "llama": LlamaConfig(**LLAMA_SIZES, num_key_value_heads=2),
    "tied": LlamaConfig(**LLAMA_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT2Config(**SMALL, n_embd=48, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**LLAMA_SIZES),
    "mixtral": MixtralConfig(
        **LLAMA_SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_base(kind, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).eval()
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def make_peft(kind, dtype=torch.float32, **options):
    options = {"r": 4, "lora_alpha": 8, **options}
    return get_peft_model(make_base(kind, dtype), LoraConfig(task_type="CAUSAL_LM", **options))


def perturb(model, adapter_name="default"):
    """Move the factors as training would, so that every adapted module changes the outputs."""
    for name, parameter in model.named_parameters():
        if f".{adapter_name}" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model
