"""The portable adapter gives the unlearned model on the untouched base."""

import pytest
import torch
from fila_models import (
    MODELS,
    assert_close,
    factors,
    initialized,
    logits,
    lora_layers,
    make_base,
    make_peft,
    random_scales,
    train,
)
from peft import LoraConfig, PeftModel, get_peft_model

from loku.fila.initialize import initialize_from_row_scales
from loku.saving.adapter import save_portable_adapter
from loku.target_modules import default_target_modules

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 12, "q_proj": 3}},
    ],
    ids=["lora", "rslora", "patterns"],
)
def test_portable_adapter_on_the_untouched_base(kind, options, tmp_path):
    model = initialized(kind, **options)
    train(model)
    unlearned = logits(model)
    save_portable_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), unlearned)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]

    loaded = PeftModel.from_pretrained(make_base(kind), tmp_path / "adapter")
    assert_close(logits(loaded), unlearned, 1e-4)
    assert (logits(loaded) - unlearned).abs().max() <= 1e-4
    assert all(scaling == 1 for layer in lora_layers(loaded).values() for scaling in layer.scaling.values())
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(make_base(kind)))
    assert (logits(loaded.merge_and_unload()) - unlearned).abs().max() <= 1e-4
    assert (logits(model.merge_and_unload()) - unlearned).abs().max() <= 1e-4


def test_portable_adapter_keeps_small_updates_of_a_bfloat16_model(tmp_path):
    model = make_peft("llama", torch.bfloat16)
    initialize_from_row_scales(model, random_scales(model))
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".default." in name:
            parameter.data += 1e-4 * parameter.data.abs().max() * torch.randn_like(parameter)
    expected = {}
    for name, layer in lora_layers(model).items():
        (A, B, scaling), (A0, B0, _) = factors(layer), factors(layer, "reference")
        expected[name] = scaling * (B @ A - B0 @ A0)
    save_portable_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path / "adapter")
    for name, layer in lora_layers(loaded).items():
        A, B, scaling = factors(layer)
        assert_close(scaling * B @ A, expected[name], 1e-4)


def test_default_initialisation_and_other_names_are_saved_as_they_are(tmp_path):
    base = make_base("llama")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=default_target_modules(base))
    model = get_peft_model(base, config, adapter_name="forget")
    train(model)
    save_portable_adapter(model, tmp_path / "a" / "b", adapter_name="forget")
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path / "a" / "b")
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-6
    assert loaded.peft_config["default"].r == 4


def test_saving_over_an_earlier_adapter_keeps_other_files(tmp_path):
    path = tmp_path / "run"
    (path / "checkpoint-5").mkdir(parents=True)
    model = initialized("llama")
    save_portable_adapter(model, path)
    train(model)
    save_portable_adapter(model, path)
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-5",
        "loku_save.json",
    ]
    assert (logits(PeftModel.from_pretrained(make_base("llama"), path)) - logits(model)).abs().max() <= 1e-4


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_save_leaves_nothing_and_keeps_the_earlier_adapter(exists, tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    model = initialized("llama")
    if exists:
        save_portable_adapter(model, path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoraConfig, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_portable_adapter(model, path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert path.exists() == exists


def test_save_refusals(tmp_path):
    model = initialized("llama")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="is a file"):
        save_portable_adapter(model, tmp_path / "file")
    with pytest.raises(ValueError, match="no LoRA adapter 'other'"):
        save_portable_adapter(model, tmp_path / "new", adapter_name="other")
    with pytest.raises(ValueError, match="residual base"):
        save_portable_adapter(model, tmp_path / "new", adapter_name="reference")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
