"""The config of an adapter has the fields that every tool knows, and the same bytes in every process."""

import json

import pytest
from fila_models import initialized, make_base
from peft import LoraConfig, get_peft_model
from small_trainers import trainer_of
from tiny_models import tiny_model

import loku
from loku.saving.adapter_files import STANDARD_FIELDS, unusual_fields

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def assert_standard(config, targets=TARGETS):
    assert config.keys() <= STANDARD_FIELDS
    assert config["target_modules"] == sorted(targets)
    assert type(config["lora_alpha"]) is int
    assert all(type(alpha) is int for alpha in config["alpha_pattern"].values())


def plain(**options):
    options = {"r": 4, "lora_alpha": 8.0, "target_modules": TARGETS, **options}
    return get_peft_model(make_base("llama"), LoraConfig(**options))


def test_portable_and_residual_saves(tmp_path):
    for name, model in (("fila", initialized("llama", lora_alpha=7.0)), ("plain", plain())):
        loku.save_portable_adapter(model, tmp_path / name)
        loku.save_residual_model(model, tmp_path / f"{name} residual")
        targets = model.peft_config["default"].target_modules
        for folder in (tmp_path / name, tmp_path / f"{name} residual" / "adapter"):
            assert_standard(read_config(folder), targets)
    assert_standard(
        read_config(tmp_path / "fila residual" / "reference"),
        initialized("llama").peft_config["reference"].target_modules,
    )


def test_a_value_that_is_no_default_stays(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2, "k.*": 3}, "alpha_pattern": {"q_proj": 4.0, "k.*": 4.5}}
    model = plain(lora_alpha=8.5, **patterns)
    loku.save_portable_adapter(model, tmp_path)
    config = read_config(tmp_path)
    assert config["lora_alpha"] == 8.5 and config["alpha_pattern"] == {"q_proj": 4, "k.*": 4.5}
    assert list(config["rank_pattern"]) == ["q_proj", "k.*"]  # the first that matches counts


def test_a_field_of_a_newer_peft_stays_if_it_says_something(tmp_path):
    newer = sorted(set(LoraConfig().to_dict()) - STANDARD_FIELDS)
    if not newer:
        pytest.skip("this peft has no such field")
    model = plain()
    assert unusual_fields(model.peft_config["default"]) == {}
    setattr(model.peft_config["default"], newer[0], {"rank": 1})
    assert unusual_fields(model.peft_config["default"]) == {newer[0]: {"rank": 1}}
    loku.save_portable_adapter(model, tmp_path)
    assert set(read_config(tmp_path)) - STANDARD_FIELDS == {newer[0]}


def test_checkpoints(tmp_path):
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8.0, target_modules=targets)
    model = get_peft_model(tiny_model("llama"), config)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = trainer_of(model, "ihl", tmp_path, **options)
    trainer.train()
    assert_standard(read_config(tmp_path / "checkpoint-1"), targets)
    trainer.save_model(str(tmp_path / "saved"), targets)
    assert_standard(read_config(tmp_path / "saved"), targets)
