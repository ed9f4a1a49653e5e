"""All backends have one interface, and ``choose`` picks one for each operation and tensor."""

import importlib
import inspect
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from kernel_inputs import DTYPES, planted_logits

from loku_kernels import backends, softmax_triplet
from loku_kernels.backends import OPERATIONS, cuda, native, reference

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def not_forced(monkeypatch):
    """Let ``choose`` decide."""
    monkeypatch.delenv("LOKU_BACKEND", raising=False)


def backend(name):
    """Import a backend by its name."""
    if name == "triton":
        pytest.importorskip("triton")
    return importlib.import_module(f"loku_kernels.backends.{name}")


def interface(function):
    """Return name, kind and default of each parameter, in their order."""
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["native", "triton", "cuda", "Backend"])
def test_one_interface(name, operation):
    """Every function of a backend is that of ``reference``. The protocol names all of them."""
    module = backends.Backend if name == "Backend" else backend(name)
    whole_rows = {"inverted_hinge_", "rest_probabilities_"}
    absent = {"native": {"divergence_"}, "triton": {"triplet_columns_"}, "cuda": set(OPERATIONS) - whole_rows}
    if operation in absent.get(name, ()):
        assert not hasattr(module, operation)
        return
    ours, expected = interface(getattr(module, operation)), interface(getattr(reference, operation))
    assert ours[name == "Backend" :] == expected and len(expected) >= 2


def test_an_interface_is_names_order_kinds_and_defaults():
    def function(a, b=0, *, c=None): ...

    def annotated(a: int, b: int = 0, *, c: float | None = None) -> int: ...

    def another_name(x, b=0, *, c=None): ...

    def another_order(b, a=0, *, c=None): ...

    def another_kind(a, b=0, c=None): ...

    def another_default(a, b=1, *, c=None): ...

    def one_more(a, b=0, *, c=None, d=None): ...

    assert interface(annotated) == interface(function)
    for other in (another_name, another_order, another_kind, another_default, one_more):
        assert interface(other) != interface(function)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_choice_on_the_cpu(operation, dtype):
    chosen = backends.choose(operation, torch.zeros(2, 3, dtype=dtype))
    served = native._core is not None and dtype != torch.float64 and operation != "divergence_"
    assert chosen is (native if served else reference)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_plain_torch_serves_unknown_devices_and_dtypes(operation, dtype):
    assert backends.choose(operation, torch.zeros(2, 3, dtype=dtype, device="meta")) is reference
    assert backends.choose(operation, torch.zeros(2, 3, dtype=torch.int32)) is reference


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_tensor_decides(operation):
    """One float64 tensor among several is enough for plain torch."""
    single, double = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    assert backends.choose(operation, single, double) is reference
    assert backends.choose(operation, double, single) is reference


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "divergence_"])
def test_a_forced_backend(operation, monkeypatch):
    monkeypatch.setenv("LOKU_BACKEND", "reference")
    assert backends.choose(operation, torch.zeros(2, 3)) is reference
    monkeypatch.setenv("LOKU_BACKEND", "")
    assert backends.choose(operation, torch.zeros(2, 3)) is (reference if native._core is None else native)
    if native._core is not None:
        monkeypatch.setenv("LOKU_BACKEND", "native")
        assert backends.choose(operation, torch.zeros(2, 3)) is native
        assert backends.choose(operation, torch.zeros(2, 3, dtype=torch.float64)) is reference


@pytest.mark.parametrize("name", ["cpp", "cuda", "Native", "reference ", "None"])
def test_other_names_of_backends_are_refused(name, monkeypatch):
    monkeypatch.setenv("LOKU_BACKEND", name)
    with pytest.raises(ValueError, match=f"must be reference, native or triton, not {name!r}"):
        backends.choose("triplet_forward", torch.zeros(2, 3))
    with pytest.raises(ValueError, match=f"not {name!r}"):
        softmax_triplet(*planted_logits(12, 9, torch.float32))


def test_a_missing_core_is_refused(monkeypatch):
    logits, labels = planted_logits(12, 9, torch.float32)
    monkeypatch.setenv("LOKU_BACKEND", "native")
    monkeypatch.setattr(native, "_core", None)
    with pytest.raises(RuntimeError, match="without its compiled core"):
        softmax_triplet(logits, labels)


def test_a_missing_triton_is_refused(monkeypatch):
    monkeypatch.setenv("LOKU_BACKEND", "triton")
    monkeypatch.setattr(backends, "_triton", lambda: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        backends.choose("triplet_forward", torch.zeros(2, 3))


def test_the_choice_on_cuda(monkeypatch, request):
    """Triton serves a pretended CUDA tensor, unless a measurement near its V prefers the core."""
    pytest.importorskip("triton")
    from loku_kernels.backends import triton

    tensor = mock.Mock(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(4, 50257), is_cpu=False)
    assert backends.choose("triplet_forward", tensor) is triton
    tensor.dtype = torch.float64
    assert backends.choose("triplet_forward", tensor) is reference
    tensor.dtype = torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "serves", lambda tensor: True)
    table = {
        ("inverted_hinge_", torch.bfloat16, 32000, (9, 0)): ("cuda", "made up"),
        ("inverted_hinge_", torch.bfloat16, 128256, (9, 0)): ("triton", "made up"),
        ("rest_probabilities_", torch.bfloat16, 32000, (8, 0)): ("cuda", "made up"),
    }
    monkeypatch.setattr(backends, "MEASURED_ON_CUDA", table)
    request.addfinalizer(backends._row_kernel_is_faster.cache_clear)
    backends._row_kernel_is_faster.cache_clear()
    assert backends.choose("inverted_hinge_", tensor) is cuda
    with mock.patch.object(cuda, "serves", lambda tensor: False):  # a core without CUDA, an old driver
        assert backends.choose("inverted_hinge_", tensor) is triton
    assert backends.choose("rest_probabilities_", tensor) is triton
    tensor.shape = (4, 128256)
    assert backends.choose("inverted_hinge_", tensor) is triton
    monkeypatch.setenv("LOKU_BACKEND", "reference")
    assert backends.choose("inverted_hinge_", tensor) is reference
    monkeypatch.setattr(backends, "_triton", lambda: None)
    monkeypatch.delenv("LOKU_BACKEND")
    assert backends.choose("inverted_hinge_", tensor) is reference  # no triton: plain torch


def test_measured_rows_name_results_that_show_them():
    """The row kernel is faster than Triton in the committed result, for each V of the table."""
    assert backends.MEASURED_ON_CUDA
    for (operation, dtype, vocab, capability), (name, file) in backends.MEASURED_ON_CUDA.items():
        assert (operation, dtype, capability, name) in {
            ("inverted_hinge_", torch.bfloat16, (9, 0), "cuda"),
            ("rest_probabilities_", torch.bfloat16, (9, 0), "cuda"),
        }
        path = ROOT / file
        if not path.exists():
            pytest.skip("no checkout")
        rows = json.loads(path.read_text())
        times = {
            variant: min(
                row["ms"]
                for row in rows
                if row["variant"] == variant and row.get("shape", "").endswith(f"x{vocab}") and "ms" in row
            )
            for variant in ("bulk16", "triton fused op")
        }
        assert times["bulk16"] < times["triton fused op"]
