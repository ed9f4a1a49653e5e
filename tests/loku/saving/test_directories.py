"""Files and directories are written whole, or the earlier ones stay."""

import errno
import fcntl
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from killed_writers import killed_at
from safetensors import SafetensorError

from loku.saving import directories
from loku.saving.directories import disk_errors, finish_interrupted, whole_directory, whole_file


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert unfinished.name == "report.json" and unfinished.parents[1].name.endswith(".unfinished")
        assert path.read_text() == "old"
    assert contents(tmp_path) == {"report.json": "new"}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_file_leaves_the_old_one_alone(exists, error, tmp_path):
    path = tmp_path / "report.json"
    if exists:
        path.write_text("old")
    with pytest.raises(error, match="in the middle"), whole_file(path) as unfinished:
        unfinished.write_text("half of the n")
        raise error("in the middle")
    assert contents(tmp_path) == ({"report.json": "old"} if exists else {})
    assert not list(tmp_path.glob(".*"))


def test_a_block_that_writes_no_file_leaves_the_old_one_alone(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert contents(tmp_path) == {"report.json": "old"}


def everything(path, new):
    return {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}


def models(path, new):
    return {entry.name for entry in path.glob("model*")} | {"config", "new"}


def write(folder, **files):
    for name, text in files.items():
        (folder / name).write_text(text)


def test_a_directory_replaces_the_entries_of_an_earlier_one(tmp_path):
    path = tmp_path / "new" / "saved"
    with whole_directory(path, key="config", replaceable=models) as unfinished:
        write(unfinished, config="1", model="1")
        assert not path.exists()
    assert contents(path) == {"config": "1", "model": "1"}
    write(path, notes="kept", model_2="old")
    with whole_directory(str(path), key="config", replaceable=models) as unfinished:
        write(unfinished, config="2", model="2")
        assert (path / "config").read_text() == "1"
    assert contents(path.parent) == {"saved/config": "2", "saved/model": "2", "saved/notes": "kept"}


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_directory_leaves_the_earlier_one_alone(exists, tmp_path):
    path = tmp_path / "saved"
    if exists:
        path.mkdir()
        write(path, config="1", model="1")
    before = contents(tmp_path)
    for error, raised in ((KeyboardInterrupt, KeyboardInterrupt), (SafetensorError, OSError)):
        with (
            pytest.raises(raised, match="in the middle"),
            whole_directory(path, key="config", replaceable=everything) as unfinished,
        ):
            write(unfinished, config="2")
            raise error("in the middle")
    assert contents(tmp_path) == before and path.exists() == exists


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_entries_are_put_back_when_a_move_fails(number, tmp_path, monkeypatch):
    """The key leaves first and comes last, so no mixture of old and new loads, and then all is undone."""
    path = tmp_path / "saved"
    path.mkdir()
    write(path, config="1", model="1")
    rename, seen = type(path).rename, []

    def failing(self, target):
        seen.append(((path / "config").exists(), (path / "model").exists()))
        if len(seen) == number:
            raise OSError("Read-only file system")
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", failing)
    with (
        pytest.raises(OSError, match="Read-only"),
        whole_directory(path, key="config", replaceable=everything) as unfinished,
    ):
        write(unfinished, config="2", model="2")
    # The first rename is that of the journal.
    expected = [(True, True), (True, True), (False, True), (False, False), (False, True)]
    assert seen[:number] == expected[:number]
    assert contents(tmp_path) == {"saved/config": "1", "saved/model": "1"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_a_file_is_no_directory(tmp_path):
    write(tmp_path, file="kept")
    with (
        pytest.raises(ValueError, match="file is a file; pass a directory"),
        whole_directory(tmp_path / "file", key="config", replaceable=everything),
    ):
        raise AssertionError("the block must not run")
    assert contents(tmp_path) == {"file": "kept"}


def overwrite(path):
    with whole_directory(path, key="config", replaceable=models) as unfinished:
        write(unfinished, config="2", model="2", new="2")
        (unfinished / "model_folder").mkdir()
        write(unfinished / "model_folder", inner="2")


def old_save(path):
    path.mkdir()
    write(path, config="1", model="1", model_old="1", notes="kept")
    return {"saved/config": "1", "saved/model": "1", "saved/model_old": "1", "saved/notes": "kept"}


NEW = {name: "2" for name in ("saved/config", "saved/model", "saved/new", "saved/model_folder/inner")}


def test_two_writers_of_one_new_directory(tmp_path):
    """The second to finish replaces the save of the first, as if that had been there from the beginning."""
    path = tmp_path / "new"
    with whole_directory(path, key="config", replaceable=everything) as second:
        (second / "config").write_text("second")
        with whole_directory(path, key="config", replaceable=everything) as first:
            (first / "config").write_text("first")
            (first / "notes").write_text("first")
    assert {file.name: file.read_text() for file in path.iterdir()} == {"config": "second"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_a_writer_that_is_killed_anywhere_is_finished_or_cleared(tmp_path):
    """At each change: the old or the new save, or none that loads. Then one of the two is whole again."""
    number, ends = 0, []
    while True:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        old = old_save(folder / "saved")
        new = {**NEW, "saved/notes": "kept"}
        killed = killed_at(number, lambda: overwrite(folder / "saved"))  # noqa: B023
        found = {name: text for name, text in contents(folder).items() if ".unfinished" not in name}
        if "saved/config" in found:  # what loads is not a mixture
            expected = old if found["saved/config"] == "1" else new
            assert found == expected or found == old | new, number
        finish_interrupted(folder / "saved")
        ends.append(contents(folder))
        assert ends[-1] in (old, new), number
        overwrite(folder / "saved")
        assert contents(folder) == new and not list(folder.rglob(".*")), number
        if not killed:
            break
    assert number > 15 and old in ends and ends.count(new) > 5


def test_a_new_directory_that_is_killed_anywhere_is_whole_or_absent(tmp_path):
    number, killed = 0, True
    while killed:
        number += 1
        path = tmp_path / str(number) / "new" / "saved"
        (tmp_path / str(number)).mkdir()
        killed = killed_at(number, lambda: overwrite(path))  # noqa: B023
        assert not path.exists() or contents(path.parent) | NEW == contents(path.parent), number
        overwrite(path)
        assert contents(path.parent) == NEW and not list(path.parent.glob(".*")), number
    assert number > 8


def test_a_file_that_is_killed_anywhere_is_old_or_new(tmp_path):
    def replace(path):
        with whole_file(path) as unfinished:
            unfinished.write_text("2")

    number, killed = 0, True
    while killed:
        number += 1
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "file"
        path.write_text("1")
        killed = killed_at(number, lambda: replace(path))  # noqa: B023
        assert path.read_text() in ("1", "2")
        replace(path)
        assert contents(path.parent) == {"file": "2"} and not list(path.parent.glob(".*")), number
    assert number > 6


def interrupted(path):
    """Kill a writer between its moves, when the old key is away; and return its workplace."""
    old_save(path)
    rename = Path.rename

    def killing(self, target):
        if self.name == "model" and self.parent == path:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    child = os.fork()
    if child == 0:
        Path.rename = killing
        try:
            overwrite(path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (place,) = path.glob(".*.unfinished")
    assert not (path / "config").exists() and (place / "previous" / "config").read_text() == "1"
    return place


def test_what_a_user_did_since_is_never_undone(tmp_path):
    """A user has mended the directory by hand, so that the moves cannot go on: nothing more is touched."""
    for name in ("new", "model", "config"):
        path = tmp_path / name / "saved"
        path.parent.mkdir()
        place = interrupted(path)
        (path / name).unlink(missing_ok=True)
        write(path, **{name: "a user's"})
        before = contents(path.parent)
        for refused in (finish_interrupted, overwrite):
            with pytest.raises(ValueError, match=r"was interrupted.*previous.*keep what you need"):
                refused(path)
        assert contents(path.parent) == before
        shutil.rmtree(place)
        finish_interrupted(path)


JOURNALS = [
    "",
    "[]",
    "[" * 100_000,
    '{"old": {"../victim": 1}, "new": {}}',
    '{"old": {"..": 1}, "new": {}}',
    '{"old": {"notes": 1}, "new": {}}',
    '{"old": ["notes"], "new": {}}',
    '{"old": {}}',
]


@pytest.mark.parametrize("journal", JOURNALS, ids=range(len(JOURNALS)))
def test_a_hostile_journal_moves_nothing(journal, tmp_path):
    place = interrupted(tmp_path / "saved")
    (tmp_path / "victim").write_text("kept")
    (place / "moves.json").write_text(journal)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"moves\.json is damaged.*move it away"):
        finish_interrupted(tmp_path / "saved")
    assert contents(tmp_path) == before


def test_a_journal_that_leaves_entries_out_deletes_nothing(tmp_path):
    place = interrupted(tmp_path / "saved")
    (place / "moves.json").write_text('{"old": {}, "new": {}}')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="was interrupted"):
        finish_interrupted(tmp_path / "saved")
    assert contents(tmp_path) == before


def test_a_journal_beside_a_file_is_left_alone(tmp_path):
    """Only a directory that exists has moves. So nobody's journal stops a cache or a report."""
    place = interrupted(tmp_path / "saved")
    foreign = place.rename(tmp_path / f".report.json.{'a' * 8}.unfinished")
    before = contents(foreign)
    with whole_file(tmp_path / "report.json") as unfinished:
        unfinished.write_text("new")
    assert contents(foreign) == before and (tmp_path / "report.json").read_text() == "new"


def test_a_journal_of_another_place_moves_nothing(tmp_path):
    """A copy of an interrupted directory has other inodes, so nothing proves what its files are."""
    interrupted(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    (place,) = (tmp_path / "copy").glob(".*.unfinished")
    place = place.rename(place.with_name(place.name.replace("first", "copy")))
    before = contents(tmp_path / "copy")
    with pytest.raises(ValueError, match="was interrupted"):
        finish_interrupted(tmp_path / "copy")
    assert contents(tmp_path / "copy") == before


def test_the_directories_of_others_and_of_the_living_stay(tmp_path):
    path = tmp_path / "saved"
    old_save(path)
    foreign = [path / f".saved.{'a' * 8}.unfinished", tmp_path / ".saved.mine.unfinished"]
    for directory in foreign:
        directory.mkdir()
        write(directory, thesis="kept")
    linked = path / f".saved.{'b' * 8}.unfinished"
    linked.symlink_to(foreign[0])
    (path / f".saved.{'c' * 8}.unfinished").mkdir()
    write(path / f".saved.{'c' * 8}.unfinished", **{"loku.lock": "", "thesis": "kept"})
    before = contents(tmp_path)
    with whole_directory(path, key="config", replaceable=models) as living:
        write(living, config="2")
        during = contents(tmp_path)
        child = os.fork()
        if child == 0:
            finish_interrupted(path)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0 and contents(tmp_path) == during
    assert contents(tmp_path) == {
        name: "2" if name == "saved/config" else text
        for name, text in before.items()
        if name not in ("saved/model", "saved/model_old")
    }
    assert linked.is_symlink()


def test_an_interrupt_in_the_undoing_loses_nothing(tmp_path, monkeypatch):
    """The old files stay in the workplace, and the next start moves the new ones into place."""
    path = tmp_path / "saved"
    old_save(path)
    rename, seen = Path.rename, []

    def interrupted(self, target):
        seen.append(self)
        if len(seen) >= 5:  # a move, and then its undoing
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        overwrite(path)
    monkeypatch.undo()
    (place,) = path.glob(".*.unfinished")
    assert (place / "previous" / "config").read_text() == "1"
    finish_interrupted(path)
    assert contents(tmp_path) == {**NEW, "saved/notes": "kept"} and not list(path.glob(".*"))


def test_a_link_to_a_file_stays(tmp_path):
    (tmp_path / "link").symlink_to("file")
    for _ in range(2):  # the first makes the file
        with whole_file(tmp_path / "link") as unfinished:
            unfinished.write_text("new")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


# A full disk


FULL_DISKS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EFBIG, "File too large"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),  # of tokenizers
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),  # of torch.save
]


