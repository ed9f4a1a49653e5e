"""Resources of every compiled CUDA kernel, without a GPU: registers, spills, vector widths.

    python scripts/cuda_table.py            # compile, compare with the committed table
    python scripts/cuda_table.py --write    # compile, write the table

The sources are compiled as in setup.py. Warnings of nvcc and ptxas are errors. ptxas reports registers and
spills. The widest loads and stores of global memory are read off the PTX. Shared memory is not listed: it is
dynamic, and the launchers in csrc ask for it.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from resource_table import Facts, Table, argument_parser, differences, report

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "cuda_table.json"
SOURCES = ("csrc/triplet_cuda.cu", "csrc/fisher_cuda.cu")
ARCHS = (80, 90, 100)
# Kernels that write as many bytes as they read.
AS_MANY_WRITES = ("inverted_hinge", "triplet_columns", "triplet_backward", "scale_rows")
FLAGS = "-std=c++17 -O3 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


def found(pattern: str, text: str) -> str:
    """Return the first group of a pattern's first match, which must be there."""
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in {text}"
    return match[1]


def nvcc_version() -> str:
    """Return the version of the nvcc on PATH."""
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return found(r"V(\d+\.\d+\.\d+)", output)


def kernel_name(symbol: str) -> str:
    """Return the name in a mangled symbol, such as inverted_hinge_kernel<BFloat16Word, 1>.

    All kernels are templates of a word type and of bools.
    """
    name = found(r"\d+([a-z][a-z_]*_kernel)I", symbol)
    word = found(r"\d+((?:BFloat16|Float16|Float32)Word)", symbol)
    flags = re.findall(r"Lb([01])E", symbol)
    return f"{name}<{', '.join([word, *flags])}>"


def widest(code: str, instruction: str) -> int:
    """Return the bytes of the widest global load ("ld") or store ("st") in the PTX of a function."""
    widths = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(rf"\b{instruction}\.global(?:\.v([24]))?\.[a-z](\d+)", code)
    ]
    return max(widths, default=0)


def compile_source(source: str, arch: int, folder: str) -> dict[str, Facts]:
    """Compile a source for one architecture and return kernel -> its facts.

    Args:
        source: The path of the source in the repository.
        arch: The compute capability, such as 90.
        folder: A folder for the compiler's files.
    """
    target = f"arch=compute_{arch},code=[compute_{arch},sm_{arch}]"
    command = ["nvcc", *FLAGS.split(), "-gencode", target, "-Xptxas", "-v,-warn-spills", "--keep"]
    work = Path(folder) / f"{Path(source).stem}_{arch}"
    work.mkdir()
    command += ["--keep-dir", str(work), "-c", str(ROOT / source), "-o", str(work / "object.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    (ptx,) = work.glob("*.ptx")
    # The text of a function ends at the next function. The report of ptxas follows the name of its kernel.
    code = dict(re.findall(r"\.entry (\w+)(.*?)(?=\.entry|\Z)", ptx.read_text(), re.S))
    facts = {}
    for symbol, log in re.findall(r"entry function '(\w+)'(.*?)(?=entry function|\Z)", result.stderr, re.S):
        facts[kernel_name(symbol)] = {
            "registers": int(found(r"Used (\d+) registers", log)),
            "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
            "stack_bytes": int(found(r"(\d+) bytes stack frame", log)),
            "load_bytes": widest(code[symbol], "ld"),
            "store_bytes": widest(code[symbol], "st"),
            "async_copy_bytes": 16 if "cp.async.cg.shared.global" in code[symbol] else 0,
        }
    return facts


def table(archs: Sequence[int] = ARCHS) -> Table:
    """Compile all sources for all architectures and return their table."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = {
            (source, arch): pool.submit(compile_source, source, arch, folder)
            for source in SOURCES
            for arch in archs
        }
        kernels: dict[str, dict[str, Facts]] = {}
        for (_, arch), job in jobs.items():
            for name, facts in job.result().items():
                kernels.setdefault(name, {})[f"sm_{arch}"] = facts
    return {"nvcc": nvcc_version(), "kernels": kernels}


def problems(ours: Table, committed: Table) -> list[str]:
    """Return a line for each problem of a table: spills, narrow accesses, differences from the committed."""
    lines = []
    for name, archs in ours["kernels"].items():
        for arch, facts in archs.items():
            if facts["spill_bytes"]:
                lines.append(f"{name} spills {facts['spill_bytes']} bytes on {arch}")
            if max(facts["load_bytes"], facts["async_copy_bytes"]) < 16:
                lines.append(f"{name} loads at most {facts['load_bytes']} bytes at once on {arch}")
            if name.startswith(AS_MANY_WRITES) and facts["store_bytes"] < 16:
                lines.append(f"{name} stores at most {facts['store_bytes']} bytes at once on {arch}")
    return lines + differences(ours, committed, "nvcc")


def main() -> None:
    """Run the command."""
    options = argument_parser(__doc__, TABLE).parse_args()
    if not shutil.which("nvcc"):
        raise SystemExit("there is no nvcc on PATH")
    ours = table()
    for name, archs in ours["kernels"].items():
        facts = ", ".join(
            f"{arch} {x['registers']} registers, {x['spill_bytes']} spilled" for arch, x in archs.items()
        )
        print(f"{name:46} {facts}")
    report(ours, TABLE, problems, options.write)


if __name__ == "__main__":
    main()
