"""A checkpoint is whole by what must be there, and a damaged or hostile manifest gets one clear error."""

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from loku.checkpoint_files import (
    HAS_REFERENCE,
    MANIFEST,
    REFERENCE,
    STATE,
    TRAINED,
    Contents,
    change,
    check_best,
    find_checkpoint,
    is_of_run,
    whole_checkpoints,
    why_not_ours,
    write_manifest,
)

RUN = {"seed": 1}
STATE_TEXT = '{"global_step": 4}'
COMMON = (STATE, "scheduler.pt", "rng_state.pth")
ADAPTERS = (*COMMON, "optimizer.pt", "training_args.bin", TRAINED)


def fill(directory, names, reference="no"):
    for name in names:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    (directory / STATE).write_text(STATE_TEXT)
    if TRAINED in names:
        save_file({"w": torch.ones(2)}, directory / TRAINED, {HAS_REFERENCE: reference})
    return directory


@pytest.fixture
def checkpoint(tmp_path):
    checkpoint = fill(tmp_path / "run" / "checkpoint-4", ADAPTERS)
    write_manifest(checkpoint, RUN, Contents())
    return checkpoint


def find(checkpoint, contents=None):
    return find_checkpoint(str(checkpoint), checkpoint.parent, RUN, contents or Contents())


