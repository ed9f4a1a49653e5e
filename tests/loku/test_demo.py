"""The demo's report on a few rows and steps; benchmarks/results has the figures of the full run."""

import json
import math
import re
import shlex

import pytest
import torch
from peft import PeftModel

from loku import cli, demo
from loku.saving.destinations import check_destination

KEYS = {
    "forget_probability",
    "retain_probability",
    "forget_rouge_l",
    "retain_rouge_l",
    "extraction_likelihood_10",
    "memorization_accuracy",
    "forget_quality",
    "retain_perplexity",
}


@pytest.fixture
def small(monkeypatch):
    forget, retain = demo.load_rows()
    monkeypatch.setattr(demo, "load_rows", lambda: (forget, retain[:16]))
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "num_train_epochs": 1})


def test_report(small, tmp_path, capsys):
    cli.main(["demo", "--output", str(tmp_path), "--quiet"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    for column in ("before", "after", "retain_only"):
        assert report[column].keys() == KEYS
        assert all(value is None or math.isfinite(value) for value in report[column].values())
    before, after = report["before"], report["after"]
    assert before["forget_probability"] > 0.99 and before["extraction_likelihood_10"] > 0.99
    assert before["memorization_accuracy"] > 0.99 and before["forget_quality"] < 0.01
    assert before["retain_perplexity"] < 1.01 and before["retain_rouge_l"] > 0.99
    assert after["forget_probability"] < before["forget_probability"]
    assert report["retain_only"]["forget_probability"] < 0.01
    assert report["retain_only"]["forget_quality"] is None
    assert len(report["samples"]) == 3 and report["history"][0]["step"] == 0
    assert report["seconds"].keys() == {*report["peak_memory_bytes"], "total"}
    assert all(peak > 1 << 20 for peak in report["peak_memory_bytes"].values())
    for text in ("retain-only twin", "forget_quality", f"{after['forget_probability']:.3f}", "total:"):
        assert text in printed
    for name, (good, meaning) in demo.MEASURES.items():
        assert re.search(rf"^{name} +{good} is better: {re.escape(meaning)}$", printed, re.M)
    assert demo.MEASURES.keys() == KEYS
    assert "Training ran all 5 steps" in printed and "loku evaluate" in printed
    names = {"adapter", "probabilities.png", "report.json", "forget.jsonl", "retain.jsonl", "loku_demo.json"}
    assert {path.name for path in tmp_path.iterdir()} == names  # and no empty directory
    assert [json.loads(line) for line in (tmp_path / "forget.jsonl").open()] == demo.load_rows()[0]
    assert (tmp_path / "probabilities.png").read_bytes().startswith(b"\x89PNG")

    check_destination(tmp_path, "demo")  # a next demo overwrites this one
    (tmp_path / "forget.jsonl").write_text("a user's rows")
    with pytest.raises(ValueError, match=r"holds forget\.jsonl, which is not a save of loku, or was changed"):
        check_destination(tmp_path, "demo")

    model, tokenizer = demo.load_model()
    model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    forget, retain = demo.load_rows()
    metrics, _ = demo.measure(model, tokenizer, forget, retain, progress=False)
    assert metrics["forget_probability"] == pytest.approx(after["forget_probability"], rel=1e-3)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_files_of_others_are_not_overwritten(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "measure", lambda *args, **kwargs: pytest.fail("it was started"))
    for name in ("report.json", "forget.jsonl", "adapter/notes.txt", "probabilities.png"):
        path = tmp_path / name.partition(".")[0].replace("/", "_")
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text("a user's")
        before = contents(tmp_path)
        assert cli.main(["demo", "--output", str(path), "--quiet"]) == 2
        assert f"{path} holds {name.partition('/')[0]}, which is not a save" in capsys.readouterr().err
        assert contents(tmp_path) == before
    for output in (demo.EMBEDDED, demo.EMBEDDED / "new"):
        before = contents(demo.EMBEDDED)
        assert cli.main(["demo", "--output", str(output), "--quiet"]) == 2
        assert "would write over" in capsys.readouterr().err and contents(demo.EMBEDDED) == before
    assert cli.main(["demo", "--output", str(tmp_path / "report" / "report.json" / "out"), "--quiet"]) == 2


def test_an_early_end_is_explained():
    history = [{"step": 32, "forget_probability": 0.0185, "retain_probability": 0.9332}]
    text = demo._end({"steps": {"run": 32, "planned": 40}, "history": history})
    for part in ("after 32 of 40 steps", "0.018", "0.933", "at most 0.03 and at least 0.92"):
        assert part in text


def test_the_next_commands_are_taken(tmp_path, monkeypatch):
    output = tmp_path / "a folder"
    for command in demo.next_commands(output):
        program, *arguments = shlex.split(command)
        taken = []
        monkeypatch.setattr(f"loku.commands.{arguments[0]}.run", taken.append)
        assert program == "loku" and cli.main(arguments) == 0 and len(taken) == 1
        assert str(output) in command


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0 and "--output" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["nonsense"])
    assert stop.value.code == 2


def test_the_embedded_files_are_small():
    assert sum(file.stat().st_size for file in demo.EMBEDDED.iterdir() if file.is_file()) <= 10e6
    model, _ = demo.load_model()
    assert next(model.parameters()).dtype == torch.float32
