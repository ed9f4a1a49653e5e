"""The Fisher information: squared per-sample gradients of a linear layer, and of a whole model.

    python benchmarks/fisher.py [--quick] [--shape 8x128x768x3072 ...] [--threads N] [--output FILE]

A shape is samples x tokens x outputs x inputs. The floor of the kernel is the weight-gradient GEMM over the
same tokens: the library's sum over all of them, with nothing squared. That of a whole model is a batched
forward and backward that computes no weight gradient, and those GEMMs. ``loop`` is the textbook's way: one
sample at a time, full backward, square, add.
"""

import argparse

import torch
from harness import interleaved_times, peak_extra_bytes, write_result

from loku_kernels import accumulate_squared_grad_

SHAPES = ["8x128x768x3072", "16x64x2048x2048", "4x512x768x768"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def batched_per_sample(fisher, inputs, grad_outputs):
    """Plain torch with an (n, d, k) tensor, as per-sample gradients are usually taken."""
    return fisher.add_(torch.einsum("ntd,ntk->ndk", grad_outputs, inputs).float().square_().sum(0))


def check(inputs, grad_outputs, divisor):
    d, k = divisor.shape
    grads = torch.einsum("ntd,ntk->ndk", grad_outputs.double(), inputs.double()).square()
    tolerance = 2**-7 if inputs.dtype == torch.bfloat16 else 1e-5
    exact = grads.sum(0)
    ours = accumulate_squared_grad_(torch.zeros(d, k, device=divisor.device), inputs, grad_outputs)
    assert ((ours - exact).abs() <= tolerance * exact + 1e-6 * exact.max()).all()
    exact = (exact / divisor).sum(1)
    ours = accumulate_squared_grad_(torch.zeros(d, device=divisor.device), inputs, grad_outputs, divisor)
    assert ((ours - exact).abs() <= tolerance * exact).all()


def measure(shape, dtype, device, runs):
    n, tokens, d, k = map(int, shape.split("x"))
    torch.manual_seed(0)
    inputs = torch.randn(n, tokens, k, device=device).to(dtype)
    grad_outputs = (torch.randn(n, tokens, d, device=device) * 1e-2).to(dtype)
    divisor = torch.rand(d, k, device=device) + 0.1
    check(inputs, grad_outputs, divisor)
    fisher, rows = torch.zeros(d, k, device=device), torch.zeros(d, device=device)
    weight_grad = torch.empty(d, k, dtype=dtype, device=device)
    flat_inputs, flat_grads = inputs.view(-1, k), grad_outputs.view(-1, d)
    functions = {
        "weight-gradient GEMM": lambda: torch.mm(flat_grads.t(), flat_inputs, out=weight_grad),
        "accumulate_squared_grad_": lambda: accumulate_squared_grad_(fisher, inputs, grad_outputs),
        "  with divisor": lambda: accumulate_squared_grad_(rows, inputs, grad_outputs, divisor),
        "einsum, square, sum": lambda: batched_per_sample(fisher, inputs, grad_outputs),
    }
    times = interleaved_times(functions, device, runs)
    return [
        {
            "what": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "name": name,
            "milliseconds": seconds * 1e3,
            "times_floor": seconds / times["weight-gradient GEMM"],
            "peak_extra_bytes": peak_extra_bytes(functions[name], device),
        }
        for name, seconds in times.items()
    ]


# --- a whole model --------------------------------------------------------------------------------


def embedded_model(count):
    """The embedded model and ``count`` rows of its forget set and as many of its retain set, tokenised."""
    from loku.data import padding_id, tokenize_dataset
    from loku.demo import load_model, load_rows

    model, tokenizer = load_model()
    sets = [tokenize_dataset(rows[:count], tokenizer) for rows in load_rows()]
    return model, sets, padding_id(tokenizer)


def gpt_neo(count, tokens=200):
    """A random GPT-Neo-125M and rows of random tokens."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        num_layers=12, hidden_size=768, num_heads=12, attention_types=[[["global", "local"], 6]]
    )
    model = GPTNeoForCausalLM(config)

    def rows():
        ids = torch.randint(0, config.vocab_size, (count, tokens)).tolist()
        return [{"input_ids": row, "labels": row} for row in ids]

    return model, [rows(), rows()], 0


def measure_model(name, model, sets, padding, device, runs, batch_size):
    from loku.data import collate
    from loku.head import negative_log_likelihood
    from loku.importance import fisher_row_scales
    from loku.targets import default_target_modules

    model.to(device).eval()
    targets = tuple(default_target_modules(model))
    modules = {
        name: m for name, m in model.named_modules() if name.endswith(targets) and hasattr(m, "weight")
    }

    def batches(rows, size):
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        parts = [collate(rows[i : i + size], padding) for i in range(0, len(rows), size)]
        return [{key: value.to(device) for key, value in part.items()} for part in parts]

    together, alone = ([batches(rows, size) for rows in sets] for size in (batch_size, 1))

    def streamed():
        forget, retain = together
        return fisher_row_scales(model, modules, forget, retain, progress=False)

    def loop():
        model.requires_grad_(True)
        fishers = []
        for part in alone:
            fisher = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
            for batch in part:
                negative_log_likelihood(model, batch).backward()
                for name, module in modules.items():
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

    def floor():
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
    functions = {"fisher_row_scales": streamed, "loop": loop, "floor": floor}
    memory = {name: peak_extra_bytes(function, device) for name, function in functions.items()}
    times = interleaved_times(functions, device, runs)
    return [
        {
            "what": name,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "name": function,
            "milliseconds": seconds * 1e3,
            "times_floor": seconds / times["floor"],
            "speedup_over_loop": times["loop"] / seconds,
            "peak_extra_bytes": memory[function],
        }
        for function, seconds in times.items()
    ]


def print_rows(rows):
    print(f"\n{rows[0]['what']} {rows[0]['dtype']}, {rows[0]['threads']} threads")
    print(f"  {'':26}{'ms':>10}{'x floor':>9}{'extra MiB':>11}")
    for row in rows:
        extra = row["peak_extra_bytes"]
        print(
            f"  {row['name']:26}{row['milliseconds']:10.1f}{row['times_floor']:9.2f}"
            f"{'?' if extra is None else round(extra / 2**20):>11}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="samples x tokens x outputs x inputs")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--runs", type=int, default=7, help="timed rounds, of which the median is taken")
    parser.add_argument("--quick", action="store_true", help="three rounds, a few rows, no GPT-Neo")
    parser.add_argument("--output", help="result file (default: benchmarks/results/fisher_DEVICE.json)")
    options = parser.parse_args()
    runs = min(options.runs, 3) if options.quick else options.runs
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtype:
            for shape in options.shape:
                new = measure(shape, DTYPES[dtype], options.device, runs)
                print_rows(new)
                rows += new
        models = {"embedded model": lambda: embedded_model(16 if options.quick else 40)}
        if not options.quick:
            models["GPT-Neo-125M"] = lambda: gpt_neo(4)
        for name, build in models.items():
            new = measure_model(name, *build(), options.device, min(runs, 3), 8)
            print_rows(new)
            rows += new
    print("\nwritten:", write_result(f"fisher_{options.device}", rows, options.device, options.output))


if __name__ == "__main__":
    main()