def unlist(checkpoint, name):
    """Delete a file and let the manifest forget it, as one that lists what it happens to find."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["files"][name]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / name).unlink()


SHARDS = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
KINDS = {
    "adapters": (Contents(), ADAPTERS),
    "fila": (Contents(), (*ADAPTERS, REFERENCE)),
    "scaler": (Contents(scaler=True), (*ADAPTERS, "scaler.pt")),
    "full": (Contents(adapters=False), (*ADAPTERS[:-1], "model.safetensors")),
    "full in shards": (
        Contents(adapters=False),
        (*ADAPTERS[:-1], "model-1.safetensors", "model-2.safetensors"),
    ),
    "two processes": (
        Contents(processes=2),
        (STATE, "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", *ADAPTERS[3:]),
    ),
    "fsdp": (
        Contents(sharded=True),
        (*COMMON, "training_args.bin", TRAINED, "optimizer_0/.metadata", "optimizer_0/__0_0.distcp"),
    ),
    "fsdp, whole": (Contents(sharded=True), (*COMMON, "training_args.bin", TRAINED, "optimizer.bin")),
    "fsdp, full": (
        Contents(adapters=False, sharded=True),
        (
            *COMMON,
            *(
                f"{name}_0/{file}"
                for name in ("optimizer", "pytorch_model_fsdp")
                for file in (".metadata", "__0_0.distcp")
            ),
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_that_a_run_needs_must_be_there_whatever_the_manifest_lists(kind, tmp_path):
    contents, names = KINDS[kind]
    whole = fill(tmp_path / "checkpoint-4", names, "yes" if REFERENCE in names else "no")
    if kind == "full in shards":
        (whole / "model.safetensors.index.json").write_text(json.dumps(SHARDS))
    write_manifest(whole, RUN, contents)
    assert find(whole, contents) == whole
    for name in names:
        copy = shutil.copytree(whole, tmp_path / "copy" / "checkpoint-4")
        unlist(copy, name)
        shown = re.escape(re.sub(r"__0_0", "*", name))
        if kind == "fsdp, whole" and name == "optimizer.bin":
            shown = "optimizer_0/.metadata"
        with pytest.raises(ValueError, match=rf"checkpoint-4 has no {shown}.* is not whole, whatever"):
            find(copy, contents)
        shutil.rmtree(tmp_path / "copy")


def test_a_checkpoint_without_a_needed_file_gets_no_manifest(tmp_path):
    fill(tmp_path, [name for name in ADAPTERS if name != "optimizer.pt"])
    with pytest.raises(OSError, match=r"^optimizer\.pt was not written"):
        write_manifest(tmp_path, RUN, Contents())
    assert not (tmp_path / MANIFEST).exists()


def test_a_checkpoint_of_the_model_alone_is_refused_as_such(tmp_path):
    checkpoint = fill(tmp_path / "checkpoint-4", (STATE, "training_args.bin", TRAINED))
    write_manifest(checkpoint, RUN, Contents(model_only=True))
    with pytest.raises(ValueError, match=r"has no state of the optimizer.*save_only_model=True"):
        find(checkpoint)


def entry(**changed):
    return {"bytes": 4, "sha256": "0" * 64, **changed}


def listing(name="a", facts=None, run=RUN):
    return json.dumps({"run": run, "files": {name: entry() if facts is None else facts}})


MANIFESTS = {
    "empty": "",
    "not JSON": "{",
    "a list": "[]",
    "null": "null",
    "a number": "NaN",
    "no run": json.dumps({"files": {"a": entry()}}),
    "no files": json.dumps({"run": RUN}),
    "empty files": json.dumps({"run": RUN, "files": {}}),
    "a list of files": json.dumps({"run": RUN, "files": ["a"]}),
    "a run of another type": listing(run=["seed", 1]),
    "facts of another type": listing(facts=[4]),
    "no size": listing(facts={"sha256": "0" * 64}),
    "size as text": listing(facts=entry(bytes="4")),
    "size as truth": listing(facts=entry(bytes=True)),
    "size NaN": listing(facts=entry(bytes=float("nan"))),
    "negative size": listing(facts=entry(bytes=-1)),
    "no digest": listing(facts={"bytes": 4}),
    "short digest": listing(facts=entry(sha256="00")),
    "digest as list": listing(facts=entry(sha256=[])),
    "above": listing("../secret"),
    "above, inside": listing("a/../../secret"),
    "absolute": listing("/etc/passwd"),
    "the folder": listing("."),
    "no name": listing(""),
    "null byte": listing("a\0b"),
    "itself": listing(MANIFEST),
    "deep": '{"run": ' + "[" * 100_000,
    "deep in the run": '{"run": {"seed": '
    + "[" * 900
    + "]" * 900
    + '}, "files": {"a": '
    + json.dumps(entry())
    + "}}",
    "not UTF-8": b"\xff\xfe{}",
    "a long number": '{"run": {"seed": ' + "9" * 10_000 + "}}",
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_hostile_manifest_gets_one_clear_error(text, checkpoint):
    secret = checkpoint.parent / "secret"
    secret.write_text("mine")
    (checkpoint / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    for resume in (str(checkpoint), True):
        with pytest.raises(ValueError, match=r"checkpoint-4 is (not a whole checkpoint|of another run)"):
            find_checkpoint(resume, checkpoint.parent, RUN, Contents())
    assert not is_of_run(checkpoint, RUN)  # so it is never deleted
    assert why_not_ours(checkpoint, RUN)
    assert secret.read_text() == "mine"


def test_a_manifest_of_a_gigabyte_is_not_read(checkpoint):
    with open(checkpoint / MANIFEST, "wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(ValueError, match="has 1073741824 bytes, more than any manifest"):
        find(checkpoint)
    assert not is_of_run(checkpoint, RUN)


def test_nothing_outside_the_folder_is_read(checkpoint, monkeypatch):
    """Neither by a manifest that is a link or a pipe, nor by files and folders that are links."""
    manifest = (checkpoint / MANIFEST).read_bytes()
    (checkpoint / MANIFEST).rename(checkpoint.parent / "manifest")
    (checkpoint / MANIFEST).symlink_to(checkpoint.parent / "manifest")
    with pytest.raises(ValueError, match="there is no such file"):
        find(checkpoint)
    (checkpoint / MANIFEST).unlink()
    os.mkfifo(checkpoint / MANIFEST)  # nobody writes to it, so a reader would wait for ever
    with pytest.raises(ValueError, match="there is no such file"):
        find(checkpoint)
    assert not is_of_run(checkpoint, RUN)
    (checkpoint / MANIFEST).unlink()
    (checkpoint / MANIFEST).write_bytes(manifest)
    (checkpoint / "optimizer.pt").rename(checkpoint.parent / "optimizer.pt")
    (checkpoint / "optimizer.pt").symlink_to(checkpoint.parent / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint-4: optimizer\.pt is a link to another place"):
        find(checkpoint)
    assert change(checkpoint) == "optimizer.pt is a link to another place"


def manifest_for(checkpoint, name):
    """Change the manifest so that it vouches for a file as it is."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    data = (checkpoint / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}x", '{"global_step": "4"}', '{"global_step": true}', '{"no_such_field": 1}', "[" * 100_000]
    + [f'{{"global_step": 4, "stateful_callbacks": {value}}}' for value in ("3", '{"TrainerControl": []}')],
)
def test_a_hostile_state_gets_one_clear_error(text, checkpoint):
    (checkpoint / STATE).write_text(text)
    manifest_for(checkpoint, STATE)
    with pytest.raises(ValueError, match=rf"checkpoint-4 is not a whole checkpoint of loku \({STATE}: "):
        find(checkpoint)


