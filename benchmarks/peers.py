"""The peers that several benchmarks measure: the official loss, plain torch, and other libraries."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


@cache
def importable(module: str) -> bool:
    """Whether a peer can be measured. The first call says so if it cannot."""
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"skipped: {module} is not installed (pip install '.[bench]')", flush=True)
    return found


def reason(error: BaseException) -> str:
    """Return the type of an error and the first 200 characters of its first line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def peer(
    name: str, module: str, attribute: str, make: Callable[[Any], Loss] = lambda found: found
) -> dict[str, Loss]:
    """Return ``{name: function}`` of another library, or ``{}`` if it is missing or does not import.

    Args:
        name: The name of the peer in the results.
        module: The module to import.
        attribute: The name of the function or class in it.
        make: Makes the function to measure from the attribute. The default takes it as it is.
    """
    if not importable(module.split(".")[0]):
        return {}
    try:
        return {name: make(getattr(importlib.import_module(module), attribute))}
    except Exception as error:
        print(f"  skipped: {name}: {reason(error)}", flush=True)
        return {}


@cache
def compiled(function: Loss) -> Loss:
    """Return the function under ``torch.compile`` with dynamic shapes."""
    return torch.compile(function, dynamic=True)


def official_ihl(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the IHL as the authors' code computes it: softmax, a one-hot mask, a boolean gather.

    Args:
        logits: The logits (N, V), of any floating dtype.
        labels: The labels (N,), int64, all counted.
    """
    p = torch.softmax(logits, dim=-1)
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    p_target = p[one_hot]
    p_runner_up = p.masked_fill(one_hot, -torch.inf).max(dim=-1).values
    return (1 + p_target - p_runner_up).mean()


def lean_ihl(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the IHL in plain torch with as few (N, V) tensors as possible.

    Args:
        logits: The logits (N, V), of any floating dtype.
        labels: The labels (N,), int64, all counted.
    """
    p = torch.softmax(logits, dim=-1)
    index = labels[:, None]
    p_target = p.gather(1, index)[:, 0]
    p_runner_up = p.scatter(1, index, -torch.inf).amax(-1)
    return (1 + p_target - p_runner_up).mean()
