"""LoRA linears whose three products are all the work of a forward.

peft casts the whole input of a linear to the dtype of its adapter, multiplies in that dtype, adds in it and
casts the result back. Beside a bfloat16 model with float32 adapters these passes take longer than the
adapter's products. Here the products of the adapter have the dtype of the model's own product, and the last
of them adds into its output:

    forward     low = x A^T         y = x W^T + b,   then  y += scaling * low B^T
    backward    g = dy B            dx = dy W,       then  dx += scaling * g A
                dA = scaling * g^T x                 dB = scaling * dy^T low

The factors A and B stay the float32 parameters of peft. They are cast at each use, which is cheap, and their
gradients are products into float32 where the library has them. A module is peft's own but for its class,
which ``fused_lora`` changes for the time of training. Its parameters, names, saves and merges stay peft's.

The class is changed in place of an attribute ``forward`` of the module. Such an attribute is bound to its
module, so the replicas of ``nn.DataParallel`` and copies of the model would run the original's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

from loku.interrupts import uninterrupted_context
from loku_kernels.logits_blocks import product_dtype
from loku_kernels.tracing import refused_results, transformed

_PLAIN_TENSORS = (Tensor, nn.Parameter)
_OWN_DTYPES = (torch.bfloat16, torch.float32, torch.float64)  # in which a product needs no autocast
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_SECOND_DERIVATIVE = (
    "the fused products of LoRA have no second derivative: train with UnlearnConfig(fused_lora=False)"
)


class _Operands(NamedTuple):
    """The operands of a fused linear beside its input, in the order of ``_FusedProducts.forward``."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dtype: torch.dtype


