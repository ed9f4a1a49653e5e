"""Checkpoints survive killed runs and full disks, and damaged ones are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_runs import AtStep, run
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import TrainerCallback

import loku
import loku.checkpoints
from loku.adapters import REFERENCE_ADAPTER
from loku.checkpoints import MANIFEST, find_checkpoint, whole_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_stage_ends_as_an_unbroken_one(tmp_path):
    script = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
    process = subprocess.run(
        [sys.executable, script, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    reports = json.loads(process.stdout.splitlines()[-1])
    assert len(reports) == 9 and set(reports.values()) == {"same"}

    full = tmp_path / "full"
    error = (full / "error").read_text()
    assert "checkpoint-4 could not be written" in error and "resume_from_checkpoint=True" in error
    assert sorted(entry.name for entry in full.iterdir()) == ["checkpoint-2", "error"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run with checkpoints 2 and 4."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("finished")
    run(directory, max_steps=4)
    torch.set_num_threads(threads)
    return directory


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def resume(directory, resume=True, callbacks=(), **options):
    run(directory, callbacks, max_steps=4, resume_from_checkpoint=resume, **options)


def alter(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    "damage, name, message",
    [
        (alter, "adapter_model.safetensors", "was altered"),
        (truncate, "reference/adapter_model.safetensors", r"has \d+ bytes of \d+"),
        (alter, "optimizer.pt", "was altered"),
        (Path.unlink, "adapter_model.safetensors", "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage, name, message, copied):
    damage(copied / "checkpoint-4" / name)
    before = contents(copied)
    with pytest.raises(ValueError, match=rf"checkpoint-4: {name} {message}.*go on from an earlier one"):
        resume(copied)
    assert contents(copied) == before
    shutil.rmtree(copied / "saved")
    resume(copied, str(copied / "checkpoint-2"))  # the earlier checkpoint is whole
    assert (copied / "saved" / "adapter_model.safetensors").exists()


def test_checkpoints_of_other_runs_are_refused(copied, monkeypatch):
    before = contents(copied)
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is of another run: learning_rate=0\.01, where this run has 0\.1"
    ):
        resume(copied, learning_rate=0.1)
    monkeypatch.setattr("killed_runs.tiny_model", lambda kind: tiny_model(kind, seed=1))
    with pytest.raises(ValueError, match=r"is of another run: another base model\. Nothing was changed"):
        resume(copied)
    monkeypatch.undo()
    monkeypatch.setattr("killed_runs.RETAIN", [{"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match="another retain set"):
        resume(copied, str(copied / "checkpoint-2"))
    assert contents(copied) == before


def test_half_written_checkpoints_are_not_taken_for_whole(copied, tmp_path):
    (copied / "checkpoint-4" / MANIFEST).unlink()
    (copied / ".unfinished" / "checkpoint-6").mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored: it is not a whole checkpoint") as warned:
        assert [c.name for c in whole_checkpoints(copied)] == ["checkpoint-2"]
    assert len(warned) == 2
    with pytest.raises(ValueError, match=f"checkpoint-4 is not a whole checkpoint of loku.*{MANIFEST}"):
        resume(copied, str(copied / "checkpoint-4"))
    assert find_checkpoint(True, tmp_path / "empty", {}) is None
    assert find_checkpoint("False", copied, {}) is None


def test_the_oldest_checkpoints_are_deleted(tmp_path):
    run(tmp_path, max_steps=6, save_total_limit=2)
    assert [c.name for c in whole_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6", "saved"]


def test_the_initial_factors_must_fit(copied):
    """A trainer without ``unlearn`` would go on with another residual base unnoticed."""
    from killed_runs import FORGET, RETAIN
    from peft import LoraConfig, get_peft_model

    def trainer(**options):
        base = tiny_model("gpt_neo")
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=loku.target_modules.default_target_modules(base))
        model = get_peft_model(base, lora)
        config = loku.UnlearnConfig(
            output_dir=str(copied / "other"),
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        rows = [[{**row, "labels": row["input_ids"]} for row in rows] for rows in (FORGET, RETAIN)]
        return model, loku.UnlearnTrainer(model, config, *rows)

    model, first = trainer()
    loku.initialize_from_checkpoint(model, copied / "checkpoint-2")
    first.train()
    model, second = trainer()
    checkpoint = copied / "other" / "checkpoint-1"
    with pytest.raises(ValueError, match="has other initial factors than this model"):
        second.train(resume_from_checkpoint=str(checkpoint))
    loku.initialize_from_checkpoint(model, checkpoint)
    second.train(resume_from_checkpoint=str(checkpoint))
    ours, theirs = (dict(t.model.named_parameters()) for t in (second, first))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("trainer_loads", ["all", "the folders"])
def test_a_resumed_run_begins_with_the_adapter_of_its_checkpoint(trainer_loads, copied, monkeypatch):
    """The initial factors lie in a folder beside it, and Trainer before 5.23 loads nothing but them."""
    if trainer_loads == "the folders":

        def load_folders(self, checkpoint, model=None):
            self.model.load_adapter(f"{checkpoint}/{REFERENCE_ADAPTER}", REFERENCE_ADAPTER)
            self.model.set_adapter("default")

        monkeypatch.setattr("transformers.Trainer._load_from_checkpoint", load_folders)
    begun, trained = {}, set()

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            state_dict = get_peft_model_state_dict(model, adapter_name="default")
            begun.update({name: tensor.clone() for name, tensor in state_dict.items()})
            trained.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)

    resume(copied, str(copied / "checkpoint-2"), callbacks=[Begin()])
    stored = load_file(copied / "checkpoint-2" / "adapter_model.safetensors")
    initial = load_file(copied / "checkpoint-2" / REFERENCE_ADAPTER / "adapter_model.safetensors")
    assert begun.keys() == stored.keys() and all(torch.equal(begun[name], stored[name]) for name in stored)
    assert any(not torch.equal(stored[name], initial[name]) for name in stored)
    assert len(trained) == len(stored) and all(".default." in name for name in trained)


def test_an_output_that_cannot_be_written_is_told_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr("loku.fila.row_scales.accumulate_squared_grad_", None)  # nothing may be measured
    with pytest.raises(OSError, match=r"output_dir .* cannot be written to .* nothing was started"):
        run(tmp_path / "file" / "run")

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", read_only)
    with pytest.raises(OSError, match=r"Read-only file system.*nothing was started"):
        run(tmp_path / "run")


def test_the_trainer_is_told_to_stop_where_it_was(tmp_path):
    steps = []
    run(tmp_path, [AtStep(4, lambda control: setattr(control, "should_training_stop", True))])
    run(tmp_path, [AtStep(step, steps.append) for step in range(1, 9)], resume_from_checkpoint=True)
    assert steps == []
