"""The plan of ``gpu.py``: its steps and shapes, and floors computed from the data sheets of cards."""

from collections.abc import Sequence

Shape = tuple[int, ...]

CARDS = {  # bytes a second, bfloat16 and float32 operations a second, from the data sheets
    "A100 SXM": (2.04e12, 312e12, 19.5e12),
    "H100 SXM": (3.35e12, 989e12, 67e12),
    "H200 SXM": (4.8e12, 989e12, 67e12),
    "B200": (8.0e12, 2250e12, 75e12),
}
LOGITS: list[Shape] = [(n, v) for v in (32000, 50257, 128256, 262144) for n in (2048, 8192, 16384)]
# outputs, inputs and number of the adapted matrices of Llama-2-7B: 224 in all
LLAMA_7B: list[Shape] = [(4096, 4096, 128), (11008, 4096, 64), (4096, 11008, 32)]
SHAPES: dict[str, list[Shape]] = {
    "forward": LOGITS,
    "fused": LOGITS,
    "linear": [(8192, 4096, 32000), (8192, 4096, 128256), (2048, 2304, 256000)],
    "fisher": [(n, t, 4096, k) for k in (4096, 11008) for t in (128, 512) for n in (1, 4, 16)],
    "fila": LLAMA_7B,
}
STEPS = {
    "build": "the compiled core, for the card found",
    "tests": "pytest -m gpu",
    "forward": "triplet forward, bfloat16 logits; target: 90% of the copy's bandwidth at 2 bytes a logit",
    "fused": "IHL forward and backward in place; target: 85% of the copy's bandwidth at 4 bytes a logit",
    "linear": "linear IHL and cross entropy, frozen head; target: two GEMMs + 1.2 x the elementwise bytes",
    "fisher": "accumulate_squared_grad_; target: 1.8 x max(compute, bytes) from 2048 tokens on",
    "fila": "row_scaled_svd of all 224 matrices of Llama-2-7B; target: 10 x faster than torch.svd_lowrank",
}
RANK = 32


def floors(step: str, shape: Shape, card: str) -> tuple[float, float, float]:
    """Return the smallest (bytes, operations, seconds) of a case in bfloat16, from a card's data sheet."""
    bandwidth, bfloat16, _ = CARDS[card]
    if step in ("forward", "fused"):
        n, v = shape
        moved, operations = (2 if step == "forward" else 4) * n * v, 0
    elif step == "linear":
        n, d, v = shape
        moved, operations = 2 * (v * d + 3 * n * d), 4 * n * d * v
    elif step == "fisher":
        n, t, d, k = shape
        moved, operations = 2 * n * t * (d + k) + 8 * d * k, 2 * n * t * d * k
    else:  # three Krylov blocks and the values of V; every product reads the weights once
        d, k, count = shape
        moved, operations = 8 * 2 * d * k * count, 8 * 2 * d * k * (RANK + 8) * count
    return moved, operations, max(moved / bandwidth, operations / bfloat16)


def label_of(shape: Shape) -> str:
    """Return a shape as "2x3"."""
    return "x".join(map(str, shape))


def dry_run(steps: Sequence[str], card: str) -> None:
    """Print the shapes of the steps and their floors."""
    print(f"floors by the data sheet of {card}, computed and not measured\n")
    for step in steps:
        print(f"{step}: {STEPS[step]}")
        for shape in SHAPES.get(step, ()):
            moved, operations, seconds = floors(step, shape, card)
            print(
                f"  {label_of(shape):20} {moved / 1e9:8.2f} GB {operations / 1e12:8.2f} TFLOP"
                f" {seconds * 1e3:9.3f} ms"
            )
