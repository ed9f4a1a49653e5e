"""FILA: row scales + peft model -> initialised adapter (LoKU, section 3.3).

The paper factors the row-scaled weight, diag(s) W = U S V^T, and takes B = diag(1/s) U S^(1/2), A = S^(1/2)
V^T. Since diag(1/s) U S = W V, this is B = W V S^(-1/2): FILA projects the rows of W on the top
right-singular subspace of diag(s) W, and a row with s = 0 needs no epsilon. The base layer keeps the residual
W - scaling * B A, so the model computes what it computed before, and training moves what the forget set needs
most.

An adapter like this fits the residual base only. `loku.saving.adapter.save_portable_adapter` writes one that
fits the untouched base, `restore_base_` gives the untouched base back, and `reference_model` runs the
original model from the initial factors, kept as a second, frozen adapter. `disable_adapter()`, `unload()` and
`delete_adapter()` leave the residual base behind.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from loku.distributed import (
    copy_whole_,
    full_tensor,
    is_sharded,
    local_tensor,
    reshard_,
    same_in_all_processes_,
)
from loku.fila.row_scale_cache import cached_row_scales
from loku.fila.row_scales import FilaConfig, fisher_row_scales, reiterable
from loku.fila.targets import REFERENCE_ADAPTER, fila_targets
from loku_kernels import row_scaled_svd

# A direction whose singular value is below this share of the largest is numerical noise: it gets no row of A
# and no column of B, instead of a column of B blown up by S^(-1/2).
_NOISE = 1e-6
_BLOCK_ELEMENTS = 1 << 22  # of a weight that are in float64 at a time
_BASE_COPY = "_loku_base_weights"


def _checked_row_scales(row_scales: Mapping[str, Tensor], layers: dict[str, LoraLinear]) -> dict[str, Tensor]:
    given = {name.removeprefix("base_model.model."): scale for name, scale in row_scales.items()}
    missing = [name for name in layers if name not in given]
    if missing:
        raise ValueError(
            f"no row scale for {len(missing)} of {len(layers)} target modules, the first {missing[0]}; "
            "measure them with get_fila_state_dict on this model, with these target_modules"
        )
    checked = {}
    for name, layer in layers.items():
        scale, weight = torch.as_tensor(given[name]), layer.get_base_layer().weight
        if scale.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}: the row scale must have shape {tuple(weight.shape[:1])}, one number a row of its "
                f"{tuple(weight.shape)} weight, got {tuple(scale.shape)}"
            )
        scale = scale.to(weight.device, torch.float32)
        if not (torch.isfinite(scale).all() and (scale >= 0).all() and (scale > 0).any()):
            raise ValueError(
                f"{name}: row scales must be finite, >= 0 and not all 0 (A and B would both be 0 and never "
                "train); use ones to ignore the Fisher of this module"
            )
        checked[name] = scale
    return checked


# Low-rank arithmetic on a weight, a block of rows at a time, in float64: each element of the result is
# rounded once, whatever autocast or TF32 settings are in force, and no second copy of a large weight exists.


def _wide_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # others may lack float64


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, _BLOCK_ELEMENTS // tensors[0].shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _add_low_rank_(weight: Tensor, B: Tensor, A: Tensor, factor: float) -> None:
    """weight (d, k) += factor * B (d, r) A (r, k)."""
    dtype = _wide_dtype(weight.device)
    A = A.to(dtype)
    for w, b in _row_blocks(weight, B):
        w.copy_(torch.addmm(w.to(dtype), b.to(dtype), A, alpha=factor))


def _factors(weight: Tensor, S: Tensor, V: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """FILA's B (d, rank) and A (rank, k), divided by sqrt(scaling) each, from S (q,), V (k, q), q <= rank."""
    dtype = _wide_dtype(weight.device)
    S, V = S.to(dtype), V.to(dtype)
    kept = S > _NOISE * S[0]
    root = torch.where(kept, S.sqrt(), 0.0)
    inverse = torch.where(kept, S.rsqrt(), 0.0)
    B = torch.cat([w.to(dtype) @ V for (w,) in _row_blocks(weight)]) * inverse
    A = (V * root).T
    spare = rank - S.shape[0]
    B, A = nn.functional.pad(B, (0, spare)), nn.functional.pad(A, (0, 0, 0, spare))
    return B / math.sqrt(scaling), A / math.sqrt(scaling)


