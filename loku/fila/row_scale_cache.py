"""Row scales on disk, so that a second run on the same model and data skips the Fisher passes.

A file is named by the SHA-256 of all that the scales depend on: the model's class, config and weights, the
rows, the modules and the damping. So a file is never out of date, only not asked for any more; those that are
can be deleted at any time.
"""

import hashlib
import json
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loku.distributed import from_main_process, is_main_process
from loku.fingerprints import batches_fingerprint, tensors_fingerprint, weights_fingerprint
from loku.models import unwrapped
from loku.saving.directories import whole_file

_FORMAT = 1  # to be raised when the same model and data give other scales


def cached_row_scales(cache_dir, measure, *, model, modules, forget_batches, retain_batches, **settings):
    """``measure()``, or what it returned for the same arguments before, bit for bit.

    Where torch.distributed is set up the main process reads and writes, and all of them must call this.

    Args:
        cache_dir: directory of the cache, made if need be.
        measure: -> name -> (d,), float32, a row scale of each of ``modules``.
        model: a causal LM; the adapters of a peft model do not count.
        modules: name -> ``torch.nn.Linear``.
        forget_batches, retain_batches: as for ``loku.fila.row_scales.fisher_row_scales``. Neither the order
            nor the grouping nor the padding of the rows counts.
        settings: what else the scales depend on; numbers and strings.

    With a warning, scales whose file cannot be read, is damaged or holds something else are measured anew,
    and those that cannot be written are not kept. OSError: the directory cannot be made.
    """
    description = {
        "format": _FORMAT,
        "model": type(unwrapped(model)).__name__,
        "config": _config(model),
        "weights": weights_fingerprint(model),
        "forget": batches_fingerprint(forget_batches),
        "retain": batches_fingerprint(retain_batches),
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
        elif metadata.get("checksum") != tensors_fingerprint(scales):
            problem = "is damaged"
        else:
            return scales
    warnings.warn(f"{path} {problem}; the row scales are measured anew", stacklevel=4)
    return None


def _save(path, key, scales):
    tensors = {name: scale.detach().cpu().contiguous() for name, scale in scales.items()}
    try:
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={"key": key, "checksum": tensors_fingerprint(tensors)})
    except (OSError, SafetensorError) as error:
        warnings.warn(f"the row scales could not be kept in {path} ({error})", stacklevel=4)
