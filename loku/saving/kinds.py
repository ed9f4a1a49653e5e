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
from loku.counts import check_counts
from loku.distributed import check_in_main_process
from loku.saving.adapter import check_portable, check_rank, loaded_from, save_portable_adapter
from loku.saving.compression import Compression
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
_SAVES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "portable": (check_portable, save_portable_adapter),
    "residual": (check_residual, save_residual_model),
    "merged": (check_merged, save_merged_model),
}


def _check_name(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")


def check_save_rank(kind: SaveKind, rank: int | None) -> None:
    """Check that a kind of save takes a rank.

    Args:
        kind: "portable", "residual" or "merged".
        rank: The rank, or None for none, which every kind takes.

    Raises:
        ValueError: The kind has no rank, or the rank is no positive integer.
    """
    _check_name(kind)
    if rank is None:
        return
    check_counts(rank=rank)
    if kind != "portable":
        raise ValueError(
            f'rank is that of a portable adapter, and the kind of save is {kind!r}: choose "portable", or no '
            "rank"
        )


def check_save(model: PeftModel | PreTrainedModel, kind: SaveKind, rank: int | None = None) -> None:
    """Check that a model can be saved in a kind, by the code that the save begins with.

    ``loku.unlearn`` asks before it trains. The answer does not change in training.

    Args:
        model: The model with its adapter "default", or a model without adapters, which has every kind.
        kind: "portable", "residual" or "merged".
        rank: The rank of a portable adapter; None (default) for the exact one.

    Raises:
        ValueError: The kind is none of these, or the model cannot be saved so, or not at a smaller rank. The
            message names the module and another kind.
    """
    check_save_rank(kind, rank)
    if isinstance(model, PeftModel):
        _SAVES[kind][0](model)
        if rank is not None:
            check_rank(model, rank)
    elif rank is not None:
        raise ValueError('the model has no adapter (tuning="full"), so its save has no rank')


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
        rank: The rank of a portable adapter; None (default) for the exact one.

    Raises:
        ValueError: The trainer's model was loaded from there (``loku.saving.destinations.refuse_overlap``),
            or its adapter cannot be saved at the rank (``check_save``).
        OSError: There is no room for the save.
    """

    def __init__(self, path: str | os.PathLike, kind: SaveKind, rank: int | None = None) -> None:
        self.path, self.kind, self.rank = path, kind, rank

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check; every process of torch.distributed calls this."""
        model, init = kwargs["model"], getattr(args, "init", "default")
        refuse_overlap(self.path, **loaded_from(model))
        if self.rank is not None:
            check_save(model, self.kind, self.rank)
        check_in_main_process(lambda: check_room(self.path, save_bytes(model, self.kind, init=init)))


def save(
    model: PeftModel | PreTrainedModel,
    path: str | os.PathLike,
    kind: SaveKind = "portable",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rank: int | None = None,
) -> Compression | None:
    """Save a model to a directory, whole or not at all; see ``UnlearnResult.save``.

    Args:
        model: The model with its adapter "default", or a model without adapters, which is saved as it is.
        path: The directory.
        kind: "portable" (default), "residual" or "merged".
        tokenizer: The tokenizer to save beside it. None (default) saves none, or beside a merged model that
            of its base.
        rank: The rank of a portable adapter; None (default) for the exact one.

    Returns:
        What the smaller rank lost, or None without a ``rank``.

    Raises:
        ValueError: The errors of ``check_save`` and ``loku.saving.destinations.check_destination``.
        OSError: ``path`` cannot be written.
    """
    check_save_rank(kind, rank)
    refuse_overlap(path, **loaded_from(model))  # before the tensors of the save are computed
    if rank is not None:
        check_save(model, kind, rank)
        peft_model: Any = model
        return save_portable_adapter(peft_model, path, tokenizer=tokenizer, rank=rank)
    write: Any = _SAVES[kind][1] if isinstance(model, PeftModel) else save_whole_model
    write(model, path, tokenizer=tokenizer)
    return None
