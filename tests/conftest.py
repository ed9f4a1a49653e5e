import pytest
import torch

from loku_kernels.backends import native


def pytest_make_parametrize_id(val, argname):
    """Name a long parameter by its argument: hostile files have megabytes."""
    return argname if isinstance(val, str | bytes) and len(val) > 80 else None


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    """Run the test on each backend that serves the CPU."""
    if request.param == "native" and native._core is None:
        pytest.skip("no compiled core")
    monkeypatch.setenv("LOKU_BACKEND", request.param)
    return request.param


@pytest.fixture
def seeded():
    """Seed torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Let torch use one thread.

    Several threads for a tiny model or for LAPACK only wait for each other on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
