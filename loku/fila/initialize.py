"""FILA initialises a LoRA adapter by row scales (LoKU, section 3.3).

The paper factors the row-scaled weight, diag(s) W = U S V^T. It takes B = diag(1/s) U S^(1/2) and
A = S^(1/2) V^T. Since diag(1/s) U S = W V, B is W V S^(-1/2). So FILA projects the rows of W on the top
right-singular subspace of diag(s) W, and a row with s = 0 needs no epsilon. The base layer keeps the residual
W - scaling * B A. So the model computes the same outputs as before. Training moves the directions that the
forget set needs most.

Such an adapter fits the residual base only. ``loku.saving.adapter.save_portable_adapter`` writes one that
fits the untouched base, and so does the model's own ``save_pretrained`` from then on
(``loku.saving.residual_base``). ``restore_base_`` gives the untouched base back. ``reference_model`` runs the
original model from the initial factors, which are kept as a second, frozen adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from loku.adapters import (
    BASE_COPY,
    REFERENCE_ADAPTER,
    active_adapters,
    adapter_factors,
    adapter_layers,
    add_frozen_adapter,
    base_weight,
    reference_layers,
    refuse_trained_adapter,
    remove_adapter,
)
from loku.distributed import (
    copy_whole_,
    full_tensor,
    is_sharded,
    local_tensor,
    reshard_,
    same_in_all_processes_,
)
from loku.fila.factors import add_low_rank_, fila_factors, official_factors
from loku.fila.measured_rows import sampled
from loku.fila.originals import HostCopies
from loku.fila.row_scale_cache import cached_row_scales
from loku.fila.row_scales import balanced, fisher_row_scales
from loku.fila.settings import FilaConfig
from loku.fila.targets import fila_targets
from loku.interrupts import raise_waiting, uninterrupted_context
from loku.process_state import process_state_kept
from loku.rollback import all_or_nothing
from loku.saving.residual_base import on_residual_base_
from loku_kernels import row_scaled_svd


def _checked_row_scales(row_scales: Mapping[str, Tensor], layers: dict[str, LoraLinear]) -> dict[str, Tensor]:
    given = {name.removeprefix("base_model.model."): values for name, values in row_scales.items()}
    missing = [name for name in layers if name not in given]
    if missing:
        raise ValueError(
            f"no row scale for {len(missing)} of {len(layers)} target modules, the first {missing[0]}; "
            "measure them with get_fila_state_dict on this model, with these target_modules"
        )
    checked = {}
    for name, layer in layers.items():
        values, weight = torch.as_tensor(given[name], dtype=torch.float32), base_weight(layer)
        if values.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}: the row scale must have shape {tuple(weight.shape[:1])}, one number a row of its "
                f"{tuple(weight.shape)} weight, got {tuple(values.shape)}"
            )
        values = values.to(weight.device)
        if not (torch.isfinite(values).all() and (values >= 0).all() and (values > 0).any()):
            raise ValueError(
                f"{name}: row scales must be finite, >= 0 and not all 0 (A and B would both be 0 and never "
                "train); use ones to ignore the Fisher of this module"
            )
        checked[name] = values
    return checked


def _same_shape_groups(layers: dict[str, LoraLinear], adapter_name: str) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        weight = base_weight(layer)
        alone = name if is_sharded(weight) else None  # sharded weights are gathered one at a time
        key = (weight.shape, weight.dtype, weight.device, layer.r[adapter_name], alone)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _whole_weights(layers: dict[str, LoraLinear], names: list[str]) -> list[Tensor]:
    """The weights of layers, gathered if they are sharded; ``ValueError`` names one that is not finite."""
    weights = [full_tensor(base_weight(layers[name]).detach()) for name in names]
    finite = torch.stack([torch.isfinite(weight).all() for weight in weights]).tolist()  # one transfer
    if not all(finite):
        name = names[finite.index(False)]
        raise ValueError(f"{name}: its weight is not finite; check the model that was loaded")
    return weights


Factors = Iterator[tuple[str, tuple[Tensor, Tensor]]]  # of one module after the other


def _fila_factors(layers: dict[str, LoraLinear], row_scales: dict[str, Tensor], adapter_name: str) -> Factors:
    for names in _same_shape_groups(layers, adapter_name):
        weights = _whole_weights(layers, names)
        rank = layers[names[0]].r[adapter_name]
        S, V = row_scaled_svd(
            [w.float() if w.dtype == torch.float64 else w for w in weights],
            torch.stack([row_scales[name] for name in names]),
            min(rank, *weights[0].shape),
        )
        for i, name in enumerate(names):
            yield name, fila_factors(weights[i], S[i], V[i], rank, layers[name].scaling[adapter_name])


def _official_factors(
    layers: dict[str, LoraLinear], row_scales: dict[str, Tensor], adapter_name: str, seed: int
) -> Factors:
    torch.manual_seed(seed)
    for name, layer in layers.items():  # in the order of the model, in which the authors' code draws
        (weight,) = _whole_weights(layers, [name])
        rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
        yield name, official_factors(weight, row_scales[name], rank, scaling)


def _move_into_adapter(layer: LoraLinear, adapter_name: str, new_B: Tensor, new_A: Tensor) -> None:
    """Set an adapter's factors, and subtract their product from the base weight."""
    for factor, new in zip(adapter_factors(layer, adapter_name), (new_B, new_A), strict=True):
        copy_whole_(factor, same_in_all_processes_(new.to(factor.device).contiguous()))
    # A and B count as stored, rounded to their dtype. So the base loses exactly as much as the adapter adds.
    _add_to_base_(layer, adapter_name, -1)


