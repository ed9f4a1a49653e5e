"""The plan of ``gpu.py``: its steps and shapes, and floors computed from the data sheets of cards."""

from collections.abc import Mapping, Sequence
from typing import Any

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
# layers, width, width of the MLP and vocabulary of Llama-2-7B
LLAMA_7B_MODEL: Shape = (32, 4096, 11008, 32000)
SHAPES: dict[str, list[Shape]] = {
    "host": [(8, 32, 64), (64, 32, 1000)],
    "forward": LOGITS,
    "fused": LOGITS,
    "linear": [(8192, 4096, 32000), (8192, 4096, 128256), (2048, 2304, 256000)],
    "fisher": [
        *((n, t, 4096, k) for k in (4096, 11008) for t in (128, 512) for n in (1, 4, 16)),
        (16, 200, 4096, 4096),
    ],
    "fila": LLAMA_7B,
    "step": [(*LLAMA_7B_MODEL, 8, 200)],
    "initialise": [LLAMA_7B_MODEL],
    "run": [(*LLAMA_7B_MODEL, 400, 200, 5)],
}
# The shapes of --device cpu, which shows without a card that everything runs.
SMALL_SHAPES: dict[str, list[Shape]] = {
    "host": [(4, 8, 16)],
    "forward": [(6, 50), (8, 40)],
    "fused": [(6, 50)],
    "linear": [(12, 8, 60)],
    "fisher": [(2, 3, 8, 6)],
    "fila": [(40, 36, 2)],
    "step": [(2, 64, 96, 80, 2, 8)],
    "initialise": [(2, 64, 96, 80)],
    "run": [(2, 64, 96, 80, 4, 8, 2)],
}
STEPS = {
    "build": "the compiled core, for the card found",
    "tests": "pytest -m gpu",
    "host": "processor time of small calls; target: 2 x eager cross_entropy, 3 x for the linear losses",
    "forward": "triplet forward, bfloat16 logits; target: 90% of the copy's bandwidth at 2 bytes a logit",
    "fused": "IHL forward and backward in place; target: 1.15 x a copy, 1.25 x at rows of unaligned starts",
    "linear": "linear IHL and cross entropy, frozen head; target: 1.07 x two GEMMs, 1.16 x at width 2304",
    "fisher": "accumulate_squared_grad_; target: 1.35 x the GEMM from 8192 tokens on, 1.8 x from 2048 on",
    "fila": "row_scaled_svd of all 224 matrices of Llama-2-7B; target: the time of torch.svd_lowrank",
    "step": "a training step of Llama-2-7B's shape, rank 32; target: 1.5 x the step without adapters",
    "initialise": "FILA initialisation of Llama-2-7B's shape, rank 32; target: 3 s",
    "run": "loku.unlearn of Llama-2-7B's shape on 400 + 400 rows, 5 epochs; target: 120 s and 40 GiB",
}
# Seconds after which a step is cut off. Nothing of it begins later, and its last case is recorded as failed.
BUDGETS = {
    "build": 300,
    "tests": 240,
    "host": 30,
    "forward": 60,
    "fused": 90,
    "linear": 150,  # quack tunes its products first
    "fisher": 60,
    "fila": 60,
    "step": 90,
    "initialise": 90,
    "run": 300,
}
RANK = 32
# The name of a device in torch -> its data sheet. Cards of the same family with other memory are left out.
DEVICES = {
    "NVIDIA A100-SXM4-80GB": "A100 SXM",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H200": "H200 SXM",
    "NVIDIA B200": "B200",
}


def data_sheet_share(row: Mapping[str, Any], device: str) -> float | None:
    """Return the share of the card's bandwidth, or of its bfloat16 operations, that a row's rate has.

    Args:
        row: The row, with ``gigabytes_per_second`` or ``teraflops``.
        device: The name of the device in torch.

    Returns:
        The share, or None if the row has no rate or the card no data sheet here.
    """
    bandwidth, bfloat16, _ = CARDS.get(DEVICES.get(device, ""), (None, None, None))
    if bandwidth and "gigabytes_per_second" in row:
        return row["gigabytes_per_second"] * 1e9 / bandwidth
    if bfloat16 and "teraflops" in row:
        return row["teraflops"] * 1e12 / bfloat16
    return None


def linear_weights(layers: int, width: int, mlp: int) -> int:
    """Return the number of weights in the linear layers of a Llama without grouped queries."""
    return layers * (4 * width**2 + 3 * width * mlp)


def model_floor(step: str, shape: Shape) -> tuple[float, float]:
    """Return the smallest (bytes, operations) of a step that runs a whole model in bfloat16.

    A training step has the forward and the gradient of the activations. The Fisher passes have these and the
    gradient of the weights. Attention is left out.
    """
    layers, width, mlp, vocab, *rest = shape
    linears, head = linear_weights(layers, width, mlp), vocab * width
    if step == "initialise":  # three Krylov blocks and the values of V, as in row_scaled_svd
        return 8 * 2 * linears, 8 * 2 * linears * (RANK + 8)
    rows, tokens, *epochs = rest
    step_bytes, step_operations = 4 * (linears + head), 4 * (linears + head) * 2 * rows * tokens
    if step == "step":
        return step_bytes, step_operations
    fisher = (6 * linears + 4 * head) * 2 * rows * tokens
    return step_bytes * epochs[0], step_operations * epochs[0] + fisher


def floors(step: str, shape: Shape, card: str) -> tuple[float, float, float]:
    """Return the smallest (bytes, operations, seconds) of a case in bfloat16, from a card's data sheet."""
    bandwidth, bfloat16, _ = CARDS[card]
    moved: float
    operations: float
    if step in ("forward", "fused"):
        n, v = shape
        moved, operations = (2 if step == "forward" else 4) * n * v, 0
    elif step in ("linear", "host"):
        n, d, v = shape
        moved, operations = 2 * (v * d + 3 * n * d), 4 * n * d * v
    elif step == "fisher":
        n, t, d, k = shape
        moved, operations = 2 * n * t * (d + k) + 8 * d * k, 2 * n * t * d * k
    elif step == "fila":  # three Krylov blocks and the values of V; every product reads the weights once
        d, k, count = shape
        moved, operations = 8 * 2 * d * k * count, 8 * 2 * d * k * (RANK + 8) * count
    else:
        moved, operations = model_floor(step, shape)
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
                f"  {label_of(shape):32} {moved / 1e9:8.2f} GB {operations / 1e12:8.2f} TFLOP"
                f" {seconds * 1e3:9.3f} ms"
            )
