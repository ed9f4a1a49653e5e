"""The compiled core as a backend on the CPU. This module passes addresses of tensors.

The public functions have checked their arguments. This module checks every size and dtype that goes with an
address again (``ValueError``), because ``torch.ops.loku_kernels`` can be called without those functions. The
core also needs contiguous small tensors. It checks the labels itself before it writes anything.

One fact of the core is private to this module. The library's bfloat16 products are faster than the core's on
a CPU with instructions for them, so the Fisher uses them there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loku_kernels.backends.online_state import OnlineState
from loku_kernels.backends.reference import fisher as reference_fisher
from loku_kernels.checks import Reduction, TokenLoss, bad_label_error

_core: Any
try:
    # Imported after torch, so that the core shares torch's OpenMP runtime.
    from loku_kernels import _core  # type: ignore[attr-defined, no-redef]
except ImportError:
    _core = None

# The tags of the core's DType, Loss and Reduction.
_DTYPE_TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOSS_TAGS = {"inverted_hinge": 0, "cross_entropy": 1}
REDUCTION_TAGS = {"mean": 0, "sum": 1, "none": 2}

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# A forked child has none of its parent's OpenMP threads. With more than one thread it would wait for them for
# ever.
os.register_at_fork(after_in_child=_note_fork)


def warn_if_missing() -> None:
    """Warn if the package was installed without its compiled core."""
    if _core is None:
        warnings.warn(
            "loku_kernels has no compiled core here, so the slower plain-torch reference implementation is "
            "in use on the CPU, and on a GPU where triton is not installed. To build the core, install a C++ "
            "compiler and run: pip install .",
            RuntimeWarning,
            stacklevel=3,
        )


def serves(tensor: Tensor) -> bool:
    """Say whether the core computes on tensors of a device and dtype.

    Args:
        tensor: A tensor of that device and dtype.

    Returns:
        True for float32, bfloat16, float16 and, as the dtype of labels, int64 on the CPU.
    """
    known = tensor.dtype in _DTYPE_TAGS or tensor.dtype is torch.int64
    return known and tensor.is_cpu and _core is not None


def threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ``ValueError`` unless the tensor has this shape and dtype, on the CPU."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on cpu, got {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )


class Rows:
    """The rows of a tensor (..., V), as the core's functions take them, and the memory of their offsets.

    Raises:
        ValueError: The core cannot compute on the tensor, or its rows are not contiguous.
    """

    def __init__(self, tensor: Tensor) -> None:
        tag = _DTYPE_TAGS.get(tensor.dtype)
        if tag is None or not tensor.is_cpu:
            raise ValueError(
                f"logits must be float32, bfloat16 or float16 on cpu, got {tensor.dtype} on {tensor.device}"
            )
        if tensor.dim() < 1:
            raise ValueError("logits must have rows, got a scalar")
        *sizes, columns = tensor.shape
        self.offsets: Tensor | None = None
        stride, count, address = 0, 1, 0
        if tensor.is_contiguous():
            stride, count = columns, tensor.numel() // columns if columns else 0
        elif tensor.stride(-1) != 1:
            raise ValueError(
                f"the last dimension of logits must be contiguous, got strides {tensor.stride()}"
            )
        elif len(sizes) == 1:
            stride, count = tensor.stride(0), sizes[0]
        else:
            offsets = torch.zeros((), dtype=torch.int64, device="cpu")
            for size, step in zip(sizes, tensor.stride()[:-1], strict=True):
                offsets = offsets.unsqueeze(-1) + torch.arange(size, dtype=torch.int64, device="cpu") * step
            self.offsets = offsets.reshape(-1)
            count, address = self.offsets.numel(), self.offsets.data_ptr()
        self.arguments = (tensor.data_ptr(), address, stride, count, columns, tag)


class Factors:
    """The factors of rows as the core's functions take them: one number, or the address of many."""

    def __init__(self, factor: Tensor | None, shape: torch.Size) -> None:
        self.each: Tensor | None = None
        self.arguments: tuple[float, int] = (1.0, 0)
        if factor is not None and not factor.is_cpu:
            raise ValueError(f"factor must be on cpu, got {factor.device}")
        if factor is not None and factor.dim() == 0:
            self.arguments = (factor.item(), 0)
        elif factor is not None:
            self.each = factor.expand(shape).double().contiguous()
            self.arguments = (1.0, self.each.data_ptr())


def rows_and_labels(logits: Tensor, labels: Tensor) -> tuple[Rows, Tensor]:
    """Return the rows of logits (..., V), and their labels (...) made contiguous, if the two fit together."""
    rows = Rows(logits)
    *shape, vocab = logits.shape
    require("labels", labels, (*shape,), torch.int64)
    if vocab < 2:
        raise ValueError(f"logits must have shape (..., V) with V >= 2, got {tuple(logits.shape)}")
    return rows, labels.contiguous()


