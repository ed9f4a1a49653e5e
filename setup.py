"""Builds the compiled core, ``loku_kernels._core``, with ninja.

The core includes no torch header, so building needs no torch and the result serves every torch
release. Without a C++ compiler the package installs all the same and computes with its plain-torch
reference implementation; a compiler that fails stops the installation.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/bindings.cpp", "csrc/fisher_cpu.cpp", "csrc/triplet_cpu.cpp"]
CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra "
    # sums may be regrouped only where a loop says so, but nothing here reads errno or FP traps
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast"
)


def find_compiler():
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def platform_flags(compiler):
    """OpenMP where the compiler comes with it, and the widest vectors where GCC clones functions."""
    if sys.platform == "darwin":
        return "", "-undefined dynamic_lookup"
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
    flags = "-fopenmp"
    if "clang" not in version and sysconfig.get_platform().endswith("x86_64"):
        flags += " -mprefer-vector-width=512"
    return flags, "-fopenmp"


class NinjaBuild(build_ext):
    """Compile the sources of an extension with one ninja call."""

    def build_extension(self, ext):
        import ninja
        import pybind11

        compiler = find_compiler()
        compile_flags, link_flags = platform_flags(compiler)
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
        lines = [
            f"cxx = {compiler}",
            f"cxxflags = {CXXFLAGS} {compile_flags} " + " ".join(f"-I{path}" for path in includes),
            f"ldflags = -shared {link_flags}",
            "rule compile",
            "  command = $cxx $cxxflags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx $in -o $out $ldflags",
        ]
        objects = []
        for source in map(Path, ext.sources):
            objects.append(f"{source.stem}.o")
            lines.append(f"build {objects[-1]}: compile {escape(source.resolve())}")
        lines.append(f"build {escape(target)}: link {' '.join(objects)}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-v", "-C", str(build_dir)], check=True)


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if find_compiler() and os.name == "posix":
    extensions = [
        Extension("loku_kernels._core", SOURCES, depends=sorted(map(str, Path("csrc").glob("*.h"))))
    ]
else:
    print("loku-kernels: no C++ compiler found, so the plain-torch reference will be used", file=sys.stderr)
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
