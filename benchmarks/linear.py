"""Losses of hidden states and an output embedding, forward and backward, beside eager logits.

    python benchmarks/linear.py [--shape 512x768x50257 ...] [--dtype D ...] [--threads N ...]

A shape is N x D x V. ``two GEMMs`` is the floor of a frozen head: h W^T and the product of its block with W,
whole or by the blocks that the operator uses, whichever is faster. ``trainable`` computes the gradient of the
embedding too; ``times frozen`` is its time over that of a frozen head. Of cut-cross-entropy it is the
``torch_compile`` path, the one that runs on a CPU.
"""

import shutil

import torch
from harness import DTYPES, Benchmark, arguments, assert_close_loss, importable, lean_ihl, sizes

from loku_kernels import linear_cross_entropy_loss, linear_ihl_loss, logits_blocks
from loku_kernels.backends import reference

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
        losses["cut-cross-entropy"] = compiled_cross_entropy
    return losses


def relative_error(ours, exact):
    parts = zip(ours.split(4096), exact.split(4096), strict=True)  # float64 copies of an embedding are large
    return (sum((a.double() - b).square().sum() for a, b in parts).sqrt() / exact.norm()).item()


def check(hidden, weight, labels):
    """Losses and gradients of hidden states and embedding: no further from float64 than eager is, twice over.

    Rows whose runner-up leads by less than the dtype resolves are left out: there either may be taken.
    """
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact_logits = exact_inputs[0] @ exact_inputs[1].t()
    eps = torch.finfo(hidden.dtype).eps
    others = exact_logits.detach().scatter(1, labels[:, None], -torch.inf).topk(2).values
    kept = others[:, 0] - others[:, 1] > 8 * eps * others[:, 0].abs()
    labels = labels.where(kept, -100)

    def gradients(loss, trainable):
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


def operator_gemms(hidden, weight):
    """A function that does the operator's two GEMMs, and nothing else, on the operator's own blocks."""
    (n, d), vocab = hidden.shape, weight.shape[0]
    itemsize = logits_blocks.product_dtype(weight).itemsize
    rows, columns = logits_blocks.block_slices(n, vocab, itemsize, weight.device.type)
    memory, out = hidden.new_empty(n * vocab), hidden.new_zeros(n, d)

    def gemms():
        for part in rows:
            for width in columns:
                h, w = hidden[part], weight[width]
                block = torch.mm(h, w.t(), out=memory[: len(h) * len(w)].view(len(h), len(w)))
                out[part].addmm_(block, w)

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


def main(argv=None):
    bench = Benchmark("linear", arguments(__doc__, SHAPES, shape_help="N x D x V"), argv)
    for shape, dtype in bench.cases(bench.options.shape, bench.options.dtype):
        measure(bench, shape, dtype)
    bench.close()


if __name__ == "__main__":
    main()
