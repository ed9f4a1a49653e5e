"""The Fisher information: squared per-sample gradients of a linear layer, and of a whole model.

    python benchmarks/fisher.py [--shape 8x128x768x3072 ...] [--models ...] [--threads N ...]

A shape is samples x tokens x outputs x inputs. The floor of the kernel is the weight-gradient GEMM over the
same tokens, which sums over all samples and squares nothing. The peers hold the gradients of all samples: one
einsum, as in opacus, and ``torch.func``, a gradient vmapped over the samples (which computes the layer's
outputs too).

The floor of a whole model is a batched forward and backward without weight gradients, and their GEMMs.
``loop`` is the textbook's way: one sample at a time, full backward, square, add.
"""

from collections.abc import Sequence
from typing import Any

import torch
from harness import DTYPES, Benchmark, arguments, sizes
from subjects import gpt_neo_125m, target_linears
from torch import Tensor
from transformers import PreTrainedModel

from loku_kernels import accumulate_squared_grad_

SHAPES = ["8x128x768x3072", "16x64x2048x2048", "4x512x768x768"]
# Samples in one batch of the whole models. Short rows are fast in batches, long rows are fast alone and so
# need less memory. The result is the same.
BATCH_SIZES = {"embedded": 4, "GPT-Neo-125M": 1}


def einsum_square_sum(fisher: Tensor, inputs: Tensor, grad_outputs: Tensor) -> Tensor:
    """Add the squared per-sample gradients to ``fisher``, through one (n, d, k) tensor.

    Args:
        fisher: The sum (d, k), float32, which is changed and returned.
        inputs: The inputs of the layer (n, t, k).
        grad_outputs: The gradients of its outputs (n, t, d).
    """
    return fisher.add_(torch.einsum("ntd,ntk->ndk", grad_outputs, inputs).float().square_().sum(0))


def torch_func(fisher: Tensor, weight: Tensor, inputs: Tensor, grad_outputs: Tensor) -> Tensor:
    """Add the same by torch.func: the gradient of one sample, vmapped over the samples."""

    def sample_gradient(x: Tensor, g: Tensor) -> Tensor:
        pull_back = torch.func.vjp(lambda w: torch.nn.functional.linear(x, w), weight)[1]
        return pull_back(g)[0]

    return fisher.add_(torch.func.vmap(sample_gradient)(inputs, grad_outputs).float().square_().sum(0))


def check(inputs: Tensor, grad_outputs: Tensor, divisor: Tensor, weight: Tensor) -> None:
    """Compare ours and the peers with an einsum in float64."""
    grads = torch.einsum("ntd,ntk->ndk", grad_outputs.double(), inputs.double()).square()
    tolerance = 1e-5 if inputs.dtype == torch.float32 else 2 * torch.finfo(inputs.dtype).eps
    exact = grads.sum(0)
    for name, accumulate in (
        ("accumulate_squared_grad_", accumulate_squared_grad_),
        ("einsum", einsum_square_sum),
        ("torch.func", lambda fisher, *tensors: torch_func(fisher, weight, *tensors)),
    ):
        error = (accumulate(torch.zeros_like(divisor), inputs, grad_outputs) - exact).abs()
        assert (error <= tolerance * (exact + exact.mean())).all(), f"{name} is wrong"
    exact = (exact / divisor).sum(1)
    ours = accumulate_squared_grad_(
        torch.zeros(len(divisor), device=divisor.device), inputs, grad_outputs, divisor
    )
    assert ((ours - exact).abs() <= tolerance * exact).all(), "accumulate_squared_grad_ with divisor is wrong"


def measure(bench: Benchmark, shape: str, dtype_name: str) -> None:
    """Check and measure one layer in one dtype."""
    n, tokens, d, k = sizes(shape)
    dtype, device = DTYPES[dtype_name], bench.device
    torch.manual_seed(0)
    inputs = torch.randn(n, tokens, k, device=device).to(dtype)
    grad_outputs = (torch.randn(n, tokens, d, device=device) * 1e-2).to(dtype)
    divisor = torch.rand(d, k, device=device) + 0.1
    weight = torch.randn(d, k, device=device).to(dtype)
    check(inputs, grad_outputs, divisor, weight)
    fisher, rows = torch.zeros(d, k, device=device), torch.zeros(d, device=device)
    weight_grad = torch.empty_like(weight)
    flat_inputs, flat_grads = inputs.view(-1, k), grad_outputs.view(-1, d)
    functions = {
        "weight-gradient GEMM": lambda: torch.mm(flat_grads.t(), flat_inputs, out=weight_grad),
        "accumulate_squared_grad_": lambda: accumulate_squared_grad_(fisher, inputs, grad_outputs),
        "accumulate_squared_grad_, divisor": lambda: accumulate_squared_grad_(
            rows, inputs, grad_outputs, divisor
        ),
        "einsum": lambda: einsum_square_sum(fisher, inputs, grad_outputs),
        "torch.func": lambda: torch_func(fisher, weight, inputs, grad_outputs),
    }
    bench.compare(
        shape,
        functions,
        dtype=dtype_name,
        over=["einsum", "torch.func"],
        floors={"weight-gradient GEMM": ["weight-gradient GEMM"]},
    )


