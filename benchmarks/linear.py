"""Losses of hidden states and an output embedding, forward and backward, beside eager logits.

    python benchmarks/linear.py [--shape 512x768x50257 ...] [--dtype D ...] [--threads N ...]

A shape is N x D x V. ``two GEMMs`` is the floor of a frozen head: h W^T and the product of its block with W,
whole or by the blocks that the operator uses, whichever is faster. ``trainable`` computes the gradient of the
embedding too; ``times frozen`` is its time over that of a frozen head.
"""

import shutil

import torch
from harness import (
    DTYPES,
    Benchmark,
    arguments,
    assert_close_loss,
    assert_close_rows,
    importable,
    lean_ihl,
    sizes,
)

from loku_kernels import linear_cross_entropy_loss, linear_ihl_loss, ops, reference

SHAPES = ["512x768x50257", "512x2048x32000", "256x2048x128256"]


def eager_cross_entropy(hidden, weight, labels):
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)


def eager_ihl(hidden, weight, labels):
    return lean_ihl(hidden @ weight.t(), labels)


def compiled_cross_entropy(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, impl="torch_compile")


def peers(device):
    """name -> loss(hidden, weight, labels)"""
    losses = {"eager cross_entropy": eager_cross_entropy, "eager IHL": eager_ihl}
    if (shutil.which("c++") or device == "cuda") and importable("cut_cross_entropy"):
        losses["cut-cross-entropy, torch_compile"] = compiled_cross_entropy
    return losses


def check(hidden, weight, labels):
    """Losses and gradients of hidden states and embedding, against the paper's formula in float64."""
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact_logits = exact_hidden @ exact_weight.t()
    # The logits are rounded to the dtype by all who compute in it, and the probabilities follow.
    eps = torch.finfo(hidden.dtype).eps
    for loss, exact in (
        (linear_ihl_loss, reference.inverted_hinge_loss(exact_logits, labels).mean()),
        (linear_cross_entropy_loss, torch.nn.functional.cross_entropy(exact_logits, labels)),
    ):
        expected = torch.autograd.grad(exact, (exact_hidden, exact_weight), retain_graph=True)
        for trainable in (False, True):
            ours = [x.detach().requires_grad_(flag) for x, flag in ((hidden, True), (weight, trainable))]
            value = loss(*ours, labels)
            value.backward()
            assert_close_loss(value, exact, loss.__name__, 64 * eps)
            for x, gradient in zip(ours, expected, strict=True):
                if x.requires_grad:
                    error = (x.grad.double() - gradient).norm() / gradient.norm()
                    assert error <= 32 * max(eps, 5e-7), f"a gradient of {loss.__name__} is off by {error:.1e}"


def operator_gemms(hidden, weight, labels):
    """A function that does the operator's two GEMMs, and nothing else, on the operator's own blocks."""
    (n, d), vocab = hidden.shape, weight.shape[0]
    blocks = [index.numel() for index in ops._row_blocks(labels, -100, vocab, weight.element_size())]
    buffer, out = hidden.new_empty(max(blocks), vocab), hidden.new_empty(n, d)

    def gemms():
        for part, result in zip(hidden.split(blocks), out.split(blocks), strict=True):
            block = torch.mm(part, weight.t(), out=buffer[: len(part)])
            torch.mm(block, weight, out=result)

    return gemms


def measure(bench, shape, dtype_name):
    torch.compiler.reset()  # else it stops compiling after a few shapes
    n, d, vocab = sizes(shape)
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=bench.device).to(dtype).requires_grad_()
    # Logits with a standard deviation of 3, as the kernels on logits are measured.
    weight = (torch.randn(vocab, d, device=bench.device) * 3 / d**0.5).to(dtype)
    labels = torch.randint(0, vocab, (n,), device=bench.device)
    check(hidden, weight, labels)
    trainable = weight.clone().requires_grad_()
    plain = hidden.detach()
    whole, out = hidden.new_empty(n, vocab), torch.empty_like(plain)

    def fresh():
        hidden.grad = trainable.grad = None

    def forward_backward(loss, weight=weight):
        return lambda: loss(hidden, weight, labels).backward()

    ours = {loss.__name__: loss for loss in (linear_ihl_loss, linear_cross_entropy_loss)}
    functions = {
        "two GEMMs, by block": operator_gemms(plain, weight, labels),
        "two GEMMs, whole": lambda: torch.mm(torch.mm(plain, weight.t(), out=whole), weight, out=out),
        **{name: forward_backward(loss) for name, loss in {**ours, **peers(bench.device)}.items()},
        **{f"{name}, trainable": forward_backward(loss, trainable) for name, loss in ours.items()},
    }
    bench.compare(
        shape,
        functions,
        dtype=dtype_name,
        over=["eager IHL", "eager cross_entropy", "cut-cross-entropy, torch_compile"],
        floors={
            "two GEMMs": ["two GEMMs, by block", "two GEMMs, whole"],
            "frozen": ["linear_ihl_loss"],
        },
        prepare=fresh,
        rates={"tokens_per_second": n},
    )


def main(argv=None):
    bench = Benchmark("linear", arguments(__doc__, SHAPES, shape_help="N x D x V"), argv)
    for shape, dtype in bench.cases(bench.options.shape, bench.options.dtype):
        measure(bench, shape, dtype)
    bench.close()


if __name__ == "__main__":
    main()
