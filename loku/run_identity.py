"""The identity of a run: the facts that two runs must share for one to go on from the other's checkpoint.

A run that goes on from a checkpoint ends with the bits of a run that was never stopped. So every fact that
can change a bit belongs to the identity, except those of the software and the machine: where these differ,
the run goes on with a warning.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from loku.config import UnlearnConfig
from loku.data import RefusalRows
from loku.data.large_sets import DrawnRows
from loku.fingerprints import base_fingerprint, ordered_rows_fingerprint, texts_fingerprint
from loku.model_description import plain

_DIGESTS = (
    "base model",
    "given adapter",
    "selection of trained parameters",
    "forget set",
    "retain set",
    "refusals",
    "evaluation sets",
)
_FORMAT = 5  # raised with each change of the facts that identify a run
_FORMAT_NAME, _ENVIRONMENT = "checkpoint format", "environment"
_LONGEST = 200  # characters of a value in a message
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "loku-kernels")
# Entries of a peft config that change no training: places and versions, and what a load sets.
_FREE_ADAPTER_ENTRIES = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
}


def model_facts(model: nn.Module) -> dict[str, Any]:
    """The facts of a model that identify a run: its base, its adapters' settings and what it trains.

    All processes must call this, before training changes a weight.

    Args:
        model: The causal LM, with adapters or without.

    Returns:
        The facts, which JSON can hold, by their names in messages.

    Raises:
        ValueError: The model or the config of an adapter cannot be identified; the message says why.
    """
    facts: dict[str, Any] = {"base model": base_fingerprint(model)}
    configs: Any = getattr(model, "peft_config", None) or {}  # also of adapters that transformers put there
    facts["adapters"] = list(model.active_adapters) if isinstance(model, PeftModel) else sorted(configs)
    for name in facts["adapters"]:
        for entry, value in configs[name].to_dict().items():
            if entry not in _FREE_ADAPTER_ENTRIES:
                facts[f"{name}.{entry}"] = _plain(f"the config of the adapter {name!r}", entry, value)
    trained = [
        f"{name} {tuple(parameter.shape)} {parameter.dtype}"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    facts["selection of trained parameters"] = texts_fingerprint(sorted(trained))
    return facts


def _plain(owner: str, name: str, value: Any) -> Any:
    try:
        return plain(value)
    except TypeError as error:
        raise ValueError(
            f"{name} of {owner} holds {_shown(value)}, which no checkpoint can keep ({error}), so no run "
            "could go on from it: use numbers, texts, lists and dicts, or name the field in FREE_FIELDS of a "
            'subclass of UnlearnConfig; save_strategy="no" writes no checkpoints'
        ) from error


def settings_facts(args: UnlearnConfig) -> dict[str, Any]:
    """The ``deciding_settings`` of a run in a form that JSON can hold, by their names in messages.

    Args:
        args: The settings.

    Raises:
        ValueError: A setting has no such form. The message names the field.
    """
    owner = type(args).__name__
    return {name: _plain(owner, name, value) for name, value in args.deciding_settings().items()}


def _environment(device: torch.device) -> dict[str, Any]:
    """The software and the machine: where they differ, the bits may."""
    found: dict[str, Any] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    is_cuda = device.type == "cuda"
    return {
        **found,
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{device.type} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "LOKU_BACKEND": os.environ.get("LOKU_BACKEND"),
    }


def run_identity(
    args: UnlearnConfig,
    model: Mapping[str, Any],
    forget: Sequence[Mapping[str, Any]],
    retain: Iterable[Mapping[str, Any]] | DrawnRows,
    refusals: RefusalRows | None = None,
) -> dict[str, Any]:
    """The facts that two runs must share for one to go on from the other's checkpoint.

    Args:
        args: The settings; their ``deciding_settings`` count.
        model: The ``model_facts`` of the model before training.
        forget: The tokenised forget rows.
        retain: The tokenised retain rows. Only the first 100 rows count of a set that is not held in memory.
        refusals: The refusals that the run trains on, or None.

    Returns:
        The facts, which JSON can hold, by their names in messages; and the "environment", which need not be
        the same.

    Raises:
        ValueError: A setting has no form that a checkpoint can keep. The message names the field.
    """
    return {
        _FORMAT_NAME: _FORMAT,
        _ENVIRONMENT: _environment(args.device),
        **model,
        "forget set": ordered_rows_fingerprint(forget),
        "retain set": ordered_rows_fingerprint(retain.first() if isinstance(retain, DrawnRows) else retain),
        "refusals": None if refusals is None else _refusals_fingerprint(refusals, len(forget)),
        **settings_facts(args),
    }


def _refusals_fingerprint(refusals: RefusalRows, count: int) -> str:
    """The digest of the texts of refusals, and of the rows with the first refusal as they are trained on."""
    rows = ordered_rows_fingerprint(refusals[index, 0] for index in range(count))
    return texts_fingerprint([*refusals.refusals, rows])


def _same(ours: Any, theirs: Any) -> bool:
    return ours == theirs or json.dumps(ours) == json.dumps(theirs)  # NaN differs from itself


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def differences(identity: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Name the facts of two runs that differ.

    Args:
        identity: The ``run_identity`` of this run.
        other: The identity that a checkpoint was written with.

    Returns:
        The differences, in one line, or "" for the same run. The "environment" does not count.
    """
    ours, theirs = identity.get(_FORMAT_NAME), other.get(_FORMAT_NAME)
    if ours != theirs:
        return (
            f"another version of loku wrote it ({_FORMAT_NAME} {_shown(theirs)}, and this version has "
            f"{_shown(ours)})"
        )
    parts = []
    for name in {**other, **identity}:
        ours, theirs = identity.get(name), other.get(name)
        if name == _ENVIRONMENT or _same(ours, theirs):
            continue
        if name not in _DIGESTS:
            parts.append(f"{name}={_shown(theirs)}, where this run has {_shown(ours)}")
        elif isinstance(ours, dict) and isinstance(theirs, dict):
            differing = " and ".join(part for part in ours if ours[part] != theirs.get(part))
            parts.append(f"another {name} (other {differing})")
        else:
            parts.append(f"another {name}")
    return "; ".join(parts)


def warn_of_environment(identity: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Warn if a run goes on with other software or on another machine than its checkpoint was written with.

    Args:
        identity: The ``run_identity`` of this run.
        other: The identity that the checkpoint was written with.
    """
    ours, theirs = identity.get(_ENVIRONMENT), other.get(_ENVIRONMENT)
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return
    parts = [
        f"{name} {_shown(theirs.get(name))}, where this run has {_shown(ours[name])}"
        for name in ours
        if ours[name] != theirs.get(name)
    ]
    if parts:
        warnings.warn(
            f"the checkpoint was written with {'; '.join(parts)}: the run goes on, and its result may differ "
            "by rounding from that of a run that was never stopped",
            stacklevel=3,
        )