def _same_shape_groups(layers: dict[str, LoraLinear], adapter_name: str) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        alone = name if is_sharded(weight) else None  # whole weights are gathered one at a time
        key = (weight.shape, weight.dtype, weight.device, layer.r[adapter_name], alone)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _initialize(layers: dict[str, LoraLinear], scales: dict[str, Tensor], adapter_name: str) -> None:
    for names in _same_shape_groups(layers, adapter_name):
        weights = [full_tensor(layers[name].get_base_layer().weight.detach()) for name in names]
        for name, weight in zip(names, weights, strict=True):
            if not torch.isfinite(weight).all():
                raise ValueError(f"{name}: its weight is not finite; check the model that was loaded")
        rank = layers[names[0]].r[adapter_name]
        S, V = row_scaled_svd(
            [w.float() if w.dtype == torch.float64 else w for w in weights],
            torch.stack([scales[name] for name in names]),
            min(rank, *weights[0].shape),
        )
        for i, name in enumerate(names):
            layer = layers[name]
            factors = _factors(weights[i], S[i], V[i], rank, layer.scaling[adapter_name])
            _move_into_adapter(layer, adapter_name, *factors)


def _move_into_adapter(layer: LoraLinear, adapter_name: str, new_B: Tensor, new_A: Tensor) -> None:
    """Set an adapter's factors, and take from the base weight what they add."""
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    for factor, new in ((B, new_B), (A, new_A)):
        copy_whole_(factor, same_in_all_processes_(new.to(factor.device).contiguous()))
    # Against A and B as stored, rounded to their dtype: what the adapter adds is what the base loses.
    _add_to_base_(layer, adapter_name, -1)


def _add_to_base_(layer: LoraLinear, adapter_name: str, factor: float) -> None:
    """base weight += factor * scaling * B A."""
    weight, B, A = (
        tensor.detach()
        for tensor in (
            layer.get_base_layer().weight,
            layer.lora_B[adapter_name].weight,
            layer.lora_A[adapter_name].weight,
        )
    )
    whole = full_tensor(weight)
    _add_low_rank_(whole, full_tensor(B), full_tensor(A), factor * layer.scaling[adapter_name])
    if whole is not weight:
        copy_whole_(weight, whole)


def _add_reference(peft_model: PeftModel, layers: dict[str, LoraLinear], adapter_name: str) -> None:
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    config = copy.deepcopy(peft_model.peft_config[adapter_name])
    config.inference_mode = True
    try:
        # On the meta device: random weights would be thrown away, and move the caller's generator.
        peft_model.add_adapter(REFERENCE_ADAPTER, config, low_cpu_mem_usage=True)
        for layer in layers.values():
            for factors in (layer.lora_A, layer.lora_B):
                weight = full_tensor(factors[adapter_name].weight.detach()).clone()
                factors[REFERENCE_ADAPTER].weight = nn.Parameter(weight, requires_grad=False)
    finally:
        for parameter, flag in flags:  # some versions of peft reset these for the adapters that were there
            parameter.requires_grad_(flag)


