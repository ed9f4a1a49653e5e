"""One forward of a model that yields the triplets and the quantities of an objective, without logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loku.data.tokens import IGNORE_INDEX
from loku.head import forward_with, next_token_labels
from loku.interrupts import uninterrupted_context
from loku.models import unwrapped
from loku.objectives import At, Quantity
from loku_kernels import linear_softmax_triplet

Head = tuple[Tensor, Tensor | None]  # the weight (V, D) and the bias (V,) of an output embedding
# A quantity with the mask (B,), bool, of the rows of a batch that have it.
RowsOf = tuple[Quantity, Tensor]


class TokenValues(NamedTuple):
    """The result of ``token_values`` for a batch.

    Attributes:
        triplet: The softmax triplets (B, T, 3), float64; zero where no label is predicted.
        counted: The mask (B, T), bool, of the positions that predict a label.
        values: Each quantity (B, T), float64, by its name; 0 at other positions than its own.
        positions: The mask (B, T), bool, of each quantity's positions, by its name.
    """

    triplet: Tensor
    counted: Tensor
    values: dict[str, Tensor]
    positions: dict[str, Tensor]


def positions_of(
    needed: Sequence[RowsOf], labels: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """The mask (B, T), bool, of the positions of each quantity in a batch, by its name.

    Rows that only fill up a batch have no label, and no position of any quantity.

    Args:
        needed: The quantities, each with the mask of the rows that have it.
        labels: The labels (B, T), int64.
        attention_mask: The attention mask (B, T), int64. None (default) for packed rows.
    """
    labelled = (next_token_labels(labels) != IGNORE_INDEX).any(1)
    return {
        quantity.name: (rows & labelled)[:, None] & quantity.positions(labels, attention_mask)
        for quantity, rows in needed
    }


@uninterrupted_context
def _outputs(model: nn.Module, quantities: Sequence[Quantity]) -> Iterator[dict[str, Tensor | None]]:
    """A context that gathers the output (B, T, D') of each quantity's module, by the quantity's name.

    A quantity without a module has no entry, and a module that was not called yet has None.
    """
    found: dict[str, Tensor | None] = {}
    base: Any = unwrapped(model)

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return keep

    with ExitStack() as stack:
        for quantity in quantities:
            module = quantity.module(base)
            if module is not None:
                found[quantity.name] = None
                stack.callback(module.register_forward_hook(keeper(quantity.name)).remove)
        yield found


def _at(
    quantity: Quantity,
    where: Tensor,
    labels: Tensor,
    states: tuple[Tensor, nn.Linear, Mapping[str, Any]],
    outputs: Mapping[str, Tensor | None],
    original_head: Head | None = None,
) -> At:
    """The model at the positions ``where`` (B, T) of a quantity, from inside its output embedding's forward.

    ``states`` are the arguments of that forward: the hidden states, the embedding and the post-processing.
    ``outputs`` are those of ``_outputs``.
    """
    hidden, head, postprocessing = states
    output = outputs.get(quantity.name)
    if quantity.name in outputs and output is None:
        raise RuntimeError(
            f"the forward did not call the module of {quantity.name} before the output embedding"
        )
    if output is not None and output.shape[:-1] != where.shape:
        raise RuntimeError(
            f"the module of {quantity.name} has an output of shape {tuple(output.shape)} for tokens of shape "
            f"{tuple(where.shape)}"
        )
    if output is not None and torch.is_grad_enabled() and not output.requires_grad:
        raise ValueError(
            f"the output of the module of {quantity.name} has no gradient: nothing before it trains, or "
            'gradient checkpointing is reentrant (set gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    return At(
        hidden[where],
        labels[where],
        head.weight,
        head.bias,
        postprocessing,
        None if output is None else output[where],
        (head.weight, head.bias) if original_head is None else original_head,
    )


def token_values(
    model: nn.Module,
    labels: Tensor,
    needed: Sequence[RowsOf] = (),
    originals: Mapping[str, Tensor] | None = None,
    original_head: Head | None = None,
    **tokens: Tensor,
) -> TokenValues:
    """Run one forward of a causal LM, differentiable, without logits.

    Args:
        model: The causal LM.
        labels: The labels (B, T), int64, aligned with the tokens; -100 is ignored.
        needed: The quantities, each with the mask of the rows that have it; none by default.
        originals: What ``original_values`` returned for these rows, by the names of the quantities; None
            (default) if none compares.
        original_head: The output embedding of the original model. None (default) stands for the model's own.
        tokens: The other tensors (B, T) of ``loku.data.collate``, int64: ``input_ids``, and
            ``attention_mask`` or ``position_ids``.

    Raises:
        ValueError: The output embedding or the positions of a quantity cannot be handled; see
            ``loku.head.output_embedding`` and ``Quantity.positions``.
    """
    next_labels = next_token_labels(labels)
    positions = positions_of(needed, labels, tokens.get("attention_mask"))
    with _outputs(model, [quantity for quantity, _ in needed]) as outputs:

        def compute(hidden: Tensor, head: nn.Linear, **post: Any) -> Tensor:
            triplet, _ = linear_softmax_triplet(hidden, head.weight, next_labels, head.bias, **post)
            channels = [triplet]
            for quantity, _ in needed:
                states, where = (hidden, head, post), positions[quantity.name]
                at = _at(quantity, where, next_labels, states, outputs, original_head)
                numbers = quantity.of_model(at, (originals or {}).get(quantity.name))
                zeros = torch.zeros_like(triplet[..., 0])
                channels.append(zeros.masked_scatter(where, numbers.to(triplet.dtype))[..., None])
            return torch.cat(channels, -1) if needed else triplet.clone()  # FSDP2 warns of outputs: views

        output = forward_with(model, compute, **tokens)
    return TokenValues(
        output[..., :3],
        next_labels != IGNORE_INDEX,
        {quantity.name: output[..., 3 + number] for number, (quantity, _) in enumerate(needed)},
        positions,
    )


def original_values(
    model: nn.Module, labels: Tensor, needed: Sequence[RowsOf], **tokens: Tensor
) -> dict[str, Tensor]:
    """Run one forward of the original model, and return what the quantities keep of it.

    Args:
        model: The causal LM, which computes as the original model.
        labels: The labels (B, T), int64, as for ``token_values``.
        needed: The quantities that compare, each with the mask of the rows that have it.
        tokens: The other tensors (B, T), as for ``token_values``.

    Returns:
        The ``Quantity.of_original`` (n, ...) of each quantity, by its name, row by row.
    """
    positions = positions_of(needed, labels, tokens.get("attention_mask"))
    next_labels = next_token_labels(labels)
    kept: dict[str, Tensor] = {}
    with torch.no_grad(), _outputs(model, [quantity for quantity, _ in needed]) as outputs:

        def compute(hidden: Tensor, head: nn.Linear, **post: Any) -> Tensor:
            for quantity, _ in needed:
                where = positions[quantity.name]
                at = _at(quantity, where, next_labels, (hidden, head, post), outputs)
                kept[quantity.name] = quantity.of_original(at)
            return hidden.new_zeros((*hidden.shape[:-1], 3), dtype=torch.float32)

        forward_with(model, compute, **tokens)
    return kept
