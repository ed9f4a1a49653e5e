"""Losses of hidden states and an output embedding, forward and backward, beside eager logits.

    python benchmarks/linear.py [--device cpu|cuda] [--threads N ...] [--output FILE]

``two GEMMs`` is the floor of a frozen head: h W^T and the product of its block with W, whole or by the row
blocks that the operator uses, whichever is faster.
"""

import argparse

import torch
from harness import interleaved_times, peak_extra_bytes, write_result

from loku_kernels import linear_cross_entropy_loss, linear_ihl_loss, ops

SHAPES = [(512, 768, 50257), (512, 2048, 32000), (256, 2048, 128256)]
DTYPES = [torch.float32, torch.bfloat16]


def eager_cross_entropy(hidden, weight, labels):
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)


def eager_ihl(hidden, weight, labels):
    p = (hidden @ weight.t()).softmax(-1)
    index = labels[:, None]
    return (1 + p.gather(1, index)[:, 0] - p.scatter(1, index, -torch.inf).amax(-1)).mean()


def measure(n, d, vocab, dtype, device, runs):
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, d, device=device) / d**0.5).to(dtype)
    labels = torch.randint(0, vocab, (n,), device=device)
    trainable = weight.clone().requires_grad_()
    blocks = [index.numel() for index in ops._row_blocks(labels, -100, vocab, weight.element_size())]
    buffer = torch.empty(max(blocks), vocab, dtype=dtype, device=device)
    whole = torch.empty(n, vocab, dtype=dtype, device=device)
    plain = hidden.detach()

    def gemms_by_block():
        for part in plain.split(blocks):
            block = torch.mm(part, weight.t(), out=buffer[: part.shape[0]])
            torch.mm(block, weight)

    def gemms_whole():
        torch.mm(torch.mm(plain, weight.t(), out=whole), weight)

    functions = {
        "two GEMMs, by block": gemms_by_block,
        "two GEMMs, whole": gemms_whole,
        "linear_ihl_loss": lambda: linear_ihl_loss(hidden, weight, labels).backward(),
        "linear_cross_entropy_loss": lambda: linear_cross_entropy_loss(hidden, weight, labels).backward(),
        "linear_ihl_loss, trainable": lambda: linear_ihl_loss(hidden, trainable, labels).backward(),
        "eager cross_entropy": lambda: eager_cross_entropy(hidden, weight, labels).backward(),
        "eager IHL": lambda: eager_ihl(hidden, weight, labels).backward(),
    }

    def fresh():
        hidden.grad = trainable.grad = None

    times = interleaved_times(functions, device, runs, prepare=fresh)
    memory = {}
    for name, function in functions.items():
        fresh()
        memory[name] = peak_extra_bytes(function, device)
    floor = min(times["two GEMMs, by block"], times["two GEMMs, whole"])
    return [
        {
            "n": n,
            "d": d,
            "vocab": vocab,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "name": name,
            "milliseconds": seconds * 1e3,
            "times_two_gemms": seconds / floor,
            "times_eager_cross_entropy": seconds / times["eager cross_entropy"],
            "peak_extra_bytes": memory[name],
        }
        for name, seconds in times.items()
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--runs", type=int, default=7, help="timed rounds, of which the median is taken")
    parser.add_argument("--output", help="result file (default: benchmarks/results/linear_DEVICE.json)")
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in DTYPES:
            for shape in SHAPES:
                new = measure(*shape, dtype, options.device, options.runs)
                rows += new
                print(f"\n{shape} {new[0]['dtype']}, {threads} threads, forward + backward")
                print(f"  {'':28}{'ms':>9}{'x GEMMs':>9}{'x eager CE':>12}{'extra MiB':>11}")
                for row in new:
                    extra = row["peak_extra_bytes"]
                    print(
                        f"  {row['name']:28}{row['milliseconds']:9.1f}{row['times_two_gemms']:9.2f}"
                        f"{row['times_eager_cross_entropy']:12.2f}"
                        f"{'?' if extra is None else round(extra / 2**20):>11}",
                        flush=True,
                    )
    print("\nwritten:", write_result(f"linear_{options.device}", rows, options.device, options.output))


if __name__ == "__main__":
    main()
