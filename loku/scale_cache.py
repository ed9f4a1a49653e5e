"""Row scales on disk, so that a second run on the same model and data skips the Fisher passes.

A file is named by the SHA-256 of all that the scales depend on: the model's class, config and weights, the
rows, the modules and the damping. So a file is never out of date, only not asked for any more; those that are
can be deleted at any time.
"""

import hashlib
import json
import os
import uuid
import warnings
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loku.head import unwrapped
from loku.processes import from_main_process, full_tensor, is_main_process

_FORMAT = 1  # to be raised when the same model and data give other scales


def cached_row_scales(cache_dir, measure, *, model, modules, forget_batches, retain_batches, **settings):
    """``measure()``, or what it returned for the same arguments before, bit for bit.

    Where torch.distributed is set up the main process reads and writes, and all of them must call this.

    Args:
        cache_dir: directory of the cache, made if need be.
        measure: -> name -> (d,), float32, a row scale of each of ``modules``.
        model: a causal LM; the adapters of a peft model do not count.
        modules: name -> ``torch.nn.Linear``.
        forget_batches, retain_batches: as for ``loku.importance.fisher_row_scales``. Neither the order nor
            the grouping nor the padding of the rows counts.
        settings: what else the scales depend on; numbers and strings.

    With a warning, scales whose file cannot be read, is damaged or holds something else are measured anew,
    and those that cannot be written are not kept. OSError: the directory cannot be made.
    """
    description = {
        "format": _FORMAT,
        "model": type(unwrapped(model)).__name__,
        "config": _config(model),
        "weights": weights_fingerprint(model),
        "forget": rows_fingerprint(forget_batches),
        "retain": rows_fingerprint(retain_batches),
        "modules": sorted(modules),
        **settings,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir) / f"row_scales-{key[:16]}.safetensors"
    scales = None
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        scales = _load(path, key, modules)
    scales = from_main_process(scales)
    if scales is None:
        scales = measure()
        if is_main_process():
            _save(path, key, scales)
    return {name: scale.to(modules[name].weight.device) for name, scale in scales.items()}


def _config(model):
    config = unwrapped(model).config.to_dict()
    for key in ("_name_or_path", "transformers_version"):  # where the weights lay does not matter
        config.pop(key, None)
    return json.dumps(config, sort_keys=True, default=str)


def _sha256(tensor):
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def weights_fingerprint(model):
    """SHA-256, hex, of every parameter and buffer of the model that peft wraps: their bits, dtypes and names.

    It reads all of them, about a second a gigabyte: one changed weight changes it.
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


def rows_fingerprint(batches):
    """SHA-256, hex, of the tokens and labels of all rows, whatever their order, grouping and padding."""
    digests = []
    for batch in batches:
        # Packed rows have position ids, which say where their documents begin, in the place of a mask. So
        # their padding counts: other batches are measured anew.
        columns = [batch[name] for name in ("input_ids", "labels", "position_ids") if name in batch]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for row, kept in zip(torch.stack(columns, 1), mask, strict=True):
            digests.append(_sha256(row[:, kept]).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _checksum(scales):
    total = hashlib.sha256()
    for name in sorted(scales):
        total.update(_sha256(scales[name]).digest())
    return total.hexdigest()


def _load(path, key, modules):
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            scales = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        problem = f"cannot be read ({error})"
    else:
        shapes = {name: tuple(module.weight.shape[:1]) for name, module in modules.items()}
        if metadata.get("key") != key or {name: tuple(s.shape) for name, s in scales.items()} != shapes:
            problem = "belongs to something else"
        elif metadata.get("checksum") != _checksum(scales):
            problem = "is damaged"
        else:
            return scales
    warnings.warn(f"{path} {problem}; the row scales are measured anew", stacklevel=4)
    return None


def _save(path, key, scales):
    tensors = {name: scale.detach().cpu().contiguous() for name, scale in scales.items()}
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        save_file(tensors, unfinished, metadata={"key": key, "checksum": _checksum(tensors)})
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"the row scales could not be kept in {path} ({error})", stacklevel=4)
    finally:
        unfinished.unlink(missing_ok=True)
