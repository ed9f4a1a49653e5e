"""What every CUDA kernel compiles to, for GPUs that need not be there: registers, spills, vector widths.

    python scripts/cuda_table.py            # compile, compare with the committed table
    python scripts/cuda_table.py --write    # compile, write the table

The sources are compiled as setup.py compiles them, warnings of nvcc and ptxas being errors. Registers and
spills are those that ptxas reports; the widest loads and stores of global memory are read off the PTX. Shared
memory is dynamic here: the launchers in csrc ask for it.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "cuda_table.json"
SOURCES = ("csrc/triplet_cuda.cu", "csrc/fisher_cuda.cu")
ARCHS = (80, 90, 100)
FLAGS = "-std=c++17 -O3 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


def nvcc_version():
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", output).group(1)


def kernel_name(symbol):
    """triplet_fused_kernel<BFloat16Word, 1> of a mangled name: kernels are templates of a word and a bool."""
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
    for symbol, report in re.findall(
        r"entry function '(\w+)'(.*?)(?=entry function|\Z)", result.stderr, re.S
    ):
        found[kernel_name(symbol)] = {
            "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
            "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
            "stack_bytes": int(re.search(r"(\d+) bytes stack frame", report).group(1)),
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
    """What is wrong with a table, in words: spills always, and any difference at the recorded nvcc."""
    found = []
    for name, archs in ours["kernels"].items():
        for arch, facts in archs.items():
            if facts["spill_bytes"]:
                found.append(f"{name} spills {facts['spill_bytes']} bytes on {arch}")
            if max(facts["load_bytes"], facts["async_copy_bytes"]) < 16:
                found.append(f"{name} loads at most {facts['load_bytes']} bytes at once on {arch}")
            if name.startswith(
                ("inverted_hinge", "triplet_columns", "triplet_backward")
            ):  # these write as much as they read
                if facts["store_bytes"] < 16:
                    found.append(f"{name} stores at most {facts['store_bytes']} bytes at once on {arch}")
            if ours["nvcc"] != committed["nvcc"]:
                continue
            recorded = committed["kernels"].get(name, {}).get(arch)
            if facts != recorded:
                found.append(f"{name} on {arch}: {facts}, recorded {recorded}")
    if missing := committed["kernels"].keys() - ours["kernels"].keys():
        found.append(f"recorded, but not there: {sorted(missing)}")
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if not shutil.which("nvcc"):
        raise SystemExit("there is no nvcc on PATH")
    ours = table()
    if options.write:
        TABLE.write_text(json.dumps(ours, indent=1) + "\n")
    for name, archs in ours["kernels"].items():
        facts = ", ".join(
            f"{arch} {x['registers']} registers, {x['spill_bytes']} spilled" for arch, x in archs.items()
        )
        print(f"{name:46} {facts}")
    if found := problems(ours, json.loads(TABLE.read_text())):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
