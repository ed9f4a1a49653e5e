"""The files beside a result that its server needs, and whether the server can serve it at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loku.deletion.request import Request
from loku.saving.destinations import LIST
from loku.serving.gguf_adapter import require_gguf
from loku.serving.lines import serving_lines, write_serving_files
from loku.serving.rules import check_target, served_rank
from loku.trust import HUB_ARGUMENTS, find_file

FOLDER = "serving"  # beside the adapter or the model


def check_serving(request: Request) -> None:
    """Refuse a server that cannot serve the model of a request, before anything is measured.

    Args:
        request: The request.

    Raises:
        ValueError: The server cannot. The message says what to do.
        ImportError: A package is missing.
    """
    if request.target == "gguf":
        require_gguf()
    problems = check_target(request.target, {}, _model_config(request, request.model), request.rank)
    if problems:
        raise ValueError(f"serving: {problems[0]}")


def serve(request: Request, place: str | os.PathLike) -> dict[str, Any]:
    """Write the folder ``serving`` beside a result.

    Args:
        request: The request.
        place: The folder of the adapter, or of the model for the target "merged".

    Returns:
        ``target``; ``rank``, the greatest rank of a module of the adapter; ``error``, the relative Frobenius
        norm of what a smaller rank lost; ``lines``, which serve the result from the folder above; and
        ``problems``, the reasons for which the server cannot. With problems no files are written.
    """
    place = Path(place)
    save = json.loads((place / LIST).read_text(encoding="utf-8"))
    told: dict[str, Any] = {
        "target": request.target,
        "error": {"relative_frobenius": float(save.get("relative_error", 0.0))},
    }
    rank, base = None, request.model
    if request.target != "merged":
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        # An adapter as the model, or a merged state of the ledger: the result stands on another base.
        base = config.get("base_model_name_or_path") or base
        told["rank"] = rank = served_rank(config)
        told["problems"] = check_target(request.target, config, _model_config(request, base), rank)
    if not told.get("problems"):
        folder = place.parent / FOLDER
        write_serving_files(folder, request.target, place, base=base, rank=rank)
        told["lines"] = serving_lines(request.target, place.name, base=base, rank=rank, files=folder.name)
    return told


def _model_config(request: Request, place: str) -> dict[str, Any]:
    """The config of the model of a request, or of another base, as it stands in its file."""
    hub = {name: value for name, value in request.model_arguments.items() if name in HUB_ARGUMENTS}
    if place != request.model:
        hub = {name: value for name, value in hub.items() if name != "subfolder"}
    elif request.revision is not None:
        hub["revision"] = request.revision
    file = find_file(place, "config.json", hub)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
