"""Runs that are killed at each of their stages and started again; ``test_checkpoints.py`` runs this file.

Each run is a fork of this process, which has imported everything once and has started no thread.
"""

import json
import os
import pkgutil
import resource
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from forks import forked
from tiny_models import tiny_model
from transformers import TrainerCallback

import loku
import loku.unlearning  # with everything that a run imports

FORGET = [{"input_ids": [3 + i, 5, 7 + 2 * i, 11, 13 + i]} for i in range(6)]
RETAIN = [{"input_ids": [40 + i, 41, 2 * i + 3, 43]} for i in range(9)]


class AtStep(TrainerCallback):
    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(control)


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def stop(control):
    control.should_training_stop = True


def run(directory, callbacks=(), **options):
    """Run 5 steps, 3 an epoch, so that checkpoints 2, 4 and 5 all lie inside an epoch."""
    model = tiny_model("gpt_neo")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1  # so that the random state must be resumed too
    defaults = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "lora_rank": 4,
        "lora_alpha": 8,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    config = loku.UnlearnConfig(**{**defaults, **options})
    result = loku.unlearn(model, FORGET, RETAIN, config=config, callbacks=list(callbacks))
    result.save(Path(directory) / "saved")


def at_call(target, number, act=kill):
    """Patch a function so that ``act`` replaces its ``number``-th call."""
    real = pkgutil.resolve_name(target)
    calls = []

    def function(*args, **kwargs):
        calls.append(None)
        return act(*args, **kwargs) if len(calls) == number else real(*args, **kwargs)

    return patch(target, function)


def write_half(tensors, path, **kwargs):
    Path(path).write_bytes(b"\x00" * 100)
    kill()


def save_half(peft_model, path, kind, tokenizer, rank):
    with patch("loku.saving.adapter_files.save_file", write_half):
        loku.saving.kinds.save(peft_model, path, kind, tokenizer=tokenizer, rank=rank)


# By stage: the patch that kills the first run, its callbacks, and whether it leaves a checkpoint.
STAGES = {
    "fisher": (lambda: at_call("loku.fila.row_scales.accumulate_squared_grad_", 5), {}, False),
    "initialisation": (lambda: at_call("loku.fila.initialize.row_scaled_svd", 2), {}, False),
    "training": (None, {"callbacks": [AtStep(3, kill)]}, True),
    "checkpoint": (lambda: at_call("torch.save", 6), {}, True),  # the optimizer of the second checkpoint
    "manifest": (lambda: at_call("loku.checkpoint_folder.write_manifest", 2), {}, True),
    "save": (lambda: at_call("loku.unlearning.save", 1, save_half), {}, True),
}
# The steps of writing the second checkpoint and of deleting the first, by the number of the call.
WRITES = {
    "training arguments": ("torch.save", 5),
    "portable adapter": ("loku.saving.adapter_files.save_file", 2),
    "trained": ("loku.checkpoint_factors.save_file", 3),
    "initial factors": ("loku.checkpoint_factors.save_file", 4),
    "scheduler": ("torch.save", 7),
    "random states": ("torch.save", 8),
    "flush": ("loku.checkpoint_folder.flush_tree", 2),
    "rename": ("loku.checkpoint_folder._rename", 2),
    "flush of the name": ("loku.checkpoint_folder.flush", 3),
    "rename of the deleted": ("loku.checkpoint_folder._rename", 3),
    "flush of the deleted": ("loku.checkpoint_folder.flush", 5),
    "deletion": ("loku.checkpoint_folder.flush", 6),
}
VARIANTS = {
    "fila": {},
    "stopped": {"callbacks": [AtStep(4, stop)]},  # inside an epoch, at a checkpoint
    "npo": {
        "method": "npo",
        "init": "default",
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_steps": 1,
    },
    "kl": {"method": "kl", "tuning": "full", "learning_rate": 1e-3},
}


def saved(directory):
    return {p.name: p.read_bytes() for p in sorted((directory / "saved").iterdir())}


