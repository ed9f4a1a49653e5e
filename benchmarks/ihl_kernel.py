"""Forward and backward of the Inverted Hinge Loss on logits (N, V), beside its peers.

    python benchmarks/ihl_kernel.py [--device cpu|cuda] [--output FILE]

``copy`` is the floor: the logits copied into another buffer, one read and one write. ``cross_entropy`` is
a yardstick: torch's own fused loss. Bandwidth counts one read and one write of the logits for all.
"""

import argparse

import torch
from harness import interleaved_times, peak_extra_bytes, write_result

from loku_kernels import ihl_loss

SHAPES = [(256, 50257), (512, 32000), (256, 128256)]
DTYPES = [torch.float32, torch.bfloat16]


def official_ihl(logits, labels):
    """As the authors' code computes it: softmax, a one-hot mask, a boolean gather."""
    p = torch.softmax(logits, dim=-1)
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    p_target = p[one_hot]
    p_runner_up = p.masked_fill(one_hot, -torch.inf).max(dim=-1).values
    return (1 + p_target - p_runner_up).mean()


def lean_ihl(logits, labels):
    """Plain torch with as few (N, V) tensors as it takes."""
    p = torch.softmax(logits, dim=-1)
    index = labels[:, None]
    p_target = p.gather(1, index)[:, 0]
    p_runner_up = p.scatter(1, index, -torch.inf).amax(-1)
    return (1 + p_target - p_runner_up).mean()


def measure(n, vocab, dtype, device, runs):
    torch.manual_seed(0)
    source = (torch.randn(n, vocab, device=device) * 3).to(dtype)
    labels = torch.randint(0, vocab, (n,), device=device)
    logits = source.clone()

    def fresh_logits():  # a kernel that works in place consumes them
        logits.requires_grad_(False).copy_(source).requires_grad_()
        logits.grad = None

    peers = {
        "official formula": lambda: official_ihl(logits, labels).backward(),
        "lean eager": lambda: lean_ihl(logits, labels).backward(),
        "cross_entropy": lambda: torch.nn.functional.cross_entropy(logits, labels).backward(),
        "ihl_loss": lambda: ihl_loss(logits, labels).backward(),
        "ihl_loss in place": lambda: ihl_loss(logits, labels, inplace=True).backward(),
    }
    memory = {}
    for name, function in peers.items():
        fresh_logits()
        memory[name] = peak_extra_bytes(function, device)
    buffer = torch.empty_like(source)
    memory["copy"] = 0
    times = interleaved_times(
        {**peers, "copy": lambda: buffer.copy_(source)}, device, runs, prepare=fresh_logits
    )
    traffic = 2 * source.numel() * source.element_size()
    return [
        {
            "n": n,
            "vocab": vocab,
            "dtype": str(dtype).removeprefix("torch."),
            "name": name,
            "milliseconds": seconds * 1e3,
            "gigabytes_per_second": traffic / seconds / 1e9,
            "tokens_per_second": n / seconds,
            "peak_extra_bytes": memory[name],
            "speedup_over_lean_eager": times["lean eager"] / seconds,
            "times_copy": seconds / times["copy"],
        }
        for name, seconds in times.items()
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=7, help="timed rounds, of which the median is taken")
    parser.add_argument("--output", help="result file (default: benchmarks/results/ihl_kernel_DEVICE.json)")
    options = parser.parse_args()
    rows = []
    for dtype in DTYPES:
        for n, vocab in SHAPES:
            rows += measure(n, vocab, dtype, options.device, options.runs)
            print(f"\n{n} x {vocab} {rows[-1]['dtype']}, forward + backward")
            print(f"  {'':20}{'ms':>9}{'GB/s':>8}{'tokens/s':>12}{'extra MiB':>11}{'x lean':>8}{'x copy':>8}")
            for row in rows[-6:]:
                extra = row["peak_extra_bytes"]
                print(
                    f"  {row['name']:20}{row['milliseconds']:9.2f}{row['gigabytes_per_second']:8.2f}"
                    f"{row['tokens_per_second']:12.0f}"
                    f"{'?' if extra is None else round(extra / 2**20):>11}"
                    f"{row['speedup_over_lean_eager']:8.1f}{row['times_copy']:8.2f}"
                )
    print("\nwritten:", write_result(f"ihl_kernel_{options.device}", rows, options.device, options.output))


if __name__ == "__main__":
    main()
