"""The three kinds of saves, and whether a model can be saved so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias, get_args

from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loku.adapters import MERGED_ADAPTER, unwrapped
from loku.distributed import check_in_main_process
from loku.saving.adapter import check_portable, loaded_from, save_portable_adapter
from loku.saving.destinations import check_room, refuse_overlap
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


def save_bytes(model: PeftModel | PreTrainedModel, kind: SaveKind, *, init: str = "default") -> int:
    """Estimate the size of the save of a model that is about to be trained, without its tokenizer, in bytes.

    Args:
        model: The model with its adapter, before FILA has initialised it, or a model without adapters.
        kind: "portable", "residual" or "merged".
        init: The ``init`` of the run. After "fila" and "pissa" a portable adapter has twice the rank, and a
            residual save two adapters.
    """
    own = {id(tensor): tensor for tensor in unwrapped(model).state_dict(keep_vars=True).values()}
    if not isinstance(model, PeftModel):
        return _bytes(own.values())
    trained = {id(tensor): tensor for tensor in model.parameters() if tensor.requires_grad}
    base = _bytes(tensor for key, tensor in own.items() if key not in trained)
    adapters = (1 if init == "default" else 2) * 4 * sum(tensor.numel() for tensor in trained.values())
    given = (getattr(unwrapped(model), MERGED_ADAPTER, None) or {}).get("factors") or {}
    if kind == "portable":
        return adapters + _bytes(factor for pair in given.values() for factor in pair)
    return base + (adapters if kind == "residual" else 0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class PlaceOfSave(TrainerCallback):
    """Check where a trained model is to be saved, before its Fisher is measured and it is trained.

    Args:
        path: The directory of the save.
        kind: The kind of the save.

    Raises:
        ValueError: The trainer's model was loaded from there (``loku.saving.destinations.refuse_overlap``).
        OSError: There is no room for the save.
    """

    def __init__(self, path: str | os.PathLike, kind: SaveKind) -> None:
        self.path, self.kind = path, kind

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check; every process of torch.distributed calls this."""
        model, init = kwargs["model"], getattr(args, "init", "default")
        refuse_overlap(self.path, **loaded_from(model))
        check_in_main_process(lambda: check_room(self.path, save_bytes(model, self.kind, init=init)))


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
    refuse_overlap(path, **loaded_from(model))  # before the tensors of the save are computed
    write: Any = _SAVES[kind][1] if isinstance(model, PeftModel) else save_whole_model
    write(model, path, tokenizer=tokenizer)