def _add_to_base_(layer: LoraLinear, adapter_name: str, factor: float) -> None:
    """base weight += factor * scaling * B A."""
    weight = base_weight(layer).detach()
    B, A = (factor.detach() for factor in adapter_factors(layer, adapter_name))
    whole = full_tensor(weight)
    add_low_rank_(whole, full_tensor(B), full_tensor(A), factor * layer.scaling[adapter_name])
    if whole is not weight:
        copy_whole_(weight, whole)


@process_state_kept()
@torch.no_grad()
def initialize_from_row_scales(
    peft_model: PeftModel,
    row_scales: Mapping[str, Tensor],
    adapter_name: str = "default",
    *,
    config: FilaConfig | None = None,
) -> None:
    """Initialise a LoRA adapter by FILA, in place: factors, residual base weights, frozen reference adapter.

    For each target module, W (d, k) is its weight, and S and V are the top r singular values and right
    singular vectors of diag(s) W:

        B = W V S^(-1/2) / sqrt(scaling),   A = S^(1/2) V^T / sqrt(scaling),   W <- W - scaling * B A

    peft's scaling is alpha / r, or alpha / sqrt(r) for rsLoRA. Times B A it is the paper's B A. The factors
    of c * s are sqrt(c) A and B / sqrt(c), so the size of the row scales decides the balance of A and B
    (``loku.fila.row_scales.balanced``). Directions
    with S_i <= 1e-6 S_1, and those beyond min(d, k), get zero rows of A and zero columns of B. The residual
    is computed in float64 from the factors as stored and rounded once. So outputs change by one rounding
    of W.

    The initial factors are kept as the adapter "reference", frozen, in the dtype of the factors. The peft
    model's class becomes a subclass of its own, whose saves fit the untouched base. The original target
    weights are kept in CPU memory, so that ``restore_base_`` is exact. ``release_base_copy_`` frees them.

    All processes of torch.distributed must call this with the same row scales. They get the same adapter. The
    weights may be sharded (FSDP2). They are gathered one at a time, and the reference is whole.

    Args:
        peft_model: The model with the adapter.
        row_scales: The row scales s (d,) of each target module, finite, >= 0 and not all zero, by the
            module's name in the base model. A "base_model.model." prefix is dropped. Further names are
            ignored.
        adapter_name: The name of the adapter, "default" by default.
        config: The settings, ``FilaConfig()`` by default. Their ``decomposition`` counts, and for
            "svd_lowrank" their ``seed``; the row scales are taken as they are.

    Raises:
        ValueError: FILA cannot initialise the adapter (see ``fila_targets``), the adapter already changes the
            outputs, or row scales are missing or of the wrong shape or value. On any exception the model is
            as before, and every weight is put back bit for bit.
    """
    reshard_(peft_model)
    layers = fila_targets(peft_model, adapter_name)
    refuse_trained_adapter(peft_model, adapter_name)
    checked = _checked_row_scales(row_scales, layers)
    config = config or FilaConfig()
    if config.decomposition == "svd_lowrank":
        factors = _official_factors(layers, checked, adapter_name, config.seed)
    else:
        factors = _fila_factors(layers, checked, adapter_name)
    _initialize(peft_model, layers, factors, adapter_name)


