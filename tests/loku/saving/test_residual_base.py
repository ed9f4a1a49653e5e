"""peft's and transformers' own saves after FILA load on the untouched base, and give the unlearned model."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from fila_models import (
    factors,
    initialized,
    logits,
    lora_layers,
    make_base,
    make_peft,
    random_scales,
    train,
)
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from transformers.trainer import Trainer

import loku
from loku.adapters import active_adapters
from loku.fila.initialize import initialize_from_row_scales, restore_base_

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


@pytest.fixture(scope="module")
def given():
    """A model after FILA and training; the tests do not change it."""
    torch.manual_seed(0)
    model = initialized("llama", rank_pattern={"q_proj": 6}, use_rslora=True)
    train(model)
    return model


def assert_loads_as(model, path, base=None):
    """The saved adapter on an untouched base computes as ``model``, and FILA's own factors do not."""
    loaded = PeftModel.from_pretrained(make_base("llama") if base is None else base, path)
    expected = logits(model)
    assert (logits(loaded) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, layer in lora_layers(loaded).items():  # twice the rank: the difference
        assert layer.r["default"] == 2 * model.get_base_model().get_submodule(name).r["default"]


def trainer(model, path):
    return Trainer(model, TrainingArguments(str(path), use_cpu=True, report_to=[]))


def in_ddp(model, path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        Accelerator().unwrap_model(DistributedDataParallel(model)).save_pretrained(path)
    finally:
        dist.destroy_process_group()


def by_another_trainer(model, path):
    trainer(model, path)._save(path, state_dict=model.state_dict())


SAVES = {
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "selected": lambda model, path: model.save_pretrained(path, selected_adapters=["default"]),
    "pickle": lambda model, path: model.save_pretrained(path, safe_serialization=False),
    "Trainer.save_model": lambda model, path: trainer(model, path).save_model(path),
    "a state dict": by_another_trainer,
    "in DDP": in_ddp,
    "deepcopy": lambda model, path: copy.deepcopy(model).save_pretrained(path),
    "pickled model": lambda model, path: pickle.loads(pickle.dumps(model)).save_pretrained(path),
}


@pytest.mark.parametrize("way", SAVES)
def test_every_way_to_save_is_portable(way, given, tmp_path):
    assert isinstance(given, PeftModelForCausalLM)
    SAVES[way](given, str(tmp_path / "saved"))
    assert_loads_as(given, tmp_path / "saved")
    assert not (tmp_path / "saved" / "reference").exists()


def test_a_state_dict_is_what_is_saved(given, tmp_path):
    other = copy.deepcopy(given)
    train(other)
    given.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_loads_as(other, tmp_path)


def test_push_to_hub(given, tmp_path, monkeypatch):
    from transformers.utils import hub

    class Api:
        def create_repo(self, *args, **kwargs):
            return type("Repo", (), {"repo_id": "user/name", "endpoint": ""})()

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    def upload(self, directory, *args, **kwargs):
        (tmp_path / "pushed").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / "pushed" / file).write_bytes(Path(directory, file).read_bytes())

    monkeypatch.setattr(hub, "hf_api", Api, raising=False)
    monkeypatch.setattr(hub, "create_repo", Api().create_repo, raising=False)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    given.push_to_hub("user/name")
    assert_loads_as(given, tmp_path / "pushed")


def test_a_model_that_was_saved_as_a_whole_keeps_its_saves(given, tmp_path):
    buffer = io.BytesIO()
    torch.save(given, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert type(again) is type(given) and torch.equal(logits(again), logits(given))
    again.save_pretrained(tmp_path)
    assert_loads_as(given, tmp_path)


def test_loku_saves_while_peft_default_models_save_as_ever(tmp_path):
    model = make_peft("llama")
    train(model)
    assert type(model) is PeftModelForCausalLM
    model.save_pretrained(tmp_path)
    assert (logits(PeftModel.from_pretrained(make_base("llama"), tmp_path)) - logits(model)).abs().max() == 0


def test_without_a_task_type_and_under_another_name(tmp_path):
    base = make_base("llama")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), adapter_name="forget")
    assert type(model) is PeftModel
    initialize_from_row_scales(model, random_scales(model, "forget"), "forget")
    train(model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["forget"]
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path / "forget")
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()


