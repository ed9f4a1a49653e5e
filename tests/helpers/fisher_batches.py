"""Batches of random rows whose Fisher a test measures, and the measured modules."""

import torch
from torch import nn

from loku.data import collate


def rows(count, seed, vocab=97):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        length = int(torch.randint(4, 12, (), generator=generator))
        ids = torch.randint(0, vocab, (length,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return result


def batches(rows, size):
    return [collate(rows[i : i + size], pad_token_id=0) for i in range(0, len(rows), size)]


def targets(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in ("q_proj", "v_proj", "mlp"))
    }
