"""Weights are rounded to few bits, and forgotten rows are learnt again."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

from loku.data import tokenize_dataset
from loku.evaluation import mean_answer_probability, token_scores
from loku.robustness import relearning_curve, round_weights_

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted():
    return get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))


def test_weights_are_rounded_to_nearest_by_channel_and_group():
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    rows = torch.tensor([[3.0, -1.4, 0.4, 1.6], [0.0, 0.0, 0.0, 0.0], [-0.3, 0.3, 0.14, 30.0]])
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:3, :4] = rows
    grouped = tiny_model("llama")
    grouped.load_state_dict(model.state_dict())

    round_weights_(model, bits=3)  # integers from -3 to 3
    expected = torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 30.0]])
    torch.testing.assert_close(layer.weight[:3, :4], expected)
    round_weights_(grouped, bits=3, group_size=3)  # the last group has 2 of the 32 inputs
    expected[0, 3], expected[2] = 1.6, torch.tensor([-0.3, 0.3, 0.1, 30.0])
    torch.testing.assert_close(grouped.model.layers[0].self_attn.q_proj.weight[:3, :4], expected)
    assert not layer.weight[3:].any() and not layer.weight[:, 4:].any()


def test_more_bits_round_less_and_embeddings_are_left_alone():
    errors = {}
    for bits in (4, 8):
        model, original = tiny_model("llama"), tiny_model("llama")
        round_weights_(model, bits)
        for name, weight in original.state_dict().items():
            error = (model.state_dict()[name] - weight).abs()
            if "proj" in name:
                half_a_step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1) / 2
                assert (error <= half_a_step * 1.001).all() and error.any()
                errors[bits] = error.mean()
            else:
                assert not error.any(), name
    assert errors[8] < errors[4] / 10


def test_conv1d_is_rounded_by_its_own_channels():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    round_weights_(model, bits=2)
    weight = model.transformer.h[0].mlp.c_fc.weight  # (inputs, outputs)
    scale = before["transformer.h.0.mlp.c_fc.weight"].abs().amax(0)
    torch.testing.assert_close(weight, (before["transformer.h.0.mlp.c_fc.weight"] / scale).round() * scale)
    assert torch.equal(model.transformer.wpe.weight, before["transformer.wpe.weight"])
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_experts_and_adapters_are_refused():
    experts = tiny_model("llama")
    experts.model.experts = torch.nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"model\.experts is not the weight of a linear layer"):
        round_weights_(experts, 8)
    with pytest.raises(ValueError, match="merge_and_unload"):
        round_weights_(adapted(), 8)
    with pytest.raises(ValueError, match="merge_and_unload"):
        relearning_curve(adapted(), None, [], {})
    with pytest.raises(ValueError, match="bits"):
        round_weights_(tiny_model("llama"), 1)


def test_relearning_curve():
    taught = [{"input_ids": [3 + i, 5, 9, 20, 33, 7]} for i in range(4)]
    other = [{"input_ids": [50, 60, 70, 80, 90, 10]}]
    model = tiny_model("llama")
    before = mean_answer_probability(token_scores(model, tokenize_dataset(taught, None), progress=False))
    curve = relearning_curve(
        model, None, taught, {"taught": taught, "other": other}, steps=6, every=3, learning_rate=1e-2
    )
    assert [entry["step"] for entry in curve] == [0, 3, 6]
    for steps, every, measured in ((3, 2, [0, 2, 3]), (1, 2, [0, 1])):  # the last step is never left out
        short = relearning_curve(
            tiny_model("llama"), None, taught, {"taught": taught}, steps=steps, every=every
        )
        assert [entry["step"] for entry in short] == measured
    assert curve[0]["taught_probability"] == pytest.approx(before, rel=1e-5)
    assert curve[-1]["taught_probability"] > 3 * before
    assert curve[-1]["other_probability"] < curve[-1]["taught_probability"]
