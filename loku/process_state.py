"""The state of the process that a run changes, as it was before it.

A run seeds the generators of Python, numpy and torch, and ``full_determinism`` sets flags and variables of
the environment. The caller's own random stream goes on as if there had been no run.

An interrupt can end a context of torch or of the standard library between its block and its end, so the modes
of autograd and autocast and the filters of warnings are put back, too. accelerate's own state
(``AcceleratorState``) lasts as long as the process.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from loku.interrupts import uninterrupted_context

# full_determinism sets them (transformers.trainer_utils.enable_full_determinism).
_VARIABLES = (
    "ASCEND_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "FLASH_ATTENTION_DETERMINISTIC",
    "HCCL_DETERMINISTIC",
)


@uninterrupted_context
def random_states_kept() -> Iterator[None]:
    """A context or decorator after which the global random generators are as before.

    They are those of Python, numpy, torch's CPU, and of the CUDA devices if CUDA is initialised.
    """
    state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def _restore_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _autocast_nesting() -> int:
    depth = torch.autocast_increment_nesting()
    return min(depth, torch.autocast_decrement_nesting())


def _leave_autocast(nesting: int) -> None:
    """Leave the contexts of autocast that an interrupt kept from ending, and forget their cached weights."""
    while _autocast_nesting() > nesting:
        torch.autocast_decrement_nesting()
    if nesting == 0:
        torch.clear_autocast_cache()


def _saved_tensors_hooks() -> Any:
    """The functions of the innermost ``torch.autograd.graph.saved_tensors_hooks``, or None."""
    # True: also while a graph is traced.
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _leave_saved_tensors_hooks(top: Any) -> None:
    """Leave the contexts of saved tensors that an interrupt kept from ending, such as a checkpoint's."""
    while (current := _saved_tensors_hooks()) is not None:
        if top is not None and all(ours is theirs for ours, theirs in zip(current, top, strict=True)):
            break
        torch._C._autograd._pop_saved_tensors_default_hooks()


def _reset(owner: Any, name: str, value: Any) -> None:
    """Set an attribute if it has another value; torch takes note of each use of its newer names."""
    if getattr(owner, name) != value:
        setattr(owner, name, value)


def _register(undo: Callable[..., Any]) -> None:
    """Register the calls that put the flags of torch and the settings of the libraries back."""
    undo(logging.set_verbosity, logging.get_verbosity())
    undo(_restore_environment, {name: os.environ.get(name) for name in _VARIABLES})
    undo(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    backends: Any = torch.backends
    for flag in ("deterministic", "benchmark"):
        undo(_reset, backends.cudnn, flag, getattr(backends.cudnn, flag))
    for library in (backends.cuda.matmul, backends.mkldnn.matmul):
        undo(_reset, library, "fp32_precision", library.fp32_precision)


@uninterrupted_context
def torch_modes_kept() -> Iterator[None]:
    """A context or decorator after which the modes of autograd and autocast are as before.

    A second interrupt may keep a context of torch from ending, such as ``torch.no_grad()`` or the hooks of
    saved tensors in gradient checkpointing.
    """
    with ExitStack() as stack:
        undo = stack.callback
        undo(torch.set_grad_enabled, torch.is_grad_enabled())
        undo(_leave_autocast, _autocast_nesting())
        for device in ("cpu", "cuda"):
            undo(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device))
            undo(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device))
        undo(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        undo(_leave_saved_tensors_hooks, _saved_tensors_hooks())
        yield


@uninterrupted_context
def process_state_kept() -> Iterator[None]:
    """A context or decorator after which the state of the process is as before, also after success.

    It is that of ``random_states_kept``, torch's flags of determinism and of the precision of float32
    products, the modes of autograd and autocast, the variables that ``full_determinism`` sets, the filters of
    warnings, and the verbosity of transformers.
    """
    with random_states_kept(), torch_modes_kept(), warnings.catch_warnings(), ExitStack() as stack:
        _register(stack.callback)
        yield
