"""A base in bfloat16: how far the portable adapter is from the model in memory, and why.

The residual is rounded to bfloat16, and the portable adapter stands on the original weights. So the two
models differ by the rounding E of the residual. The guide has these figures.
"""

import copy

import pytest
import torch
from fila_models import train
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import loku
from loku.adapters import adapter_factors, adapter_layers
from loku.demo import EMBEDDED
from loku.fila.initialize import initialize_from_row_scales
from loku.fila.targets import fila_targets
from loku.target_modules import default_target_modules

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

RANK = 8


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids).logits.double()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Errors as shares of the largest logit, the bound of E, and its energy by rank."""
    folder = tmp_path_factory.mktemp("rounding")
    generator = torch.Generator().manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    assert base.dtype == torch.bfloat16
    original, ids = copy.deepcopy(base), torch.randint(3, 4000, (4, 48), generator=generator)
    targets = default_target_modules(base)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    scales = {
        name: torch.rand(layer.out_features, generator=generator) ** 4
        for name, layer in fila_targets(model).items()
    }
    initialize_from_row_scales(model, scales)
    train(model, steps=2)
    loku.save_portable_adapter(model, folder / "portable")
    loku.save_merged_model(model, folder / "merged")

    figures, E = {}, {}
    for name, layer in adapter_layers(model, "default").items():
        B0, A0 = (factor.detach().double() for factor in adapter_factors(layer, "reference"))
        residual = layer.get_base_layer().weight.detach().double()
        exact = original.get_submodule(name).weight.detach().double() - layer.scaling["reference"] * B0 @ A0
        E[name] = residual - exact
        bound = 2.0**-8 * residual.abs() + 1e-12
        figures["bound"] = max(figures.get("bound", 0.0), (E[name].abs() / bound).max().item())
    for rank in (RANK, 2 * RANK):
        energies = [torch.linalg.svdvals(error.float()).square() for error in E.values()]
        figures[f"energy {rank}"] = sum(float(e[:rank].sum() / e.sum()) for e in energies) / len(energies)

    def off(other, model):
        expected = logits(model, ids)
        return ((logits(other, ids) - expected).abs().max() / expected.abs().max()).item()

    portable = PeftModel.from_pretrained(copy.deepcopy(original), folder / "portable")
    figures["moved"] = off(original, model)
    figures["portable"] = off(portable, model)
    figures["merged"] = off(AutoModelForCausalLM.from_pretrained(folder / "merged"), model)

    def with_rounding(name):
        error = E[name].float()
        return lambda module, x, y: (y.float() + x[0].float() @ error.T).to(y)

    layers = adapter_layers(portable, "default")
    hooks = [layer.register_forward_hook(with_rounding(name)) for name, layer in layers.items()]
    figures["with all of E"] = off(portable, model)
    for hook in hooks:
        hook.remove()
    figures["in exact arithmetic"] = off(copy.deepcopy(portable).double(), copy.deepcopy(model).double())
    return figures


def test_the_bound(measured):
    """|E| is at most half a unit in the last place of the residual: 2^-8 of it in bfloat16."""
    assert 0.5 < measured["bound"] <= 1 + 1e-3


def test_the_portable_adapter_is_as_close_as_a_merged_save(measured):
    """Both are off by roundings of bfloat16 itself, 2^-8 of a logit, and unlearning moves the logits more."""
    assert measured["portable"] <= 2 * max(measured["merged"], 2**-8) and measured["portable"] <= 0.02
    assert measured["moved"] > 10 * measured["portable"]


def test_an_adapter_that_carried_the_rounding_would_not_be_closer(measured):
    """E is noise of full rank, and the forward in bfloat16 rounds as much as E does."""
    assert measured[f"energy {RANK}"] < 0.15 and measured[f"energy {2 * RANK}"] < 0.25
    assert measured["with all of E"] > 0.5 * measured["portable"]
    assert measured["in exact arithmetic"] < measured["portable"]
