"""Autocast of the linear operators: they cast their operands as ``torch.nn.functional.linear`` does.

Autocast casts floating-point tensors to its dtype, but never float64 ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def dtype_under_autocast(tensor: Tensor) -> torch.dtype:
    """Return the dtype that ``torch.nn.functional.linear`` gives to an operand.

    Args:
        tensor: The operand.

    Returns:
        The dtype of autocast if that is on and applies to the tensor, else the tensor's own.
    """
    device_type = "cpu" if tensor.is_cpu else tensor.device.type
    if not torch.is_autocast_enabled(device_type) or not _is_cast(tensor):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def _is_cast(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def apply_without_autocast(
    function: Callable[..., Any], operands: tuple[Tensor, *tuple[Tensor | None, ...]], *settings: Any
) -> Any:
    """Call a function, with its operands cast under autocast as ``torch.nn.functional.linear`` casts them.

    Args:
        function: The function. It runs without autocast.
        operands: Its first arguments. Each is a tensor or None, the first a tensor.
        settings: Its other arguments.

    Returns:
        The function's result.
    """
    device_type = "cpu" if operands[0].is_cpu else operands[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return function(*operands, *settings)
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        cast = (x if x is None or not _is_cast(x) else x.to(dtype) for x in operands)
        return function(*cast, *settings)


# torch does not annotate the library.
_library = torch.library.Library("loku_kernels", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]


def register_autocast(name: str, operator: Callable[..., Any], operands: int) -> None:
    """Make an operator cast its first arguments under autocast, as ``torch.nn.functional.linear`` does.

    Args:
        name: The operator's name in the library ``loku_kernels``.
        operator: The operator.
        operands: The number of leading arguments to cast. Each is a tensor or None.
    """

    def cast(*args: Any) -> Any:
        return apply_without_autocast(operator, args[:operands], *args[operands:])

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, cast, key)  # type: ignore[no-untyped-call, unused-ignore]
