"""Resources of every compiled CUDA kernel, without a GPU: registers, spills, stores, fences.

    python scripts/cuda_table.py            # compile, compare with the committed table
    python scripts/cuda_table.py --write    # compile, write the table

The sources are compiled as in setup.py. Warnings of nvcc and ptxas are errors. ptxas reports registers and
spills. The rest is read off the PTX: the widest stores to global memory, the bulk copies, and the barriers of
a cluster and fences of global memory inside loops. Shared memory is not listed: it is dynamic, and the
launchers in csrc ask for it.
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
SOURCE = "csrc/fused_rows_cuda.cu"
ARCHS = (90, 100)
ENDINGS = ("inverted_hinge", "rest_probabilities", "capped_rest_probabilities")  # of its enum Ending
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
    """Return the name of a mangled symbol, such as inverted_hinge<BFloat16Word, cluster>.

    All kernels are templates of a word type, of an ending and of a bool.
    """
    word = found(r"\d+((?:BFloat16|Float16|Float32)Word)", symbol)
    ending = ENDINGS[int(found(r"EndingE(\d)E", symbol))]
    return f"{ending}<{word}, {'cluster' if found(r'Lb([01])E', symbol) == '1' else 'block'}>"


def widest_store(code: str) -> int:
    """Return the bytes of the widest global store in the PTX of a function."""
    stores = re.findall(r"\bst\.global[.\w:]*?(?:\.v([24]))?\.[a-z](\d+)\b", code)
    return max((int(vector or 1) * int(bits) // 8 for vector, bits in stores), default=0)


def fences_in_loops(code: str) -> int:
    """Count the barriers of a cluster and the fences of global memory inside the loops of a function's PTX.

    A loop is all that lies between a label and a later branch to it. A fence of shared memory alone, which a
    message between blocks needs, does not count.
    """
    lines = code.splitlines()
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if re.match(r"\s*\$\w+:", line)}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if branch and labels.get(branch[1], i) < i:
            inside.update(range(labels[branch[1]], i))
    fence = re.compile(r"\b(?:barrier\.cluster|membar|fence\.(?!proxy\.async\.shared::cta))")
    return sum(bool(fence.search(lines[i])) for i in inside)


def compile_source(arch: int, folder: str) -> dict[str, Facts]:
    """Compile the source for one architecture and return kernel -> its facts.

    Args:
        arch: The compute capability times ten, such as 90.
        folder: A folder for the compiler's files.
    """
    target = f"arch=compute_{arch},code=[compute_{arch},sm_{arch}]"
    command = ["nvcc", *FLAGS.split(), "-gencode", target, "-Xptxas", "-v,-warn-spills", "--keep"]
    work = Path(folder) / str(arch)
    work.mkdir()
    command += ["--keep-dir", str(work), "-c", str(ROOT / SOURCE), "-o", str(work / "object.o")]
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
            "store_bytes": widest_store(code[symbol]),
            "bulk_copies": code[symbol].count("cp.async.bulk.shared::cluster.global"),
            "fences_in_loops": fences_in_loops(code[symbol]),
        }
    return facts


def table(archs: Sequence[int] = ARCHS) -> Table:
    """Compile the source for all architectures and return the table."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        kernels: dict[str, dict[str, Facts]] = {}
        for arch, result in zip(
            archs, pool.map(lambda arch: compile_source(arch, folder), archs), strict=True
        ):
            for name, facts in result.items():
                kernels.setdefault(name, {})[f"sm_{arch}"] = facts
    return {"nvcc": nvcc_version(), "kernels": kernels}


def problems(ours: Table, committed: Table) -> list[str]:
    """Return a line for each problem of a table, such as a spill or a difference from the committed one."""
    lines = []
    for name, archs in ours["kernels"].items():
        for arch, facts in archs.items():
            if facts["spill_bytes"]:
                lines.append(f"{name} spills {facts['spill_bytes']} bytes on {arch}")
            if facts["fences_in_loops"]:
                lines.append(
                    f"{name} has {facts['fences_in_loops']} fences of global memory in loops on {arch}"
                )
            if facts["store_bytes"] < 16:
                lines.append(f"{name} stores at most {facts['store_bytes']} bytes at once on {arch}")
            if not facts["bulk_copies"]:
                lines.append(f"{name} has no bulk copy on {arch}")
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
