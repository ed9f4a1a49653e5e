"""Autocast of the linear operators: they cast their operands as ``torch.nn.functional.linear`` does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
        return function(*(None if x is None else x.to(dtype) for x in operands), *settings)


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