@pytest.mark.parametrize("error", FULL_DISKS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("exists", [False, True])
def test_every_error_of_a_full_disk_says_what_to_do(exists, error, tmp_path):
    path = tmp_path / "new" / "saved"
    if exists:
        path.parent.mkdir()
        old_save(path)
    before = contents(tmp_path)
    with (
        pytest.raises(OSError, match=r"saved was not written.*as it was: there is no room .*Make room"),
        whole_directory(path, key="config", replaceable=models) as unfinished,
    ):
        write(unfinished, config="2")
        raise error
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == exists
    with pytest.raises(OSError) as raised, disk_errors(path):
        raise error
    assert raised.value.errno in (errno.ENOSPC, errno.EFBIG)


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("(wrong)"), RuntimeError("CUDA error"), PermissionError(errno.EACCES, "no")):
        with pytest.raises(type(error)) as raised, disk_errors(tmp_path):
            raise error
        assert raised.value is error
    with pytest.raises(OSError, match="is as it was: unheard") as raised, disk_errors(tmp_path):
        raise SafetensorError("unheard")
    assert raised.value.errno == errno.EIO


def test_writers_of_one_folder_move_one_after_the_other(tmp_path):
    """A second save finds the first one whole, and neither is mixed with the other."""
    path, found = tmp_path / "saved", {}
    old_save(path)
    reading, writing = os.pipe()

    def slow(directory, new):
        os.write(writing, b"1")
        time.sleep(0.5)
        return models(directory, new)

    def seen(directory, new):
        found.update(contents(directory))
        return models(directory, new)

    child = os.fork()
    if child == 0:
        with whole_directory(path, key="config", replaceable=slow) as new:
            write(new, config="first", model="first")
        os._exit(0)
    os.read(reading, 1)
    with whole_directory(path, key="config", replaceable=seen) as new:
        write(new, config="second", model="second")
    assert os.waitpid(child, 0)[1] == 0
    assert (found["config"], found["model"]) == ("first", "first")
    assert (contents(path)["config"], contents(path)["model"]) == ("second", "second")


def test_many_writers_of_one_file(tmp_path):
    """Runs that share a cache of row scales write one file at the same time."""
    path, children = tmp_path / "file", []
    for number in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(60):
                    with whole_file(path) as unfinished:
                        unfinished.write_text(str(number))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert path.read_text() in "012" and os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_locked_for_good_is_written_to(tmp_path, monkeypatch):
    """A script may hold it: ``flock FOLDER loku unlearn --output FOLDER``."""
    monkeypatch.setattr(directories, "_LONGEST_WAIT", 0.05)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with whole_file(tmp_path / "file") as unfinished:
        unfinished.write_text("whole")
    os.close(descriptor)
    assert contents(tmp_path) == {"file": "whole"}
