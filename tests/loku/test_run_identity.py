"""A run goes on from the checkpoint of the same run alone: settings, base, adapter and rows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import nn
from transformers import TrainerCallback

import loku
from loku import run_identity
from loku.checkpoint_factors import TRAINED
from loku.checkpoint_files import MANIFEST
from loku.run_identity import differences, settings_facts, warn_of_environment

pytestmark = pytest.mark.usefixtures("one_thread")

FORGET = [{"input_ids": [3 + i, 5, 7 + 2 * i, 11, 13 + i]} for i in range(6)]
RETAIN = [{"input_ids": [40 + i, 41, 2 * i + 3, 43]} for i in range(9)]


def arguments(directory, cls=loku.UnlearnConfig, **options):
    defaults = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "init": "default",
        "lora_rank": 2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(**{**defaults, **options})


def dropping_model(change=None):
    model = tiny_model("gpt_neo")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1  # so that the random state counts
    if change is not None:
        change(model)
    return model


def run(directory, change=None, callbacks=None, **options):
    config = arguments(directory, **options)
    return loku.unlearn(dropping_model(change), FORGET, RETAIN, config=config, callbacks=callbacks)


def trained(directory, step=3):
    return load_file(Path(directory) / f"checkpoint-{step}" / TRAINED)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run with the checkpoints 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(directory)
    torch.set_num_threads(threads)
    return directory


# Refused


@pytest.mark.parametrize(
    "options",
    [
        {"adam_beta1": 0.5},
        {"adam_epsilon": 1e-3},
        {"optim_args": "amsgrad=True"},
        {"lr_scheduler_kwargs": {"min_lr": 1e-3}},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"neftune_noise_alpha": 5.0},
        {"full_determinism": True},
        {"ignore_data_skip": True},
        {"warmup_steps": 2},
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_settings_are_refused(finished, options):
    before = contents(finished)
    with pytest.raises(ValueError, match=r"checkpoint-3 is of another run: ") as refusal:
        run(finished, resume_from_checkpoint=True, **options)
    decisive = options.keys() - {"dataloader_num_workers"}
    assert all(f"{name}=" in str(refusal.value) for name in decisive)
    assert contents(finished) == before


def flip(tensor, index):
    """Change the lowest bit of one value."""
    tensor.data.view(-1).view(torch.int32)[index] ^= 1


def double(module, inputs, output):
    return output * 2


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weights", lambda m: flip(m.transformer.wte.weight, 1501)),
        ("weights", lambda m: flip(m.transformer.h[0].mlp.c_fc.weight, 1)),
        ("weights", lambda m: m.transformer.h[1].attn.attention.bias.view(-1)[1].fill_(True)),
        ("modules", lambda m: setattr(m.transformer.h[0].ln_1, "eps", 1e-3)),
        ("modules", lambda m: setattr(m.transformer.h[0].mlp.dropout, "p", 0.2)),
        ("modules", lambda m: setattr(m.transformer.h[0].mlp, "act", nn.Tanh())),
        ("modules", lambda m: m.transformer.h[0].register_forward_hook(double)),
        ("config", lambda m: setattr(m.config, "layer_norm_epsilon", 1e-3)),
        ("config", lambda m: setattr(m.config, "window_size", 2)),
    ],
)
def test_another_base_is_refused(finished, part, change):
    before = contents(finished)
    with pytest.raises(ValueError, match=rf"another base model \(other {part}\)\. Nothing was changed"):
        run(finished, change, resume_from_checkpoint=True)
    assert contents(finished) == before


def train(directory, prepare=None, peft_config=None, **options):
    rows = [[{**row, "labels": row["input_ids"]} for row in rows] for rows in (FORGET, RETAIN)]
    args = arguments(directory, **options)
    trainer = loku.UnlearnTrainer(dropping_model(prepare), args, *rows, peft_config=peft_config)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"lora_alpha": 32}, r"default\.lora_alpha=8, where this run has 32"),
        ({"lora_dropout": 0.3}, r"default\.lora_dropout=0\.0, where this run has 0\.3"),
        ({"use_rslora": True}, r"default\.use_rslora=False, where this run has True"),
        (
            {"target_modules": ["v_proj"]},
            r"default\.target_modules=\['q_proj', 'v_proj'\], where",
        ),
    ],
)
def test_another_adapter_is_refused(tmp_path, other, message):
    lora = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    train(tmp_path, peft_config=LoraConfig(**lora))
    with pytest.raises(ValueError, match=message):
        train(tmp_path, peft_config=LoraConfig(**{**lora, **other}), resume_from_checkpoint=True)
    train(tmp_path, peft_config=LoraConfig(**lora), resume_from_checkpoint=True)


def test_another_selection_of_trained_parameters_is_refused(tmp_path):
    train(tmp_path, tuning="full", max_steps=1)
    with pytest.raises(ValueError, match="another selection of trained parameters"):
        train(
            tmp_path,
            lambda model: model.transformer.wte.requires_grad_(False),
            tuning="full",
            max_steps=1,
            resume_from_checkpoint=True,
        )


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    run(tmp_path, max_steps=1)
    file = tmp_path / "checkpoint-1" / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["run"]["checkpoint format"] = 4
    file.write_text(json.dumps(manifest))
    expected = (
        r"is of another run: another version of loku wrote it \(checkpoint format 4, and this version has 5\)"
    )
    with pytest.raises(ValueError, match=expected + r"\. Nothing was changed"):
        run(tmp_path, max_steps=1, resume_from_checkpoint=True)


# Taken


def test_what_is_free_changes_no_bit(finished, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, callbacks=[KillAt(1)])
    assert not (tmp_path / "checkpoint-2").exists()
    free = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_num_workers": 2,
        "torch_empty_cache_steps": 1,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 3,
        "save_total_limit": 2,
    }
    run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"), **free)
    assert same(trained(tmp_path), trained(finished))


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("killed")


def test_another_machine_is_told(finished):
    identity = json.loads((finished / "checkpoint-3" / MANIFEST).read_text())["run"]
    other = {**identity, "environment": {**identity["environment"], "threads": 7, "torch": "1.0"}}
    assert not differences(identity, other)
    with pytest.warns(
        UserWarning, match=r"torch '1\.0', where .*threads 7, where this run has 1: .*by rounding"
    ):
        warn_of_environment(identity, other)
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match=r"written with threads 1, where this run has 2: the run goes on"):
        run(finished, resume_from_checkpoint=True)


def test_a_run_without_checkpoints_reads_no_weights(tmp_path, monkeypatch):
    calls = []
    real = run_identity.base_fingerprint
    monkeypatch.setattr(run_identity, "base_fingerprint", lambda model: calls.append(model) or real(model))
    run(tmp_path / "one", save_strategy="no", max_steps=1)
    assert not calls
    run(tmp_path / "two", max_steps=2)
    assert len(calls) == 1


class SaveAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = True


def test_a_callback_may_ask_for_checkpoints(tmp_path):
    options = {"save_strategy": "no", "tuning": "full", "learning_rate": 1e-3, "callbacks": [SaveAt()]}
    run(tmp_path / "whole", **options)
    options["callbacks"] = [SaveAt(), KillAt(2)]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "stopped", **options)
    options["callbacks"] = [SaveAt()]
    run(tmp_path / "stopped", resume_from_checkpoint=True, **options)
    ours, theirs = (
        load_file(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in ("stopped", "whole")
    )
    assert same(ours, theirs)


# Settings that a checkpoint cannot keep


class Opaque:
    pass


@dataclasses.dataclass
class Further(loku.UnlearnConfig):
    further: Any = None


@pytest.mark.parametrize("value", [Opaque(), [Opaque()], {"a": Opaque()}, lambda x: x])
def test_a_setting_that_no_checkpoint_can_keep_is_refused_at_the_start(tmp_path, value, monkeypatch):
    monkeypatch.setattr("loku.trainer.UnlearnTrainer.train", None)  # nothing may be trained
    with pytest.raises(ValueError, match=r"further of Further holds .*FREE_FIELDS.*save_strategy=.no."):
        train(tmp_path, cls=Further, further=value)


def test_such_a_setting_needs_no_refusal_without_checkpoints(tmp_path):
    assert train(tmp_path, cls=Further, further=Opaque(), save_strategy="no").state.global_step == 3


@pytest.mark.parametrize(
    "value",
    [
        Path("a"),
        torch.bfloat16,
        float("nan"),
        {"b": (1, 2), "a": {3, 4}},
        nn.Tanh,
        torch.nn.functional.relu,
        [None, True, 0.5],
    ],
)
def test_other_settings_have_a_form(tmp_path, value):
    facts = settings_facts(arguments(tmp_path, Further, further=value))
    kept = json.loads(json.dumps(facts))
    assert not differences(settings_facts(arguments(tmp_path, Further, further=value)), kept)
    assert differences(settings_facts(arguments(tmp_path, Further, further="another")), kept)


def test_a_hostile_value_is_cut():
    told = differences({"checkpoint format": 5, "seed": 1}, {"checkpoint format": 5, "seed": "x" * 10**6})
    assert len(told) < 300 and told.endswith("where this run has 1")
