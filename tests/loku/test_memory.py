"""The peak of the resident memory counts from the last reset."""

import pytest
import torch
from peak_memory import needs_proc

from loku.memory import forget_peak_memory, peak_device_memory, peak_memory


@needs_proc
def test_the_peak_is_kept_until_it_is_forgotten():
    size = 256 << 20  # bytes, far above the noise of the process
    forget_peak_memory()
    before = peak_memory()
    tensor = torch.ones(size, dtype=torch.uint8)
    del tensor
    assert peak_memory() - before > 0.9 * size
    forget_peak_memory()
    assert peak_memory() - before < 0.1 * size


def test_elsewhere_the_peak_is_that_of_the_whole_process(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    monkeypatch.setattr("pathlib.Path.write_text", missing)
    forget_peak_memory()
    assert peak_memory() > 16 << 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_there_is_no_peak():
    assert peak_device_memory() is None