def triplet_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, *, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See ``reference.triplet_forward``."""
    return _call_for_triplets("triplet_forward", logits, labels, ignore_index, softcap)


def inverted_hinge_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``reference.inverted_hinge_``."""
    require("scale", scale, (), torch.float64)
    return _call_for_triplets("inverted_hinge_", logits, labels, ignore_index, scale.item())


def rest_probabilities_(
    logits: Tensor, labels: Tensor, ignore_index: int, *, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See ``reference.rest_probabilities_``."""
    return _call_for_triplets("rest_probabilities_", logits, labels, ignore_index, softcap)


def _call_for_triplets(
    name: str, logits: Tensor, labels: Tensor, ignore_index: int, number: float
) -> tuple[Tensor, Tensor]:
    """Check the arguments of a function that returns triplets, and call it with its last ``number``."""
    rows, labels = rows_and_labels(logits, labels)
    triplet = labels.new_empty((*labels.shape, 3), dtype=torch.float64)
    runner_up_id = torch.empty_like(labels)
    bad = getattr(_core, name)(
        rows.arguments,
        labels.data_ptr(),
        labels.numel(),
        ignore_index,
        number,
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
        threads(),
    )
    if bad >= 0:
        raise bad_label_error(labels, bad, logits.shape[-1], ignore_index)
    return triplet, runner_up_id


def triplet_backward(
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    *,
    factor: Tensor | None = None,
    first_column: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """See ``reference.triplet_backward``."""
    shape = logits.shape[:-1]
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    else:
        require("out", out, logits.shape, logits.dtype)
    rows, out_rows, factors = Rows(logits), Rows(out), Factors(factor, shape)
    require("labels", labels, shape, torch.int64)
    require("runner_up_id", runner_up_id, shape, torch.int64)
    require("triplet", triplet, (*shape, 3), torch.float64)
    require("grad_triplet", grad_triplet, (*shape, 3), torch.float64)
    labels, runner_up_id = labels.contiguous(), runner_up_id.contiguous()
    triplet, grad_triplet = triplet.contiguous(), grad_triplet.contiguous()
    _core.triplet_backward(
        rows.arguments,
        first_column,
        labels.data_ptr(),
        labels.numel(),
        ignore_index,
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
        grad_triplet.data_ptr(),
        *factors.arguments,
        softcap,
        out_rows.arguments,
        threads(),
    )
    return out


def triplet_columns_(
    logits: Tensor,
    labels: Tensor,
    state: OnlineState,
    *,
    first_column: int,
    softcap: float,
    store: bool,
) -> None:
    """See ``reference.triplet_columns_``."""
    shape = (len(logits),)
    rows = Rows(logits)
    require("labels", labels, shape, torch.int64)
    require("numbers", state.numbers, (*shape, 4), torch.float64)
    for name in ("runner_up_id", "demoted_id"):
        require(name, getattr(state, name), shape, torch.int64)
    for name in ("rescale", "demoted_share"):
        require(name, getattr(state, name), shape, torch.float32)
    if not all(x.is_contiguous() for x in (labels, *state)):
        raise ValueError("labels and state must be contiguous")
    _core.triplet_columns_(
        rows.arguments,
        first_column,
        labels.data_ptr(),
        labels.numel(),
        softcap,
        store,
        *(x.data_ptr() for x in state),
        threads(),
    )


def scale_rows_(logits: Tensor, factor: Tensor) -> None:
    """See ``reference.scale_rows_``. Rows whose factor is 1 are left alone."""
    rows, factors = Rows(logits), Factors(factor, logits.shape[:-1])
    _core.scale_rows_(rows.arguments, *factors.arguments, threads())


def mean_scale(labels: Tensor, ignore_index: int) -> Tensor:
    """See ``reference.mean_scale``."""
    share = 1 / max(number_counted(labels, ignore_index), 1)
    return torch.tensor(share, dtype=torch.float64, device="cpu")


def number_counted(labels: Tensor, ignore_index: int) -> int:
    """Count the labels that are not ignored.

    Args:
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count.
    """
    require("labels", labels, labels.shape, torch.int64)
    labels = labels.contiguous()
    return int(_core.number_counted(labels.data_ptr(), labels.numel(), ignore_index))


def token_losses(
    loss: TokenLoss,
    triplet: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction,
    dtype: torch.dtype,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """See ``reference.token_losses``."""
    shape = labels.shape
    require("labels", labels, shape, torch.int64)
    require("triplet", triplet, (*shape, 3), torch.float64)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    labels, triplet = labels.contiguous(), triplet.contiguous()
    value = labels.new_empty(shape if reduction == "none" else (), dtype=dtype)
    grad_triplet = torch.empty_like(triplet) if want_grad else None
    _core.token_losses(
        LOSS_TAGS[loss],
        triplet.data_ptr(),
        labels.data_ptr(),
        labels.numel(),
        ignore_index,
        REDUCTION_TAGS[reduction],
        dtype == torch.float64,
        value.data_ptr(),
        0 if grad_triplet is None else grad_triplet.data_ptr(),
        threads(),
    )
    return value, grad_triplet


def hidden_gradient(
    grad_triplet: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    triplet: Tensor,
    runner_up_id: Tensor,
    direction: Tensor,
    *,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """See ``reference.hidden_gradient``."""
    shape = labels.shape
    require("runner_up_id", runner_up_id, shape, torch.int64)
    require("triplet", triplet, (*shape, 3), torch.float64)
    require("grad_triplet", grad_triplet, (*shape, 3), torch.float64)
    triplet, runner_up_id, grad_triplet = (x.contiguous() for x in (triplet, runner_up_id, grad_triplet))
    saved = (triplet.data_ptr(), runner_up_id.data_ptr())

    def call(
        factors: tuple[float, int], weight_rows: tuple[Any, ...], ids: tuple[int, int], *rest: Any
    ) -> int:
        arguments = (grad_triplet.data_ptr(), *factors, *weight_rows, *ids, *saved, *rest)
        return int(_core.hidden_gradient(*arguments))

    return gradient_of_hidden(call, factor, weight, labels, direction, softcap, logit_scale)


def gradient_of_hidden(
    call: Callable[..., int],
    factor: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    direction: Tensor,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """Check the arguments that two functions share, and ``call`` the core with them."""
    vocab, width = weight.shape
    require("labels", labels, labels.shape[:1], torch.int64)
    require("direction", direction, (*labels.shape, width), weight.dtype)
    rows, factors = Rows(weight), Factors(factor, labels.shape)
    labels, direction = labels.contiguous(), direction.contiguous()
    out = torch.empty_like(direction)
    address, _, stride, _, _, tag = rows.arguments
    bad = call(
        factors.arguments,
        ((address, stride), vocab),
        (labels.data_ptr(), labels.numel()),
        (direction.data_ptr(), width),
        softcap,
        logit_scale,
        width,
        tag,
        out.data_ptr(),
        threads(),
    )
    if bad >= 0:
        raise ValueError(f"row {bad} has a label or a runner-up outside of the weight's {vocab} rows")
    return out


def _features(tensor: Tensor) -> tuple[int, int, int, int]:
    """Describe a tensor (n, T, features) to the core: its address, the number of features, the strides."""
    return tensor.data_ptr(), tensor.shape[2], tensor.stride(0), tensor.stride(1)


def _matrix(tensor: Tensor | None) -> tuple[int, int]:
    """Describe a matrix to the core: its address and row stride, or zeros for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
) -> None:
    """See ``reference.accumulate_squared_grad_``. The sums are float32."""
    if inputs.dtype == torch.bfloat16 and reference_fisher.multiplies_bfloat16(inputs.device):
        arguments = (fisher, inputs, grad_outputs, divisor)
        reference_fisher.accumulate_by_products_(*arguments, torch.bfloat16, _add_squares)
        return
    if inputs.dim() != 3 or inputs.device.type != "cpu":
        raise ValueError(f"inputs must be (n, T, k) on cpu, got {tuple(inputs.shape)} on {inputs.device}")
    require("grad_outputs", grad_outputs, (*inputs.shape[:2], grad_outputs.shape[-1]), inputs.dtype)
    weight_shape = (grad_outputs.shape[2], inputs.shape[2])
    require("fisher", fisher, weight_shape[: 2 if divisor is None else 1], torch.float32)
    if divisor is not None:
        require("divisor", divisor, weight_shape, torch.float32)
    if 0 in (*inputs.shape, *grad_outputs.shape):
        return
    total = fisher.contiguous()
    divisor = None if divisor is None else divisor.contiguous()
    inputs, grad_outputs = (x if x.stride(2) == 1 else x.contiguous() for x in (inputs, grad_outputs))
    _core.accumulate_squared_grad_(
        *inputs.shape[:2],
        _DTYPE_TAGS[inputs.dtype],
        _features(inputs),
        _features(grad_outputs),
        _matrix(total),
        _matrix(divisor),
        threads(),
    )
    if total is not fisher:
        fisher.copy_(total)


def _add_squares(fisher: Tensor, product: Tensor, scratch: Tensor) -> None:
    """Add the squares of a bfloat16 product (rows, columns) to a tile of the Fisher in float32."""
    require("product", product, fisher.shape, torch.bfloat16)
    require("fisher", fisher, product.shape, torch.float32)
    if not product.is_contiguous() or fisher.stride(1) != 1:
        raise ValueError("product must be contiguous, and so must the rows of fisher")
    _core.add_squares_(product.data_ptr(), *product.shape, _matrix(fisher), threads())
