"""Processor time of a forward and backward on a tiny input, beside eager ``cross_entropy``.

    python benchmarks/host_time.py [--shape 8x32x64 ...] [--device cuda]

A shape is N x D x V. The losses on logits take logits (N, V), the linear losses hidden states (N, D) and a
frozen output embedding (V, D). The yardstick is ``torch.nn.functional.cross_entropy`` of the logits, forward
and backward. ``two GEMMs`` is the arithmetic that the linear losses have beside it.

The time is that of all threads of the process (``harness.processor_seconds_of``), with one thread of torch.
On a GPU it is the time of the host alone. The functions take turns, and the median of the rounds counts.
"""

from collections.abc import Sequence
from functools import partial

import torch
from harness import DTYPES, Benchmark, Call, arguments, assert_close_loss, processor_seconds_of, sizes
from peers import Loss
from subjects import random_logits
from torch import Tensor

from loku_kernels import cross_entropy_loss, ihl_loss, linear_cross_entropy_loss, linear_ihl_loss
from loku_kernels.backends import reference

SHAPES = ["8x32x64", "64x32x1000"]
YARDSTICK = "eager cross_entropy"
ON_LOGITS: dict[str, Loss] = {
    "ihl_loss": ihl_loss,
    "ihl_loss in place": partial(ihl_loss, inplace=True),
    "cross_entropy_loss": cross_entropy_loss,
}
FROM_HIDDEN: dict[str, Loss] = {
    "linear_ihl_loss": linear_ihl_loss,
    "linear_cross_entropy_loss": linear_cross_entropy_loss,
}


class Calls:
    """The functions that are measured on one shape, and the tensors that they share.

    Args:
        device: The device that computes, "cpu" or "cuda".
        n: The number of rows.
        d: The width of the hidden states.
        vocab: The size of the vocabulary.
        dtype: The dtype of logits, hidden states and output embedding. Default float32.
    """

    def __init__(self, device: str, n: int, d: int, vocab: int, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.labels = random_logits(n, vocab, dtype, device)
        self.logits = self.source.clone().requires_grad_()
        self.hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocab, d, device=device) / d**0.5).to(dtype)

    def prepare(self) -> None:
        """Write the logits anew, which a loss in place overwrites, and drop the gradients."""
        self.logits.detach().copy_(self.source)
        self.logits.grad = self.hidden.grad = None

    def _on_logits(self, loss: Loss) -> Call:
        def call() -> None:
            self.logits.grad = None
            loss(self.logits, self.labels).backward()

        return call

    def _from_hidden(self, loss: Loss) -> Call:
        def call() -> None:
            self.hidden.grad = None
            loss(self.hidden, self.weight, self.labels).backward()

        return call

    def functions(self) -> dict[str, Call]:
        """Return name -> function, the yardstick first."""
        hidden, weight = self.hidden.detach(), self.weight
        return {
            YARDSTICK: self._on_logits(torch.nn.functional.cross_entropy),
            **{name: self._on_logits(loss) for name, loss in ON_LOGITS.items()},
            **{name: self._from_hidden(loss) for name, loss in FROM_HIDDEN.items()},
            "two GEMMs": lambda: torch.mm(torch.mm(hidden, weight.t()), weight),
        }

    def check(self) -> None:
        """Assert that each loss is the formula's in float64, of the logits as the function computes them."""
        products = self.hidden.detach() @ self.weight.t()
        for losses, logits, operands in (
            (ON_LOGITS, self.source, (self.source,)),
            (FROM_HIDDEN, products, (self.hidden.detach(), self.weight)),
        ):
            for name, loss in losses.items():
                exact = _exact(name, logits.double(), self.labels)
                assert_close_loss(
                    loss(*operands, self.labels), exact, name, 64 * torch.finfo(logits.dtype).eps
                )


def _exact(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    if "ihl" in name:
        return reference.inverted_hinge_loss(logits, labels).mean()
    return torch.nn.functional.cross_entropy(logits, labels)


def measure(bench: Benchmark, shape: str, dtype: str) -> None:
    """Check and measure one shape N x D x V in one dtype."""
    n, d, vocab = sizes(shape)
    calls = Calls(bench.device, n, d, vocab, DTYPES[dtype])
    calls.check()
    bench.compare(
        shape,
        calls.functions(),
        dtype=dtype,
        floors={YARDSTICK: [YARDSTICK]},
        prepare=calls.prepare,
        timer=processor_seconds_of,
        memory=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = arguments(__doc__, SHAPES, ("float32",), "N x D x V")
    parser.set_defaults(threads=[1], runs=51)
    bench = Benchmark("host_time", parser, argv)
    for shape, dtype in bench.cases(bench.options.shape, bench.options.dtype):
        measure(bench, shape, dtype)
    bench.close()


if __name__ == "__main__":
    main()
