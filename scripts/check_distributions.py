"""Check the files of an sdist and a wheel that ``python -m build`` has made from this checkout.

    python scripts/check_distributions.py DIRECTORY

The sdist must have every tracked file that building, testing and measuring need. The wheel must have the
packages with the compiled core and the embedded model, and nothing else. The core must serve every Python and
must not need libtorch. The package's licence is MIT, and each data file of others is known by its notice.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The passages of WikiText are under CC BY-SA, which is not the package's licence.
WIKITEXT = "experiments/data/wikitext.jsonl"
NOT_IN_SDIST = (".ci/", ".gitignore", ".clang-format", WIKITEXT)
DATA = (".csv", ".gz", ".json", ".jsonl", ".npz", ".parquet", ".png", ".safetensors", ".svg", ".txt")
# What was made here, and what derives from TOFU; loku/embedded/LICENSE is the notice of the latter.
OWN_DATA = (
    "benchmarks/results/",
    "docs/",
    "experiments/records/",
    "experiments/results/",
    "scripts/",
    "tests/lower_bounds.txt",
)
OWN_DATA += ("experiments/tutorial/", "loku/probe/", "tests/data/public_names.json")
OF_TOFU = ("loku/embedded/", "tests/data/phi_")
NOTICE = "loku/embedded/LICENSE"
PACKAGES = ("loku/", "loku_kernels/")


def tracked_files() -> set[str]:
    """Return the tracked files that the sdist must have."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name for name in listed.stdout.splitlines() if not name.startswith(NOT_IN_SDIST)}


def needed_libraries(core: bytes) -> set[str]:
    """Return the shared libraries that an ELF file names."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(core)
        file.flush()
        listed = subprocess.run(["readelf", "-d", file.name], check=True, capture_output=True, text=True)
    return {line.split("[")[1].rstrip("]") for line in listed.stdout.splitlines() if "(NEEDED)" in line}


def problems_of_licence(names: set[str], metadata: str) -> list[str]:
    """Return a line for each problem of a distribution's licence.

    Args:
        names: The files, by their paths in the repository.
        metadata: The text of PKG-INFO or METADATA.
    """
    fields = metadata.partition("\n\n")[0].splitlines()
    wanted = ["License-Expression: MIT", "License-File: LICENSE", f"License-File: {NOTICE}"]
    problems = [f"the metadata lack {line}" for line in wanted if line not in fields]
    data = sorted(name for name in names if name.endswith(DATA))
    problems += [
        f"{name} has no known licence" for name in data if not name.startswith((*OWN_DATA, *OF_TOFU))
    ]
    return problems


def problems_of_sdist(path: Path) -> list[str]:
    """Return a line for each problem of an sdist."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        top = archive.getnames()[0].partition("/")[0]
        metadata = archive.extractfile(f"{top}/PKG-INFO")
        assert metadata is not None
        problems = problems_of_licence(
            {name for name in names if ".egg-info/" not in name}, metadata.read().decode()
        )
    return [*problems, *(f"the sdist lacks {name}" for name in sorted(tracked_files() - names))]


def problems_of_wheel(path: Path) -> list[str]:
    """Return a line for each problem of a wheel."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        cores = [name for name in names if name.startswith("loku_kernels/_core.")]
        libraries = set().union(*(needed_libraries(archive.read(name)) for name in cores))
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    installed = {name for name in names if ".dist-info/" not in name}
    expected = {name for name in tracked_files() if name.startswith(PACKAGES)}
    problems = problems_of_licence(installed, metadata)
    problems += [f"the wheel lacks {name}" for name in sorted(expected - names)]
    problems += [f"the wheel should not have {name}" for name in sorted(installed - expected - set(cores))]
    for wanted in ("entry_points.txt", "licenses/LICENSE", "licenses/loku/embedded/LICENSE"):
        if not any(name.endswith(f".dist-info/{wanted}") for name in names):
            problems.append(f"the wheel's metadata lacks {wanted}")
    if cores != ["loku_kernels/_core.abi3.so"] or "-cp311-abi3-" not in path.name:
        problems.append(f"{path.name} has the cores {cores}, not one that serves every Python")
    problems += [f"the compiled core needs {library}" for library in sorted(libraries) if "torch" in library]
    return problems


def main(directory: str) -> None:
    """Check the sdist and the wheel in a folder."""
    checks: dict[str, Callable[[Path], list[str]]] = {
        "*.tar.gz": problems_of_sdist,
        "*.whl": problems_of_wheel,
    }
    problems = []
    for pattern, check in checks.items():
        found = list(Path(directory).glob(pattern))
        if len(found) == 1:
            problems += check(found[0])
        else:
            problems.append(f"{directory} has {len(found)} files {pattern}, not one")
    if problems:
        sys.exit("\n".join(problems))
    print("the sdist and the wheel have what they should")


if __name__ == "__main__":
    main(*sys.argv[1:])
