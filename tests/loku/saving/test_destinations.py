"""A directory holds the last save, whatever was saved to it before, and files of others are safe."""

import json
import shutil

import pytest
import torch
from fila_models import initialized, logits, make_base, train
from peft import PeftModel
from transformers import AutoModelForCausalLM

import loku
from loku.saving.destinations import LIST, check_destination
from loku.saving.kinds import KINDS, save

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

OTHERS = {
    "portable": ["adapter_config.json", "adapter_model.safetensors", LIST],
    "residual": ["adapter", "base", LIST, "reference"],
    "merged": ["config.json", "generation_config.json", LIST, "model.safetensors"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a base, a model unlearned from it, and the same model trained on."""
    folder = tmp_path_factory.mktemp("models")
    make_base("llama").save_pretrained(folder / "original")
    torch.manual_seed(0)
    first = initialized("llama")
    first.peft_config["default"].base_model_name_or_path = str(folder / "original")
    train(first)
    other = initialized("llama")
    train(other, steps=8)
    return folder, other, first


def loaded(path, kind, folder):
    if kind == "merged":
        return AutoModelForCausalLM.from_pretrained(path)
    if kind == "residual":
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        return PeftModel.from_pretrained(base, path / "adapter")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "original"), path)


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("earlier", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_save_is_what_loads(earlier, kind, models, tmp_path):
    folder, other, model = models
    path = tmp_path / "saved"
    save(other, path, earlier)
    (path / "notes.txt").write_text("kept")
    (path / "checkpoint-7").mkdir()
    save(model, path, kind)
    assert sorted(entry.name for entry in path.iterdir()) == sorted(
        [*OTHERS[kind], "notes.txt", "checkpoint-7"]
    )
    expected = logits(model)
    assert_close(logits(loaded(path, kind, folder)), expected)
    if kind != "residual":  # whoever takes the folder for a model, or for an adapter, gets the same
        assert_close(logits(AutoModelForCausalLM.from_pretrained(path)), expected)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def foreign_model(models, path):
    make_base("llama").save_pretrained(path)
    return "config.json, model.safetensors"


def foreign_adapter(models, path):
    save(models[1], path, "portable")
    (path / LIST).unlink()
    return "adapter_config.json, adapter_model.safetensors"


def altered_model(models, path):
    save(models[1], path, "merged")
    AutoModelForCausalLM.from_pretrained(path).double().save_pretrained(path)
    return "config.json, model.safetensors"


def pickled_model(models, path):
    path.mkdir()
    torch.save({}, path / "pytorch_model.bin")
    return "pytorch_model.bin"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [foreign_model, foreign_adapter, altered_model, pickled_model])
def test_the_models_of_others_are_refused(make, kind, models, tmp_path):
    path = tmp_path / "saved"
    names = make(models, path)
    before = contents(tmp_path)
    for refused in (lambda: save(models[2], path, kind), lambda: check_destination(path, kind)):
        with pytest.raises(ValueError, match=f"{path} holds {names}, which is not a save of loku.*delete it"):
            refused()
    assert contents(tmp_path) == before


def test_a_folder_named_base_is_not_ours(models, tmp_path):
    """A residual save would replace it, and the other kinds leave it alone."""
    make_base("llama").save_pretrained(tmp_path / "base")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds base, which is not a save of loku"):
        save(models[2], tmp_path, "residual")
    assert contents(tmp_path) == before
    for kind in ("portable", "merged"):
        save(models[2], tmp_path, kind)
        assert contents(tmp_path / "base") == contents_of(before, "base/")


def contents_of(files, prefix):
    return {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}


def test_a_copied_save_is_still_ours(models, tmp_path):
    save(models[1], tmp_path / "first", "residual")
    shutil.copytree(tmp_path / "first", tmp_path / "second", copy_function=shutil.copy)
    save(models[2], tmp_path / "second", "merged")
    assert sorted(entry.name for entry in (tmp_path / "second").iterdir()) == OTHERS["merged"]


def test_a_damaged_list_means_that_nothing_is_ours(models, tmp_path):
    save(models[1], tmp_path, "merged")
    for text in ("{", "[]", '{"files": {}}'):
        (tmp_path / LIST).write_text(text)
        with pytest.raises(ValueError, match=r"holds config\.json, model\.safetensors"):
            check_destination(tmp_path, "portable")


def test_save_pretrained_takes_our_saves_away_and_overwrites_adapters_as_peft(models, tmp_path):
    folder, other, model = models
    save(other, tmp_path / "ours", "merged")
    model.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "config.json").exists()
    foreign_adapter(models, tmp_path / "foreign")
    model.save_pretrained(tmp_path / "foreign")
    make_base("llama").save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists()
    for name in ("ours", "foreign", "model"):
        assert_close(logits(loaded(tmp_path / name, "portable", folder)), logits(model))
        assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), logits(model))


def test_names_of_the_bases(models, tmp_path, monkeypatch):
    folder, _, model = models
    monkeypatch.chdir(tmp_path)
    save(model, "portable")
    save(model, "residual", "residual")

    def base_of(path):
        return json.loads((tmp_path / path / "adapter_config.json").read_text())["base_model_name_or_path"]

    assert base_of("portable") == str(folder / "original")
    assert base_of("residual/adapter") == base_of("residual/reference") == str(tmp_path / "residual" / "base")

    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("residual/base"), "residual/adapter"
    )
    with pytest.raises(
        ValueError, match=r"is a residual.*load_adapter\('.*residual/reference', 'reference'\)"
    ):
        loku.save_portable_adapter(again, "again")
    again.load_adapter("residual/reference", "reference")
    loku.save_portable_adapter(again, "again")
    assert base_of("again") == str(folder / "original")  # and not the residual, which it does not fit
    assert_close(logits(AutoModelForCausalLM.from_pretrained("again")), logits(model))
