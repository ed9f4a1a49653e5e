"""All three saves load with plain transformers and peft, and compute the unlearned model's outputs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import loku
from loku.demo import EMBEDDED
from loku.fila.initialize import initialize_from_row_scales
from loku.fila.targets import fila_targets
from loku.target_modules import default_target_modules
from loku.trust import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"input_ids": [3 + i, 5, 7 + 2 * i, 11, 13 + i]} for i in range(6)]
IDS = torch.tensor([row["input_ids"] for row in ROWS])
KINDS = ["portable", "residual", "merged"]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def unlearned(path, **options):
    config = loku.UnlearnConfig(
        output_dir=str(path / "trainer"),
        max_steps=3,
        learning_rate=1e-2,
        lora_rank=4,
        lora_alpha=8,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return loku.unlearn(str(path / "base"), ROWS, ROWS[::-1], config=config)


def loaded(path, kind):
    if kind == "merged":
        return AutoModelForCausalLM.from_pretrained(path)
    base, adapter = (path / "base", path / "adapter") if kind == "residual" else (path.parent / "base", path)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


FRESH_PROCESS = """
import pathlib, socket, sys, torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

def refuse(*args, **kwargs):
    raise AssertionError("a pickle or the network")

torch.load = socket.socket.connect = refuse
path = pathlib.Path(sys.argv[1])
ids = load_file(path / "ids.safetensors")["ids"]
models = {
    "portable": AutoPeftModelForCausalLM.from_pretrained(path / "portable"),
    "residual": AutoPeftModelForCausalLM.from_pretrained(path / "residual" / "adapter"),
    "merged": AutoModelForCausalLM.from_pretrained(path / "merged"),
}
with torch.no_grad():
    logits = {kind: model.eval()(input_ids=ids).logits for kind, model in models.items()}
