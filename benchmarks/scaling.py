"""Growth of time and peak extra memory with the vocabulary, and with N x V up to 2^32 entries.

    python benchmarks/scaling.py [--shape 256x1024 ...] [--large 64x262144 ...] [--threads N ...]

The part ``logits`` measures IHL forward and backward on logits of ``--shape`` N x V, ours and each peer. The
part ``linear`` measures the same from hidden states of width 768. The part ``large`` measures ``ihl_loss`` in
place on bfloat16 logits of ``--large`` N x V: in one call if they fit into memory, else by blocks of rows
through one buffer. Its floor is a read of the logits. ``benchmarks/report.py`` draws
``benchmarks/results/scaling_cpu.png`` from the first part.
"""

from collections.abc import Sequence

import torch
from harness import DTYPES, Benchmark, arguments, sizes
from ihl_kernel import read
from peers import lean_ihl, official_ihl
from subjects import random_logits

from loku_kernels import ihl_loss, linear_ihl_loss

SHAPES = [f"256x{2**power}" for power in range(10, 19)]
LARGE = [f"{2**power}x262144" for power in range(6, 15, 2)]
WIDTH = 768
PART_ROWS = 64


def measure_logits(bench: Benchmark, shape: str, dtype: str) -> None:
    """Measure IHL forward and backward on logits N x V."""
    n, vocab = sizes(shape)
    source, labels = random_logits(n, vocab, DTYPES[dtype], bench.device)
    logits, buffer = source.clone(), torch.empty_like(source)

    def fresh_logits() -> None:
        logits.requires_grad_(False).copy_(source).requires_grad_()
        logits.grad = None

    functions = {
        "official formula": lambda: official_ihl(logits, labels).backward(),
        "lean eager": lambda: lean_ihl(logits, labels).backward(),
        "cross_entropy": lambda: torch.nn.functional.cross_entropy(logits, labels).backward(),
        "ihl_loss in place": lambda: ihl_loss(logits, labels, inplace=True).backward(),
        "copy": lambda: buffer.copy_(logits.detach()),
    }
    bench.compare(
        shape,
        functions,
        dtype=dtype,
        over=["official formula", "lean eager", "cross_entropy"],
        floors={"copy": ["copy"]},
        prepare=fresh_logits,
        part="logits",
        n=n,
        vocab=vocab,
    )


def measure_linear(bench: Benchmark, shape: str, dtype: str) -> None:
    """Measure IHL forward and backward from hidden states of width ``WIDTH``."""
    n, vocab = sizes(shape)
    torch.manual_seed(0)
    hidden = torch.randn(n, WIDTH, device=bench.device).to(DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(vocab, WIDTH, device=bench.device) * 3 / WIDTH**0.5).to(DTYPES[dtype])
    labels = torch.randint(0, vocab, (n,), device=bench.device)

    def fresh() -> None:
        hidden.grad = None

    functions = {
        "eager IHL": lambda: lean_ihl(hidden @ weight.t(), labels).backward(),
        "eager cross_entropy": lambda: torch.nn.functional.cross_entropy(
            hidden @ weight.t(), labels
        ).backward(),
        "linear_ihl_loss": lambda: linear_ihl_loss(hidden, weight, labels).backward(),
    }
    bench.compare(
        shape,
        functions,
        dtype=dtype,
        over=["eager IHL", "eager cross_entropy"],
        prepare=fresh,
        part="linear",
        n=n,
        vocab=vocab,
    )


def free_bytes(device: str) -> int:
    """Return the free memory of the device in bytes, or 0 if it is unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            return int(dict(line.split(":") for line in file)["MemAvailable"].split()[0]) << 10
    except OSError:
        return 0


def measure_large(bench: Benchmark, shape: str, limit_bytes: int) -> None:
    """Measure ``ihl_loss`` in place on bfloat16 logits N x V.

    Args:
        bench: The benchmark.
        shape: The shape N x V.
        limit_bytes: The largest logits of one call, in bytes. Larger ones are measured by blocks of rows.
    """
    n, vocab = sizes(shape)
    part, part_labels = random_logits(min(n, PART_ROWS), vocab, torch.bfloat16, bench.device)
    whole = n * vocab * part.element_size()
    one_call = whole <= limit_bytes and 1.5 * whole <= free_bytes(bench.device)
    rows = n if one_call else max(1, min(n, limit_bytes // 4 // (vocab * part.element_size())))
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=bench.device)
    labels = part_labels.repeat(-(-rows // len(part)))[:rows]

    def fresh_logits() -> None:
        logits.requires_grad_(False)
        for target in logits.split(len(part)):
            target.copy_(part[: len(target)])
        logits.requires_grad_()

    calls = -(-n // rows)
    bench.compare(
        shape,
        {
            "ihl_loss in place": lambda: ihl_loss(logits, labels, inplace=True).backward(),
            "read": lambda: read(logits),
        },
        dtype="bfloat16",
        floors={"read": ["read"]},
        prepare=fresh_logits,
        repeats={"ihl_loss in place": calls, "read": calls},
        part="large",
        n=n,
        vocab=vocab,
        calls=calls,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = arguments(__doc__, SHAPES, ("float32",), "N x V of the sweep over the vocabulary")
    parser.add_argument("--large", nargs="*", default=LARGE, help="N x V in bfloat16")
    parser.add_argument(
        "--limit-gib", type=float, default=8, help="larger logits, in GiB, are measured by blocks of rows"
    )
    bench = Benchmark("scaling", parser, argv)
    for measure in (measure_logits, measure_linear):
        for dtype, shape in bench.cases(bench.options.dtype, bench.options.shape):
            measure(bench, shape, dtype)
    for (shape,) in bench.cases(bench.options.large):
        measure_large(bench, shape, int(bench.options.limit_gib * 2**30))
    bench.close()


if __name__ == "__main__":
    main()
