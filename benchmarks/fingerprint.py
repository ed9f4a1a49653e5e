"""The digest by which a checkpoint and the cache of row scales know a base model.

    python benchmarks/fingerprint.py [--shape 8x4096 ...]

A shape L x D is a model of L square matrices of width D. The time is the processor time of all threads, so it
is the time on a clock times the number of threads that the digest has cores for (at most 8). The floor is
SHA-256 of the same bytes.
"""

import hashlib
import time
from collections.abc import Sequence

import torch
from harness import DTYPES, Benchmark, Call, arguments, sizes
from torch import nn

from loku import fingerprints

SHAPES = ["8x4096"]


def _processor_seconds(function: Call, device: str) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(bench: Benchmark, shape: str, dtype: str) -> None:
    """Measure one shape L x D in one dtype."""
    layers, width = sizes(shape)
    options = {"bias": False, "device": bench.device, "dtype": DTYPES[dtype]}
    model = nn.Sequential(*(nn.Linear(width, width, **options) for _ in range(layers)))
    parameters = [parameter.detach().view(torch.uint8) for parameter in model.parameters()]
    size = sum(parameter.nbytes for parameter in parameters)

    def digest() -> dict[str, str]:
        fingerprints.THREADS = torch.get_num_threads()
        return fingerprints.base_fingerprint(model)

    def sha256() -> list[bytes]:
        return [hashlib.sha256(parameter.cpu().numpy().data).digest() for parameter in parameters]

    before = digest()
    parameters[0].view(-1)[1] ^= 1
    assert digest() != before
    bench.compare(
        shape,
        {"base_fingerprint": digest, "SHA-256": sha256},
        dtype=dtype,
        floors={"SHA-256": ["SHA-256"]},
        rates={"GB/s": size / 1e9},
        timer=_processor_seconds,
        memory=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    bench = Benchmark("fingerprint", arguments(__doc__, SHAPES, ("bfloat16",), "L x D"), argv)
    for shape, dtype in bench.cases(bench.options.shape, bench.options.dtype):
        measure(bench, shape, dtype)
    bench.close()


if __name__ == "__main__":
    main()
