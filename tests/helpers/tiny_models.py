"""Tiny random models of the tested classes."""

import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, PhiConfig

KINDS = ["gpt_neo", "llama", "phi"]


def tiny_config(kind, vocab=97):
    common = {"vocab_size": vocab, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt_neo":
        attention = [[["global", "local"], 1]]
        return GPTNeoConfig(
            **common, num_layers=2, num_heads=4, attention_types=attention, max_position_embeddings=128
        )
    common |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {"llama": LlamaConfig, "phi": PhiConfig}[kind](**common, max_position_embeddings=128)


def tiny_model(kind, vocab=97, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, vocab)).eval()
    for parameter in model.parameters():  # predictions as far from uniform as a trained model's
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    return model
