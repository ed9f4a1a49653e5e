"""Threads that wait for busy cores sleep under the command, and are told of in Python."""

import subprocess
import sys
import warnings

import pytest
import torch

from loku import cpu_threads


def test_the_command_lets_threads_sleep():
    code = (
        "import os, sys; os.environ.pop('OMP_WAIT_POLICY', None); from loku import cli\n"
        "assert 'torch' not in sys.modules\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "passive"


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_choice_of_the_user_stays(variable, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "5")
    cpu_threads.wait_passively()
    assert cpu_threads.os.environ.get("OMP_WAIT_POLICY") == ("5" if variable == "OMP_WAIT_POLICY" else None)


def test_busy_cores_are_told_of(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    times = iter([0.0, 30 * 0.02])
    monkeypatch.setattr(cpu_threads.time, "perf_counter", lambda: next(times))
    with pytest.warns(UserWarning, match=r"on 2 threads takes 20\.0 ms.*Set OMP_WAIT_POLICY=passive"):
        cpu_threads.warn_of_busy_cores()
    times = iter([0.0, 30 * 5e-5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu_threads.warn_of_busy_cores()
