"""Two processes do not write to one directory."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from loku.directory_lock import LOCK, DirectoryLock

HOLD = """
import sys, time
from loku.directory_lock import DirectoryLock
lock = DirectoryLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_another_process_is_named_and_its_death_frees_the_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        host = os.uname().nodename
        with pytest.raises(ValueError, match=rf"process {holder.pid} on '{host}' is writing checkpoints to"):
            DirectoryLock(tmp_path).acquire()
        with pytest.raises(ValueError, match="Pass another output_dir, or wait for its end"):
            DirectoryLock(tmp_path).acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def hold_again_and_again(directory, inside, seconds):
    end, held = time.monotonic() + seconds, 0
    while time.monotonic() < end or not held:
        lock = DirectoryLock(directory)
        try:
            lock.acquire()
        except ValueError:
            time.sleep(0.001)
            continue
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # it fails if another one holds the lock
        time.sleep(0.001)
        os.unlink(inside)
        lock.release()
        held += 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_never_two_hold_it_though_each_deletes_its_file(tmp_path):
    (tmp_path / "run").mkdir()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                hold_again_and_again(tmp_path / "run", tmp_path / "inside", 2)
                code = 0
            finally:
                os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_that_outlives_its_process_does_not_hold_the_lock(tmp_path):
    """The workers of a data loader are forks."""
    first = DirectoryLock(tmp_path)
    holder = os.fork()
    if holder == 0:
        first.acquire()
        if os.fork() == 0:
            time.sleep(5)
        else:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    os.waitpid(holder, 0)
    second = DirectoryLock(tmp_path)
    second.acquire()
    second.release()


def test_two_locks_of_one_process_exclude_each_other(tmp_path):
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    first.acquire()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        second.acquire()
    second.release()  # it holds nothing
    assert (tmp_path / LOCK).exists()
    first.release()
    second.acquire()
    second.release()


@pytest.mark.parametrize("damage", ["", "[" * 999, '{"pid": "x"}', "\xff", "null"])
def test_a_damaged_note_of_the_holder_is_no_obstacle(damage, tmp_path):
    first = DirectoryLock(tmp_path)
    first.acquire()
    (tmp_path / f"{LOCK}.json").write_text(damage, encoding="latin-1")
    with pytest.raises(ValueError, match=r"^another process is writing checkpoints"):
        DirectoryLock(tmp_path).acquire()
    first.release()


def test_a_file_stands_for_the_lock_where_there_is_no_flock(tmp_path, monkeypatch):
    def no_flock(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", no_flock)
    lock = DirectoryLock(tmp_path)
    with pytest.warns(UserWarning, match="has no flock .*Delete it if a process was killed"):
        lock.acquire()
    with (
        pytest.warns(UserWarning, match="has no flock"),
        pytest.raises(ValueError, match="is writing checkp"),
    ):
        DirectoryLock(tmp_path).acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_a_file_system_without_locks(tmp_path, monkeypatch):
    def forbidden(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", forbidden)
    with pytest.raises(PermissionError):
        DirectoryLock(tmp_path).acquire()
