"""Inputs of the kernels, with cases that random logits never give."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100


def planted_logits(n, v, dtype, seed=0):
    """Make logits (n, v) and labels (n,) whose rows go through the cases below in turn.

    Random logits make every probability about 1/V, and then any answer passes.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator) * 3
    labels = torch.randint(0, v, (n,), generator=generator)
    for i in range(n):
        row, t = logits[i], int(labels[i])
        other = (t + 1 + int(torch.randint(0, v - 1, (), generator=generator))) % v  # not t
        match i % 12:
            case 0:  # memorised: p_t = 1 - 1e-6 or so
                row[t] = row.logsumexp(0) + 13.8
            case 1:  # a confident runner-up
                row[other] = row.logsumexp(0) + 8
            case 2:  # all equal: the lowest index is runner-up
                row.fill_(1.5)
            case 3:  # a tie of target and runner-up
                row[t] = row[other] = row.max() + 1
            case 4:  # masked words, target and one other kept
                row[torch.rand(v, generator=generator) < 0.7] = -torch.inf
                row[t], row[other] = 0.5, 0.25
            case 5:  # everything but the target masked
                row.fill_(-torch.inf)
                row[t] = 1.0
            case 6:  # the target masked
                row[t] = -torch.inf
            case 7:  # a large offset
                row += 1000.0 if dtype != torch.float16 else 100.0
            case 8:  # ascending: a new runner-up all the time
                row.copy_(row.sort().values)
            case 9:  # extreme spread: exp underflows for all but one
                row.mul_(100.0)
            case 10:
                labels[i] = IGNORE
            case _:
                pass
    return logits.to(dtype), labels


def planted_operands(n, d, v, dtype, seed=0, bias=True, memorised=True):
    """Make hidden (n, d), weight (v, d), bias (v,) or None, and labels (n,).

    Every second row of ``hidden`` points at its label's embedding, so that p_t is near 1 there.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) / d**0.5
    offset = torch.randn(v, generator=generator) if bias else None
    labels = torch.randint(0, v, (n,), generator=generator)
    if memorised:
        hidden[::2] += 14 * weight[labels[::2]] / weight[labels[::2]].norm(dim=1, keepdim=True) ** 2
    labels[n // 3] = IGNORE
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden, weight, None if offset is None else offset.to(dtype), labels


def fisher_operands(n, tokens, d, k, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, tokens, k, generator=generator)
    grad_outputs = torch.randn(n, tokens, d, generator=generator)
    grad_outputs *= 10.0 ** -torch.randint(0, 6, (n, 1, 1), generator=generator)
    return inputs.to(dtype), grad_outputs.to(dtype)
