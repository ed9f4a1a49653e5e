"""``accelerate launch`` runs the command in two CPU processes by ``configs/accelerate``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from tiny_models import tiny_model

import loku

ROOT = Path(__file__).parents[2]
PACKAGES = str(Path(loku.__file__).parents[1])
IDS = [[3 + i, 5, 7 + 2 * i, 11, 13 + i] for i in range(6)]


def launch(folder, config, environment=(), **changes):
    """Run ``loku unlearn`` under ``accelerate launch``, and return the finished process."""
    settings = yaml.safe_load(
        (ROOT / "configs" / "accelerate" / f"{config}.yaml").read_text(encoding="utf-8")
    )
    settings |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True, **changes}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    tiny_model("llama").save_pretrained(folder / "base")
    for name, first in (("forget", 0), ("retain", 40)):
        rows = [{"input_ids": [(first + token) % 97 for token in row]} for row in IDS]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                folder / "accelerate.yaml",
            ),
            *(ROOT / "tests" / "helpers" / "launched.py", "unlearn", "--model", folder / "base"),
            *("--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl"),
            *(
                "--output",
                folder / "out",
                "--max_steps",
                "2",
                "--lora_rank",
                "2",
                "--quiet",
                "--use_cpu",
                "true",
            ),
            *("--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--optim", "sgd"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([PACKAGES, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **dict(environment),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


@torch.no_grad()
def logits(model):
    return model.eval()(torch.tensor(IDS)).logits


@pytest.fixture(scope="module")
def unlearned(tmp_path_factory):
    """The logits of the model that each configuration gives."""
    found = {}
    for config in ("ddp", "fsdp2"):
        folder = tmp_path_factory.mktemp(config)
        run = launch(folder, config)
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("sharded" if config == "fsdp2" else "whole") == 4
        assert run.stdout.count("unlearned ") == 1 and "in each of 2 processes" in run.stdout
        found[config] = logits(PeftModel.from_pretrained(tiny_model("llama"), folder / "out"))
    return found


def test_both_configurations_give_one_model(unlearned):
    untouched = logits(tiny_model("llama"))
    assert (unlearned["ddp"] - untouched).norm() > 1e-3 * untouched.norm()
    torch.testing.assert_close(unlearned["fsdp2"], unlearned["ddp"], rtol=1e-3, atol=1e-3)


def test_an_interrupt_of_one_process_ends_all(tmp_path):
    begin = time.monotonic()
    run = launch(tmp_path, "ddp", {"FAILING_RANK": "1"})
    assert run.returncode != 0 and "loku, process 1: interrupted" in run.stderr
    assert time.monotonic() - begin < 600  # not until gloo's timeout of half an hour
    assert not (tmp_path / "out" / "adapter_config.json").exists()