def check(name, directory, patched, killed, options, has_checkpoint, expected):
    options = {**options, "callbacks": [*options.get("callbacks", []), *killed.get("callbacks", [])]}
    resumed = {**options, "callbacks": options["callbacks"][: -1 if killed else None]}

    def first():
        if patched is None:
            return run(directory, **options)
        with patched():
            run(directory, **options)

    def second():
        warnings.simplefilter("ignore")
        if has_checkpoint:  # nothing may be measured or decomposed again
            for target in (
                "loku.fila.row_scales.accumulate_squared_grad_",
                "loku.fila.initialize.row_scaled_svd",
            ):
                at_call(target, 1, lambda *args: sys.exit("the Fisher pass was run again")).start()
        run(directory, resume_from_checkpoint=True, **resumed)

    assert forked(first) == -signal.SIGKILL, f"{name}: was not killed"
    assert not (directory / "saved").exists()
    assert bool(loku.checkpoints.whole_checkpoints(directory)) == has_checkpoint, name
    assert forked(second) == 0, f"{name}: could not be resumed"
    assert saved(directory) == expected, f"{name}: ended elsewhere"


def writes(directory, expected):
    """Kill a run at each step of writing the second checkpoint and of deleting the first."""
    for stage, (target, number) in WRITES.items():
        folder, options = directory / stage, {"save_total_limit": 1}
        check(f"write-{stage}", folder, lambda t=target, n=number: at_call(t, n), {}, options, True, expected)
        assert sorted(entry.name for entry in folder.iterdir()) == ["checkpoint-5", "saved"], stage
        yield f"write-{stage}"


def replaced(directory, expected):
    """Kill a run that replaces its own earlier checkpoint, between the two renames."""
    assert forked(lambda: run(directory)) == 0

    def first():
        with at_call(
            "loku.checkpoint_folder._rename", 2
        ):  # the old checkpoint is aside, the new one without its name
            run(directory)

    assert forked(first) == -signal.SIGKILL
    assert not (directory / "checkpoint-2").exists()
    assert forked(lambda: run(directory, resume_from_checkpoint=str(directory / "checkpoint-4"))) == 0
    assert saved(directory) == expected
    names = ["checkpoint-2", "checkpoint-4", "checkpoint-5", "saved"]
    assert sorted(entry.name for entry in directory.iterdir()) == names


def two_in_one_folder(directory, expected):
    """A second run is refused while the first lives, and goes on from its checkpoint when it was killed."""
    waits, told = directory.parent / "waits", directory.parent / "told"

    def wait(control):
        waits.touch()
        time.sleep(3600)

    def second():
        try:
            run(directory, resume_from_checkpoint=True)
        except ValueError as error:
            told.write_text(str(error))

    first = os.fork()
    if first == 0:
        run(directory, [AtStep(3, wait)])
        os._exit(1)
    try:
        while not waits.exists():
            assert os.waitpid(first, os.WNOHANG) == (0, 0), "the first run ended"
            time.sleep(0.05)
        before = sorted(directory.rglob("*"))
        assert forked(second) == 0
        assert f"process {first} on {socket.gethostname()!r} is writing checkpoints" in told.read_text()
        assert sorted(directory.rglob("*")) == before
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert forked(lambda: run(directory, resume_from_checkpoint=True)) == 0
    assert saved(directory) == expected
    names = ["checkpoint-2", "checkpoint-4", "checkpoint-5", "saved"]
    assert sorted(entry.name for entry in directory.iterdir()) == names


def disk_full(directory):
    """Limit the size of files so that the second checkpoint cannot be written."""

    def limited():
        def limit(control):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

        try:
            run(directory, [AtStep(3, limit)])
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            (directory / "error").write_text(str(error))

    assert forked(limited) == 0


def main(directory):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    socket.socket.connect = lambda *args: sys.exit("network")
    reports = {}
    for variant, options in VARIANTS.items():
        assert forked(lambda o=options, v=variant: run(directory / v, **o)) == 0
        expected = saved(directory / variant)
        stages = STAGES if variant == "fila" else {"stopped": ("save",)}.get(variant, ("training",))
        for stage in stages:
            patched, killed, has_checkpoint = STAGES[stage]
            if variant == "npo" and stage == "training":
                killed = {"callbacks": [AtStep(3, kill)]}
            name = f"{variant}-{stage}"
            check(name, directory / name, patched, killed, options, has_checkpoint, expected)
            reports[name] = "same"
        if variant == "fila":
            reports |= dict.fromkeys(writes(directory, expected), "same")
            replaced(directory / "replaced", expected)
            two_in_one_folder(directory / "shared", expected)
    disk_full(directory / "full")
    print(json.dumps(reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
