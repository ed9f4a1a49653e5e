"""Models and logits that several benchmarks measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART_ROWS = 512  # rows whose float32 copies exist at a time


def gpt_neo_125m() -> PreTrainedModel:
    """Return a GPT-Neo-125M with random weights, the same at each call."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    attention = [[["global", "local"], 6]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(num_layers=12, hidden_size=768, num_heads=12, attention_types=attention)
    )


def target_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return name -> module of the linear layers that FILA adapts by default."""
    from loku.target_modules import default_target_modules

    targets = tuple(default_target_modules(model))
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(targets) and isinstance(module, nn.Linear)
    }


def random_logits(n: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return random logits (N, V) and labels (N,), int64, the same at each call.

    The logits have a standard deviation of 3. In every second row the target is memorised, with p_t = 0.98.
    """
    torch.manual_seed(0)
    logits = torch.randn(n, vocab, device=device, dtype=dtype) * 3
    labels = torch.randint(0, vocab, (n,), device=device)
    for part, targets in zip(logits.split(PART_ROWS), labels.split(PART_ROWS), strict=True):
        memorised = part.float().logsumexp(-1)[::2] + 4
        part[::2] = part[::2].scatter(1, targets[::2, None], memorised[:, None].to(dtype))
    return logits, labels