@process_state_kept()
@torch.no_grad()
def initialize_from_factors(
    peft_model: PeftModel, factors: Mapping[str, tuple[Tensor, Tensor]], adapter_name: str = "default"
) -> None:
    """Initialise a LoRA adapter with given factors, in place: the base keeps W - scaling * B A.

    The factors may be of any kind. Those of an earlier FILA initialisation of the same base model leave the
    earlier residual bit for bit, without Fisher passes and decompositions. The effects are those of
    ``loku.fila.initialize.initialize_from_row_scales``: outputs stay, and saves fit the untouched base.

    Args:
        peft_model: The model with the adapter.
        factors: The factors B (d, rank) and A (rank, k) of each target module, finite, by the module's name
            in the base model, as ``loku.adapters.reference_factors`` returns them. They are rounded to the
            dtype of the adapter.
        adapter_name: The name of the adapter, "default" by default.

    Raises:
        ValueError: FILA cannot initialise the adapter (see ``fila_targets``), the adapter already changes the
            outputs, or the factors are of other modules or shapes, or not finite. On any exception the model
            is as before.
    """
    reshard_(peft_model)
    layers = fila_targets(peft_model, adapter_name)
    refuse_trained_adapter(peft_model, adapter_name)
    if factors.keys() != layers.keys():
        differing = sorted(factors.keys() ^ layers.keys())
        raise ValueError(
            f"the factors are not those of the target modules: {len(differing)} are in one and not in the "
            f"other, the first {differing[0]}; use the target_modules that they were made with"
        )
    for name, layer in layers.items():
        held = [factor.shape for factor in adapter_factors(layer, adapter_name)]
        given = [factor.shape for factor in factors[name]]
        if held != given:
            raise ValueError(
                f"{name}: B and A must have the shapes {[tuple(shape) for shape in held]}, got "
                f"{[tuple(shape) for shape in given]}; use the rank that they were made with"
            )
        if not all(torch.isfinite(factor).all() for factor in factors[name]):
            raise ValueError(f"{name}: B and A must be finite")
    _initialize(peft_model, layers, ((name, factors[name]) for name in layers), adapter_name)


def _initialize(
    peft_model: PeftModel, layers: dict[str, LoraLinear], factors: Factors, adapter_name: str
) -> None:
    originals = _copies(layers, adapter_name)
    with _keeping_originals(peft_model, layers, adapter_name, originals):
        for name, (B, A) in factors:
            originals.wait_for(name)
            _move_into_adapter(layers[name], adapter_name, B, A)


def _local_weight(layer: LoraLinear) -> Tensor:
    """The weight as it is stored: a copy of it is contiguous for Conv1D, too."""
    stored: Any = layer.get_base_layer().weight
    return local_tensor(stored)