def test_a_second_adapter_on_the_residual_base_is_saved_alone(given, tmp_path):
    model = copy.deepcopy(given)
    model.add_adapter("more", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("more")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path / "more")
    assert (logits(loaded) - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.set_adapter("default")
    assert_loads_as(model, tmp_path)


def test_disable_adapter_gives_the_original_model(given):
    original, before = logits(make_base("llama")), logits(given)
    with given.disable_adapter():
        assert (logits(given) - original).abs().max() <= 1e-5 * original.abs().max()
    with active_adapters(given, []):
        assert (logits(given) - original).abs().max() > 0.1 * original.abs().max()
    assert torch.equal(logits(given), before)


def test_merge_and_unload_merges_the_adapter_alone(given):
    expected = logits(given)
    merged = copy.deepcopy(given).merge_and_unload()
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    original = copy.deepcopy(given).merge_and_unload(adapter_names=["reference"])
    expected = logits(make_base("llama"))
    assert (logits(original) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_would_be_wrong_is_refused(given, tmp_path):
    before = logits(given)
    with pytest.raises(ValueError, match=r"residual base.*restore_base_.*merge_and_unload"):
        given.unload()
    with pytest.raises(ValueError, match=r"'reference'.*are lost; call .*restore_base_"):
        given.delete_adapter("reference")
    with pytest.raises(ValueError, match="do not add up"):
        given.merge_and_unload(adapter_names=["default", "reference"])
    with pytest.raises(ValueError, match="is the original model's adapter on the residual base"):
        given.save_pretrained(tmp_path / "saved", selected_adapters=["default", "reference"])
    with pytest.raises(ValueError, match="no LoRA adapter 'other'"):
        given.save_pretrained(tmp_path / "saved", selected_adapters=["other"])
    with pytest.raises(ValueError, match="already the difference"):
        given.save_pretrained(tmp_path / "saved", path_initial_model_for_weight_conversion="x")
    assert not (tmp_path / "saved").exists() and torch.equal(logits(given), before)


def test_after_restore_base_nothing_is_saved(given, tmp_path):
    model = copy.deepcopy(given)
    restore_base_(model)
    for save in (model.save_pretrained, lambda path: loku.save_portable_adapter(model, path)):
        with pytest.raises(ValueError, match="no layer with the adapter 'default' any more"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_small_updates_survive(tmp_path):
    """The difference is exact: float32, small differences before products, from a state dict too."""
    model = make_peft("llama", torch.bfloat16)
    initialize_from_row_scales(model, random_scales(model))
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".default." in name:
            parameter.data += 1e-4 * parameter.data.abs().max() * torch.randn_like(parameter)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in lora_layers(model).items():
        (A, B, scaling), (A0, B0, _) = factors(layer), factors(layer, "reference")
        expected = scaling * (B @ A - B0 @ A0)
        A2, B2 = (saved[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
        assert (B2 @ A2 - expected).norm() <= 1e-4 * expected.norm(), name


def test_the_tokenizer_lies_beside_every_kind(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    result = loku.UnlearnResult(initialized("llama"), [], tokenizer)
    for kind, folder in {"portable": ".", "residual": "base", "merged": "."}.items():
        result.save(tmp_path / kind, kind)
        assert (tmp_path / kind / folder / "tokenizer.json").exists()


def test_a_loaded_residual_model_is_saved_so_by_its_trainer(given, tmp_path):
    """peft loads a plain ``PeftModel``; with the initial factors ``UnlearnTrainer`` knows what it is."""
    loku.save_residual_model(given, tmp_path / "residual")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "residual" / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "residual" / "adapter", is_trainable=True)
    model.load_adapter(tmp_path / "residual" / "reference", "reference")
    rows = [{"input_ids": [3, 5, 7], "labels": [3, 5, 7]}]
    args = loku.UnlearnConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    loku.UnlearnTrainer(model, args, rows, rows).save_model(str(tmp_path / "by trainer"))
    model.save_pretrained(tmp_path / "by peft")
    for name in ("by trainer", "by peft"):
        assert_loads_as(given, tmp_path / name)
