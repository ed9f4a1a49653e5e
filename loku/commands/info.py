"""``loku info``: the versions, the devices, and the backend of each operation."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from loku.commands import CommandParser, Commands

PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton")


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "info",
        help="show the versions, the devices, and the backend of each operation",
        description="Print the versions, the devices, the backends that are built, and the backend that each "
        "operation of loku_kernels uses on each device. LOKU_BACKEND=reference|native|triton forces one.",
    )
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the command with its parsed options."""
    print("\n".join([*_versions(), "", *_devices(), "", *_backends(), "", *_choices()]))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _versions() -> list[str]:
    import loku_kernels

    rows = [("loku-kernels", loku_kernels.__version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return _aligned(rows)


def _devices() -> list[str]:
    import torch

    from loku.deletion.facts import cpu_name

    rows = [("cpu", f"{cpu_name()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{device.name}, {memory}, compute {device.major}.{device.minor}"))
    return _aligned(rows)


def _backends() -> list[str]:
    from loku_kernels.backends import native

    core = native._core
    if core is None:
        rows = [("native", "not built: a C++ compiler and pip install . build it")]
    else:
        openmp = "OpenMP" if core.has_openmp else "one thread: built without OpenMP"
        rows = [("native", f"on the CPU: {core.instruction_set}, {openmp}")]
    if core is not None and core.has_cuda:
        error = core.cuda_error()
        rows.append(("native, CUDA C++", f"built, and not used: {error}" if error else "built"))
    else:
        rows.append(("native, CUDA C++", "not built: nvcc and LOKU_CUDA=1 pip install . build it"))
    try:
        rows.append(("triton", f"{metadata.version('triton')}, for CUDA tensors"))
    except metadata.PackageNotFoundError:
        rows.append(("triton", "not installed"))
    rows.append(("reference", "plain torch, for everything else"))
    rows.append(("LOKU_BACKEND", os.environ.get("LOKU_BACKEND") or "not set"))
    return _aligned(rows)


def _choices() -> list[str]:
    import torch

    from loku_kernels import backends
    from loku_kernels.checks import LOGIT_DTYPES

    rows = [("operation", "device", *(str(dtype).removeprefix("torch.") for dtype in LOGIT_DTYPES))]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for op in backends.OPERATIONS:
            tensors = (torch.empty(1, 2, 2, dtype=dtype, device=device) for dtype in LOGIT_DTYPES)
            rows.append((op, device, *(_name(backends.choose(op, tensor)) for tensor in tensors)))
    return _aligned(rows)


def _name(backend: Any) -> str:
    return backend.__name__.rsplit(".", 1)[-1]