@uninterrupted_context
def _keeping_originals(
    peft_model: PeftModel, layers: dict[str, LoraLinear], adapter_name: str, originals: HostCopies
) -> Iterator[None]:
    """Put the weights back if an initialisation fails, and add the reference adapter when it is done.

    ``originals`` are the ``_copies`` of the weights. A weight may be overwritten once its copy is made.
    """
    factors = [factor for layer in layers.values() for factor in adapter_factors(layer, adapter_name)]
    old_factors = [factor.clone() for factor in factors]

    def restore_weights() -> None:
        for name, original in originals.finished().items():  # without a copy a weight was not overwritten
            _local_weight(layers[name]).copy_(original)
        for factor, old in zip(factors, old_factors, strict=True):
            factor.copy_(old)

    def remove_reference() -> None:
        if REFERENCE_ADAPTER in peft_model.peft_config:  # a sharded model
            remove_adapter(peft_model, REFERENCE_ADAPTER)
        release_base_copy_(peft_model)

    with ExitStack() as undo:
        undo.callback(remove_reference)
        undo.callback(restore_weights)
        with all_or_nothing(peft_model):
            yield
            initial = {name: adapter_factors(layer, adapter_name) for name, layer in layers.items()}
            setattr(peft_model, BASE_COPY, originals.finished())
            add_frozen_adapter(peft_model, REFERENCE_ADAPTER, adapter_name, initial)
            on_residual_base_(peft_model)
        raise_waiting()
        undo.pop_all()


def _copies(layers: dict[str, LoraLinear], adapter_name: str) -> HostCopies:
    order = [name for names in _same_shape_groups(layers, adapter_name) for name in names]
    return HostCopies({name: _local_weight(layers[name]) for name in order})


def undo_of_initialisation(model: nn.Module) -> Callable[[], None]:
    """Keep the factors of a model, and return a function that undoes an initialisation made after this call.

    The function puts weights and factors back, and removes the reference. It does nothing if there was no
    initialisation.

    Args:
        model: The model. Nothing is kept for one without a LoRA adapter, or initialised before.
    """
    if not isinstance(model, PeftModel) or REFERENCE_ADAPTER in model.peft_config:
        return lambda: None
    factors = [
        (layer, name, [full_tensor(factor.detach()).clone() for factor in adapter_factors(layer, name)])
        for name in model.active_adapters
        for layer in adapter_layers(model, name).values()
        if name in layer.lora_A
    ]

    def undo() -> None:
        if REFERENCE_ADAPTER not in model.peft_config:
            return
        reshard_(model)
        restore_weights_(model)
        remove_adapter(model, REFERENCE_ADAPTER)
        with torch.no_grad():
            for layer, name, old in factors:
                for factor, values in zip(adapter_factors(layer, name), old, strict=True):
                    copy_whole_(factor, values)

    return undo


def hand_over_base_copy_(peft_model: PeftModel, undo: ExitStack[bool | None]) -> None:
    """``release_base_copy_``, with the copy held by the callbacks of ``all_or_nothing`` until it succeeds."""
    if hasattr(peft_model, BASE_COPY):
        undo.callback(setattr, peft_model, BASE_COPY, getattr(peft_model, BASE_COPY))
        release_base_copy_(peft_model)


def release_base_copy_(peft_model: PeftModel) -> None:
    """Free the CPU copy of the original weights. ``restore_base_`` then adds the initial factors back."""
    if hasattr(peft_model, BASE_COPY):
        delattr(peft_model, BASE_COPY)


@torch.no_grad()
def restore_weights_(peft_model: PeftModel) -> None:
    """Put the original weights back as ``restore_base_`` does, and leave the LoRA layers where they are."""
    originals = getattr(peft_model, BASE_COPY, None)
    for name, layer in reference_layers(peft_model).items():
        if originals is not None:
            _local_weight(layer).copy_(originals[name])
            continue
        if layer.merged:
            layer.unmerge()
        _add_to_base_(layer, REFERENCE_ADAPTER, 1)
    release_base_copy_(peft_model)


def restore_base_(peft_model: PeftModel) -> nn.Module:
    """Put the original weights back and take all LoRA layers off.

    The weights are the original ones bit for bit while the copy made at initialisation is held. The copy is
    gone after ``release_base_copy_`` and in a model loaded from a checkpoint. Then W = residual +
    scaling * B0 A0 is computed in float64 and rounded once. It is off by the rounding of the residual, at
    most half a unit in its last place, plus half a unit in the last place of W. The ``requires_grad`` of the
    base parameters stays as peft set it. A model that FILA never initialised is only unloaded.

    Args:
        peft_model: The model that FILA initialised.

    Returns:
        The base model that was wrapped.
    """
    restore_weights_(peft_model)
    base: Any = peft_model.base_model.unload()  # type: ignore[operator]
    if hasattr(base, "peft_config"):  # peft before 0.21 leaves it, and warns at the next get_peft_model
        del base.peft_config
    return base


