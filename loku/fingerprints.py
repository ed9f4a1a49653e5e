"""Digests of models and rows: a file with an equal digest was made for this model and these rows.

Checkpoints and the cache of row scales ask the same of a model: whether it computes as the model of the file.
So both have one digest of it (``base_fingerprint``). It reads every weight. They ask different things of
rows: those of a checkpoint have an order, and the order, grouping and padding of rows in a cache do not
count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from loku.adapters import BASE_COPY, reference_layers, snapshot_reference
from loku.distributed import from_main_process, full_tensor, is_main_process, local_tensor
from loku.model_description import base_modules, config_description, modules_description

_PIECE = 16 << 20  # bytes that one thread digests at a time
_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")
THREADS = min(8, os.cpu_count() or 1)  # more than these wait for the memory


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or the tensors inside a tensor subclass, such as a quantised weight."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.detach()
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))


def _piece_digest(header: bytes, piece: Tensor) -> bytes:
    digest = hashlib.sha256(header)
    digest.update(piece.numpy().data)
    return digest.digest()


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of named tensors in their order: names, dtypes, shapes and bits.

    Threads digest pieces of the tensors. A tensor on another device is copied piece by piece.
    """
    total, waiting = hashlib.sha256(), deque[Future[bytes]]()
    with ThreadPoolExecutor(THREADS) as threads:
        for name, tensor in tensors:
            for number, part in enumerate(_parts(tensor)):
                header = json.dumps([name, number, str(part.dtype), list(part.shape), part.is_meta]).encode()
                values = _NOTHING if part.is_meta else part
                for piece in values.contiguous().reshape(-1).view(torch.uint8).split(_PIECE):
                    waiting.append(threads.submit(_piece_digest, header, piece.cpu()))
                    if len(waiting) > 2 * THREADS:
                        total.update(waiting.popleft().result())
        for digest in waiting:
            total.update(digest.result())
    return total.hexdigest()


def _original_weights(model: nn.Module) -> dict[int, Tensor]:
    """The weights that FILA overwrote in a peft model, while their copies are held, by the id of the module.

    A sharded weight has the copy of this process's shard.
    """
    copies = getattr(model, BASE_COPY, {})
    layers = reference_layers(model) if isinstance(model, PeftModel) and copies else {}
    return {id(layer.get_base_layer()): copies[name] for name, layer in layers.items()}


def _original(weight: Any, copy: Tensor) -> Tensor:
    if local_tensor(weight) is weight:
        return copy
    whole = torch.empty_like(weight)
    local_tensor(whole).copy_(copy)
    return whole


def _further_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a quantised module saves beside its parameters and buffers, such as its scales."""
    if type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
        return {}
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", False)
    own = {*module._parameters, *module._buffers}
    return {name: value for name, value in saved.items() if name not in own and isinstance(value, Tensor)}


def _base_tensors(model: nn.Module, with_buffers: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the base model as it was before FILA, each once, gathered if they are sharded."""
    originals, first_names = _original_weights(model), dict[int, str]()
    for name, module in base_modules(model):
        hook: Any = getattr(module, "_hf_hook", None)
        is_offloaded = getattr(hook, "offload", False)  # its weights are elsewhere until its forward
        with align_module_device(module) if is_offloaded else nullcontext():
            kinds: dict[str, Mapping[str, Tensor | None]] = {"parameter": module._parameters}
            if with_buffers:
                kinds["buffer"] = module._buffers
            for kind, tensors in kinds.items():
                for own_name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    label = f"{kind} {name}.{own_name}"
                    if not is_offloaded:  # such tensors live for a moment, and others get their ids
                        if id(tensor) in first_names:
                            yield f"{label} is {first_names[id(tensor)]}", _NOTHING
                            continue
                        first_names[id(tensor)] = label
                    if own_name == "weight" and id(module) in originals:
                        yield label, full_tensor(_original(tensor, originals[id(module)]))
                    else:
                        yield label, full_tensor(tensor)
            for own_name, tensor in _further_tensors(module).items():
                yield f"state {name}.{own_name}", full_tensor(tensor)


def parameters_fingerprint(model: nn.Module) -> str:
    """Return this process's digest of all parameters of a base model: names, shapes, dtypes and bits.

    Args:
        model: The causal LM, with adapters or without; they do not count. Every process must call this for a
            sharded model.
    """
    return _digest(_base_tensors(model, with_buffers=False))


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """Return the digests of what a causal LM computes with, without its adapters.

    One changed value of a parameter or buffer changes the digest, and so does a changed entry of the config
    or setting of a module (``loku.model_description``). While FILA's copies of the original weights are held,
    they count in place of the residual weights. So the digest is that of the untouched base before FILA and
    after it.

    All bytes are read, by up to 8 threads, at 1.15 GB a second of a core
    (``benchmarks/results/fingerprint_cpu.json``). So a model of 7B parameters in bfloat16 (13.5 GB) takes 12
    seconds of processor time, which up to 8 cores share. All processes must call this, and the main process
    digests.

    Args:
        model: The causal LM, with wrappers and adapters or without. Its parameters may be sharded, quantised
            or offloaded.

    Returns:
        The digests by "weights", "config" and "modules", the same in all processes.

    Raises:
        ValueError: A parameter has no values (it is on the meta device), in all processes.
    """
    digests: dict[str, str] | str = {}
    empty: list[str] = []

    def with_values() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _base_tensors(model, with_buffers=True):
            if tensor.is_meta:
                empty.append(name)
            yield name, tensor

    if is_main_process():
        digests = {
            "weights": _digest(with_values()),
            "config": hashlib.sha256(config_description(model).encode()).hexdigest(),
            "modules": hashlib.sha256(modules_description(model).encode()).hexdigest(),
        }
        if empty:
            digests = f"{empty[0]} has no values (it is on the meta device), so nothing identifies the model"
    else:
        for _ in with_values():  # it gathers the sharded ones
            pass
    digests = from_main_process(digests)
    if isinstance(digests, str):
        raise ValueError(f"{digests}: load the model with its weights")
    return digests


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


def ordered_rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the digest of the tokens and labels of tokenised rows, in their order.

    The positions of packed rows count, because they say where documents begin.
    """
    digest = hashlib.sha256()
    for row in rows:
        columns = [row[name] for name in ("input_ids", "labels", "position_ids") if name in row]
        values = np.asarray(columns, dtype=np.int64)
        digest.update(f"{values.shape}".encode() + values.tobytes())
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
            values = row[:, kept].cpu().contiguous()
            digests.append(_piece_digest(f"{tuple(values.shape)}".encode(), values.view(torch.uint8)))
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def texts_fingerprint(texts: Iterable[str]) -> str:
    """Return the digest of some texts, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")  # a text of JSON may have half a surrogate pair
        digest.update(f"{len(encoded)} ".encode() + encoded)
    return digest.hexdigest()


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of named tensors, in the order of their names: names, dtypes, shapes and bits."""
    return _digest(sorted(tensors.items()))