# --- a whole model --------------------------------------------------------------------------------

Subject = tuple[PreTrainedModel, list[Any], int]


def embedded_model(count: int = 40) -> Subject:
    """Return the embedded model, ``count`` tokenised rows of either set, and the padding token."""
    from loku.data import padding_id, tokenize_dataset
    from loku.demo import load_model, load_rows

    model, tokenizer = load_model()
    sets = [tokenize_dataset(rows[:count], tokenizer) for rows in load_rows()]
    return model, sets, padding_id(tokenizer)


def gpt_neo(count: int = 4, tokens: int = 200) -> Subject:
    """Return a random GPT-Neo-125M, ``count`` rows of random tokens for either set, and the padding token."""
    model = gpt_neo_125m()
    ids = torch.randint(0, model.config.vocab_size, (2, count, tokens)).tolist()
    return model, [[{"input_ids": row, "labels": row} for row in rows] for rows in ids], 0


MODELS = {"embedded": embedded_model, "GPT-Neo-125M": gpt_neo}


def measure_model(bench: Benchmark, name: str) -> None:
    """Check and measure the row scales of a whole model of ``MODELS``."""
    from loku.data import collate
    from loku.fila.row_scales import fisher_row_scales
    from loku.head import negative_log_likelihood

    model, sets, padding = MODELS[name]()
    device = bench.device
    model.to(device).eval()
    modules = target_linears(model)

    def batches(rows: list[Any], size: int) -> list[dict[str, Tensor]]:
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        parts = [collate(rows[i : i + size], padding) for i in range(0, len(rows), size)]
        return [{key: value.to(device) for key, value in part.items()} for part in parts]

    together, alone = ([batches(rows, size) for rows in sets] for size in (BATCH_SIZES[name], 1))

    def streamed() -> dict[str, Tensor]:
        forget, retain = together
        return fisher_row_scales(model, modules, forget, retain, progress=False)

    def loop() -> dict[str, Tensor]:
        model.requires_grad_(True)
        fishers = []
        for part in alone:
            fisher = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
            for batch in part:
                negative_log_likelihood(model, batch).backward()
                for name, module in modules.items():
                    assert module.weight.grad is not None
                    fisher[name] += module.weight.grad.square() / len(part)
                model.zero_grad()
            fishers.append(fisher)
        scales = {}
        for name in modules:
            forget, retain = (fisher[name] for fisher in fishers)
            score = (forget / (retain + retain.mean())).sum(1)
            scales[name] = (score / score.mean()).sqrt()
        return scales

    tokens = max(batch["input_ids"].numel() for part in together for batch in part)
    operands = [
        [torch.randn(tokens, features, device=device) for features in (m.out_features, m.in_features)]
        for m in modules.values()
    ]

    def floor() -> None:
        model.requires_grad_(False)
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
        for part in together:
            for batch in part:
                negative_log_likelihood(model, batch).backward()
                count = batch["input_ids"].numel()
                for grads, inputs in operands:
                    torch.mm(grads[:count].t(), inputs[:count])
        hook.remove()

    ours, exact = streamed(), loop()
    for module in modules:
        torch.testing.assert_close(ours[module], exact[module], rtol=1e-2, atol=1e-3)
    bench.compare(
        name,
        {"fisher_row_scales": streamed, "loop": loop, "floor": floor},
        over=["loop"],
        floors={"floor": ["floor"]},
        runs=min(bench.runs, 3),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = arguments(__doc__, SHAPES, shape_help="samples x tokens x outputs x inputs")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="whole models")
    bench = Benchmark("fisher", parser, argv)
    for shape, dtype in bench.cases(bench.options.shape, bench.options.dtype):
        measure(bench, shape, dtype)
    for (name,) in bench.cases(bench.options.models):
        measure_model(bench, name)
    bench.close()


if __name__ == "__main__":
    main()
