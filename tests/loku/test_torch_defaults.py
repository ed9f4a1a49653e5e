"""A run does not depend on the default dtype and device of the process."""

from contextlib import contextmanager

import pytest
import torch
from kernel_inputs import fisher_operands, planted_logits, planted_operands
from small_trainers import FORGET, RETAIN, arguments
from tiny_models import tiny_model

import loku
from loku.torch_defaults import torch_defaults
from loku_kernels import (
    accumulate_squared_grad_,
    ihl_loss,
    linear_cross_entropy_loss,
    linear_ihl_loss,
    linear_kl_divergence_loss,
    row_scaled_svd,
    softmax_triplet,
    triplet_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def defaults(dtype=torch.float32, device="cpu"):
    """Set the defaults of the process, as a user would, and put torch's back."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def kernels(dtype):
    """Return a function of each public kernel on operands of a dtype."""
    logits, labels = planted_logits(24, 33, dtype)
    logits = logits.nan_to_num(neginf=-9.0)
    hidden, weight, bias, targets = planted_operands(24, 8, 33, dtype)
    reference = torch.ones_like(hidden)
    triplet, _ = softmax_triplet(logits, labels)
    inputs, upstream = fisher_operands(3, 5, 7, 9, dtype)
    zeros, divisor = torch.zeros(7, 9), torch.ones(7, 9)
    wide = torch.randn(2, 60, 90, generator=torch.Generator().manual_seed(0)).to(dtype)
    small, scales = wide[:, :9, :7], torch.linspace(0.1, 1, 120).view(2, 60)

    def with_gradients(function, *leaves):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value.sum(), leaves)

    return {
        "ihl_loss": lambda: with_gradients(lambda x: ihl_loss(x, labels), logits),
        "in place": lambda: with_gradients(lambda x: ihl_loss(x * 1, labels, inplace=True), logits),
        "triplet_loss": lambda: with_gradients(lambda x: triplet_loss("cross_entropy", x, labels), triplet),
        "linear_ihl_loss": lambda: with_gradients(
            lambda h, w, b: linear_ihl_loss(h, w, targets, b, reduction="none"), hidden, weight, bias
        ),
        "linear_cross_entropy_loss": lambda: with_gradients(
            lambda h: linear_cross_entropy_loss(h, weight, targets, bias, softcap=9.0), hidden
        ),
        "linear_kl_divergence_loss": lambda: with_gradients(
            lambda h, w, b: linear_kl_divergence_loss(h, w, reference, targets, b), hidden, weight, bias
        ),
        "accumulate_squared_grad_": lambda: accumulate_squared_grad_(zeros.clone(), inputs, upstream),
        "a divisor": lambda: accumulate_squared_grad_(zeros[:, 0].clone(), inputs, upstream, divisor),
        "row_scaled_svd": lambda: row_scaled_svd(wide, scales, 4),
        "row_scaled_svd of small matrices": lambda: row_scaled_svd(small, scales[:, :9], 4),
    }


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(dtype, default, backend):
    for name, function in kernels(dtype).items():
        expected = function()
        with defaults(default):
            result = function()
        torch.testing.assert_close(result, expected, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_context_ends(device):
    with defaults(torch.float64, device):
        with torch_defaults():
            assert torch.ones(1).dtype == torch.float32 and torch.ones(1).device.type == "cpu"
        assert torch.ones(1).dtype == torch.float64 and torch.ones(1).device.type == device
        with pytest.raises(ZeroDivisionError), torch_defaults():
            raise ZeroDivisionError
        assert torch.ones(1).dtype == torch.float64 and torch.ones(1).device.type == device


def unlearned(tmp_path, settings):
    """Return the parameters of a run, and its logged losses."""
    config = arguments(tmp_path, seed=3, **settings)
    result = loku.unlearn(tiny_model("llama"), FORGET, RETAIN, config=config)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    return dict(result.model.named_parameters()), losses


@pytest.mark.parametrize(
    "settings",
    [{"init": "fila"}, {"init": "default"}, {"init": "pissa", "method": "kl"}],
    ids=lambda settings: settings["init"],
)
def test_unlearn(settings, tmp_path):
    expected = unlearned(tmp_path, settings)
    for default in ({"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}):
        model = tiny_model("llama")
        with defaults(**default):
            config = arguments(tmp_path, seed=3, **settings)
            result = loku.unlearn(model, FORGET, RETAIN, config=config)
        losses = [entry["loss"] for entry in result.history if "loss" in entry]
        torch.testing.assert_close((dict(result.model.named_parameters()), losses), expected, rtol=0, atol=0)