@torch.no_grad()
def initialize_from_row_scales(
    peft_model: PeftModel, row_scales: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Initialise a LoRA adapter by FILA, in place: factors, residual base weights, frozen reference adapter.

    row_scales: module name in the base model (a "base_model.model." prefix is dropped) -> s (d,), finite,
    >= 0, not all zero. Further names are ignored.

    For each target, with W (d, k) its weight and S, V the top `r` singular values and right singular vectors
    of diag(s) W:

        B = W V S^(-1/2) / sqrt(scaling),   A = S^(1/2) V^T / sqrt(scaling),   W <- W - scaling * B A

    so peft's scaling (alpha / r, or alpha / sqrt(r) for rsLoRA) times B A is the paper's B A. Directions with
    S_i <= 1e-6 S_1, and those beyond min(d, k), get zero rows of A and zero columns of B. The residual is
    computed in float64 from the factors as stored and rounded once, so outputs change by one rounding of W.

    The initial factors are kept as the adapter "reference", frozen, in the dtype of the factors. Its
    parameters are saved by `PeftModel.save_pretrained` (a checkpoint needs both), not by
    `save_portable_adapter`. The original target weights are kept in CPU memory, so that `restore_base_` is
    exact; `release_base_copy_` frees them.

    Where torch.distributed is set up all processes must call this, with the same row scales, and get the same
    adapter. The weights may be sharded (FSDP2): they are gathered one at a time, and the reference is whole.

    ValueError: see `fila_targets`; a missing row scale, or one of the wrong shape. On any exception every
    weight is put back bit for bit.
    """
    reshard_(peft_model)
    layers = fila_targets(peft_model, adapter_name)
    scales = _checked_row_scales(row_scales, layers)
    with _keeping_originals(peft_model, layers, adapter_name):
        _initialize(layers, scales, adapter_name)


@torch.no_grad()
def initialize_from_factors(
    peft_model: PeftModel, factors: Mapping[str, tuple[Tensor, Tensor]], adapter_name: str = "default"
) -> None:
    """Initialise a LoRA adapter with the factors of an earlier FILA initialisation, in place.

    factors: module name in the base model -> B (d, rank), A (rank, k), as an adapter "reference" has them
    (`reference_factors`). On the same base model the residual is the earlier one bit for bit, without Fisher
    passes and decompositions. Effects and errors: `initialize_from_row_scales`.
    """
    layers = fila_targets(peft_model, adapter_name)
    if factors.keys() != layers.keys():
        differing = sorted(factors.keys() ^ layers.keys())
        raise ValueError(
            f"the factors are not those of the target modules: {len(differing)} are in one and not in the "
            f"other, the first {differing[0]}; use the target_modules that they were made with"
        )
    for name, layer in layers.items():
        held = [f[adapter_name].weight.shape for f in (layer.lora_B, layer.lora_A)]
        given = [factor.shape for factor in factors[name]]
        if held != given:
            raise ValueError(
                f"{name}: B and A must have the shapes {[tuple(shape) for shape in held]}, got "
                f"{[tuple(shape) for shape in given]}; use the rank that they were made with"
            )
    with _keeping_originals(peft_model, layers, adapter_name):
        for name, layer in layers.items():
            _move_into_adapter(layer, adapter_name, *factors[name])


def reference_factors(peft_model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """The initial factors B (d, rank), A (rank, k) by module name in the base model; empty without FILA."""
    return {
        name: (
            layer.lora_B[REFERENCE_ADAPTER].weight.detach(),
            layer.lora_A[REFERENCE_ADAPTER].weight.detach(),
        )
        for name, layer in peft_model.get_base_model().named_modules()
        if isinstance(layer, LoraLinear) and REFERENCE_ADAPTER in layer.lora_A
    }


@contextmanager
def _keeping_originals(
    peft_model: PeftModel, layers: dict[str, LoraLinear], adapter_name: str
) -> Iterator[None]:
    """Keep what an initialisation overwrites, and put it back if it fails; else add the reference adapter."""
    originals = {
        name: local_tensor(layer.get_base_layer().weight).to("cpu", copy=True)
        for name, layer in layers.items()
    }
    factors = [f[adapter_name].weight for layer in layers.values() for f in (layer.lora_A, layer.lora_B)]
    old_factors = [factor.clone() for factor in factors]
    try:
        yield
        _add_reference(peft_model, layers, adapter_name)
    except BaseException:
        for name, layer in layers.items():
            local_tensor(layer.get_base_layer().weight).copy_(originals[name])
        for factor, old in zip(factors, old_factors, strict=True):
            factor.copy_(old)
        if REFERENCE_ADAPTER in peft_model.peft_config:
            peft_model.delete_adapter(REFERENCE_ADAPTER)
        raise
    setattr(peft_model, _BASE_COPY, originals)


def release_base_copy_(peft_model: PeftModel) -> None:
    """Free the CPU copy of the original weights; `restore_base_` then adds the initial factors back."""
    if hasattr(peft_model, _BASE_COPY):
        delattr(peft_model, _BASE_COPY)


@torch.no_grad()
def restore_base_(peft_model: PeftModel) -> nn.Module:
    """Put the original weights back and take all LoRA layers off; returns the base model that was wrapped.

    Bit for bit as long as the copy made at initialisation is held. Without it (after `release_base_copy_`, or
    in a model loaded from a checkpoint) W = residual + scaling * B0 A0 is computed in float64 and rounded
    once: off by the rounding of the residual, at most half a unit in its last place, plus half a unit in that
    of W. `requires_grad` of the base parameters stays as peft set it. A model that FILA never initialised is
    only unloaded.
    """
    originals = getattr(peft_model, _BASE_COPY, None)
    for name, layer in peft_model.get_base_model().named_modules():
        if not (isinstance(layer, LoraLinear) and REFERENCE_ADAPTER in layer.lora_A):
            continue
        weight = layer.get_base_layer().weight
        if originals is not None:
            local_tensor(weight).copy_(originals[name])
            continue
        if layer.merged:
            layer.unmerge()
        _add_to_base_(layer, REFERENCE_ADAPTER, 1)
    release_base_copy_(peft_model)
    base = peft_model.unload()
    if hasattr(base, "peft_config"):  # peft before 0.21 leaves it, and warns at the next get_peft_model
        del base.peft_config
    return base


@contextmanager
def _active_adapters(peft_model: PeftModel, names: list[str]) -> Iterator[None]:
    """Run with these adapters, or the bare base for []. peft's own switches also rewrite requires_grad."""
    modules = [m for m in peft_model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(getattr(module, "merged", False) for module in modules):
        raise ValueError("an adapter is merged into the base weights; call unmerge_adapter() first")
    saved = [(module, module._active_adapter, module._disable_adapters) for module in modules]
    try:
        for module in modules:
            module._active_adapter, module._disable_adapters = list(names), not names
        yield
    finally:
        for module, active, disabled in saved:
            module._active_adapter, module._disable_adapters = active, disabled


@contextmanager
def reference_model(peft_model: PeftModel) -> Iterator[PeftModel]:
    """A context in which `peft_model` computes what the original model did: the reference of NPO, DPO and KL.

    Selects the frozen initial factors on the residual base after FILA, and no adapter after default LoRA
    initialisation. Gradients are off inside; `requires_grad` of every parameter and the active adapters are
    what they were on leaving. ValueError if an adapter is merged.
    """
    names = [REFERENCE_ADAPTER] if REFERENCE_ADAPTER in peft_model.peft_config else []
    with _active_adapters(peft_model, names), torch.no_grad():
        yield peft_model


# For peft users, after peft's EVA convention: the state is computed apart from applying it.


def _sampled(batches: Iterable, config: FilaConfig) -> Iterable:
    """`fisher_samples` rows: drawn by `seed` from a DataLoader over a sized data set, else the first ones."""
    count = config.fisher_samples
    if count is None:
        return reiterable(batches)
    if isinstance(batches, DataLoader) and batches.batch_size and hasattr(batches.dataset, "__len__"):
        order = torch.randperm(len(batches.dataset), generator=torch.Generator().manual_seed(config.seed))
        chosen = Subset(batches.dataset, order[:count].sort().values.tolist())
        return DataLoader(chosen, batch_size=batches.batch_size, collate_fn=batches.collate_fn)
    first = []
    for batch in batches:
        first.append({key: value[:count] for key, value in batch.items()})
        count -= len(first[-1]["input_ids"])
        if count == 0:
            break
    return first


def get_fila_state_dict(
    peft_model: PeftModel,
    forget_dataloader: Iterable[Mapping[str, Tensor]],
    retain_dataloader: Iterable[Mapping[str, Tensor]],
    adapter_name: str = "default",
    *,
    config: FilaConfig | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Measure FILA's row scales: module name in the base model -> s (d,), float32.

    The dataloaders yield batches for the model, with `labels`. Where torch.distributed is set up, as by
    `torchrun` with a `TrainingArguments` or an `Accelerator`, every process passes the same rows in the same
    order, runs its share and gets the same scales. Errors: `fila_targets`, and those of
    `loku.fila.row_scales.fisher_row_scales`.
    """
    config = config or FilaConfig()
    layers = fila_targets(peft_model, adapter_name)
    what = {
        "model": peft_model,
        "modules": {name: layer.get_base_layer() for name, layer in layers.items()},
        "forget_batches": _sampled(forget_dataloader, config),
        "retain_batches": _sampled(retain_dataloader, config),
        "damping": config.damping,
        "damping_mode": config.damping_mode,
    }
    with _active_adapters(peft_model, []):
        measure = partial(
            fisher_row_scales, **what, memory_budget=config.fisher_memory_budget, progress=progress
        )
        if config.fisher_cache_dir is None:
            return measure()
        return cached_row_scales(config.fisher_cache_dir, measure, **what)


def initialize_lora_fila_weights(
    peft_model: PeftModel,
    forget_dataloader: Iterable[Mapping[str, Tensor]] | None = None,
    retain_dataloader: Iterable[Mapping[str, Tensor]] | None = None,
    fila_state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    *,
    config: FilaConfig | None = None,
    progress: bool = True,
) -> None:
    """Initialise a LoRA adapter by FILA, as peft's `initialize_lora_eva_weights` does by EVA.

    The dataloaders, as for `get_fila_state_dict`, are not needed where its result is passed as
    `fila_state_dict`. Effects and errors: `initialize_from_row_scales`.
    """
    if fila_state_dict is None:
        if forget_dataloader is None or retain_dataloader is None:
            raise ValueError("forget_dataloader and retain_dataloader are required without fila_state_dict")
        fila_state_dict = get_fila_state_dict(
            peft_model, forget_dataloader, retain_dataloader, adapter_name, config=config, progress=progress
        )
    initialize_from_row_scales(peft_model, fila_state_dict, adapter_name)
