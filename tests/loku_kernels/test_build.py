"""``setup.py``: the decisions of a build, and its refusals."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no checkout")


def build(folder, **environment):
    """Run setup.py on a copy of the files that it needs."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "loku_kernels").mkdir()
    shutil.copy(ROOT / "loku_kernels" / "__init__.py", folder / "loku_kernels")  # it has the version
    for name in ("loku", "loku/evaluation", "loku/embedded"):
        (folder / name).mkdir()
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(autouse=True)
def _tools():
    pytest.importorskip("ninja")
    pytest.importorskip("setuptools", minversion="77")


def test_a_build_that_cannot_have_cuda_fails(tmp_path):
    # PATH has a C++ compiler and no nvcc, and CUDA_HOME has no nvcc either.
    compiler = shutil.which("g++")
    if compiler is None or os.path.exists(os.path.join(os.path.dirname(compiler), "nvcc")):
        pytest.skip("needs g++ in a folder without nvcc")
    result = build(tmp_path, LOKU_CUDA="1", PATH=os.path.dirname(compiler), CUDA_HOME=str(tmp_path))
    assert result.returncode != 0 and "LOKU_CUDA=1 asks for CUDA kernels" in result.stderr
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "LOKU_CUDA": "yes"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and "LOKU_CUDA must be auto, 0 or 1, not 'yes'" in result.stderr


def test_a_compiler_that_fails_is_named(tmp_path):
    compiler = tmp_path / "failing"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    (tmp_path / "build").mkdir()
    result = build(tmp_path / "build", LOKU_CUDA="0", CXX=str(compiler))
    assert result.returncode != 0 and f"the C++ compiler {compiler} failed" in result.stderr
    assert "LOKU_CORE=0" in result.stderr


def test_a_compiler_that_is_not_there_is_named(tmp_path):
    result = build(tmp_path, CXX="no-such-compiler -O1")
    assert result.returncode != 0 and "no compiler 'no-such-compiler -O1', which CXX names" in result.stderr


def test_a_build_without_the_core(tmp_path):
    result = build(tmp_path, LOKU_CORE="0")
    assert result.returncode == 0, result.stderr
    assert "LOKU_CORE=0, so the plain-torch reference will be used" in result.stderr
    assert not list((tmp_path / "loku_kernels").glob("_core*"))