def test_hostile_weights_get_one_clear_error(checkpoint):
    (checkpoint / TRAINED).write_bytes(b"\xff" * 100)
    manifest_for(checkpoint, TRAINED)
    with pytest.raises(ValueError, match=rf"checkpoint-4 is not a whole checkpoint of loku \({TRAINED}: "):
        find(checkpoint)


@pytest.mark.parametrize(
    "index", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": []}}']
)
def test_a_hostile_index_gets_one_clear_error(index, tmp_path):
    contents, names = KINDS["full in shards"]
    checkpoint = fill(tmp_path / "checkpoint-4", names)
    file = checkpoint / "model.safetensors.index.json"
    file.write_text(json.dumps(SHARDS))
    write_manifest(checkpoint, RUN, contents)
    file.write_text(index)
    manifest_for(checkpoint, file.name)
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is not a whole checkpoint of loku \(model\.safetensors\.index"
    ):
        find(checkpoint, contents)


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (2, 4, 10):
        directory = tmp_path / f"checkpoint-{step}"
        write_manifest(fill(directory, ADAPTERS), RUN, Contents())
        os.utime(directory, (10**9 - step, 10**9 - step))
        os.utime(directory / MANIFEST, (10**9 - step, 10**9 - step))
    for name in ("checkpoint-11a", "checkpoint-", "checkpoint-٣", "my-checkpoint-12"):
        shutil.copytree(tmp_path / "checkpoint-10", tmp_path / name)
    assert [path.name for path in whole_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (2, 4, 10)]
    assert find_checkpoint(True, tmp_path, RUN, Contents()).name == "checkpoint-10"


def test_newer_checkpoints_of_another_run_are_passed_over_with_a_warning(checkpoint):
    other = fill(checkpoint.parent / "checkpoint-6", ADAPTERS)
    write_manifest(other, {"seed": 2}, Contents())
    with pytest.warns(
        UserWarning, match="goes on from checkpoint-4: .*checkpoint-6 is of another run: seed=2"
    ):
        assert find_checkpoint(True, checkpoint.parent, RUN, Contents()) == checkpoint


def test_a_run_that_begins_anew_says_so(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.warns(UserWarning) as warned:
        assert find_checkpoint(True, tmp_path, RUN, Contents()) is None
    torn, anew = (str(warning.message) for warning in warned)
    assert re.search(r"checkpoint-4 is ignored: it is not a whole checkpoint", torn)
    assert re.search(r"has no whole checkpoint; the run begins anew", anew)


def test_the_best_checkpoint_must_be_unaltered_and_of_this_run(checkpoint):
    check_best(checkpoint, RUN)
    with pytest.raises(ValueError, match="checkpoint-4, the best checkpoint, was not loaded: seed=1, where"):
        check_best(checkpoint, {"seed": 2})
    (checkpoint / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"was not loaded: optimizer\.pt has 1 bytes of 12"):
        check_best(checkpoint, RUN)
    shutil.rmtree(checkpoint)
    with pytest.raises(OSError, match="checkpoint-4, is gone"):
        check_best(checkpoint, RUN)
