"""Digests of models and rows: a file with an equal digest was made for this model and these rows.

A checkpoint and a cache of row scales ask different questions. A checkpoint belongs to one run: its rows have
an order, and a sample of the weights tells models apart in a moment. A cache must never serve another model
or other rows: it reads every weight, and the order, grouping and padding of the rows do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loku.adapters import snapshot_reference, unwrapped
from loku.distributed import from_main_process, full_tensor, is_main_process

_SAMPLE = 1024  # greatest number of values of a parameter in a sample of the weights


def _sha256(tensor: Tensor) -> Any:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def sampled_weights_fingerprint(model: nn.Module) -> str:
    """Return the digest of a model's parameters: names, shapes, dtypes, and up to 1024 values of each.

    LoRA parameters do not count, so a model has the same fingerprint with adapters and without.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(unwrapped(model).named_parameters()):
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.numel() and not parameter.is_meta:
            values = parameter.detach().flatten()
            values = values[:: -(-values.numel() // _SAMPLE)].contiguous().cpu()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def given_adapter_fingerprint(model: nn.Module) -> str | None:
    """Return the digest of the LoRA parameters that are a part of the original model.

    Returns:
        The digest, or None for a fresh adapter or FILA's initial one, and for a model without LoRA layers.
    """
    reference = snapshot_reference(model)
    if not isinstance(model, PeftModel) or (reference is not None and reference.adapter is None):
        return None
    tensors = {name: full_tensor(p) for name, p in model.named_parameters() if ".lora_" in name}
    return tensors_fingerprint(tensors) if tensors else None


def weights_fingerprint(model: nn.Module) -> str:
    """Return the digest of every parameter and buffer of a model without its adapters: bits, dtypes, names.

    One changed weight changes the digest. Reading all weights takes about a second for each gigabyte. All
    processes must call this, and all get the main process's digest.
    """
    base = unwrapped(model)
    adapters = {
        f"{name}.{attribute}."
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer)
        for attribute in (*module.adapter_layer_names, *module.other_param_names)
    }
    total = hashlib.sha256()
    for tensors in (base.named_parameters(), base.named_buffers()):
        for name, tensor in tensors:
            if any(name.startswith(adapter) for adapter in adapters):
                continue
            tensor = full_tensor(tensor)
            if is_main_process():
                name = name.replace(".base_layer.", ".")
                total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update(_sha256(tensor).digest())
    return from_main_process(total.hexdigest())


def ordered_rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the digest of the tokens and labels of tokenised rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([row["input_ids"], row["labels"]], dtype=np.int64).tobytes())
        digest.update(b"end of row")
    return digest.hexdigest()


def batches_fingerprint(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Return the digest of the tokens and labels of all rows of some batches.

    The order, grouping and padding of the rows do not count, except that the padding of packed rows does.

    Args:
        batches: The batches, as ``loku.data.collate`` makes them.
    """
    digests = []
    for batch in batches:
        # The position ids of packed rows say where documents begin. Packed rows have no mask, so their
        # padding counts: the same rows have another digest in other batches.
        columns = [batch[name] for name in ("input_ids", "labels", "position_ids") if name in batch]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for row, kept in zip(torch.stack(columns, 1), mask, strict=True):
            digests.append(_sha256(row[:, kept]).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def texts_fingerprint(texts: Iterable[str]) -> str:
    """Return the digest of some texts, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0end of text\0")
    return digest.hexdigest()


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of the bits of named tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(_sha256(tensors[name]).digest())
    return total.hexdigest()
