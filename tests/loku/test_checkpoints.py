"""Checkpoints survive killed runs and full disks, and damaged ones are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_runs import FORGET, RETAIN, AtStep, run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import TrainerCallback

import loku
import loku.checkpoints
from loku.checkpoint_factors import load_trained_
from loku.checkpoint_files import (
    MANIFEST,
    REFERENCE,
    TRAINED,
    Contents,
    find_checkpoint,
    whole_checkpoints,
)
from loku.fila.initialize import initialize_from_row_scales
from loku.fila.targets import fila_targets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_stage_ends_as_an_unbroken_one(tmp_path):
    script = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
    process = subprocess.run(
        [sys.executable, script, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    reports = json.loads(process.stdout.splitlines()[-1])
    assert len(reports) == 21 and set(reports.values()) == {"same"}

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
    run(directory, callbacks, **{"max_steps": 4, "resume_from_checkpoint": resume, **options})


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
        (alter, TRAINED, "was altered"),
        (truncate, REFERENCE, r"has \d+ bytes of \d+"),
        (alter, "optimizer.pt", "was altered"),
        (Path.unlink, TRAINED, "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage, name, message, copied):
    damage(copied / "checkpoint-4" / name)
    before = contents(copied)
    with pytest.raises(ValueError, match=rf"checkpoint-4: {name} {message}.*go on from an earlier one"):
        resume(copied)
    assert contents(copied) == before
    with pytest.raises(ValueError, match=r"checkpoint-4 .* must not replace.*move checkpoint-4 away"):
        resume(copied, str(copied / "checkpoint-2"))  # somebody has changed it, so it may be somebody's
    assert contents(copied) == before
    shutil.rmtree(copied / "saved")
    shutil.rmtree(copied / "checkpoint-4")
    resume(copied, str(copied / "checkpoint-2"))  # the earlier checkpoint is whole
    assert (copied / "saved" / "adapter_model.safetensors").exists()


def test_checkpoints_of_other_runs_are_refused(copied, monkeypatch):
    before = contents(copied)
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is of another run: learning_rate=0\.01, where this run has 0\.1"
    ):
        resume(copied, learning_rate=0.1)
    monkeypatch.setattr("killed_runs.tiny_model", lambda kind: tiny_model(kind, seed=1))
    with pytest.raises(
        ValueError, match=r"is of another run: another base model \(other weights\)\. Nothing was changed"
    ):
        resume(copied)
    monkeypatch.undo()
    monkeypatch.setattr("killed_runs.RETAIN", [{"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match="another retain set"):
        resume(copied, str(copied / "checkpoint-2"))
    assert contents(copied) == before


def test_a_longer_run_is_told_what_to_do(copied):
    advice = r"max_steps=4, where this run has 6\. .* unlearn the saved model in a new run$"
    with pytest.raises(ValueError, match=advice):
        resume(copied, max_steps=6)


def test_the_directory_of_checkpoints_is_no_checkpoint(copied):
    with pytest.raises(ValueError, match=f"{copied} is no checkpoint.* such as {copied}/checkpoint-4$"):
        resume(copied, str(copied))


def test_half_written_checkpoints_are_not_taken_for_whole(copied, tmp_path):
    (copied / "checkpoint-4" / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="is ignored: it is not a whole checkpoint") as warned:
        assert [c.name for c in whole_checkpoints(copied)] == ["checkpoint-2"]
    assert len(warned) == 1
    with pytest.raises(ValueError, match=f"checkpoint-4 is not a whole checkpoint of loku.*{MANIFEST}"):
        resume(copied, str(copied / "checkpoint-4"))
    with pytest.warns(UserWarning, match="empty has no whole checkpoint; the run begins anew"):
        assert find_checkpoint(True, tmp_path / "empty", {}, Contents()) is None
    assert find_checkpoint("False", copied, {}, Contents()) is None


def test_a_checkpoint_without_an_optimizer_is_refused(tmp_path):
    run(tmp_path, max_steps=2, save_only_model=True)
    with pytest.raises(ValueError, match=r"checkpoint-2 has no state of the optimizer.*save_only_model=True"):
        resume(tmp_path, save_only_model=True, max_steps=2)


def test_the_oldest_checkpoints_are_deleted(tmp_path):
    run(tmp_path, max_steps=6, save_total_limit=2)
    assert [c.name for c in whole_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6", "saved"]


def trainer_of(directory, **options):
    """Return a trainer of a model with an adapter, without ``unlearn``, and the model."""
    base = tiny_model("gpt_neo")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=loku.target_modules.default_target_modules(base))
    model = get_peft_model(base, lora)
    defaults = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "use_cpu": True}
    config = loku.UnlearnConfig(output_dir=str(directory), disable_tqdm=True, **{**defaults, **options})
    rows = [[{**row, "labels": row["input_ids"]} for row in rows] for rows in (FORGET, RETAIN)]
    return model, loku.UnlearnTrainer(model, config, *rows)


def test_the_initial_factors_must_fit(copied):
    """A trainer without ``unlearn`` must not go on with another residual base unnoticed."""
    model, first = trainer_of(copied / "other")
    loku.initialize_from_checkpoint(model, copied / "checkpoint-2")
    first.train()
    checkpoint = copied / "other" / "checkpoint-1"
    model, second = trainer_of(copied / "other")
    ones = {name: torch.ones(len(layer.weight)) for name, layer in fila_targets(model).items()}
    initialize_from_row_scales(model, ones)
    with pytest.raises(ValueError, match="has other initial factors than this model"):
        second.train(resume_from_checkpoint=str(checkpoint))
    model, third = trainer_of(copied / "other")  # on the untouched base
    third.train(resume_from_checkpoint=str(checkpoint))
    ours, theirs = (dict(t.model.named_parameters()) for t in (third, first))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_begins_with_the_parameters_of_its_checkpoint(copied):
    begun = {}

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            begun.update({name: parameter.detach().clone() for name, parameter in trained})

    resume(copied, str(copied / "checkpoint-2"), callbacks=[Begin()])
    stored = load_file(copied / "checkpoint-2" / TRAINED)
    initial = loku.checkpoints.stored_factors(copied / "checkpoint-2")
    assert begun.keys() == stored.keys() and all(torch.equal(begun[name], stored[name]) for name in stored)
    assert len(initial) == len(stored) / 2 and all(".default." in name for name in stored)
    for name, (B, A) in initial.items():
        for letter, factor in (("B", B), ("A", A)):
            assert not torch.equal(stored[f"base_model.model.{name}.lora_{letter}.default.weight"], factor)


@pytest.fixture(scope="module", params=["fila", "default"])
def trained(request, tmp_path_factory):
    """A trained trainer, its folder and its logits."""
    folder = tmp_path_factory.mktemp(request.param)
    model, trainer = trainer_of(folder)
    if request.param == "fila":
        ones = {name: torch.ones(len(layer.weight)) for name, layer in fila_targets(model).items()}
        initialize_from_row_scales(model, ones)
    trainer.train()
    return trainer, folder, logits_of(model)


IDS = torch.arange(3, 19)[None]


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("place", ["checkpoint", "save_model"])
def test_what_lies_in_a_checkpoint_is_right_on_the_untouched_base(place, trained, tmp_path):
    trainer, folder, expected = trained
    if place == "save_model":
        trainer.save_model(str(tmp_path))
        assert (tmp_path / "training_args.bin").is_file()
    path = tmp_path if place == "save_model" else folder / "checkpoint-2"
    untouched = logits_of(tiny_model("gpt_neo"))
    assert (expected - untouched).norm() > 1e-2 * expected.norm()
    for config in sorted(path.rglob("adapter_config.json")):
        loaded = PeftModel.from_pretrained(tiny_model("gpt_neo"), config.parent)
        torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-4)
    assert sorted(path.rglob("adapter_config.json")) == [path / "adapter_config.json"]


def test_other_trained_parameters_are_refused(trained, tmp_path):
    trainer, folder, expected = trained
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    stored = load_file(tmp_path / "checkpoint-2" / TRAINED)
    name = sorted(stored)[-1]
    save_file({other: value for other, value in stored.items() if other != name}, tmp_path / TRAINED)
    with pytest.raises(ValueError, match=rf"{name} has the shape none there"):
        load_trained_(trainer.model, tmp_path)
    assert torch.equal(logits_of(trainer.model), expected)


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
