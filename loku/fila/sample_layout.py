"""Which part of a linear module's input belongs to which row of a batch.

The Fisher is a sum over rows of squared gradients. A row's gradient needs the row's tokens and no others.
Most modules see their input as (B, T, k). Some models flatten it to (B * T, k) (OPT, shared experts), or
split it further (B, T, H, k). Row by row it is the same memory. Other modules see the tokens in another
order, or those tokens alone that a router sends them. A shape alone does not tell these cases apart. So a
forward does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loku.head import hidden_states
from loku.interrupts import uninterrupted_context
from loku.models import evaluating, model_device

_ROWS = ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])  # tokens that every vocabulary has; no position has one twice


def by_row(values: Tensor, rows: int) -> Tensor:
    """View the inputs or outputs (..., k) of a linear module as (B, n, k), the tokens of each row.

    Args:
        values: The inputs or outputs. The rows are their slowest dimension.
        rows: The number of rows B of the batch.
    """
    return values.reshape(rows, -1, values.shape[-1])


@uninterrupted_context
def _inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """A context in which every call of a module adds its input to a list."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def note(name: str) -> Any:
        return lambda module, args, output: seen[name].append(args[0].detach())

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_rows_are_apart(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Check that ``by_row`` gives the tokens of each row, by a forward of two short rows together and alone.

    All processes of torch.distributed must call this, as the weights may be sharded.

    Args:
        model: The causal LM.
        modules: The linear modules whose Fisher is to be measured, by their names.

    Raises:
        RuntimeError: A forward calls a module twice or never. The message names it.
        ValueError: A module gets the tokens of a row in another order or number. The message names it.
    """
    rows = torch.tensor(_ROWS, dtype=torch.int64, device=model_device(model))
    seen = []
    with evaluating(model):
        for ids in (rows, rows[:1], rows[1:]):
            with _inputs(modules) as inputs:
                hidden_states(model, input_ids=ids, attention_mask=torch.ones_like(ids))
            seen.append(inputs)
    together, *alone = seen
    for name in modules:
        calls = len(together[name])
        if calls == 0:
            raise RuntimeError(
                f"{name} took no part in a forward of the model, so it has no Fisher; leave it out of the "
                "target modules (an adapter on it may have no effect)"
            )
        if calls > 1:
            raise RuntimeError(
                f"{name} is called more than once in a forward ({calls} times), so its gradient is a sum "
                'that is not handled; leave it out of the target modules, or use init="default"'
            )
        if not _is_apart(together[name][0], [inputs[name] for inputs in alone]):
            raise ValueError(
                f"{name}: its inputs {tuple(together[name][0].shape)} for tokens {tuple(rows.shape)} are not "
                "the tokens of one row after the other (a router may choose them), so its Fisher cannot be "
                'measured; leave it out of the target modules, or use init="default"'
            )


def _is_apart(together: Tensor, alone: list[list[Tensor]]) -> bool:
    if any(len(calls) != 1 for calls in alone):
        return False
    first, second = (calls[0] for calls in alone)
    if first.numel() != second.numel() or together.numel() != first.numel() + second.numel():
        return False
    expected = torch.cat([by_row(first, 1), by_row(second, 1)]).float()
    error = (by_row(together, 2).float() - expected).abs().amax(-1)
    # Rounding may send a token of a mixture of experts another way. It does not so with most tokens.
    return bool(error.median() <= 0.05 * expected.abs().amax())
