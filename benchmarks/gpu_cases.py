"""The cases of ``gpu.py``: each kernel in bfloat16 on both GPU backends, beside its peers and its floor.

A function of ``CASES`` takes the device and the sizes of a shape and returns a ``Case``. The floor is
measured in the same process: a copy for kernels that move bytes, the bare products for the others.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from fila import thin_products
from gpu_plan import RANK
from harness import Call, Timer, Times, processor_seconds_of, seconds_of
from host_time import YARDSTICK, Calls
from linear import operator_gemms
from peers import Loss, compiled, lean_ihl, official_ihl, peer
from subjects import random_logits
from torch import Tensor

from loku_kernels import (
    accumulate_squared_grad_,
    ihl_loss,
    linear_cross_entropy_loss,
    linear_ihl_loss,
    row_scaled_svd,
    softmax_triplet,
)
from loku_kernels.backends import native

LOWRANK_MATRICES = 4  # matrices of a shape that torch.svd_lowrank is timed on
MAX_LOGITS_BYTES = 9 << 30  # bytes of one tensor of logits; eager peers need several


def _no_target(times: Times) -> float | None:
    return None


@dataclass(frozen=True)
class Case:
    """The functions that are measured on a shape, and the times that they are compared with.

    Args:
        functions: name -> function.
        floor: name -> seconds of the measured functions, to the seconds of the floor.
        target: The same, to the longest time that our function should take. The default has no target.
        over: The names of the peers.
        prepare: Called, untimed, before each call.
        repeats: name -> the number of calls that do the work of one call of the others.
        timer: Measures one call. The default is the time of the device.
        rates: label -> the amount of work of one call, which is recorded as amount per second.
        columns: name -> further columns of its row.
    """

    functions: Mapping[str, Call]
    floor: Callable[[Times], float]
    target: Callable[[Times], float | None] = _no_target
    over: tuple[str, ...] = ()
    prepare: Call | None = None
    repeats: Mapping[str, float] = field(default_factory=dict)
    timer: Timer = seconds_of
    rates: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, dict[str, Any]] = field(default_factory=dict)


# --- backends and peers ---------------------------------------------------------------------------


def forced(backend: str, function: Call) -> Call:
    """Return the function with ``LOKU_BACKEND`` set during its calls."""

    def call() -> Any:
        before = os.environ.get("LOKU_BACKEND")
        os.environ["LOKU_BACKEND"] = backend
        try:
            return function()
        finally:
            if before is None:
                del os.environ["LOKU_BACKEND"]
            else:
                os.environ["LOKU_BACKEND"] = before

    return call


def compiled_backend(device: str) -> Any:
    """Return the backend module with the compiled kernels of a device, or None if it has none."""
    if native._core is None or (device == "cuda" and not native._core.has_cuda):
        return None
    if device == "cuda" and importlib.util.find_spec("loku_kernels.backends.cuda"):
        return importlib.import_module("loku_kernels.backends.cuda")
    return native


def on_backends(name: str, function: Call, device: str, *operations: str) -> dict[str, Call]:
    """Return "name [triton]" and "name [native]" -> function, for the backends that are there.

    Args:
        name: The name of the function.
        function: The function.
        device: The device that computes, "cpu" or "cuda".
        *operations: Names of operations. The compiled backend counts if it has one of them.
    """
    found = {}
    if device == "cuda" and importlib.util.find_spec("triton"):
        found[f"{name} [triton]"] = forced("triton", function)
    if any(hasattr(compiled_backend(device), operation) for operation in operations):
        found[f"{name} [native]"] = forced("native", function)
    return found


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of logits (N, V) and labels (N,), computed in float32."""
    return torch.nn.functional.cross_entropy(logits.float(), labels)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the same from hidden states (N, D) and the output embedding (V, D)."""
    return cross_entropy(hidden @ weight.t(), labels)


def bounded_logits(n: int, v: int, device: str) -> tuple[Tensor, Tensor]:
    """Return ``random_logits`` in bfloat16.

    Raises:
        ValueError: The logits take more than ``MAX_LOGITS_BYTES``.
    """
    if 2 * n * v > MAX_LOGITS_BYTES:
        raise ValueError("the logits are too large")
    return random_logits(n, v, torch.bfloat16, device)


# --- cases ----------------------------------------------------------------------------------------


def host(device: str, n: int, d: int, v: int) -> Case:
    """Processor time of ``host_time.py``: small calls on N rows, width D and vocabulary V."""
    calls = Calls(device, n, d, v, torch.bfloat16)
    calls.check()
    return Case(
        calls.functions(),
        floor=lambda times: times[YARDSTICK],
        over=(YARDSTICK,),
        prepare=calls.prepare,
        timer=processor_seconds_of,
    )


def forward(device: str, n: int, v: int) -> Case:
    """``softmax_triplet`` of logits (N, V), without a gradient."""
    logits, labels = bounded_logits(n, v, device)
    buffer = torch.empty_like(logits)
    losses: dict[str, Loss] = {
        "eager cross_entropy": torch.nn.functional.cross_entropy,
        "torch.compile cross_entropy": compiled(cross_entropy),
        **peer("quack cross_entropy", "quack.cross_entropy", "cross_entropy",
               lambda loss: partial(loss, reduction="mean")),
    }  # fmt: skip
    return Case(
        {
            "copy": lambda: buffer.copy_(logits),
            **on_backends(
                "softmax_triplet", lambda: softmax_triplet(logits, labels), device, "triplet_forward"
            ),
            **{name: partial(loss, logits, labels) for name, loss in losses.items()},
        },
        # The copy reads and writes. A read alone takes half its time at the same bandwidth.
        floor=lambda times: times["copy"] / 2,
        target=lambda times: times["copy"] / 2 / 0.9,
        over=tuple(losses),
        rates={"gigabytes_per_second": 2 * n * v / 1e9},
    )


def fused(device: str, n: int, v: int) -> Case:
    """``ihl_loss`` of logits (N, V), forward and backward, in place and not."""
    source, labels = bounded_logits(n, v, device)
    logits, buffer = source.clone().requires_grad_(), torch.empty_like(source)
    size = 2 * n * v
    losses: dict[str, Loss] = {
        "eager cross_entropy": torch.nn.functional.cross_entropy,
        **peer("quack cross_entropy", "quack.cross_entropy", "cross_entropy",
               lambda loss: partial(loss, reduction="mean", inplace_backward=True)),
        **peer("Liger cross entropy", "liger_kernel.transformers", "LigerCrossEntropyLoss",
               lambda loss: loss()),
    }  # fmt: skip
    if size <= MAX_LOGITS_BYTES // 4:  # these hold several float or int64 tensors of that shape
        losses |= {"lean eager IHL": lean_ihl, "torch.compile IHL": compiled(lean_ihl)}
    if size <= MAX_LOGITS_BYTES // 16:
        losses["official formula"] = official_ihl

    def gradient(loss: Loss) -> Call:
        return lambda: torch.autograd.grad(loss(logits, labels), logits)

    return Case(
        {
            "copy": lambda: buffer.copy_(source),
            **on_backends(
                "ihl_loss in place", gradient(partial(ihl_loss, inplace=True)), device, "inverted_hinge_"
            ),
            **on_backends("ihl_loss", gradient(ihl_loss), device, "triplet_backward"),
            **{name: gradient(loss) for name, loss in losses.items()},
        },
        floor=lambda times: times["copy"],
        target=lambda times: times["copy"] * (1.25 if v % 8 else 1.15),
        over=tuple(losses),
        prepare=lambda: logits.detach().copy_(source),  # an in-place kernel overwrites the logits
        rates={"gigabytes_per_second": 2 * size / 1e9},
    )


def linear(device: str, n: int, d: int, v: int) -> Case:
    """Losses of hidden states (N, D) and a frozen output embedding (V, D), forward and backward."""
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, d, device=device, dtype=torch.bfloat16) / d**0.5
    labels = torch.randint(0, v, (n,), device=device)
    plain = hidden.detach()
    logits, out = (torch.empty(n, width, device=device, dtype=torch.bfloat16) for width in (v, d))
    losses: dict[str, Loss] = {
        "eager cross_entropy": lambda h, w, t: torch.nn.functional.cross_entropy(h @ w.t(), t),
        "torch.compile cross_entropy": compiled(linear_cross_entropy),
        **peer("Liger fused linear cross entropy", "liger_kernel.transformers",
               "LigerFusedLinearCrossEntropyLoss", lambda loss: lambda h, w, t: loss()(w, h, t)),
        **peer("Cut Cross Entropy", "cut_cross_entropy", "linear_cross_entropy"),
        **peer("torch chunked linear_cross_entropy", "torch.nn", "LinearCrossEntropyOptions",
               lambda options: partial(torch.nn.functional.linear_cross_entropy, options=options())),
        **peer("quack chunked linear cross entropy", "quack.linear_cross_entropy",
               "chunked_linear_cross_entropy"),
    }  # fmt: skip

    def gradient(loss: Loss) -> Call:
        return lambda: torch.autograd.grad(loss(hidden, weight, labels), hidden)

    blocks = ("rest_probabilities_", "triplet_columns_")  # of whole rows, of columns

    def gemms(times: Times) -> float:
        return min(times["two GEMMs, whole"], times["two GEMMs, by block"])

    return Case(
        {
            "two GEMMs, whole": lambda: torch.mm(torch.mm(plain, weight.t(), out=logits), weight, out=out),
            "two GEMMs, by block": operator_gemms(plain, weight),
            **on_backends("linear_ihl_loss", gradient(linear_ihl_loss), device, *blocks),
            **on_backends("linear_cross_entropy_loss", gradient(linear_cross_entropy_loss), device, *blocks),
            **{name: gradient(loss) for name, loss in losses.items()},
        },
        floor=gemms,
        target=lambda times: gemms(times) * (1.07 if d >= 4096 else 1.16),
        over=tuple(losses),
        rates={"teraflops": 4 * n * d * v / 1e12},
    )


def fisher(device: str, n: int, t: int, d: int, k: int) -> Case:
    """``accumulate_squared_grad_`` of n samples of t tokens on a weight (d, k), with and without divisor."""
    torch.manual_seed(0)
    inputs = torch.randn(n, t, k, device=device, dtype=torch.bfloat16)
    grads = torch.randn(n, t, d, device=device, dtype=torch.bfloat16) * 1e-2
    total, rows = torch.zeros(d, k, device=device), torch.zeros(d, device=device)
    divisor = torch.rand(d, k, device=device) + 0.1
    product = torch.empty(d, k, device=device, dtype=torch.bfloat16)
    buffer, ours = torch.empty_like(total), "accumulate_squared_grad_"

    def floor(times: Times) -> float:
        return max(times["weight-gradient GEMM"], times["copy of the Fisher"])

    return Case(
        {
            "weight-gradient GEMM": lambda: torch.mm(
                grads.flatten(0, 1).t(), inputs.flatten(0, 1), out=product
            ),
            "copy of the Fisher": lambda: buffer.copy_(total),
            **on_backends(ours, lambda: accumulate_squared_grad_(total, inputs, grads), device, ours),
            **on_backends(
                "with divisor", lambda: accumulate_squared_grad_(rows, inputs, grads, divisor), device, ours
            ),
            "bmm, square, sum": lambda: total.add_(torch.bmm(grads.mT, inputs).float().square_().sum(0)),
        },
        floor=floor,
        target=lambda times: floor(times) * (1.35 if n * t >= 8192 else 1.8) if n * t >= 2048 else None,
        over=("bmm, square, sum",),
        rates={"teraflops": 2 * n * t * d * k / 1e12},
    )


def fila(device: str, d: int, k: int, count: int) -> Case:
    """``row_scaled_svd`` of ``count`` matrices (d, k) in one call.

    ``torch.svd_lowrank`` runs on ``LOWRANK_MATRICES`` of them, and its time is scaled to all.
    """
    torch.manual_seed(0)
    weights = [torch.randn(d, k, device=device, dtype=torch.bfloat16) for _ in range(count)]
    scales = torch.randn(count, d, device=device).exp()
    few = min(LOWRANK_MATRICES, count)

    def lowrank() -> None:
        for w, s in zip(weights[:few], scales, strict=False):
            torch.svd_lowrank(s[:, None] * w.float(), q=RANK)

    _, v = row_scaled_svd(weights[:1], scales[:1], RANK)
    scaled = scales[0].double()[:, None] * weights[0].double()
    gram = scaled @ scaled.T if d < k else scaled.T @ scaled
    captured, most = (scaled @ v[0].double()).square().sum(), torch.linalg.eigvalsh(gram)[-RANK:].sum()
    return Case(
        {
            "thin products": partial(thin_products, weights, RANK),
            "row_scaled_svd": lambda: row_scaled_svd(weights, scales, RANK),
            "torch.svd_lowrank": lowrank,
        },
        floor=lambda times: times["thin products"],
        target=lambda times: times["torch.svd_lowrank"],
        over=("torch.svd_lowrank",),
        repeats={"torch.svd_lowrank": count / few},
        columns={"row_scaled_svd": {"deficit": (1 - captured / most).item()}},
    )


CASES: dict[str, Callable[..., Case]] = {
    "host": host,
    "forward": forward,
    "fused": fused,
    "linear": linear,
    "fisher": fisher,
    "fila": fila,
}
