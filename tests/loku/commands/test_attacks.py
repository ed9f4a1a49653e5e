"""``loku evaluate --attack``: what it refuses, what it writes and what it prints."""

import argparse
import json
from functools import partial

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from loku import attacks, cli, demo
from loku.commands.attacks import ATTACKS, attack_tables, check_options
from loku.data import read_rows
from loku.deletion import request
from loku.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = {
    "forget": [{"question": f"Who is {name}?", "answer": f"{name} Lee."} for name in ("Ann", "Bo", "Cy")],
    "holdout": [
        {"question": f"Where is {name}?", "answer": f"In {name}."} for name in ("Ulm", "Rom", "Kiew")
    ],
    "retain": [{"question": f"What is {i}?", "answer": f"{i} is a number."} for i in range(2)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two random models with a tokenizer, and the files of three data sets."""
    folder = tmp_path_factory.mktemp("attacks")
    _, tokenizer = demo.load_model()
    for seed, name in enumerate(("model", "original")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab=len(tokenizer)))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, rows in ROWS.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def evaluate(folder, out, sets, *more, model="model"):
    data = [f"{name}={folder / name}.json" for name in sets]
    return cli.main(["evaluate", str(folder / model), "--data", *data, f"--out={out}", "--quiet", *more])


@pytest.mark.parametrize(
    ("sets", "more", "message"),
    [
        (["retain"], ["--attack", "extract"], "--attack extract needs forget in --data"),
        (["forget"], ["--attack", "extract", "mia"], "--attack mia needs holdout in --data"),
        (
            ["retain"],
            ["--attack", "mia"],
            "needs forget and holdout in --data: --data forget=FILE holdout=FILE",
        ),
        (["retain"], ["--attack", "relearn"], "--attack relearn needs forget"),
        (["retain"], ["--attack", "quantise"], "--attack quantise needs forget"),
        (["forget"], ["--reference-model", "x"], "--reference-model is for --attack mia or relearn"),
        (
            ["forget", "holdout"],
            ["--attack", "mia", "quantise", "--control-model", "x"],
            "--control-model is for --attack relearn, which was not asked for",
        ),
    ],
    ids=[
        *("extract", "mia without holdout", "mia without both", "relearn", "quantise"),
        *("reference", "control"),
    ],
)
def test_what_lacks_data_is_refused_before_the_model_is_loaded(folder, tmp_path, capsys, sets, more, message):
    assert evaluate(folder, tmp_path / "report.json", sets, *more, model="absent") == 2
    error = capsys.readouterr().err
    assert message in error and "absent" not in error and not list(tmp_path.iterdir())


def test_several_processes_are_refused():
    options = argparse.Namespace(attack=["extract"], reference_model=None, control_model=None)
    check_options(options, ["forget"], 1)
    with pytest.raises(ValueError, match="runs in one process, and there are 2"):
        check_options(options, ["forget"], 2)
    options.attack = []
    check_options(options, [], 2)


def test_the_attacks_are_those_of_a_request():
    assert ATTACKS == request.ATTACKS  # whose module needs more imports than the parser may


def test_an_unknown_attack_is_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(folder, tmp_path / "report.json", ["forget"], "--attack", "guess")
    assert "invalid choice: 'guess'" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_known_before_the_measures(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loku.evaluation.evaluate", lambda *args, **kwargs: pytest.fail("it was measured"))
    more = ["--attack", "mia", "--reference-model", str(folder / "nowhere")]
    assert evaluate(folder, tmp_path / "report.json", ["forget", "holdout"], *more) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_report_has_the_results_of_the_attacks(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loku.attacks.extraction.PREAMBLES", {"one": "Say it. {question}"})
    monkeypatch.setattr(attacks, "relearning_attack", partial(attacks.relearning_attack, steps=2))
    out = tmp_path / "report.json"
    more = ["--attack", "quantise", "relearn", "mia", "extract", "--batch-size", "4"]
    more += [f"--reference-model={folder / 'original'}", f"--control-model={folder / 'original'}"]
    assert evaluate(folder, out, ROWS, *more) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text(encoding="utf-8"))

    model, other = (load_model(folder / name).eval() for name in ("model", "original"))
    _, tokenizer = demo.load_model()
    data = {name: read_rows(folder / f"{name}.json") for name in ROWS}
    forget, holdout, retain = (data[name] for name in ("forget", "holdout", "retain"))
    expected = {
        "extract": attacks.extraction_attack(model, tokenizer, forget, holdout, batch_size=4),
        "mia": attacks.membership_attack(model, tokenizer, forget, holdout, other, batch_size=4),
        "relearn": attacks.relearning_attack(
            model,
            tokenizer,
            forget,
            control_model=other,
            holdout=holdout,
            retain=retain,
            original_model=other,
        ),
        "quantise": attacks.quantisation_attack(model, tokenizer, data, batch_size=4),
    }
    assert list(report["attacks"]) == list(expected)
    assert report["attacks"] == json.loads(json.dumps(expected))
    assert report["reference_model"] == report["control_model"] == str(folder / "original")
    assert report["sets"]["forget"]["rows"] == 3
    assert attack_tables(expected) in printed and "train_runtime" not in printed
    for line in ("extract: ", "mia: ", "relearn: ", "quantise: ", "the control is the retrained model"):
        assert f"\n{line}" in printed
    assert "forget: paraphrased was not tested: no row has 'paraphrased_question'" in printed
    assert evaluate(folder, out, ["forget"]) == 0  # the report is known as an earlier one
    assert json.loads(out.read_text(encoding="utf-8"))["attacks"] == {}


def test_a_failed_attack_does_not_lose_the_measures(folder, tmp_path, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory for a copy")

    monkeypatch.setattr(attacks, "quantisation_attack", fails)
    out = tmp_path / "report.json"
    assert evaluate(folder, out, ["forget", "holdout"], "--attack", "mia", "quantise") == 1
    captured = capsys.readouterr()
    report = json.loads(out.read_text(encoding="utf-8"))
    assert list(report["attacks"]) == ["mia"] and report["sets"]["forget"]["rows"] == 3
    assert "no memory for a copy" in captured.err and "mia: forget rows told" in captured.out


def test_the_table_of_a_set_that_cannot_be_halved(folder):
    model, tokenizer = load_model(folder / "model"), demo.load_model()[1]
    result = attacks.relearning_attack(model, tokenizer, ROWS["forget"][:1])
    text = attack_tables({"relearn": result})
    assert text == (
        "relearn\nrelearning was not tested: the forget set has one row, so no other row is left to measure"
    )
