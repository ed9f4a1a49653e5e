"""How the answers of a model change when its adapter gets a smaller rank (``loku.saving.compression``)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from loku.adapters import MERGED_ADAPTER, REFERENCE_ADAPTER, adapter_layers, reference_factors
from loku.counts import check_counts
from loku.data import (
    IGNORE_INDEX,
    TOFU_TEMPLATE,
    QuestionTemplate,
    collate,
    token_limits,
    tokenize_dataset,
)
from loku.models import evaluating, model_device
from loku.saving.compression import adapter_modules
from loku_kernels import softmax_triplet


def answer_changes(
    peft_model: PeftModel,
    config: Any,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    sets: Mapping[str, Any],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = True,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> dict[str, dict[str, int | float]]:
    """Compare a model with the exact adapter and with the adapter of a smaller rank, on the same tokens.

    Both run on one base. The smaller factors take the places of the exact ones, and the exact factors come
    back after each batch. A model after FILA stands on the residual: there the smaller factors come together
    with the initial ones, so that no second model is needed.

    Args:
        peft_model: The model with the exact adapter "default", not merged: on its untouched base, or the
            result of ``loku.unlearn``. It is not sharded.
        config: The config of the smaller adapter, by ``loku.saving.compression.compressed_adapter``.
        state: Its tensors.
        tokenizer: The tokenizer; None if all rows have ``input_ids``.
        sets: Data sets by their names, as for ``loku.data.tokenize_dataset``.
        batch_size: The number of rows in a batch, 16 by default. The logits of two batches are in memory.
        max_length: The number of tokens at which texts are cut; None (default) for the model's context.
        progress: Whether to show a progress bar, True by default.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        The figures by set. ``rows`` and ``tokens`` count what was measured. ``largest_logit_change`` is the
        largest difference of a logit of any word before a labelled token. ``exact_probability`` and
        ``probability`` are the means over rows of the answer probability, exp(-mean token loss), with either
        adapter. ``largest_probability_change`` is its largest difference in a row.

    Raises:
        ValueError: A set is empty, or ``batch_size`` is no positive integer. The two adapters are not of the
            same modules, or the base holds an earlier adapter. Or the errors of
            ``loku.data.tokenize_dataset``.
        FloatingPointError: A logit is NaN or Inf with either adapter.
    """
    check_counts(batch_size=batch_size)
    limits = token_limits(peft_model)
    tokens = {
        name: tokenize_dataset(
            rows, tokenizer, max_length=max_length, limits=limits, name=name, template=template
        )
        for name, rows in sets.items()
    }
    factors = _filled_factors(peft_model, config, state)
    with evaluating(peft_model):
        return {
            name: _changes(peft_model, factors, rows, batch_size, progress, name)
            for name, rows in tokens.items()
        }


def _filled_factors(
    peft_model: PeftModel, config: Any, state: Mapping[str, Tensor]
) -> list[tuple[Any, Tensor]]:
    """The parameters of the exact factors, and the values that make them those of a smaller adapter."""
    if hasattr(peft_model.get_base_model(), MERGED_ADAPTER):
        raise ValueError(
            "the model was an adapter that was merged into its base, which the saved adapters replace: load "
            "the exact adapter on the untouched base, and compare there (loku export --data does)"
        )
    layers = adapter_layers(peft_model, "default")
    names = {name: layer.parameter_name for name, layer in layers.items() if hasattr(layer, "parameter_name")}
    modules, initial = adapter_modules(config, state, names), reference_factors(peft_model)
    if modules.keys() != layers.keys() or not initial.keys() <= layers.keys():
        other = sorted((modules.keys() | initial.keys()) ^ layers.keys())[0]
        raise ValueError(f"{other}: it has an adapter in one of the model and the smaller adapter alone")
    filled = []
    for name, layer in layers.items():
        B, A, scaling = modules[name].B, modules[name].A, layer.scaling["default"]
        missing = layer.r["default"] - A.shape[1]
        if name in initial:  # the smaller adapter fits the untouched base, that is, the residual + B0 A0
            B0, A0 = (factor.double().cpu() for factor in initial[name])
            B = torch.cat([B, layer.scaling[REFERENCE_ADAPTER] * B0[None]], dim=2)
            A = torch.cat([A, A0[None]], dim=1)
        elif missing < 0:
            raise ValueError(f"{name}: the smaller adapter has rank {A.shape[1]}, and that of the model less")
        else:  # experts need the factors of the exact rank
            B, A = F.pad(B, (0, missing)), F.pad(A, (0, 0, 0, missing))
        if "default" in layer.lora_A:
            parameters = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        else:
            parameters = layer.lora_embedding_B["default"], layer.lora_embedding_A["default"]
        values = B.permute(1, 2, 0).flatten(1) / scaling, A.flatten(0, 1)
        for parameter, value in zip(parameters, values, strict=True):
            filled.append((parameter, value.to(parameter.device, parameter.dtype).contiguous()))
    return filled


@contextmanager
def _in_place_of_the_exact(factors: Sequence[tuple[Any, Tensor]]) -> Iterator[None]:
    exact = [parameter.data for parameter, _ in factors]
    try:
        for parameter, value in factors:
            parameter.data = value
        yield
    finally:
        for (parameter, _), value in zip(factors, exact, strict=True):
            parameter.data = value


def _changes(
    peft_model: PeftModel,
    factors: Sequence[tuple[Any, Tensor]],
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    progress: bool,
    name: str,
) -> dict[str, int | float]:
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    device, largest, count = model_device(peft_model), 0.0, 0
    before: list[float] = []
    after: list[float] = []
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=f"comparing {name}", disable=not progress, leave=False):
        chosen = [rows[i] for i in order[start : start + batch_size]]
        batch = {key: value.to(device) for key, value in collate(chosen, pad_token_id=0).items()}
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
        labelled = labels != IGNORE_INDEX
        exact = peft_model(**batch, use_cache=False).logits[labelled]
        with _in_place_of_the_exact(factors):
            small = peft_model(**batch, use_cache=False).logits[labelled]
        change = (exact.float() - small.float()).abs().max().item() if len(exact) else 0.0
        if not math.isfinite(change):
            raise FloatingPointError(f"{name}: a logit is NaN or Inf, so the adapters cannot be compared")
        largest, count = max(largest, change), count + len(exact)
        counts = labelled.sum(dim=1).tolist()
        for logits, found in ((exact, before), (small, after)):
            triplet, _ = softmax_triplet(logits, labels[labelled])
            losses = -triplet.log_softmax(-1)[..., 0]
            found += [(-part.mean()).exp().item() for part in losses.split(counts) if len(part)]
    if not before:
        raise ValueError(f"{name}: no row has a token to predict")
    return {
        "rows": len(before),
        "tokens": count,
        "largest_logit_change": largest,
        "exact_probability": sum(before) / len(before),
        "probability": sum(after) / len(after),
        "largest_probability_change": max(abs(a - b) for a, b in zip(before, after, strict=True)),
    }
