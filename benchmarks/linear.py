"""Losses of hidden states and an output embedding, forward and backward, beside eager logits.

    python benchmarks/linear.py [--shape 512x768x50257 ...] [--dtype D ...] [--threads N ...]

A shape is N x D x V. ``two GEMMs`` is the floor of a frozen head: h W^T and its product with W, whole or by
the operator's blocks, whichever is faster. ``trainable`` computes the gradient of the embedding too, and
``times frozen`` is its time over the time of a frozen head. cut-cross-entropy runs by its ``torch_compile``
path, which is the one for CPUs.
"""

import shutil
from collections.abc import Callable, Sequence

import torch
from harness import DTYPES, Benchmark, Call, arguments, assert_close_loss, sizes
from peers import Loss, importable, lean_ihl
from torch import Tensor

from loku_kernels import linear_cross_entropy_loss, linear_ihl_loss, logits_blocks
from loku_kernels.backends import reference

SHAPES = ["512x768x50257", "512x2048x32000", "256x2048x128256"]


def eager_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of hidden states (N, D) and an embedding (V, D), with whole logits."""
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)


def eager_ihl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the IHL of hidden states (N, D) and an embedding (V, D), with whole logits."""
    return lean_ihl(hidden @ weight.t(), labels)


def compiled_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of cut-cross-entropy's ``torch_compile`` path."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, impl="torch_compile")


def peers(device: str) -> dict[str, Loss]:
    """Return name -> loss(hidden, weight, labels) of the peers on a device."""
    losses: dict[str, Loss] = {"eager cross_entropy": eager_cross_entropy, "eager IHL": eager_ihl}
    if (shutil.which("c++") or device == "cuda") and importable("cut_cross_entropy"):
        losses["cut-cross-entropy"] = compiled_cross_entropy
    return losses


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Return the norm of the error over the norm of the exact tensor, float64."""
    parts = zip(ours.split(4096), exact.split(4096), strict=True)  # float64 copies of an embedding are large
    return (sum((a.double() - b).square().sum() for a, b in parts).sqrt() / exact.norm()).item()


def check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Assert that losses and gradients are at most twice as far from float64 as the eager ones.

    A row is left out if its two best tokens beside the target differ by less than the dtype resolves: either
    may be the runner-up.

    Args:
        hidden: The hidden states (N, D).
        weight: The output embedding (V, D), of the same dtype.
        labels: The labels (N,), int64.
    """
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact_logits = exact_inputs[0] @ exact_inputs[1].t()
    eps = torch.finfo(hidden.dtype).eps
    others = exact_logits.detach().scatter(1, labels[:, None], -torch.inf).topk(2).values
    kept = others[:, 0] - others[:, 1] > 8 * eps * others[:, 0].abs()
    labels = labels.where(kept, -100)

    def gradients(loss: Callable[..., Tensor], trainable: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(trainable)]
        value = loss(*inputs)
        return value, torch.autograd.grad(value, inputs[: 1 + trainable])

    for ours, eager, exact in (
        (linear_ihl_loss, eager_ihl, reference.inverted_hinge_loss(exact_logits[kept], labels[kept]).mean()),
        (
            linear_cross_entropy_loss,
            eager_cross_entropy,
            torch.nn.functional.cross_entropy(exact_logits[kept], labels[kept]),
        ),
    ):
        expected = torch.autograd.grad(exact, exact_inputs, retain_graph=True)
        _, yardstick = gradients(lambda h, w, eager=eager: eager(h[kept], w, labels[kept]), True)
        allowed = [2 * relative_error(*pair) + 4 * eps for pair in zip(yardstick, expected, strict=True)]
        for trainable in (False, True):
            value, result = gradients(lambda h, w, ours=ours: ours(h, w, labels), trainable)
            assert_close_loss(value, exact, ours.__name__, 64 * eps)
            for gradient, truth, bound in zip(result, expected, allowed, strict=False):
                error = relative_error(gradient, truth)
                assert error <= bound, f"{ours.__name__}: a gradient is off by {error:.1e}, not {bound:.1e}"


def operator_gemms(hidden: Tensor, weight: Tensor) -> Call:
    """Return a function that computes the operator's two GEMMs alone, on the operator's own blocks.

    Args:
        hidden: The hidden states (N, D), without a gradient.
        weight: The output embedding (V, D), of the same dtype.
    """
    (n, d), vocab = hidden.shape, weight.shape[0]
    blocks = logits_blocks.LogitsBlocks(hidden, weight, None, 0.0, 1.0)
    rows, columns = blocks.rows, blocks.columns
    memory, out = hidden.new_empty(n * vocab), hidden.new_zeros(n, d)

    def gemms() -> None:
        for part in rows:
            for width in columns:
                h, w = hidden[part], weight[width]
                block = torch.mm(h, w.t(), out=memory[: len(h) * len(w)].view(len(h), len(w)))
                if len(columns) == 1:  # whole rows go straight into the result
                    torch.mm(block, w, out=out[part])
                else:
                    out[part].addmm_(block, w)

    return gemms


def measure(bench: Benchmark, shape: str, dtype_name: str) -> None:
    """Check and measure one shape N x D x V in one dtype."""
    torch.compiler.reset()  # without a reset it stops compiling after a few shapes
    n, d, vocab = sizes(shape)
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=bench.device).to(dtype).requires_grad_()
    # The logits have a standard deviation of 3, as in ihl_kernel.py.
    weight = (torch.randn(vocab, d, device=bench.device) * 3 / d**0.5).to(dtype)
    labels = torch.randint(0, vocab, (n,), device=bench.device)
    check(hidden, weight, labels)
    trainable = weight.clone().requires_grad_()
    plain = hidden.detach()
    whole, out = hidden.new_empty(n, vocab), torch.empty_like(plain)

    def fresh() -> None:
        hidden.grad = trainable.grad = None

    def forward_backward(loss: Loss, weight: Tensor = weight) -> Call:
        return lambda: loss(hidden, weight, labels).backward()

    functions = {
        "two GEMMs, by block": operator_gemms(plain, weight),
        "two GEMMs, whole": lambda: torch.mm(torch.mm(plain, weight.t(), out=whole), weight, out=out),
        "linear_ihl_loss": forward_backward(linear_ihl_loss),
        "linear_cross_entropy_loss": forward_backward(linear_cross_entropy_loss),
        "linear_ihl_loss, trainable": forward_backward(linear_ihl_loss, trainable),
        **{name: forward_backward(loss) for name, loss in peers(bench.device).items()},
    }
    bench.compare(
        shape,
        functions,
        dtype=dtype_name,
        over=["eager IHL", "eager cross_entropy", "cut-cross-entropy"],
        floors={
            "two GEMMs": ["two GEMMs, by block", "two GEMMs, whole"],
            "frozen": ["linear_ihl_loss"],
        },
        prepare=fresh,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    bench = Benchmark("linear", arguments(__doc__, SHAPES, shape_help="N x D x V"), argv)
    for shape, dtype in bench.cases(bench.options.shape, bench.options.dtype):
        measure(bench, shape, dtype)
    bench.close()


if __name__ == "__main__":
    main()
