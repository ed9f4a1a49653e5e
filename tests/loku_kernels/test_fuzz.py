"""Any arguments give a Python exception or the result of plain torch, and never a crash.

``scripts/sanitize.sh`` runs this file with the address and undefined-behaviour sanitizers. There a read or
write outside a tensor ends the process. ``scripts/fuzz.py`` makes 100,000 of these calls.
"""

import importlib.util
import json
from pathlib import Path

import fuzz_calls
import pytest
import torch
from fuzz_calls import (
    CALLS,
    FLOATS,
    FUNCTIONS,
    call_native,
    is_right,
    lies_about,
    make_call,
    outcome,
    right_arguments,
    tensors_of,
)

import loku_kernels
from loku_kernels.backends import native

pytestmark = pytest.mark.skipif(native._core is None, reason="no compiled core")

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz.py"


@pytest.mark.parametrize("name", CALLS)
def test_right_or_refused(name):
    for seed in range(100):
        make_call(name, seed)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_address_without_its_size(name):
    call_native(name, right_arguments(name))
    for key in tensors_of(name):
        for lie in lies_about(right_arguments(name)[key]):
            if not is_right(name, key, lie):
                with pytest.raises((ValueError, RuntimeError, IndexError)):
                    call_native(name, {**right_arguments(name), key: lie})


# Tensors whose shape, by a stride of 0, is larger than any memory


HUGE = 2**60


@pytest.mark.parametrize("dtype", FLOATS)
def test_sizes_that_no_machine_has(dtype):
    one = torch.zeros(1, 4, dtype=dtype)
    label = torch.zeros(1, dtype=torch.int64)
    calls = [
        lambda: loku_kernels.softmax_triplet(one.expand(HUGE, 4), label.expand(HUGE)),
        lambda: loku_kernels.ihl_loss(one.expand(HUGE, 4), label.expand(HUGE)),
        lambda: loku_kernels.linear_ihl_loss(one.expand(HUGE, 4), one.expand(8, 4), label.expand(HUGE)),
        lambda: loku_kernels.linear_kl_divergence_loss(
            one.expand(HUGE, 4), one.expand(8, 4), one.expand(HUGE, 4)
        ),
        lambda: loku_kernels.accumulate_squared_grad_(
            torch.zeros(1, 1).expand(HUGE, HUGE),
            one[None, :, :1].expand(1, 1, HUGE),
            one[None, :, :1].expand(1, 1, HUGE),
        ),
        lambda: loku_kernels.row_scaled_svd(
            one[None].expand(1, HUGE, 4), torch.ones(1, 1).expand(1, HUGE), 1
        ),
    ]
    for call in calls:
        assert isinstance(outcome(call), Exception)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_counts_right_wrong_and_crashed_calls(script, monkeypatch, capsys, tmp_path):
    counts = script.run_child("triplet_loss", 0, 20)
    assert counts["right"] > 0 and counts["ValueError"] > 0 and counts.total() == 20
    monkeypatch.setattr(script, "ROOT", tmp_path)  # without tests/helpers a child ends at its first import
    assert script.run_child("triplet_loss", 0, 20) == {"crashed": 1}
    monkeypatch.setattr(fuzz_calls, "outcome", lambda *_, **__: "a wrong result")
    assert script.make_calls("no addresses", 7, 3) == {"wrong": 3}
    assert "no addresses with seed 7: AssertionError: a wrong result" in capsys.readouterr().err
    summary = script.summary({"triplet_loss": counts}, {"seed": 0})
    assert summary["calls"] == 20 and summary["wrong"] == summary["crashed"] == 0 and summary["seed"] == 0


def test_the_committed_counts():
    counts = json.loads(SCRIPT.with_name("fuzz_counts.json").read_text())
    assert counts["calls"] >= 100_000 and counts["wrong"] == counts["crashed"] == 0
    assert counts["right"] + sum(counts["refused"].values()) == counts["calls"]
    assert counts["sanitizers"] == ["address", "undefined"] and counts["threads"] >= 2
    assert counts["by_call"].keys() == CALLS.keys() and counts["environment"]["commit"]
