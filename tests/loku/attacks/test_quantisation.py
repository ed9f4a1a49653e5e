"""Rounded weights are measured, and the model stays as it is."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

from loku.attacks import quantisation_attack
from loku.attacks.copies import merged_copy
from loku.data import tokenize_dataset
from loku.evaluation import token_measures, token_scores
from loku.robustness import round_weights_

pytestmark = pytest.mark.usefixtures("one_thread")

SETS = {
    "forget": [{"input_ids": [3 + i, 5, 9, 20, 33, 7]} for i in range(3)],
    "retain": [{"input_ids": [50, 60, 70 + i, 80]} for i in range(2)],
}


def measures(model, rows):
    return token_measures(token_scores(model, tokenize_dataset(rows, None), progress=False))


def adapted(kind="llama", targets=("q_proj", "v_proj")):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(kind), LoraConfig(r=2, target_modules=list(targets)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("make", [tiny_model, adapted], ids=["plain", "adapter"])
def test_each_rounding_is_measured_and_the_model_stays(make):
    model = make("llama")
    before, modules = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    state = torch.get_rng_state()
    result = quantisation_attack(model, None, SETS, bits=(8, 3), group_size=16)

    plain = copy.deepcopy(model)
    plain = plain.merge_and_unload() if make is adapted else plain
    expected = {"not rounded": model, **({"merged": plain} if make is adapted else {})}
    for bits in (8, 3):
        rounded = copy.deepcopy(plain)
        round_weights_(rounded, bits, 16)
        expected[f"{bits} bits"] = rounded
    assert list(result["roundings"]) == list(expected)
    for title, other in expected.items():
        for name, rows in SETS.items():
            assert result["roundings"][title][name] == measures(other, rows), (title, name)
    assert result["roundings"]["3 bits"] != result["roundings"]["not rounded"]
    assert result["not_tested"] == {} and json.loads(json.dumps(result, allow_nan=False)) == result

    assert [name for name, _ in model.named_modules()] == modules and not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_what_hides_below_a_step_of_the_rounding_comes_back():
    """An unlearned model whose change is less than half a step is the original again."""
    original = tiny_model("llama")
    round_weights_(original, 4, 16)
    unlearned = copy.deepcopy(original)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in unlearned.named_parameters():
            if "proj" in name:
                groups = weight.unflatten(1, (-1, 16))
                greatest = groups.abs().amax(-1, keepdim=True)
                noise = (torch.rand_like(groups) - 0.5) * 0.9 * greatest / 7
                groups += noise.where(groups.abs() < greatest, 0.0)  # the scale stays
    result = quantisation_attack(unlearned, None, SETS, bits=(4,), group_size=16)["roundings"]
    assert result["4 bits"]["forget"] == pytest.approx(measures(original, SETS["forget"]), rel=1e-4)
    assert result["not rounded"]["forget"]["perplexity"] != pytest.approx(
        result["4 bits"]["forget"]["perplexity"], rel=1e-2
    )


def test_what_cannot_be_rounded_is_said():
    experts = tiny_model("llama")
    experts.model.experts = torch.nn.Parameter(torch.ones(2, 3, 4))
    result = quantisation_attack(experts, None, SETS)
    assert list(result["roundings"]) == ["not rounded"]
    assert list(result["not_tested"]) == ["8 bits", "4 bits"]
    assert "model.experts is not the weight of a linear layer" in result["not_tested"]["4 bits"]

    inner = adapted().get_base_model()  # its layers have adapters, and nothing says how to merge them
    assert "without its PeftModel" in quantisation_attack(inner, None, SETS)["not_tested"]["8 bits"]

    packed = tiny_model("llama")
    packed.is_quantized = True
    assert "quantised" in quantisation_attack(packed, None, SETS)["not_tested"]["8 bits"]


def test_the_copy_leaves_the_kept_weights_of_fila_out():
    from loku.adapters import BASE_COPY

    model = adapted()
    kept = {"a": torch.ones(3)}
    setattr(model, BASE_COPY, kept)
    copied = copy.deepcopy(model, {id(kept): {}})
    assert getattr(copied, BASE_COPY) == {} and getattr(model, BASE_COPY) is kept
    merged = merged_copy(model, torch.float64)
    assert merged.dtype == torch.float64 and not hasattr(merged, BASE_COPY)
    ids = torch.tensor([[3, 5, 9, 20]])
    torch.testing.assert_close(merged(ids).logits.float(), model(ids).logits, rtol=1e-3, atol=1e-3)


def test_bad_arguments_are_refused_by_name(monkeypatch):
    model = tiny_model("llama")
    for arguments, words in (
        ({"bits": (8, 1)}, r"bits\[1\] must be an integer >= 2"),
        ({"group_size": 0}, "group_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"sets": {}}, "no set to measure"),
    ):
        with pytest.raises(ValueError, match=words):
            quantisation_attack(model, None, **{"sets": SETS, **arguments})
    monkeypatch.setattr("loku.attacks.copies.rank_and_size", lambda: (0, 2))
    with pytest.raises(ValueError, match="quantisation runs in one process, and there are 2"):
        quantisation_attack(model, None, SETS)
