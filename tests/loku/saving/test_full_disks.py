"""A disk that fills up at any point of a save, and the check of its room before the training."""

import errno
import os
import resource
import shutil
import subprocess

import pytest
import torch
from fila_models import initialized, make_base, train
from transformers import AutoTokenizer

from loku import UnlearnConfig, unlearn
from loku.demo import EMBEDDED
from loku.saving.destinations import check_destination, check_room
from loku.saving.directories import system_error
from loku.saving.kinds import KINDS, PlaceOfSave, save, save_bytes

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

PAGE = 4096
ROWS = [{"input_ids": [3 + i, 5, 7 + 2 * i, 11, 13 + i]} for i in range(4)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = initialized("llama")
    train(made)
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no file system be mounted")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_anywhere_keeps_the_old_save(kind, model, tokenizer, small_disk):
    path = small_disk / "saved"
    save(model, path, "portable", tokenizer=tokenizer)
    failures = 0
    for pages in range(0, 500, 7):
        (small_disk / "ballast").unlink(missing_ok=True)
        free = shutil.disk_usage(small_disk).free
        (small_disk / "ballast").write_bytes(bytes(free - pages * PAGE))
        before = contents(small_disk)
        try:
            save(model, path, kind, tokenizer=tokenizer)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert f"{path} was not written, and is as it was: there is no room" in str(error)
            assert "Make room, and save again" in str(error)
            assert contents(small_disk) == before and len(list(small_disk.rglob(".*"))) == 0
            failures += 1
        else:
            break
    assert failures > 5 and (path / "loku_save.json").read_text().startswith(f'{{\n  "kind": "{kind}"')


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_that_cannot_grow_keeps_the_old_save(exists, kind, model, tokenizer, tmp_path):
    """The same by a limit of the process, where no file system can be mounted."""
    path = tmp_path / "new" / "saved"
    if exists:
        save(model, path, "portable", tokenizer=tokenizer)
    before = contents(tmp_path)
    size = max(map(len, before.values()), default=100_000)
    old, failures = resource.getrlimit(resource.RLIMIT_FSIZE), 0
    for limit in (0, 100, 500, 2000, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            save(model, path, kind, tokenizer=tokenizer)
        except OSError as error:
            failures += 1
            assert error.errno == errno.EFBIG and "saved was not written, and is as it was" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert contents(tmp_path) == before and not list(tmp_path.rglob(".*"))
        assert path.parent.exists() == exists
    assert failures == 5


@pytest.mark.parametrize("init", ["default", "fila"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_save_is_known_before_the_training(kind, init, tmp_path):
    sizes = {}

    class Record(PlaceOfSave):
        def on_init_end(self, args, state, control, **kwargs):
            super().on_init_end(args, state, control, **kwargs)
            sizes[kind] = save_bytes(kwargs["model"], kind, init=args.init)

    config = UnlearnConfig(
        output_dir=str(tmp_path / "run"), init=init, max_steps=1, use_cpu=True, disable_tqdm=True
    )
    result = unlearn(
        make_base("llama"),
        ROWS,
        ROWS[::-1],
        config=config,
        callbacks=[Record(tmp_path, kind)],
        save_kind=kind,
    )
    result.save(tmp_path / "saved", kind)
    written = sum(
        map(len, (data for name, data in contents(tmp_path / "saved").items() if "json" not in name))
    )
    assert written == pytest.approx(sizes[kind], rel=0.2)
    whole = make_base("llama")
    save(whole, tmp_path / "whole", "merged")
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size == pytest.approx(
        save_bytes(whole, kind), rel=0.1
    )


def test_too_little_room_is_found_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 3 << 10))
    check_room(tmp_path / "new" / "newer", 3 << 10)
    with pytest.raises(
        OSError, match=r"newer has room for 0\.0 MiB, and the save needs about 2\.0 MiB"
    ) as raised:
        check_room(tmp_path / "new" / "newer", 2 << 20)
    assert raised.value.errno == errno.ENOSPC

    def never(*args, **kwargs):
        raise AssertionError("it was measured or trained")

    monkeypatch.setattr("loku.unlearning.initialize_lora_fila_weights", never)
    monkeypatch.setattr("loku.unlearning.UnlearnTrainer.train", never)
    base = make_base("llama")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = UnlearnConfig(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, disable_tqdm=True)
    with pytest.raises(OSError, match=r"out has room for 0\.0 MiB.*Nothing was started; make room"):
        unlearn(base, ROWS, ROWS, config=config, callbacks=[PlaceOfSave(tmp_path / "out", "merged")])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("place", ["file/out", "file/new/out"])
def test_a_place_that_cannot_be_written_is_found_before_the_training(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as raised:
        check_destination(tmp_path / place, "portable")
    assert raised.value.filename == str(tmp_path / place) and "nothing was started" in raised.value.strerror


def test_a_read_only_place_is_found_before_the_training(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for place in (small_disk, small_disk / "out"):
        with pytest.raises(OSError, match=r"cannot be written to .*Read-only") as raised:
            check_destination(place, "portable")
        assert raised.value.errno == errno.EROFS
    assert os.listdir(small_disk) == []


def test_the_number_of_an_error_is_not_in_its_text():
    assert str(system_error("no room", errno.ENOSPC)) == "no room"
