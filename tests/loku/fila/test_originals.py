"""Copies of the original weights, through buffers that a device fills late."""

from functools import partial
from unittest import mock

import pytest
import torch
from fila_models import factors, lora_layers, make_peft, random_scales
from late_copies import LateCuda

import loku.fila.initialize
from loku.fila import originals
from loku.fila.initialize import initialize_from_factors, initialize_from_row_scales, restore_base_
from loku.fila.originals import HostCopies, pinned_memory

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def late_copies(cuda, **options):
    return partial(HostCopies, staged=lambda tensor: True, cuda=cuda, allocate=cuda.allocate, **options)


def some_tensors():
    """Make tensors of every dtype, with shapes that fill buffers in part, exactly and several times."""
    tensors = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((7, 5), (16, 4), (33, 13), (0, 3), (1,)):
            bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)  # NaN and Inf too
            tensors[f"{dtype} {shape}"] = bits.view(dtype).squeeze(-1)
    tensors["strided"] = torch.randn(9, 14)[::2, 1::3]
    tensors["parameter"] = torch.nn.Parameter(torch.randn(6, 6))
    return tensors


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8) if tensor.numel() else tensor.shape


def assert_same_bits(copies, tensors):
    assert list(copies) == list(tensors)
    for name, tensor in tensors.items():
        copy = copies[name]
        assert copy.dtype == tensor.dtype and copy.shape == tensor.shape and not copy.requires_grad
        if tensor.numel():
            assert torch.equal(bits(copy), bits(tensor)), name
            assert copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("staging", [64, 256, 1 << 20])
def test_copies_are_bitwise_and_pass_through_two_buffers(staging, monkeypatch):
    monkeypatch.setattr(originals, "STAGING_BYTES", staging)
    tensors, cuda = some_tensors(), LateCuda()
    with mock.patch.object(torch.Tensor, "to", side_effect=AssertionError("a direct copy")):
        copies = late_copies(cuda)(tensors).finished()
    assert_same_bits(copies, tensors)
    assert cuda.allocated == [staging, staging]
    assert cuda.log.pop(0) == ("wait", torch.device("cpu"), "current stream of cpu")
    sizes = [size for what, _, size in cuda.log]
    assert {what for what, *_ in cuda.log} == {"copy"} and max(sizes) <= staging
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())
    assert len(sizes) == sum(max(1, -(-tensor.nbytes // staging)) for tensor in tensors.values())


def test_a_tensor_may_be_overwritten_after_the_wait(monkeypatch):
    monkeypatch.setattr(originals, "STAGING_BYTES", 64)
    tensors = {str(i): torch.randn(11, 7) for i in range(20)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = late_copies(LateCuda())(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(copies.wait_for(name), before[name])
        tensor.zero_()
    assert_same_bits(copies.finished(), before)


def test_other_devices_are_copied_at_once():
    tensors = some_tensors()
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    copies = HostCopies(tensors, cuda=None, allocate=None)
    for tensor in tensors.values():
        tensor.detach().zero_()
    assert_same_bits(copies.finished(), before)


def test_an_error_of_the_thread_reaches_the_waiting_one(monkeypatch):
    monkeypatch.setattr(originals, "STAGING_BYTES", 64)
    tensors = {str(i): torch.randn(11, 7) for i in range(9)}

    class Failing(LateCuda):
        def allocate(self, size):
            raise MemoryError("no memory for buffers")

    copies = late_copies(Failing())(tensors)
    with pytest.raises(MemoryError, match="for buffers"):
        copies.wait_for("3")
    assert copies.finished() == {}

    made = []

    def refused(shape, dtype):
        made.append(shape)
        if len(made) == 6:
            raise MemoryError("no memory for a copy")
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(originals, "_host_memory", refused)
    copies = late_copies(LateCuda())(tensors)
    with pytest.raises(MemoryError, match="for a copy"):
        copies.wait_for("8")
    done = copies.finished()
    assert 3 <= len(done) <= 5 and all(torch.equal(done[name], tensors[name]) for name in done)


def test_pinned_memory_is_ordinary_where_none_can_be_pinned():
    memory = pinned_memory(100)
    assert memory.dtype == torch.uint8 and memory.shape == (100,)
    assert memory.is_pinned() == torch.cuda.is_available()


# An initialisation whose weights are copied late


@pytest.fixture
def late(monkeypatch):
    """Let initialisations copy their weights as from a slow device."""
    monkeypatch.setattr(originals, "STAGING_BYTES", 512)
    cuda = LateCuda()
    monkeypatch.setattr(loku.fila.initialize, "HostCopies", late_copies(cuda))
    return cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_initialisation_waits_for_the_copies(late, dtype):
    model = make_peft("llama", dtype)
    weights = {n: layer.get_base_layer().weight.detach().clone() for n, layer in lora_layers(model).items()}
    initialize_from_row_scales(model, random_scales(model))
    given = {name: factors(layer)[1::-1] for name, layer in lora_layers(model).items()}
    other = make_peft("llama", dtype)
    initialize_from_factors(other, given)
    for initialised in (model, other):
        layers = lora_layers(initialised)
        assert all(not torch.equal(layers[n].get_base_layer().weight, weights[n]) for n in weights)
        restored = restore_base_(initialised)
        assert all(torch.equal(restored.get_submodule(n).weight, weights[n]) for n in weights)
    assert late.allocated == [512] * 4


@pytest.mark.parametrize("failing", ["svd", "copy"])
def test_a_failure_puts_the_weights_back_that_were_overwritten(late, failing, monkeypatch):
    model = make_peft("llama")
    scales = random_scales(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    real, calls = loku.fila.initialize.row_scaled_svd, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 3:
            raise MemoryError
        return real(*args)

    def refused(shape, dtype):
        calls.append(None)
        if len(calls) == 6:
            raise MemoryError
        return torch.zeros(shape, dtype=dtype)

    if failing == "svd":
        monkeypatch.setattr(loku.fila.initialize, "row_scaled_svd", interrupted)
    else:
        monkeypatch.setattr(originals, "_host_memory", refused)
    with pytest.raises(MemoryError):
        initialize_from_row_scales(model, scales)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card(monkeypatch):
    monkeypatch.setattr(originals, "STAGING_BYTES", 1 << 20)
    buffers = []

    def allocate(size):
        buffers.append(pinned_memory(size))
        return buffers[-1]

    tensors = {name: tensor.cuda() for name, tensor in some_tensors().items()}
    tensors["large"] = torch.randn(1000, 3000, device="cuda")
    before = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        copies = HostCopies(tensors, allocate=allocate)
        for name, tensor in tensors.items():
            copies.wait_for(name)
            tensor.detach().zero_()
        torch.cuda.synchronize()
    assert_same_bits(copies.finished(), before)
    assert len(buffers) == 2 and all(buffer.is_pinned() for buffer in buffers)
    names = {event.key for event in profile.key_averages() if "Memcpy DtoH" in event.key}
    assert names and not any("Pageable" in name for name in names), names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_initialisation_on_a_card_restores_every_bit(dtype):
    model = make_peft("llama", dtype).cuda()
    weights = {n: layer.get_base_layer().weight.detach().clone() for n, layer in lora_layers(model).items()}
    initialize_from_row_scales(model, random_scales(model))
    restored = restore_base_(model)
    assert all(torch.equal(restored.get_submodule(n).weight, weights[n]) for n in weights)
