"""Forward and backward of the Inverted Hinge Loss on logits (N, V), beside its peers.

    python benchmarks/ihl_kernel.py [--shape 256x50257 ...] [--dtype D ...] [--threads N ...]

``copy`` is the floor: the logits are copied into another buffer, with one read and one write.
``cross_entropy`` is a yardstick: torch's own fused loss. The bandwidth of every function counts one read and
one write of the logits. ``softmax_triplet`` is the forward alone, as metrics use it. Its floor is ``read``, a
vectorised sum over the same bytes. The logits are written just before every call, as by a model.
"""

import shutil
from collections.abc import Mapping, Sequence

import torch
from harness import DTYPES, Benchmark, Call, arguments, assert_close_loss, assert_close_rows, sizes
from peers import Loss, importable, lean_ihl, official_ihl
from subjects import random_logits
from torch import Tensor

from loku_kernels import ihl_loss, inverted_hinge, softmax_triplet
from loku_kernels.backends import reference

SHAPES = ["256x50257", "512x32000", "256x128256"]


def torchmetrics_ihl(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the IHL from the multiclass hinge of torchmetrics, which is mean(1 - p_target + p_runner_up)."""
    from torchmetrics.functional.classification import multiclass_hinge_loss

    return 2 - multiclass_hinge_loss(logits, labels, logits.shape[-1], validate_args=False)


def peers() -> dict[str, Loss]:
    """Return name -> loss(logits, labels) of the peers."""
    losses: dict[str, Loss] = {"official formula": official_ihl, "lean eager": lean_ihl}
    if shutil.which("c++") or torch.cuda.is_available():
        losses["lean torch.compile"] = torch.compile(lean_ihl, dynamic=False)
    if importable("torchmetrics"):
        losses["torchmetrics"] = torchmetrics_ihl
    return {**losses, "cross_entropy": torch.nn.functional.cross_entropy}


def read(tensor: Tensor) -> Tensor:
    """Return a sum over the tensor's bytes as 64-bit integers, which reads memory at full speed."""
    data = tensor.detach().view(-1).view(torch.uint8)
    return data[: data.numel() // 8 * 8].view(torch.int64).sum()


def check(source: Tensor, labels: Tensor, losses: Mapping[str, Loss]) -> None:
    """Compare losses, and gradients of ours, with the paper's formula in float64.

    Args:
        source: The logits (N, V), of any floating dtype.
        labels: The labels (N,), int64.
        losses: name -> loss(logits, labels). The peers except ``cross_entropy`` compute the same loss.
    """
    exact_logits = source.double().requires_grad_()
    exact = reference.inverted_hinge_loss(exact_logits, labels).mean()
    exact.backward()
    for name, loss in losses.items():
        logits = source.clone().requires_grad_()
        ours = name.startswith(("ihl_loss", "softmax_triplet"))
        value = loss(logits, labels)
        if name != "cross_entropy":
            peers_tolerance = max(1e-4, 4 * torch.finfo(source.dtype).eps)
            assert_close_loss(value, exact, name, 1e-5 if ours else peers_tolerance)
        if ours:
            value.backward()
            assert_close_rows(logits.grad, exact_logits.grad, f"the gradient of {name}")


def measure(bench: Benchmark, shape: str, dtype_name: str) -> None:
    """Check and measure one shape N x V in one dtype."""
    torch.compiler.reset()  # without a reset it stops compiling after a few shapes
    n, vocab = sizes(shape)
    source, labels = random_logits(n, vocab, DTYPES[dtype_name], bench.device)
    losses: dict[str, Loss] = {
        **peers(),
        "ihl_loss": ihl_loss,
        "ihl_loss in place": lambda *args: ihl_loss(*args, inplace=True),
    }
    check(
        source,
        labels,
        {**losses, "softmax_triplet": lambda *a: inverted_hinge(softmax_triplet(*a)[0]).mean()},
    )
    logits, buffer = source.clone(), torch.empty_like(source)

    def fresh_logits() -> None:  # a kernel that works in place overwrites them
        logits.requires_grad_(False).copy_(source).requires_grad_()
        logits.grad = None

    def forward_backward(loss: Loss) -> Call:
        return lambda: loss(logits, labels).backward()

    functions = {name: forward_backward(loss) for name, loss in losses.items()}
    functions["copy"] = lambda: buffer.copy_(logits.detach())
    bench.compare(
        shape,
        functions,
        dtype=dtype_name,
        over=["official formula", "lean eager", "lean torch.compile", "cross_entropy"],
        floors={"copy": ["copy"]},
        prepare=fresh_logits,
        rates={"GB_per_second": 2 * source.nbytes / 1e9, "tokens_per_second": n},
        computes="forward and backward",
    )
    forward = {
        "lean eager": lambda: lean_ihl(logits.detach(), labels),
        "softmax_triplet": lambda: softmax_triplet(logits.detach(), labels),
        "read": lambda: read(logits),
    }
    bench.compare(
        shape,
        forward,
        dtype=dtype_name,
        over=["lean eager"],
        floors={"read": ["read"]},
        prepare=fresh_logits,
        rates={"GB_per_second": source.nbytes / 1e9},
        computes="forward",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = arguments(__doc__, SHAPES, ("float32", "bfloat16", "float16"), "N x V")
    bench = Benchmark("ihl_kernel", parser, argv)
    for shape, dtype in bench.cases(bench.options.shape, bench.options.dtype):
        measure(bench, shape, dtype)
    bench.close()


if __name__ == "__main__":
    main()
