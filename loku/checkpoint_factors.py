"""The trained parameters and the initial factors of a peft model, in two files of a checkpoint.

After FILA an adapter fits the residual base alone. Files of peft's names would load on the untouched base
without a word. So a checkpoint keeps what a resumed run needs under names of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loku.adapters import reference_factors
from loku.checkpoint_files import HAS_REFERENCE, REFERENCE, TRAINED
from loku.distributed import copy_whole_, full_tensor, is_main_process
from loku.fila.initialize import initialize_from_factors


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def save_factors(peft_model: PeftModel, directory: str | os.PathLike) -> None:
    """Write the trained parameters and the initial factors of a model into the directory of a checkpoint.

    All processes of torch.distributed must call this, because sharded parameters are gathered. The main
    process writes.

    Args:
        peft_model: The model with its adapters.
        directory: The directory, which exists.

    Raises:
        OSError: A file cannot be written.
    """
    reference = {
        f"{name}.lora_{letter}": factor
        for name, factors in reference_factors(peft_model).items()
        for letter, factor in zip("BA", factors, strict=True)
    }
    files: dict[str, dict[str, Tensor]] = {TRAINED: dict(_trained(peft_model)), REFERENCE: reference}
    for file, tensors in files.items():
        whole = {}
        for name, tensor in tensors.items():
            gathered = full_tensor(tensor.detach())
            if is_main_process():
                whole[name] = gathered.cpu().contiguous()
        if whole:
            metadata = {HAS_REFERENCE: "yes" if reference else "no"}
            save_file(whole, Path(directory) / file, metadata)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.parent} is not a whole checkpoint of loku ({file.name}: {error})") from error


def stored_factors(checkpoint: str | os.PathLike) -> dict[str, tuple[Tensor, Tensor]]:
    """The initial factors in a checkpoint.

    Args:
        checkpoint: The directory of the checkpoint.

    Returns:
        B (d, rank) and A (rank, k) by module name in the base model, as from
        ``loku.adapters.reference_factors``. The dict is empty without FILA.
    """
    file = Path(checkpoint) / REFERENCE
    if not file.is_file():
        return {}
    tensors = _load(file)
    names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    return {name: (tensors[f"{name}.lora_B"], tensors[f"{name}.lora_A"]) for name in names}


def initialize_from_checkpoint(
    peft_model: PeftModel, checkpoint: str | os.PathLike, adapter_name: str = "default"
) -> None:
    """Initialise an adapter by FILA with the initial factors of a checkpoint (``initialize_from_factors``).

    Nothing is measured or decomposed. ``UnlearnTrainer.train(resume_from_checkpoint=checkpoint)`` then loads
    the trained factors.

    Args:
        peft_model: The model with the adapter, on the untouched base.
        checkpoint: The directory of the checkpoint.
        adapter_name: The name of the adapter, "default" by default.

    Raises:
        ValueError: FILA cannot initialise the adapter, or the factors are of other modules or shapes.
    """
    initialize_from_factors(peft_model, stored_factors(checkpoint), adapter_name)


def check_reference(peft_model: PeftModel, checkpoint: str | os.PathLike) -> None:
    """Check that a model was initialised by the initial factors of a checkpoint.

    All processes of torch.distributed must call this.

    Args:
        peft_model: The model.
        checkpoint: The directory of the checkpoint.

    Raises:
        ValueError: It was not, so the checkpoint's adapter does not fit the model's residual base.
    """
    held, stored = reference_factors(peft_model), stored_factors(checkpoint)
    same = held.keys() == stored.keys() and all(
        torch.equal(full_tensor(ours).cpu(), theirs)
        for name in held
        for ours, theirs in zip(held[name], stored[name], strict=True)
    )
    if not same:
        raise ValueError(
            f"{checkpoint} has other initial factors than this model, so its adapter does not fit this "
            "residual base; initialise it by loku.initialize_from_checkpoint(peft_model, checkpoint) first"
        )


@torch.no_grad()
def load_trained_(peft_model: PeftModel, checkpoint: str | os.PathLike) -> None:
    """Overwrite the trained parameters of a model by those of a checkpoint.

    All processes of torch.distributed must call this.

    Args:
        peft_model: The model, with the initial factors of the checkpoint (``check_reference``). Its
            parameters may be sharded.
        checkpoint: The directory of the checkpoint.

    Raises:
        ValueError: The checkpoint holds other parameters than those that the model trains. Nothing is
            overwritten then.
    """
    stored, held = _load(Path(checkpoint) / TRAINED), _trained(peft_model)
    for name in sorted(held.keys() | stored.keys()):
        ours, theirs = (values[name].shape if name in values else None for values in (held, stored))
        if ours != theirs:
            raise ValueError(
                f"{checkpoint} was made with other trained parameters: {name} has the shape "
                f"{_shape(theirs)} there, and {_shape(ours)} in this model; use the adapter that the run had"
            )
    for name, parameter in held.items():
        copy_whole_(parameter, stored[name])


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))
