"""Peak memory of the Fisher stage under a memory budget, on a random GPT-Neo-125M.

    python benchmarks/fisher_memory.py [--budget 64MiB 256MiB none] [--shape 2x200]

A shape is rows x tokens of the one batch of either set. Each budget is measured in a process of its own,
above what that holds with the model loaded, and so is what no budget can go below: a forward and backward of
the same batches that computes no weight gradient. Times are recorded, but memory is what is measured.
"""

import multiprocessing
import os
import time
from functools import partial

import torch
from harness import Benchmark, arguments, gpt_neo_125m, peak_extra_bytes, sizes

from loku.data import collate
from loku.fila.row_scales import fisher_row_scales, gradients_for_activations_alone, memory_bytes, plan_groups
from loku.fila.targets import default_target_modules
from loku.head import negative_log_likelihood

PLAIN = "forward and backward alone"


def measure(build_model, budget, shape, threads, device):
    """The row of one budget ("none" for no limit), or of ``PLAIN``."""
    torch.set_num_threads(threads)
    model = build_model().to(device).eval()
    targets = tuple(default_target_modules(model))
    modules = {n: m for n, m in model.named_modules() if n.endswith(targets) and hasattr(m, "weight")}
    rows, tokens = sizes(shape)
    forget, retain = (
        [collate([{"input_ids": row, "labels": row} for row in part], 0)]
        for part in torch.randint(0, model.config.vocab_size, (2, rows, tokens)).tolist()
    )
    limit = None if budget in (PLAIN, "none") else memory_bytes(budget)
    groups = [] if budget == PLAIN else plan_groups(modules, rows * tokens, limit)

    def plain():
        with gradients_for_activations_alone(model):
            for batch in forget + retain:
                batch = {name: value.to(device) for name, value in batch.items()}
                negative_log_likelihood(model, batch).backward()

    run = plain
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


def main(argv=None, build_model=gpt_neo_125m):
    parser = arguments(__doc__, ["2x200"], shape_help="rows x tokens of a batch")
    parser.add_argument("--budget", nargs="+", default=["64MiB", "256MiB", "none"])
    bench = Benchmark("fisher_memory", parser, argv)
    options = bench.options
    fresh = multiprocessing.get_context("spawn")
    for shape, threads in bench.cases(options.shape, options.threads[:1]):
        # A pool whose processes do one thing each: the memory that one leaves behind is not another's.
        with fresh.Pool(1, maxtasksperchild=1) as pool:
            bench.add(
                pool.apply(measure, (build_model, budget, shape, threads, bench.device))
                for budget in (PLAIN, *options.budget)
            )
    bench.close()


if __name__ == "__main__":
    # For the processes to come. Else glibc keeps blocks that were freed, and what it keeps would be counted.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    main()
