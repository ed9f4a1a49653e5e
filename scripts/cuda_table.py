"""What every CUDA kernel compiles to, for GPUs that need not be there: registers, spills, vector widths.

    python scripts/cuda_table.py            # compile, compare with the committed table
    python scripts/cuda_table.py --write    # compile, write the table

The sources are compiled as setup.py compiles them, warnings of nvcc and ptxas being errors. Registers and
spills are those that ptxas reports; the widest loads and stores of global memory are read off the PTX. Shared
memory is dynamic here: the launchers in csrc ask for it.
"""

import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from resource_table import argument_parser, differences, report

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "cuda_table.json"
SOURCES = ("csrc/triplet_cuda.cu", "csrc/fisher_cuda.cu")
ARCHS = (80, 90, 100)
AS_MANY_WRITES = ("inverted_hinge", "triplet_columns", "triplet_backward", "scale_rows")  # as reads
FLAGS = "-std=c++17 -O3 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


def nvcc_version():
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", output).group(1)


def kernel_name(symbol):
    """inverted_hinge_kernel<BFloat16Word, 1> of a mangled name: kernels are templates of word and bool."""
    name = re.search(r"\d+([a-z][a-z_]*_kernel)I", symbol).group(1)
    word = re.search(r"\d+((?:BFloat16|Float16|Float32)Word)", symbol).group(1)
    flags = re.findall(r"Lb([01])E", symbol)
    return f"{name}<{', '.join([word, *flags])}>"


def widest(code, instruction):
    """Bytes of the widest global load or store, of one PTX function's text."""
    widths = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(rf"\b{instruction}\.global(?:\.v([24]))?\.[a-z](\d+)", code)
    ]
    return max(widths, default=0)


def compile_source(source, arch, folder):
    """kernel -> what it compiles to, of one source for one architecture."""
    target = f"arch=compute_{arch},code=[compute_{arch},sm_{arch}]"
    command = ["nvcc", *FLAGS.split(), "-gencode", target, "-Xptxas", "-v,-warn-spills", "--keep"]
    work = Path(folder) / f"{Path(source).stem}_{arch}"
    work.mkdir()
    command += ["--keep-dir", str(work), "-c", str(ROOT / source), "-o", str(work / "object.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    (ptx,) = work.glob("*.ptx")
    # A function's text ends where the next begins. What ptxas says of a kernel follows its name.
    code = dict(re.findall(r"\.entry (\w+)(.*?)(?=\.entry|\Z)", ptx.read_text(), re.S))
    found = {}
    for symbol, log in re.findall(r"entry function '(\w+)'(.*?)(?=entry function|\Z)", result.stderr, re.S):
        found[kernel_name(symbol)] = {
            "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
            "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
            "stack_bytes": int(re.search(r"(\d+) bytes stack frame", log).group(1)),
            "load_bytes": widest(code[symbol], "ld"),
            "store_bytes": widest(code[symbol], "st"),
            "async_copy_bytes": 16 if "cp.async.cg.shared.global" in code[symbol] else 0,
        }
    return found


def table(archs=ARCHS):
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = {
            (source, arch): pool.submit(compile_source, source, arch, folder)
            for source in SOURCES
            for arch in archs
        }
        kernels = {}
        for (_, arch), job in jobs.items():
            for name, facts in job.result().items():
                kernels.setdefault(name, {})[f"sm_{arch}"] = facts
    return {"nvcc": nvcc_version(), "kernels": kernels}


def problems(ours, committed):
    """Lines that say what is wrong with a table: spills, narrow accesses, and what is not as committed."""
    found = []
    for name, archs in ours["kernels"].items():
        for arch, facts in archs.items():
            if facts["spill_bytes"]:
                found.append(f"{name} spills {facts['spill_bytes']} bytes on {arch}")
            if max(facts["load_bytes"], facts["async_copy_bytes"]) < 16:
                found.append(f"{name} loads at most {facts['load_bytes']} bytes at once on {arch}")
            if name.startswith(AS_MANY_WRITES) and facts["store_bytes"] < 16:
                found.append(f"{name} stores at most {facts['store_bytes']} bytes at once on {arch}")
    return found + differences(ours, committed, "nvcc")


def main():
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