def _factor_gradient(left: Tensor, right: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Compute scaling * left^T right, a gradient of a factor, in the widest dtype that the library offers."""
    wide = product_dtype(left)
    if wide == left.dtype:
        product = torch.mm(left.t(), right)
    else:
        product = torch.mm(left.t(), right, out_dtype=wide)
    return product.to(torch.promote_types(wide, dtype)).mul_(scaling).to(dtype)


class _FusedProducts(torch.autograd.Function):
    """x W^T + b + scaling * x A^T B^T, with frozen W and b. The module's docstring has the products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        low = torch.mm(rows, lora_A.to(dtype).t())
        output = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        output.addmm_(low, lora_B.to(dtype).t(), alpha=scaling)
        needs_A, needs_B = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(rows if needs_A else None, low if needs_B else None, weight, lora_A, lora_B)
        ctx.scaling, ctx.dtype, ctx.x_shape, ctx.x_dtype = scaling, dtype, x.shape, x.dtype
        # Autograd forbids to change a view that a Function returns, and some models scale the output in
        # place.
        return torch.ops.aten._unsafe_view(output, (*x.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, lora_A, lora_B = ctx.saved_tensors
        scaling, dtype, device_type = ctx.scaling, ctx.dtype, grad_output.device.type
        needs_x, _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        grad = grad_output.detach().reshape(-1, grad_output.shape[-1])
        # A backward inside autocast may be that of a forward outside, whose dtype counts.
        autocast = torch.is_autocast_enabled(device_type)
        with torch.no_grad(), torch.autocast(device_type, enabled=False) if autocast else nullcontext():
            if needs_x or needs_A:
                grad_low = torch.mm(grad, lora_B.to(dtype))
            if needs_x:
                grad_x = torch.mm(grad, weight.to(dtype))
                grad_x.addmm_(grad_low, lora_A.to(dtype), alpha=scaling)
                grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
            if needs_A:
                grad_A = _factor_gradient(grad_low, rows, scaling, lora_A.dtype)
            if needs_B:
                grad_B = _factor_gradient(grad, low, scaling, lora_B.dtype)
        if torch.is_grad_enabled():
            if transformed():
                raise RuntimeError(_NO_SECOND_DERIVATIVE)
            inputs = [factor for factor in (lora_A, lora_B) if factor.requires_grad] + [grad_output]
            grad_x, grad_A, grad_B = refused_results(_NO_SECOND_DERIVATIVE, [grad_x, grad_A, grad_B], inputs)
        return grad_x, None, None, grad_A, grad_B, None, None


def _traced_products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """The products of ``_FusedProducts`` as plain operations, for compilers and ``torch.func``."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    low = F.linear(rows, lora_A.to(dtype))
    output = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    output = torch.addmm(output, low, lora_B.to(dtype).t(), alpha=scaling)
    return output.view(*x.shape[:-1], len(weight))


def _is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling a module runs the forward of this class and nothing else.

    accelerate puts its hooks into an attribute ``forward``; torch, DeepSpeed and tensor parallelism into the
    others.
    """
    if type(module) is not kind:
        return False
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def _is_identity(dropout: nn.Module) -> bool:
    if type(dropout) is nn.Dropout:
        return not dropout.training and _is_plain(dropout, nn.Dropout)
    return _is_plain(dropout, nn.Identity)


def _products_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype of the base model's own product, or None if the adapter's needs another.

    float16 has a dtype of its own only under autocast, where gradients are scaled. Elsewhere the products of
    the adapter stay in float32, as small gradients round to 0 in float16.
    """
    if torch.is_autocast_enabled(x.device.type):
        castable = x.dtype in _AUTOCAST_DTYPES and weight.dtype in _AUTOCAST_DTYPES
        return torch.get_autocast_dtype(x.device.type) if castable else None
    return x.dtype if x.dtype in _OWN_DTYPES and x.dtype == weight.dtype else None


def _operands(layer: LoraLinear, x: Tensor) -> _Operands | None:
    """The operands of a layer's fused products, or None if its forward is another than these products.

    Each call asks. So modules and parameters are read from their dicts, not by ``nn.Module.__getattr__``,
    which takes several times longer.
    """
    if layer._disable_adapters or layer.merged_adapters or nn_module._has_any_global_hook():
        return None
    modules = layer._modules
    base, factors_A, factors_B = modules["base_layer"], modules["lora_A"], modules["lora_B"]
    assert factors_A is not None and factors_B is not None  # peft's own
    names = [name for name in layer.active_adapters if name in factors_A._modules]
    if len(names) != 1 or names[0] in layer.lora_variant or not _is_plain(base, nn.Linear):
        return None
    name = names[0]
    linear_A, linear_B = factors_A._modules[name], factors_B._modules[name]
    if not (_is_plain(linear_A, nn.Linear) and _is_plain(linear_B, nn.Linear)):
        return None
    assert base is not None and linear_A is not None and linear_B is not None  # as they are plain
    if not _is_identity(layer.lora_dropout[name]):
        return None
    if not layer.__dict__.get("cast_input_dtype_enabled", True):  # peft.helpers.disable_input_dtype_casting
        return None
    of_base, of_A, of_B = base._parameters, linear_A._parameters, linear_B._parameters
    if "bias" not in of_base:  # FSDP has put it elsewhere
        return None
    if of_A.get("bias", x) is not None or of_B.get("bias", x) is not None:
        return None
    weight, bias = of_base.get("weight"), of_base["bias"]
    lora_A, lora_B = of_A.get("weight"), of_B.get("weight")
    device = x.device
    tensors: tuple[Any, ...] = (
        (x, weight, lora_A, lora_B) if bias is None else (x, weight, lora_A, lora_B, bias)
    )
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TENSORS or tensor.device != device:
            return None
    assert weight is not None and lora_A is not None and lora_B is not None  # as their types say
    if weight.requires_grad or (bias is not None and (bias.requires_grad or bias.dtype != weight.dtype)):
        return None
    if not x.dim() or x.shape[-1] != weight.shape[1]:
        return None
    dtype = _products_dtype(x, weight)
    return None if dtype is None else _Operands(weight, bias, lora_A, lora_B, layer.scaling[name], dtype)


class FusedLoraLinear(LoraLinear):
    """A ``peft.tuners.lora.Linear`` that multiplies as the module's docstring says where it can.

    It has one active adapter of plain LoRA on a plain frozen ``nn.Linear`` then, without dropout, hooks,
    merged weights, tensor subclasses and further arguments. All other calls run peft's own forward. Each call
    decides.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the layer.

        Args:
            x: The input (..., in_features).
            args: Further arguments of peft's forward.
            kwargs: Further keyword arguments of peft's forward.

        Returns:
            The output (..., out_features), in the dtype of the base layer's.
        """
        operands = None if args or kwargs else _operands(self, x)
        if operands is None:
            return super().forward(x, *args, **kwargs)
        if torch.compiler.is_compiling() or transformed():
            return _traced_products(x, *operands)
        return _FusedProducts.apply(x, *operands)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as peft's own class, so that a copy made in training is as one made after it."""
        reduced: Any = super().__reduce_ex__(protocol)
        # pickle refuses copyreg.__newobj__ with another class than the object's.
        return object.__new__, (LoraLinear,), *reduced[2:]


@uninterrupted_context
def fused_lora(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Fuse the LoRA linears of a model within the context. Afterwards they are peft's again.

    Args:
        model: The model. Its ``peft.tuners.lora.Linear`` modules are concerned, and no subclass of them.
        enabled: Whether to do so, True by default; False leaves the model as it is.
    """
    modules = model.modules() if enabled else ()
    layers: list[Any] = [module for module in modules if type(module) is LoraLinear]
    try:
        for layer in layers:
            layer.__class__ = FusedLoraLinear
        yield
    finally:
        for layer in layers:
            if type(layer) is FusedLoraLinear:  # FSDP gives a module another class
                layer.__class__ = LoraLinear  # type: ignore[assignment]
