"""TensorFloat-32 (TF32) for the float32 products of a training run.

TF32 rounds the operands of a float32 product to 10 bits of mantissa, and sums in float32. Cards multiply in
it many times faster than in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from transformers import TrainingArguments

from loku.interrupts import uninterrupted_context


def chooses_tf32(args: TrainingArguments, model: nn.Module) -> bool:
    """Whether a run multiplies in TF32 although its settings do not say so.

    It does if ``args.tf32`` is None, the CUDA device has TF32 (compute capability 8.0 and above), and the
    model has float32 matrices whose products autocast does not make narrower.

    Args:
        args: The settings.
        model: The model.
    """
    if args.tf32 is not None or args.bf16 or args.fp16 or args.device.type != "cuda":
        return False
    if torch.version.cuda is None or torch.cuda.get_device_capability(args.device) < (8, 0):
        return False
    return any(p.dtype == torch.float32 and p.dim() > 1 for p in model.parameters())


@uninterrupted_context
def float32_products(precision: Literal["tf32", "ieee"] | None) -> Iterator[None]:
    """Set the precision of CUDA's float32 products within the context.

    Args:
        precision: "tf32" for TensorFloat-32, "ieee" for float32, or None to leave the precision as it is.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    changes = precision not in (None, before)
    try:
        # The older attribute sets the newer, too. With the newer alone torch raises at each read of the older
        # and of torch.get_float32_matmul_precision, which the autotuning of torch.compile reads.
        if changes:
            matmul.allow_tf32 = precision == "tf32"
        yield
    finally:
        if changes:
            matmul.allow_tf32 = before == "tf32"
            matmul.fp32_precision = before  # "none", the initial value, has no other name