save_file(logits, path / "logits.safetensors")
"""


def test_every_kind_loads_in_a_fresh_process(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    result = unlearned(tmp_path)
    for kind in KINDS:
        result.save(tmp_path / kind, kind=kind)
    expected = logits(result.model)
    original = logits(tiny_model("llama"))
    assert (expected - original).norm() / original.norm() > 1e-2

    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["init_lora_weights"] is True and config["r"] == 8 and config["lora_alpha"] == 8
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env=environment)
    # Relative to the largest logit. The residual and its adapter equal the model in memory, bit for bit.
    tolerance = {"portable": 1e-5, "residual": 0.0, "merged": 1e-5}
    for kind, ours in load_file(tmp_path / "logits.safetensors").items():
        assert (ours - expected).abs().max() <= tolerance[kind] * expected.abs().max(), kind


def initialized(kind="llama", dtype=torch.float32, **options):
    base = tiny_model(kind).to(dtype)
    options = {"r": 4, "lora_alpha": 8, "target_modules": default_target_modules(base), **options}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(3)
    scales = {
        name: torch.rand(layer.out_features, generator=generator)
        for name, layer in fila_targets(model).items()
    }
    initialize_from_row_scales(model, scales)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


SAVES = {
    "portable": loku.save_portable_adapter,
    "residual": loku.save_residual_model,
    "merged": loku.save_merged_model,
}


@pytest.mark.parametrize("kind", ["residual", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_with_tied_weights_and_in_bfloat16(dtype, kind, tmp_path):
    model = initialized("gpt_neo", dtype)  # one weight for input and output embedding
    before = {name: value.clone() for name, value in model.state_dict().items()}
    SAVES[kind](model, tmp_path / kind)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    again = loaded(tmp_path / kind, kind)
    assert again.get_input_embeddings().weight.dtype == dtype
    if kind == "residual":
        assert torch.equal(logits(again), logits(model))
        return
    for name, layer in fila_targets_of(model).items():
        delta = layer.scaling["default"] * (
            layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        exact = layer.get_base_layer().weight.double() + delta
        error = (again.get_submodule(name).weight.double() - exact).abs()
        assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def fila_targets_of(model):
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def test_the_reference_of_a_residual_model_makes_it_portable(tmp_path):
    model = initialized()
    loku.save_residual_model(model, tmp_path / "residual")
    again = loaded(tmp_path / "residual", "residual")
    again.load_adapter(tmp_path / "residual" / "reference", "reference")
    with loku.reference_model(again):
        torch.testing.assert_close(logits(again), logits(tiny_model("llama")), rtol=1e-4, atol=1e-4)
    loku.save_portable_adapter(again, tmp_path / "portable")
    portable = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "portable")
    torch.testing.assert_close(logits(portable), logits(model), rtol=1e-4, atol=1e-4)


def test_default_initialisation(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    result = unlearned(tmp_path, init="default")
    for kind in KINDS:
        result.save(tmp_path / kind, kind=kind)
        torch.testing.assert_close(
            logits(loaded(tmp_path / kind, kind)), logits(result.model), rtol=1e-4, atol=1e-4
        )
    assert not (tmp_path / "residual" / "reference").exists()
    with pytest.raises(ValueError, match="kind must be one of"):
        result.save(tmp_path / "new", kind="gguf")


@pytest.mark.parametrize("kind", ["residual", "merged"])
def test_a_save_replaces_an_earlier_one_of_any_kind(kind, tmp_path):
    path = tmp_path / "saved"
    model = initialized()
    for earlier in KINDS:
        SAVES[earlier](model, path)
        (path / "notes.txt").write_text("kept")
        SAVES[kind](model, path)
        names = {"residual": ["adapter", "base", "reference"]}.get(
            kind, ["config.json", "generation_config.json", "model.safetensors"]
        )
        assert sorted(entry.name for entry in path.iterdir()) == sorted(
            [*names, "loku_save.json", "notes.txt"]
        )
        assert torch.allclose(logits(loaded(path, kind)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moment", ["writing", "moving"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_save_keeps_the_earlier_one(kind, moment, tmp_path, monkeypatch):
    path = tmp_path / "saved"
    model = initialized()
    SAVES[kind](model, path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for parameter in model.parameters():
        parameter.data += 1
    if moment == "writing":
        target = (
            "loku.saving.adapter_files.save_file"
            if kind != "merged"
            else "transformers.LlamaForCausalLM.save_pretrained"
        )

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(target, full)
    else:
        rename, calls = type(path).rename, []

        def full(self, target):
            calls.append(target)
            if len(calls) == 3:
                raise OSError(30, "Read-only file system")
            return rename(self, target)

        monkeypatch.setattr(type(path), "rename", full)
    with pytest.raises(OSError, match=r"No space|Read-only"):
        SAVES[kind](model, path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_quantised_weights_and_other_adapters_are_not_merged(tmp_path):
    model = initialized()
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.get_base_layer().weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    for save in (loku.save_merged_model, loku.save_residual_model):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: its weight is a quantised"):
            save(model, tmp_path / "saved")
    dora = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"q_proj: its adapter is a DoraLinear.*merge_and_unload"):
        loku.save_merged_model(dora, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_pickled_model_is_not_read(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    torch.save(load_file(tmp_path / "base" / "model.safetensors"), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        unlearned(tmp_path)


TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


@pytest.fixture
def chat_base(tmp_path):
    """A bfloat16 model with a tokenizer, a chat template and a generation config of its own."""
    tokenizer = load_tokenizer(EMBEDDED)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    model = tiny_model("llama", len(tokenizer)).to(torch.bfloat16)
    model.generation_config.update(temperature=0.3, do_sample=True, max_new_tokens=7)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_merged_model_has_what_its_base_has(tuning, chat_base, tmp_path):
    result = unlearned(tmp_path, tuning=tuning)
    assert result.tokenizer is None  # the rows have ids
    result.save(tmp_path / "merged", "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {again.dtype} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    ours, theirs = (
        json.loads((path / "generation_config.json").read_text()) for path in (tmp_path / "merged", chat_base)
    )
    assert ours == theirs and ours["temperature"] == 0.3 and ours["max_new_tokens"] == 7
    tokenizer = load_tokenizer(tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == TEMPLATE
    messages = [{"role": "user", "content": "Who?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>Who?"
    assert tokenizer.get_vocab() == load_tokenizer(EMBEDDED).get_vocab()
    if tuning == "lora":  # one rounding of the sum in float32
        for name, layer in fila_targets_of(result.model).items():
            exact = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
            assert torch.equal(weights[f"{name}.weight"], exact.to(torch.bfloat16))


def test_a_tokenizer_that_was_passed_comes_first(chat_base, tmp_path):
    result = unlearned(tmp_path)
    other = load_tokenizer(EMBEDDED)
    other.chat_template = "{{ 'other' }}"
    result.tokenizer = other
    result.save(tmp_path / "merged", "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ 'other' }}"


def test_the_log_says_that_a_base_has_no_tokenizer(tmp_path, caplog):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    unlearned(tmp_path).save(tmp_path / "merged", "merged")
    assert "saved without a tokenizer" in caplog.text and str(tmp_path / "base") in caplog.text
    assert not (tmp_path / "merged" / "tokenizer.json").exists()
