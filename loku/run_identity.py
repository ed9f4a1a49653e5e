"""The identity of a run: the facts that two runs must share for one to go on from the other's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from loku.config import UnlearnConfig
from loku.data import RefusalRows
from loku.data.large_sets import DrawnRows
from loku.fingerprints import ordered_rows_fingerprint, texts_fingerprint

_DIGESTS = ("base model", "given adapter", "forget set", "retain set", "refusals", "evaluation sets")
_FORMAT = 4  # raised with each change of the facts that identify a run


def run_identity(
    args: UnlearnConfig,
    fingerprint: str | None,
    forget: Iterable[Mapping[str, Any]],
    retain: Iterable[Mapping[str, Any]] | DrawnRows,
    refusals: RefusalRows | None = None,
) -> dict[str, Any]:
    """The facts that two runs must share for one to go on from the other's checkpoint.

    Args:
        args: The settings; their ``deciding_settings`` count.
        fingerprint: The ``sampled_weights_fingerprint`` of the base model, or None in a process that writes
            no checkpoints.
        forget: The tokenised forget rows.
        retain: The tokenised retain rows. Only the first 100 rows count of a set that is not held in memory.
        refusals: The refusals that the run trains on, or None.

    Returns:
        The facts, which JSON can hold, by their names in messages.
    """
    identity = {
        "checkpoint format": _FORMAT,
        "base model": fingerprint,
        "forget set": ordered_rows_fingerprint(forget),
        "retain set": ordered_rows_fingerprint(retain.first() if isinstance(retain, DrawnRows) else retain),
        "refusals": None if refusals is None else texts_fingerprint(refusals.refusals),
        **args.deciding_settings(),
    }
    return json.loads(json.dumps(identity, default=str))  # the form that is read back


def differences(identity: dict[str, Any], other: dict[str, Any]) -> str:
    """Name the facts of two runs that differ.

    Args:
        identity: The ``run_identity`` of this run.
        other: The identity that a checkpoint was written with.

    Returns:
        The differences, in one line, or "" for the same run.
    """
    parts = []
    for name in {**other, **identity}:
        ours, theirs = identity.get(name), other.get(name)
        if ours != theirs:
            is_digest = name in _DIGESTS
            parts.append(
                f"another {name}" if is_digest else f"{name}={theirs!r}, where this run has {ours!r}"
            )
    return "; ".join(parts)
