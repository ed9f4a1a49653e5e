"""Build the compiled core, ``loku_kernels._core``, with ninja.

The core includes no torch header. So the build needs no torch, and the result serves every torch release.
The core uses CPython's limited API alone. So one binary serves every CPython from 3.11 on. A free-threaded
CPython has no limited API and gets a core of its own. Without a C++ compiler the package is installed without
the core and computes with its plain-torch reference. A compiler that fails stops the installation.
``LOKU_CORE=0`` leaves the core out.

CUDA kernels are built if nvcc is on PATH or in CUDA_HOME (default /usr/local/cuda). ``LOKU_CUDA=0`` leaves
them out. ``LOKU_CUDA=1`` fails without nvcc. ``LOKU_CUDA_ARCHS="90"`` (default "90 100") restricts the
GPUs. The build prints its decision.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/bindings.cpp", "csrc/fisher_cpu.cpp", "csrc/losses_cpu.cpp", "csrc/triplet_cpu.cpp"]
CUDA_SOURCES = ["csrc/fused_rows_cuda.cu"]
# The oldest Python of pyproject.toml, as the tag of a wheel and as CPython's headers have it.
STABLE_ABI = None if sysconfig.get_config_var("Py_GIL_DISABLED") else ("cp311", "0x030B0000")
CUDA_ARCHS = "90 100"  # compute capabilities x 10; newer GPUs translate the last one's PTX
CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra "
    # Sums may be regrouped only if a loop says so. Nothing here reads errno or floating-point traps.
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast"
)


def find_compiler():
    """Find a C++ compiler, or return None. ``LOKU_CORE=0`` asks for none."""
    if os.environ.get("LOKU_CORE") == "0":
        return None
    if (asked := os.environ.get("CXX")) and not shutil.which(asked.split()[0]):
        raise SystemExit(f"loku-kernels: there is no compiler {asked!r}, which CXX names")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def find_nvcc():
    """Find nvcc if CUDA kernels are to be built, else return None. Print the decision."""
    choice = os.environ.get("LOKU_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"loku-kernels: LOKU_CUDA must be auto, 0 or 1, not {choice!r}")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))
    if choice == "1" and not nvcc:
        raise SystemExit(
            "loku-kernels: LOKU_CUDA=1 asks for CUDA kernels, and there is no nvcc on PATH or in CUDA_HOME"
        )
    if choice == "0" or not nvcc:
        reason = "LOKU_CUDA=0" if choice == "0" else "no nvcc on PATH or in CUDA_HOME"
        print(f"loku-kernels: without CUDA kernels ({reason})", file=sys.stderr)
        return None
    print(f"loku-kernels: with CUDA kernels ({nvcc}, LOKU_CUDA={choice})", file=sys.stderr)
    return nvcc


def cuda_flags():
    archs = os.environ.get("LOKU_CUDA_ARCHS", CUDA_ARCHS).split()
    flags = "-std=c++17 -O3 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
    for arch in archs:
        flags += f" -gencode arch=compute_{arch},code=sm_{arch}"
    return flags + f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"


def platform_flags(compiler):
    """Return compiler and linker flags: OpenMP except on macOS, and the widest vectors for GCC on x86-64."""
    if sys.platform == "darwin":
        return "", "-undefined dynamic_lookup"
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
    flags = "-fopenmp"
    if "clang" not in version and sysconfig.get_platform().endswith("x86_64"):
        flags += " -mprefer-vector-width=512"
    return flags, "-fopenmp"


def python_flags():
    limited_api = f" -DPy_LIMITED_API={STABLE_ABI[1]}" if STABLE_ABI else ""
    return f"-I{sysconfig.get_paths()['include']}{limited_api}"


class NinjaBuild(build_ext):
    """Compile the sources of an extension with one ninja call."""

    def build_extension(self, ext):
        import ninja

        compiler, nvcc = find_compiler(), find_nvcc()
        compile_flags, link_flags = platform_flags(compiler)
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"cxx = {compiler}",
            f"cxxflags = {CXXFLAGS} {compile_flags} -DLOKU_WITH_CUDA={int(nvcc is not None)} "
            + python_flags(),
            f"ldflags = -shared {link_flags}",
            "rule compile",
            "  command = $cxx $cxxflags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx $in -o $out $ldflags",
        ]
        if nvcc:
            # The runtime is linked in, so that the core loads without CUDA. Its symbols stay inside, or the
            # loader might take those of torch's runtime.
            host = compiler.split()[0]
            lines += [
                f"nvccflags = -ccbin {host} {cuda_flags()}",
                "rule compile_cuda",
                f"  command = {nvcc} $nvccflags -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link_cuda",
                f"  command = {nvcc} -shared -cudart static -ccbin {host} $in -o $out"
                f" -Xlinker --exclude-libs=ALL {link_flags and '-Xcompiler ' + link_flags}",
            ]
        objects = []
        for source in map(Path, ext.sources + (CUDA_SOURCES if nvcc else [])):
            objects.append(f"{source.stem}.o")
            rule = "compile_cuda" if source.suffix == ".cu" else "compile"
            lines.append(f"build {objects[-1]}: {rule} {escape(source.resolve())}")
        lines.append(f"build {escape(target)}: {'link_cuda' if nvcc else 'link'} {' '.join(objects)}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        built = subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-v", "-C", str(build_dir)])
        if built.returncode != 0:
            raise SystemExit(
                f"loku-kernels: the C++ compiler {compiler} failed, see above; it must know C++17, and "
                "Python.h must be there. LOKU_CORE=0 installs without the compiled core"
            )


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if find_compiler() and os.name == "posix":
    extensions = [
        Extension(
            "loku_kernels._core",
            SOURCES,
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
            py_limited_api=STABLE_ABI is not None,
        )
    ]
else:
    reason = "LOKU_CORE=0" if os.environ.get("LOKU_CORE") == "0" else "no C++ compiler found"
    print(f"loku-kernels: {reason}, so the plain-torch reference will be used", file=sys.stderr)
    extensions = []

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": STABLE_ABI[0]} if STABLE_ABI else {}},
)
