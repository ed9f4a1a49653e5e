"""The three kinds of saves, and whether a model can be saved so."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loku.saving.adapter import check_portable, save_portable_adapter
from loku.saving.models import (
    check_merged,
    check_residual,
    save_merged_model,
    save_residual_model,
    save_whole_model,
)

SaveKind: TypeAlias = Literal["portable", "residual", "merged"]
KINDS: tuple[SaveKind, ...] = get_args(SaveKind)

# The check of each kind is the one that its save begins with.
_SAVES: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "portable": (check_portable, save_portable_adapter),
    "residual": (check_residual, save_residual_model),
    "merged": (check_merged, save_merged_model),
}


def _check_name(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")


def check_save(model: PeftModel | PreTrainedModel, kind: SaveKind) -> None:
    """Check that a model can be saved in a kind, by the code that the save begins with.

    ``loku.unlearn`` asks before it trains. The answer does not change in training.

    Args:
        model: The model with its adapter "default", or a model without adapters, which has every kind.
        kind: "portable", "residual" or "merged".

    Raises:
        ValueError: The kind is none of these, or the model cannot be saved so. The message names the module
            and another kind.
    """
    _check_name(kind)
    if isinstance(model, PeftModel):
        _SAVES[kind][0](model)


def save(
    model: PeftModel | PreTrainedModel,
    path: str | os.PathLike,
    kind: SaveKind = "portable",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Save a model to a directory, whole or not at all; see ``UnlearnResult.save``.

    Args:
        model: The model with its adapter "default", or a model without adapters, which is saved as it is.
        path: The directory.
        kind: "portable" (default), "residual" or "merged".
        tokenizer: The tokenizer to save beside it; None (default) saves none.

    Raises:
        ValueError: The errors of ``check_save`` and ``loku.saving.destinations.check_destination``.
        OSError: ``path`` cannot be written.
    """
    _check_name(kind)
    write: Any = _SAVES[kind][1] if isinstance(model, PeftModel) else save_whole_model
    write(model, path, tokenizer=tokenizer)