# The functions below follow peft's EVA convention: one computes the state, the other applies it.


@process_state_kept()
def get_fila_state_dict(
    peft_model: PeftModel,
    forget_dataloader: Iterable[Mapping[str, Tensor]],
    retain_dataloader: Iterable[Mapping[str, Tensor]],
    adapter_name: str = "default",
    *,
    config: FilaConfig | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Measure FILA's row scales of the target modules of an adapter.

    ``torchrun`` sets up torch.distributed with a ``TrainingArguments`` or an ``Accelerator``. Then every
    process passes the same rows in the same order, runs its share and gets the same row scales.

    Args:
        peft_model: The model with the adapter.
        forget_dataloader: The batches of the forget set, for the model, with ``labels``.
        retain_dataloader: The batches of the retain set, in the same form.
        adapter_name: The name of the adapter, "default" by default.
        config: The settings of the row scales, ``FilaConfig()`` by default.
        progress: Whether to show the passes and a progress bar.

    Returns:
        The row scales s (d,), float32, of each target module, by the module's name in the base model.

    Raises:
        ValueError: FILA cannot initialise the adapter (see ``fila_targets``), the adapter already changes the
            outputs, or the row scales cannot be
            measured (see ``loku.fila.row_scales.fisher_row_scales``).
        RuntimeError: A forward calls a target module twice or never.
        FloatingPointError: A Fisher or a loss is NaN or Inf.
        OSError: ``fisher_cache_dir`` cannot be made.
    """
    config = config or FilaConfig()
    layers = fila_targets(peft_model, adapter_name)
    refuse_trained_adapter(peft_model, adapter_name)
    measured: dict[str, Any] = {
        "model": peft_model,
        "modules": {name: layer.get_base_layer() for name, layer in layers.items()},
        "forget_batches": sampled(forget_dataloader, config),
        "retain_batches": sampled(retain_dataloader, config),
        "damping": config.damping,
        "damping_mode": config.damping_mode,
        "fisher": config.fisher,
    }
    with all_or_nothing(peft_model), active_adapters(peft_model, []):
        measure = partial(
            fisher_row_scales, **measured, memory_budget=config.fisher_memory_budget, progress=progress
        )
        if config.fisher_cache_dir is None:
            row_scales = measure()
        else:  # it keeps them as measured, for every balance
            row_scales = cached_row_scales(config.fisher_cache_dir, measure, **measured)
    return balanced(row_scales, config.balance)


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
    """Initialise a LoRA adapter by FILA, as peft's ``initialize_lora_eva_weights`` does by EVA.

    The effects are those of ``initialize_from_row_scales``.

    Args:
        peft_model: The model with the adapter.
        forget_dataloader: The batches of the forget set, as for ``get_fila_state_dict``. It is not needed
            with ``fila_state_dict``.
        retain_dataloader: The batches of the retain set, in the same form.
        fila_state_dict: The row scales that ``get_fila_state_dict`` returned, used as they are: the damping
            and the balance of ``config`` do not change them. None (default) measures them.
        adapter_name: The name of the adapter, "default" by default.
        config: The settings, ``FilaConfig()`` by default.
        progress: Whether to show the passes and a progress bar.

    Raises:
        ValueError: The dataloaders and ``fila_state_dict`` are both missing, or ``get_fila_state_dict`` or
            ``initialize_from_row_scales`` refuses the model or its row scales.
        RuntimeError: A forward calls a target module twice or never.
        FloatingPointError: A Fisher or a loss is NaN or Inf.
    """
    if fila_state_dict is None:
        if forget_dataloader is None or retain_dataloader is None:
            raise ValueError("forget_dataloader and retain_dataloader are required without fila_state_dict")
        fila_state_dict = get_fila_state_dict(
            peft_model, forget_dataloader, retain_dataloader, adapter_name, config=config, progress=progress
        )
    initialize_from_row_scales(peft_model, fila_state_dict, adapter_name, config=config)
