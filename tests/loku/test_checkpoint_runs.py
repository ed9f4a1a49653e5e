"""Runs touch nothing in their directory of checkpoints but what they wrote themselves."""

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest
from killed_runs import FORGET, RETAIN, AtStep, at_call, run
from peft import LoraConfig
from tiny_models import tiny_model
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import loku
from loku.checkpoint_files import whole_checkpoints
from loku.cli import _explain

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = {"init": "default", "max_steps": 4}


def contents(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


@pytest.fixture
def measures_nothing(monkeypatch):
    """Nothing may be measured for FILA, and so nothing trained."""
    monkeypatch.setattr("loku.fila.row_scales.accumulate_squared_grad_", None)


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_foreign_directory_is_refused_before_training(step, tmp_path, measures_nothing):
    (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / f"checkpoint-{step}" / "thesis.pdf").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=rf"would write checkpoint-{step} .*Nothing was changed; pass another"
    ):
        run(tmp_path)
    assert contents(tmp_path) == before and names(tmp_path) == [f"checkpoint-{step}"]


@pytest.mark.parametrize("step", ["1", "3", "6", "02", "x"])
def test_a_foreign_directory_of_another_step_stays(step, tmp_path):
    (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / f"checkpoint-{step}" / "thesis.pdf").write_text("mine")
    run(tmp_path, init="default", save_total_limit=1)
    assert names(tmp_path / f"checkpoint-{step}") == ["thesis.pdf"]
    assert names(tmp_path) == sorted([f"checkpoint-{step}", "checkpoint-5", "saved"])


def test_another_runs_checkpoints_are_refused_or_stay(tmp_path, monkeypatch):
    run(tmp_path, **PLAIN)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("loku.fila.row_scales.accumulate_squared_grad_", None)
        with pytest.raises(
            ValueError, match=r"checkpoint-2 .*another run: .*init='default', where .* 'fila'"
        ):
            run(tmp_path, max_steps=4)
    assert contents(tmp_path) == before
    run(tmp_path, init="default", max_steps=3, save_steps=3, save_total_limit=1)  # writes checkpoint 3 alone
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "saved"]
    kept = {p: data for p, data in before.items() if "checkpoint" in p.parent.name}
    assert kept == {p: data for p, data in contents(tmp_path).items() if p in kept}


def test_a_run_that_begins_anew_replaces_its_own_checkpoints(tmp_path):
    run(tmp_path, **PLAIN)
    before = contents(tmp_path / "saved")
    written = os.stat(tmp_path / "checkpoint-2").st_ino
    run(tmp_path, **PLAIN)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "saved"]
    assert os.stat(tmp_path / "checkpoint-2").st_ino != written
    assert contents(tmp_path / "saved") == before


def test_a_run_with_epochs_is_refused_too(tmp_path):
    (tmp_path / "checkpoint-6").mkdir()  # the last step of the second epoch of 3 steps
    epochs = {"init": "default", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    with pytest.raises(ValueError, match="would write checkpoint-6"):
        run(tmp_path, **epochs)
    (tmp_path / "checkpoint-6").rename(tmp_path / "checkpoint-5")
    run(tmp_path, **epochs)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-5", "checkpoint-6", "saved"]


def test_what_appears_while_the_run_trains_stays(tmp_path):
    def appear(control):
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4" / "thesis.pdf").write_text("mine")

    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*must not replace it") as failed:
        run(tmp_path, [AtStep(3, appear)], **PLAIN)
    assert _explain(failed.value)[0] == 1
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert names(tmp_path / "checkpoint-4") == ["thesis.pdf"]


def test_a_checkpoint_with_a_users_file_is_not_deleted(tmp_path):
    def annotate(control):
        (tmp_path / "checkpoint-2" / "notes.txt").write_text("mine")

    with pytest.warns(UserWarning, match=r"save_total_limit: .*checkpoint-2 stays: it also has notes\.txt"):
        run(tmp_path, [AtStep(3, annotate)], init="default", save_total_limit=1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5", "saved"]
    assert (tmp_path / "checkpoint-2" / "notes.txt").read_text() == "mine"


class ClockSetBack(TrainerCallback):
    """After each checkpoint the times of all files are later than any time to come."""

    def __init__(self, directory):
        self.directory, self.time = directory, 4_000_000_000

    def on_save(self, args, state, control, **kwargs):
        self.time -= 1000
        for path in [*self.directory.rglob("*"), self.directory]:
            if os.path.getmtime(path) < 3_000_000_000:
                os.utime(path, (self.time, self.time))


def test_the_newest_checkpoint_stays_if_the_clock_is_set_back(tmp_path):
    run(tmp_path, [ClockSetBack(tmp_path)], init="default", max_steps=8, save_total_limit=2)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8", "saved"]


def test_the_best_checkpoint_alone_stays_at_the_end_beside_foreign_ones(tmp_path):
    """Trainer's own deletion at the end takes everything that has the name of a checkpoint."""
    foreign = tmp_path / "checkpoint-99"
    foreign.mkdir()
    (foreign / "thesis.pdf").write_text("mine")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "forget_loss"}
    evaluation = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "greater_is_better": False,
    }  # so the first is best
    run(tmp_path, **PLAIN, **best, **evaluation, save_total_limit=1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-99", "saved"]
    assert names(foreign) == ["thesis.pdf"]


def test_an_altered_best_checkpoint_is_not_loaded(tmp_path):
    def alter(control):
        file = tmp_path / "checkpoint-2" / "loku_trained.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "forget_loss"}
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "greater_is_better": False}
    with pytest.raises(ValueError, match=r"checkpoint-2, the best checkpoint, was not loaded: loku_trained"):
        run(tmp_path, [AtStep(3, alter)], **PLAIN, **best, **evaluation)


