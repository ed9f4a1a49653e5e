"""Row scales on disk, so that a second run on the same model and data skips the Fisher passes.

The name of a file is the SHA-256 of everything that the row scales depend on: what the model computes with
(``loku.fingerprints.base_fingerprint``), the rows, the modules and the damping. So a file never becomes
wrong. A model with hooks or a forward of its own has no such digest, and its row scales are always measured.
Every file may be deleted at any time.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loku.adapters import linear_weight
from loku.distributed import from_main_process, is_main_process
from loku.fila.settings import Fisher
from loku.fingerprints import base_fingerprint, batches_fingerprint, tensors_fingerprint
from loku.model_description import without_description
from loku.saving.directories import whole_file

_FORMAT = 4  # raise it when the same model and data give other row scales


def cached_row_scales(
    cache_dir: str | os.PathLike,
    measure: Callable[[], dict[str, Tensor]],
    *,
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    forget_batches: Iterable[Mapping[str, Tensor]],
    retain_batches: Iterable[Mapping[str, Tensor]],
    fisher: Fisher = "per-sample",
    **settings: float | str,
) -> dict[str, Tensor]:
    """Return ``measure()``, or its earlier result for the same arguments, bit for bit.

    All processes of torch.distributed must call this. The main process reads and writes.

    A warning says so if a file is not used, and the row scales are measured anew: because it cannot be read,
    is damaged, belongs to something else or holds impossible values. A warning also names the reason if the
    row scales cannot be written, or are not kept because a hook of the model has no digest.

    Args:
        cache_dir: The directory of the cache. It is made if it does not exist.
        measure: A function that returns the row scales (d,), float32, of each of ``modules``.
        model: The causal LM. The adapters of a peft model do not count.
        modules: The linear modules by their names.
        forget_batches: The batches, as for ``loku.fila.row_scales.fisher_row_scales``. The order, grouping
            and padding of the rows do not count. For the per-batch Fisher their grouping counts.
        retain_batches: The batches of the retain set, in the same form.
        fisher: The kind of Fisher, as for ``loku.fila.row_scales.fisher_row_scales``.
        settings: The other numbers and strings that the row scales depend on.

    Returns:
        The row scales (d,), float32, of each module, on the module's device.

    Raises:
        OSError: The directory cannot be made.
    """
    if (reason := without_description(model)) is not None:
        warnings.warn(
            f"fisher_cache_dir is not used: {reason}, and no cache can tell what it computes", stacklevel=3
        )
        return measure()
    description = {
        "format": _FORMAT,
        "model": base_fingerprint(model),
        "fisher": fisher,
        "forget": _rows_fingerprint(forget_batches, fisher),
        "retain": _rows_fingerprint(retain_batches, fisher),
        "modules": sorted(modules),
        **settings,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir) / f"row_scales-{key[:16]}.safetensors"
    row_scales = None
    if is_main_process():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"fisher_cache_dir cannot be made ({error.strerror}); nothing was measured"
            raise OSError(error.errno, text, os.fspath(cache_dir)) from error
        row_scales = _load(path, key, modules)
    row_scales = from_main_process(row_scales)
    if row_scales is None:
        row_scales = measure()
        if is_main_process():
            _save(path, key, row_scales)
    return {name: values.to(modules[name].weight.device) for name, values in row_scales.items()}


def _rows_fingerprint(batches: Iterable[Mapping[str, Tensor]], fisher: Fisher) -> str | list[str]:
    if fisher == "per-batch":
        return sorted(batches_fingerprint([batch]) for batch in batches)
    return batches_fingerprint(batches)


def _load(path: Path, key: str, modules: Mapping[str, nn.Linear]) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    expected = {name: ("F32", [linear_weight(module).shape[0]]) for name, module in modules.items()}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}
            # The header is checked before any values are read: it could ask for all memory.
            held = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            is_ours = metadata.get("key") == key and held == expected
            row_scales = {name: file.get_tensor(name) for name in held} if is_ours else {}
    except (OSError, SafetensorError) as error:
        problem = f"cannot be read ({error})"
    else:
        if not is_ours:
            problem = "belongs to something else"
        elif metadata.get("checksum") != tensors_fingerprint(row_scales):
            problem = "is damaged"
        elif not all(_possible(values) for values in row_scales.values()):
            problem = "holds impossible values"
        else:
            return row_scales
    warnings.warn(f"{path} {problem}; the row scales are measured anew", stacklevel=4)
    return None


def _possible(row_scales: Tensor) -> bool:
    """Whether values can be row scales: finite, >= 0 and not all 0."""
    return bool(row_scales.isfinite().all() and (row_scales >= 0).all() and row_scales.any())


def _save(path: Path, key: str, row_scales: Mapping[str, Tensor]) -> None:
    tensors = {name: values.detach().cpu().contiguous() for name, values in row_scales.items()}
    try:
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={"key": key, "checksum": tensors_fingerprint(tensors)})
    except (OSError, SafetensorError) as error:
        warnings.warn(f"the row scales could not be kept in {path} ({error})", stacklevel=4)
