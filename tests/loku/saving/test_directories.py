"""Files and directories are written whole, or the earlier ones stay."""

import pytest
from safetensors import SafetensorError

from loku.saving.directories import whole_directory, whole_file


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
    return {entry.name for entry in path.glob("model*")} | {"config"}


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
