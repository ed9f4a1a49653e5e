"""Tiny models that have learnt some rows by heart."""

import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from loku.data import collate, tokenize_dataset


def small_llama(tokenizer, seed=0):
    """A random tiny Llama for a tokenizer."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config("llama", vocab=len(tokenizer))).eval()


def teach_(model, tokenizer, rows, steps=150, learning_rate=5e-3):
    """Train all weights of a model on some rows, all of them in each step."""
    batch = collate(tokenize_dataset(rows, tokenizer), pad_token_id=0)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()
