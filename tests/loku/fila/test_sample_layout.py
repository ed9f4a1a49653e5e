"""The tokens of each row in the inputs of a linear module."""

import pytest
import torch
from fila_models import make_base
from torch import nn
from transformers import AutoModelForCausalLM, XLNetConfig

from loku.fila.sample_layout import by_row, check_rows_are_apart

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

NAME = "model.layers.1.mlp"


class Around(nn.Module):
    """An MLP that gets other inputs than (B, T, D)."""

    def __init__(self, mlp, before, after):
        super().__init__()
        self.mlp, self.before, self.after = mlp, before, after

    def forward(self, x):
        return self.after(self.mlp(self.before(x)), x)


def model_with(before, after):
    model = make_base("llama")
    model.model.layers[1].mlp = Around(model.model.layers[1].mlp, before, after)
    return model, {f"{NAME}.mlp.up_proj": model.model.layers[1].mlp.mlp.up_proj}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: x.flatten(0, 1), lambda y, x: y.view_as(x)),
        (lambda x: x[:, :, None], lambda y, x: y[:, :, 0]),
        (lambda x: x[:, 1:], lambda y, x: nn.functional.pad(y, (0, 0, 1, 0))),
    ],
    ids=["flat", "split", "fewer tokens"],
)
def test_rows_after_one_another_are_apart(before, after):
    check_rows_are_apart(*model_with(before, after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1)),
        (
            lambda x: x.transpose(0, 1).flatten(0, 1),
            lambda y, x: y.view(x.shape[1], *x.shape[::2]).transpose(0, 1),
        ),
        (lambda x: x.flip(0), lambda y, x: y.flip(0)),
        (lambda x: x.flatten(0, 1)[x.flatten(0, 1)[:, 0] > 0], lambda y, x: x),
    ],
    ids=["time first", "flat, time first", "other order", "routed"],
)
def test_other_orders_are_refused(before, after):
    with pytest.raises(ValueError, match=rf"{NAME}.mlp.up_proj: .* init=\"default\""):
        check_rows_are_apart(*model_with(before, after))


def test_the_layout_of_a_class_is_seen():
    config = XLNetConfig(vocab_size=61, d_model=32, n_layer=1, n_head=4, d_inner=48)
    model = AutoModelForCausalLM.from_config(config)
    name = "transformer.layer.0.ff.layer_1"
    with pytest.raises(ValueError, match=rf"{name}: its inputs \(5, 2, 32\) for tokens \(2, 5\)"):
        check_rows_are_apart(model, {name: model.get_submodule(name)})


def test_by_row():
    x = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(by_row(x, 2), x)
    assert torch.equal(by_row(x.flatten(0, 1), 2), x)
    assert torch.equal(by_row(x.view(2, 3, 2, 2), 2), x.view(2, 6, 2))
