"""Two processes of torchrun, on the CPU with gloo, give the row scales and adapters of one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import loku

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"

PACKAGES = str(Path(loku.__file__).parents[1])  # the folder of the tested packages

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of the two processes' files, and their report."""
    folder = tmp_path_factory.mktemp("two")
    helpers = Path(__file__).parents[1] / "helpers"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = subprocess.run(
        [*command, str(helpers / "two_processes.py"), str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([PACKAGES, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return folder, json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folder and report of one process with the same global batch."""
    folder = tmp_path_factory.mktemp("one")
    callbacks = two_processes.measuring()
    return folder, two_processes.unlearned(folder, "adapter", callbacks, per_device_train_batch_size=4)


def test_row_scales(two):
    folder, report = two
    assert report["processes"] == [0, 1] and report["row scales are the same"]
    for file, measure in (
        ("scales", two_processes.row_scales),
        ("sharded_scales", two_processes.sharded_row_scales),
    ):
        found, expected = load_file(folder / f"{file}.safetensors"), measure()
        assert found.keys() == expected.keys() and len(found) >= 4
        for name, scale in expected.items():
            torch.testing.assert_close(found[name], scale, rtol=1e-5, atol=1e-6)


def test_one_cache_for_both(two):
    folder, report = two
    assert report["cached"] == [True, True]
    assert len(list((folder / "cache").iterdir())) == 1


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_knows_the_settings_of(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == 8 and file.read_text().startswith("# accelerate launch --config_file")


def update(path):
    """Return the update B A of each weight by a saved adapter."""
    factors = load_file(path / "adapter_model.safetensors")
    return {
        name: factors[name.replace("lora_A", "lora_B")] @ A for name, A in factors.items() if "lora_A" in name
    }


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_adapters(one, two, how):
    folder, log = one[0], one[1]["log"]
    expected, found = update(folder / "adapter"), update(two[0] / how)
    assert found.keys() == expected.keys() and len(found) == 10
    for name, value in expected.items():
        assert value.norm() > 1e-3
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name
    two_logs = two[1][how]["log"]
    assert two[1][how]["sharded"] == (how == "fsdp2")
    assert len(two_logs) == len(log) == 4
    for ours, theirs in zip(two_logs, log, strict=True):
        for name in ("forget_loss", "retain_loss", "forget_probability"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_every_kind_of_save(two, how):
    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(3, 43).view(4, 10)).logits

    def adapted(base, adapter):
        return logits(PeftModel.from_pretrained(base, adapter))

    folder = two[0]
    expected = adapted(tiny_model("llama"), folder / how)
    residual = AutoModelForCausalLM.from_pretrained(folder / f"{how}-residual" / "base")
    found = {
        "residual": adapted(residual, folder / f"{how}-residual" / "adapter"),
        "merged": logits(AutoModelForCausalLM.from_pretrained(folder / f"{how}-merged")),
        "save_pretrained": adapted(tiny_model("llama"), folder / f"{how}-peft"),
    }
    assert (expected - logits(tiny_model("llama"))).norm() > 1e-2 * expected.norm()
    for name, logits_of_save in found.items():
        assert (logits_of_save - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_callbacks_measure_all_rows(how, one, two):
    found, expected = two[1][how]["measured"], one[1]["measured"]
    for ours, theirs in zip(found, expected, strict=True):
        assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs] == [0, 2, 4]
        for entry, other in zip(ours, theirs, strict=True):
            assert entry == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_methods_that_need_more_than_triplets(how, two, tmp_path):
    """Their losses, and the dual weight of PDU in both processes, are those of one process."""
    one = two_processes.logs_of_methods(tmp_path, per_device_train_batch_size=4)
    both = two[1][f"{how}_methods"]
    for method, log in one.items():
        names = ["forget_loss", "retain_loss", *(["retain_weight"] if method == "pdu" else [])]
        assert len(log) == 3 and log[0]["forget_loss"] != log[2]["forget_loss"]
        for process in both:
            for ours, theirs in zip(process[method], log, strict=True):
                for name in names:
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), (method, name)
    for of_first, of_second in zip(both[0]["pdu"], both[1]["pdu"], strict=True):
        assert of_first["retain_weight"] == of_second["retain_weight"]


def test_a_run_under_fsdp2_resumes_exactly(two):
    """It goes on from its second step, evaluates, and loads the best checkpoint, which is the last."""
    folder, report = two
    names = ("fsdp2_whole", "fsdp2_resumed")
    whole, resumed = (load_file(folder / name / "adapter_model.safetensors") for name in names)
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    newest = folder / "fsdp2_run" / "checkpoint-4"
    assert sorted(path.name for path in newest.parent.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert list(newest.rglob("adapter_config.json")) == [newest / "adapter_config.json"]
    assert (newest / "adapter_model.safetensors").read_bytes() == (
        folder / "fsdp2_whole" / "adapter_model.safetensors"
    ).read_bytes()  # right on the untouched base
    whole, resumed = report["fsdp2_whole"], report["fsdp2_resumed"]
    assert whole["sharded"] and resumed["sharded"]
    assert [entry["step"] for entry in resumed["measured"][1]] == [2, 4]  # it began at the second step
    assert resumed["measured"][1][-1] == whole["measured"][1][-1]
    assert [entry["eval_forget_loss"] for entry in resumed["evaluations"]] == [
        entry["eval_forget_loss"] for entry in whole["evaluations"]
    ]


def test_an_error_in_one_process_stops_both(two):
    """A NaN in process 1 and a full disk in process 0; and an option that would leave process 1 waiting."""
    errors = two[1]["errors"]
    for error in errors["nan"]:
        assert re.match(r"FloatingPointError: step 2: forget_loss is nan \(it begins in .*up_proj", error)
    assert "in process 1" in errors["nan"][0]
    for error in errors["disk"]:
        assert re.match(r"OSError: checkpoint-1 could not be written to .*disk full", error)
    for error in errors["locked"]:
        assert re.match(
            r"ValueError: process \d+ on .* is writing checkpoints to .*taken; nothing was", error
        )
    for error in errors["dispatch"]:
        assert error.startswith("ValueError: dispatch_batches=True would leave all processes but one waiting")
