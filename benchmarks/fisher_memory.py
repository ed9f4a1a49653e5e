"""Peak memory of the Fisher stage under a memory budget, on a random GPT-Neo-125M.

    python benchmarks/fisher_memory.py [--budget 64MiB 256MiB none] [--shape 2x200]

A shape is rows x tokens of the one batch of either set. Each budget is measured in a process of its own,
above the memory of that process with the model loaded. The lower limit of all budgets is measured in the same
way: a forward and backward of the same batches that computes no weight gradient. Times are recorded too.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from harness import Benchmark, arguments, peak_extra_bytes, sizes
from result_files import Row
from subjects import gpt_neo_125m, target_linears
from transformers import PreTrainedModel

from loku.data import collate
from loku.fila.row_scales import fisher_row_scales, gradients_for_activations_alone, plan_groups
from loku.fila.settings import memory_bytes
from loku.head import negative_log_likelihood

PLAIN = "forward and backward alone"


def measure(
    build_model: Callable[[], PreTrainedModel], budget: str, shape: str, threads: int, device: str
) -> Row:
    """Return the row of one budget.

    Args:
        build_model: Makes the model.
        budget: The budget, such as "64MiB", "none" for no limit, or ``PLAIN`` for the lower limit.
        shape: The shape rows x tokens of a batch.
        threads: The number of threads.
        device: The device that computes, "cpu" or "cuda".
    """
    torch.set_num_threads(threads)
    model = build_model().eval()
    model.to(torch.device(device))
    modules = target_linears(model)
    rows, tokens = sizes(shape)
    forget, retain = (
        [collate([{"input_ids": row, "labels": row} for row in part], 0)]
        for part in torch.randint(0, model.config.vocab_size, (2, rows, tokens)).tolist()
    )
    limit = None if budget in (PLAIN, "none") else memory_bytes(budget)
    groups = [] if budget == PLAIN else plan_groups(modules, rows * tokens, limit)

    def plain() -> None:
        with gradients_for_activations_alone(model):
            for batch in forget + retain:
                batch = {name: value.to(device) for name, value in batch.items()}
                negative_log_likelihood(model, batch).backward()

    run: Callable[[], object] = plain
    if groups:
        run = partial(fisher_row_scales, model, modules, forget, retain, memory_budget=limit, progress=False)
    start = time.perf_counter()
    peak = peak_extra_bytes(run, device)
    return {
        "what": shape,
        "threads": threads,
        "name": budget,
        "budget_bytes": limit,
        "passes": 2 * len(groups),
        "planned_bytes": max((group.bytes for group in groups), default=0),
        "peak_extra_bytes": peak,
        "milliseconds": (time.perf_counter() - start) * 1e3,
    }


def main(
    argv: Sequence[str] | None = None, build_model: Callable[[], PreTrainedModel] = gpt_neo_125m
) -> None:
    """Run the command on the model that ``build_model`` makes."""
    parser = arguments(__doc__, ["2x200"], shape_help="rows x tokens of a batch")
    parser.add_argument("--budget", nargs="+", default=["64MiB", "256MiB", "none"], help="memory budgets")
    bench = Benchmark("fisher_memory", parser, argv)
    options = bench.options
    fresh = multiprocessing.get_context("spawn")
    for shape, threads in bench.cases(options.shape, options.threads[:1]):
        # Each process of the pool measures one budget, so none inherits the memory of another.
        with fresh.Pool(1, maxtasksperchild=1) as pool:
            bench.add(
                pool.apply(measure, (build_model, budget, shape, threads, bench.device))
                for budget in (PLAIN, *options.budget)
            )
    bench.close()


if __name__ == "__main__":
    # The processes to come inherit it. glibc returns freed blocks of this size, so they are not counted.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    main()
