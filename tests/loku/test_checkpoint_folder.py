"""A run replaces and deletes nothing but its own unaltered checkpoints, and clears what dead runs left."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loku.checkpoint_files import HAS_REFERENCE, MANIFEST, STATE, TRAINED, Contents
from loku.checkpoint_folder import CheckpointFolder

RUN, CONTENTS = {"seed": 1}, Contents(model_only=True)


def fill(directory, text=""):
    """Write the files of a checkpoint with ``CONTENTS``."""
    directory.mkdir(parents=True)
    (directory / STATE).write_text('{"global_step": 1}' + text)
    (directory / "training_args.bin").write_bytes(b"args")
    save_file({"w": torch.ones(2)}, directory / TRAINED, {HAS_REFERENCE: "no"})


def publish(folder, step, identity=RUN, text=""):
    fill(folder.private / f"checkpoint-{step}", text)
    return folder.publish(step, identity, CONTENTS)


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "run")
    (tmp_path / "run").mkdir()
    folder.reserve()
    yield folder
    folder.release()


def names(folder):
    return sorted(entry.name for entry in folder.directory.iterdir() if not entry.name.startswith("_loku."))


def contents(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def foreign(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "thesis.pdf").write_text("mine")


def annotated(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")


def altered(checkpoint):
    (checkpoint / STATE).write_text('{"global_step": 2}')


def linked(checkpoint):
    checkpoint.rename(checkpoint.parent / "elsewhere")
    checkpoint.symlink_to(checkpoint.parent / "elsewhere")


def incomplete(checkpoint):
    (checkpoint / "training_args.bin").unlink()


def with_folder(checkpoint):
    (checkpoint / "mine").mkdir()


OTHERS = [
    (foreign, r"no manifest of loku vouches for it \(there is no such file"),
    (annotated, "it also has notes.txt, which loku did not write"),
    (with_folder, "it also has mine, which loku did not write"),
    (altered, "trainer_state.json was altered"),
    (linked, "it is a link"),
    (incomplete, "training_args.bin is missing"),
]


@pytest.mark.parametrize("make, reason", OTHERS)
def test_what_is_not_our_own_unaltered_checkpoint_stays(make, reason, folder):
    make(publish(folder, 2))
    publish(folder, 4)
    publish(folder, 6)
    before = contents(folder.directory / "checkpoint-2")
    with pytest.raises(ValueError, match=f"would write checkpoint-2 to .*{reason}.*pass another output_dir"):
        folder.refuse_collisions(lambda step: True, RUN)
    folder.refuse_collisions(lambda step: step != 2, RUN)
    with pytest.raises(FileExistsError, match=f"must not replace it: .*{reason}"):
        publish(folder, 2)
    if make is foreign:
        folder.delete_oldest(1, {"checkpoint-6"}, RUN)
    else:
        with pytest.warns(UserWarning, match=f"checkpoint-2 stays: {reason}"):
            folder.delete_oldest(1, {"checkpoint-6"}, RUN)
    assert contents(folder.directory / "checkpoint-2") == before
    assert {"checkpoint-2", "checkpoint-6"} <= set(names(folder)) and "checkpoint-4" not in names(folder)


def test_another_runs_checkpoints_stay(folder):
    for step in (2, 4, 6):
        publish(folder, step, {"seed": 2})
    publish(folder, 8)
    publish(folder, 10)
    with pytest.raises(ValueError, match=r"checkpoint-2 .*of another run: seed=2, where this run has 1"):
        folder.refuse_collisions(lambda step: True, RUN)
    with pytest.raises(FileExistsError, match="checkpoint of another run: seed=2"):
        publish(folder, 4)
    folder.delete_oldest(1, {"checkpoint-10"}, RUN)
    assert names(folder) == [f"checkpoint-{step}" for step in (10, 2, 4, 6)]


def test_the_order_is_that_of_the_steps_whatever_the_clock_says(folder):
    """The newest checkpoints get the oldest times, as after a clock that was set back."""
    for step in (2, 4, 6, 8, 10):
        checkpoint = publish(folder, step)
        for path in [*checkpoint.rglob("*"), checkpoint]:
            os.utime(path, (10**9 - step, 10**9 - step))
        folder.delete_oldest(2, {checkpoint.name, "checkpoint-4"}, RUN)
    assert names(folder) == ["checkpoint-10", "checkpoint-4"]


def test_a_run_replaces_its_own_checkpoint(folder):
    publish(folder, 2)
    folder.refuse_collisions(lambda step: True, RUN)
    checkpoint = publish(folder, 2, text=" ")
    assert (checkpoint / STATE).read_text() == '{"global_step": 1} '
    assert names(folder) == ["checkpoint-2"]


@pytest.mark.parametrize("call", range(1, 4))
def test_a_replaced_checkpoint_survives_a_stop_at_each_rename(call, folder, monkeypatch):
    """The renames are: the old one aside, the new one to its place, the old one out of the way."""
    checkpoint, calls, rename = publish(folder, 2), [], Path.rename

    def stopped(self, target):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        publish(folder, 2, text=" ")
    monkeypatch.undo()
    assert len(calls) == call + (call == 2)  # the second is undone
    assert (checkpoint / STATE).read_text() == '{"global_step": 1}' + " " * (call == 3)
    assert (checkpoint / MANIFEST).is_file()
    folder.release()
    assert list(folder.directory.iterdir()) == [checkpoint]


def dead(tmp_path, monkeypatch, call):
    """The directory of a run that was killed at a rename while it replaced checkpoint 2."""
    folder = CheckpointFolder(tmp_path)
    folder.reserve()
    publish(folder, 2)
    rename, calls = Path.rename, []

    class Killed(BaseException):
        pass

    def stopped(self, target):
        calls.append(None)
        if len(calls) >= call:  # and nothing afterwards, as in a dead process
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(Killed):
        publish(folder, 2)
    monkeypatch.undo()
    folder._lock.release()
    return folder


@pytest.mark.parametrize("call", range(1, 4))
def test_the_next_run_clears_what_a_dead_one_left_and_puts_checkpoints_back(call, tmp_path, monkeypatch):
    left = dead(tmp_path, monkeypatch, call)
    assert left.private.is_dir() and (tmp_path / "checkpoint-2").exists() == (call != 2)
    folder = CheckpointFolder(tmp_path)
    folder.reserve()
    assert sorted(entry.name for entry in tmp_path.iterdir() if "lock" not in entry.name) == [
        folder.private.name,
        "checkpoint-2",
    ]
    folder.refuse_collisions(lambda step: True, RUN)  # it is whole
    folder.release()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2"]


def test_only_our_own_rests_are_cleared(tmp_path):
    kept = ["_loku.mine.unfinished", ".unfinished", "_loku.notes", ".checkpoint.12345678.unfinished"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.pdf").write_text("mine")
    (tmp_path / "_loku.file.unfinished").write_text("mine")
    (tmp_path / "_loku.link.unfinished").symlink_to(tmp_path / "_loku.notes")
    before = contents(tmp_path)
    folder = CheckpointFolder(tmp_path)
    folder.reserve()
    folder.release()
    assert contents(tmp_path) == before and (tmp_path / "_loku.link.unfinished").is_symlink()


def test_a_hostile_rest_moves_and_deletes_nothing_outside(tmp_path):
    (tmp_path / "elsewhere" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "elsewhere" / "checkpoint-2" / "thesis.pdf").write_text("mine")
    rest = tmp_path / "run" / "_loku.12345678.unfinished"
    rest.mkdir(parents=True)
    (rest / "loku_unfinished.txt").touch()
    for name in ("replaced", "checkpoint-2", "deleted-1"):
        (rest / name).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    folder = CheckpointFolder(tmp_path / "run")
    folder.reserve()
    folder.release()
    assert contents(tmp_path / "elsewhere") == before
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    """The manifest comes last, the directory of the name after it; and a name goes before its files."""
    private, events, rename, fsync = f"flush {folder.private.name}", [], Path.rename, os.fsync

    def recorded(self, target):
        events.append(f"{self.name} -> {'private' if folder.private in target.parents else target.name}")
        return rename(self, target)

    def flushed(descriptor):
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    monkeypatch.setattr(Path, "rename", recorded)
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kwargs: events.append("delete"))
    publish(folder, 2)
    files = {f"flush {name}" for name in (STATE, "training_args.bin", TRAINED, MANIFEST, "checkpoint-2")}
    assert set(events[:5]) == files and events[5:] == ["checkpoint-2 -> checkpoint-2", "flush run", private]
    events.clear()
    folder.delete_oldest(0, set(), RUN)
    assert events == ["checkpoint-2 -> private", private, "flush run", "delete"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_may_be_unable_to_flush_directories(number, folder, monkeypatch):
    fsync = os.fsync

    def of_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            publish(folder, 2)
    else:
        publish(folder, 2)
        assert names(folder) == ["checkpoint-2"]