def test_a_callbacks_checkpoint_is_whole_without_a_save_strategy(tmp_path):
    run(
        tmp_path,
        [AtStep(3, lambda control: setattr(control, "should_save", True))],
        **PLAIN,
        save_strategy="no",
    )
    assert names(tmp_path) == ["checkpoint-3", "saved"]
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_a_checkpoint_on_a_signal_is_whole(tmp_path):
    """transformers makes the directory of the checkpoint before it asks the trainer to write it."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                manager.is_checkpoint_requested = True

    config = loku.UnlearnConfig(
        output_dir=str(tmp_path),
        init="default",
        max_steps=4,
        use_cpu=True,
        disable_tqdm=True,
        enable_jit_checkpoint=True,
    )
    rows = [[{**row, "labels": row["input_ids"]} for row in rows] for rows in (FORGET, RETAIN)]
    model = tiny_model("gpt_neo")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=loku.target_modules.default_target_modules(model))
    trainer = loku.UnlearnTrainer(model, config, *rows, peft_config=lora, callbacks=[Signal()])
    callbacks = trainer.callback_handler.callbacks
    manager = next(c for c in callbacks if isinstance(c, JITCheckpointCallback)).jit_manager
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2"]
    assert "checkpoint-is-incomplete.txt" not in names(tmp_path / "checkpoint-2")
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_disk_without_room_is_refused_before_training(tmp_path, monkeypatch, measures_nothing):
    usage = namedtuple("usage", "total used free")(2**30, 2**30, 1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=r"has room for 0\.0 MiB, and a checkpoint .* needs about 0\.7 MiB"
    ) as full:
        run(tmp_path, lora_rank=64)  # 57344 parameters of 4 bytes, and Adam's two states of each
    assert full.value.errno == errno.ENOSPC and _explain(full.value)[0] == 1
    assert names(tmp_path) == []


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    """The tokenizers' error of a full disk is a plain Exception."""
    error = Exception("No space left on device (os error 28)")
    with at_call("torch.save", 5, lambda *args: (_ for _ in ()).throw(error)):
        with pytest.raises(
            OSError, match=r"checkpoint-4 could not be written .*os error 28.*make room"
        ) as full:
            run(tmp_path, **PLAIN)
    code, text = _explain(full.value)
    assert code == 1 and "resume_from_checkpoint=True" in text
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("place", ["models", "models/base", "models/base/run"])
def test_the_folder_of_the_model_is_not_written_to(place, tmp_path, measures_nothing):
    tiny_model("gpt_neo").save_pretrained(tmp_path / "models" / "base")
    before = contents(tmp_path)
    config = loku.UnlearnConfig(
        output_dir=str(tmp_path / place), save_strategy="steps", use_cpu=True, disable_tqdm=True, max_steps=2
    )
    with pytest.raises(ValueError, match="the model, which is only read"):
        loku.unlearn(str(tmp_path / "models" / "base"), FORGET, RETAIN, config=config)
    assert contents(tmp_path) == before


INTERRUPTED = {
    "training arguments": ("torch.save", 5),
    "adapter": ("loku.checkpoint_factors.save_file", 2),
    "manifest": ("loku.checkpoint_folder.write_manifest", 2),
    "flush": ("loku.checkpoint_folder.flush_tree", 2),
    "rename": ("loku.checkpoint_folder._rename", 2),
    "after the rename": ("loku.checkpoint_folder.flush", 3),
    "deletion": ("loku.checkpoint_folder._rename", 3),
}


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage", INTERRUPTED)
def test_an_interrupted_write_leaves_nothing_behind(stage, tmp_path):
    target, number = INTERRUPTED[stage]
    options = {**PLAIN, "save_total_limit": 1}
    with at_call(target, number, interrupt), pytest.raises(KeyboardInterrupt):
        run(tmp_path, **options)
    left = {
        "after the rename": ["checkpoint-2", "checkpoint-4"],
        "deletion": ["checkpoint-2", "checkpoint-4"],
    }
    assert names(tmp_path) == left.get(stage, ["checkpoint-2"])
    run(tmp_path, **options, resume_from_checkpoint=True)
    run(tmp_path / "whole", **options)
    ours, expected = ([*contents(path / "saved").values()] for path in (tmp_path, tmp_path / "whole"))
    assert len(expected) >= 2 and ours == expected


def test_a_run_that_finds_no_checkpoint_says_that_it_begins_anew(tmp_path):
    with pytest.warns(UserWarning, match="has no whole checkpoint; the run begins anew"):
        run(tmp_path, **PLAIN, resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "saved"]


def test_initial_factors_are_needed_though_no_manifest_lists_them(tmp_path):
    """Without them the run would go on silently on the untouched base, which its adapter does not fit."""
    run(tmp_path, max_steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    manifest = json.loads((checkpoint / "loku_checkpoint.json").read_text())
    del manifest["files"]["loku_reference.safetensors"]
    (checkpoint / "loku_checkpoint.json").write_text(json.dumps(manifest))
    (checkpoint / "loku_reference.safetensors").unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-4 has no loku_reference\.safetensors"):
        run(tmp_path, max_steps=4, resume_from_checkpoint=True)
    assert contents(tmp_path) == before
