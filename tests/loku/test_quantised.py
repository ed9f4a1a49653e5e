"""Quantised bases (QLoRA). The tests need bitsandbytes: pip install 'loku-kernels[qlora]'."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import loku

pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"input_ids": [3 + i, 5, 7 + 2 * i, 11, 13 + i]} for i in range(6)]
SIZES = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
QUANTISED = {
    "Linear4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "Linear8bitLt": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(params=QUANTISED)
def model(request, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(SIZES).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=QUANTISED[request.param], device_map="cpu"
    )
    assert type(model.model.layers[0].mlp.up_proj).__name__ == request.param
    return model


def config(tmp_path, **options):
    return loku.UnlearnConfig(
        output_dir=str(tmp_path / "trainer"),
        max_steps=20,
        learning_rate=1e-2,
        lora_rank=4,
        lora_alpha=8,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_default_lora_trains_on_it(gradient_checkpointing, model, tmp_path):
    options = config(tmp_path, init="default", gradient_checkpointing=gradient_checkpointing)
    result = loku.unlearn(model, ROWS, ROWS[::-1], config=options)
    losses = [entry["retain_loss"] for entry in result.history if "retain_loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in result.model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert ".lora_B." not in name or parameter.abs().max() > 0, name
    result.save(tmp_path / "adapter")
    for kind in ("merged", "residual"):
        with pytest.raises(ValueError, match=r"its weight is a quantised .*save the portable adapter"):
            result.save(tmp_path / kind, kind=kind)


@pytest.mark.parametrize("init", ["fila", "pissa"])
def test_fila_refuses_it(init, model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = r"q_proj: FILA needs a plain nn\.Linear.*initialise on the unquantised base and then quantise"
    with pytest.raises(ValueError, match=message):
        loku.unlearn(model, ROWS, ROWS[::-1], config=config(tmp_path, init=init))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def test_the_documented_recipe(tmp_path, monkeypatch):
    """The one block of Python in README and docs that quantises a base runs as it is."""
    root = Path(__file__).parents[2]
    pages = [path.read_text(encoding="utf-8") for path in (root / "README.md", *root.glob("docs/*.md"))]
    blocks = [
        block for page in pages for block in re.findall(r"^```py(?:thon)?\n(.*?)^```", page, re.S | re.M)
    ]
    (recipe,) = (block for block in blocks if "BitsAndBytesConfig(" in block)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(compile(recipe, "recipe", "exec"), names)
    history = [entry for entry in names["trainer"].state.log_history if "forget_loss" in entry]
    assert history[-1]["forget_probability"] < 0.7 * history[0]["forget_probability"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
