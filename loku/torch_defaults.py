"""torch's own defaults for the time of a run, whatever the process has set.

``torch.set_default_dtype`` changes the factories of all libraries. transformers sums its logged loss in the
default dtype, and peft draws its factors in it. So a run would depend on it. ``torch.set_default_device``
would put batches and random orders on a device that their generators do not have.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from loku.interrupts import uninterrupted_context


@uninterrupted_context
def torch_defaults() -> Iterator[None]:
    """A context or decorator in which new tensors are float32 and on the CPU, unless they say otherwise."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    changes = device.type != "cpu"  # the context of a device has a price at each call of torch
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu") if changes else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)
