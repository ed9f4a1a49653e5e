"""The experiment on a real model: its cells run, go on, are checked before they run, and its report."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from loku.data.files import read_rows
from loku.demo import EMBEDDED

ROOT = Path(__file__).parents[2]
FACTS = {"base": "somewhere", "rows": 48, "epochs": 1.0, "learning_rate": 1e-5}
TEMPLATE = {"question_template": "Question: {question}\nAnswer:", "answer_template": " {answer}"}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    yield
    for folder in ("experiments", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            sys.modules.pop(path.stem, None)


@pytest.fixture
def models(tmp_path):
    """A folder as that of ``finetune_tofu.py``, of the embedded model and a part of its rows."""
    folder = tmp_path / "models"
    rows = read_rows(EMBEDDED / "tofu.jsonl")
    rows = [*rows[400:408], *rows[-40:-32]]
    for name in ("full", "retain8"):
        shutil.copytree(EMBEDDED, folder / name)
        (folder / name / "finetuning.json").write_text(json.dumps({**FACTS, **TEMPLATE}))
    (folder / "full.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    twin = json.loads((EMBEDDED / "retain_only.json").read_text())["log"]
    log = {  # of the same eight questions
        name: {quantity: dict(list(values.items())[:8]) for quantity, values in section.items()}
        for name, section in twin.items()
    }
    (folder / "retain8_log.json").write_text(json.dumps(log))
    for name in ("authors", "facts"):
        others = [{key: row[key] for key in ("question", "answer", "perturbed_answer")} for row in rows[:2]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    return folder


def flags(models):
    place = models.parent
    return [
        *("--models", str(models), "--out", str(place / "out.jsonl"), "--forget-rows", "8"),
        *("--real-authors", str(place / "authors.jsonl"), "--world-facts", str(place / "facts.jsonl")),
        *("--utility-rows", "2", "--relearning-steps", "1", "--num-train-epochs", "1", "--lora-rank", "4"),
    ]


def test_a_cell_runs_and_is_not_run_again(models, capsys, one_thread, monkeypatch):
    import grid
    import smollm2_tofu
    import tofu_report
    from torch import nn

    monkeypatch.setattr(tofu_report, "KEPT", 0.1)  # one long step counts as forgetting
    arm = ["--method", "ihl", "--init", "default", "--learning-rate", "0.4"]
    out = models.parent / "out.jsonl"
    smollm2_tofu.main([*flags(models), *arm, "--minutes", "0"])
    assert "the time is over, and 1 cells are left" in capsys.readouterr().out

    options = SimpleNamespace(
        models=models,
        real_authors=str(models.parent / "authors.jsonl"),
        world_facts=str(models.parent / "facts.jsonl"),
    )
    made = smollm2_tofu.models_of(options)
    settings = {"lora_rank": 4, "num_train_epochs": 1, "utility_rows": 2, "relearning_steps": 1}
    cell = smollm2_tofu.Cell(init="default", learning_rate=0.4, forget_rows=8, **settings)
    base = smollm2_tofu.base_of(cell, made)
    found = smollm2_tofu.run_cell(cell, base, made)
    before, after = found["curve"]
    assert (before["step"], after["step"]) == (0, 1)
    assert before["forget"]["probability"] > 0.99 and before["world_facts"]["probability"] > 0.5
    assert 0 < before["model_utility"] <= 1
    assert after["forget"]["probability"] < 0.9
    assert found["best_epoch"] == 1
    mean = sum(probability for _, probability in found["rows"]["forget"]) / 8
    assert mean == pytest.approx(after["forget"]["probability"])
    assert {author for author, _ in found["rows"]["forget"]} == {0}
    figures = found["robustness"]
    assert figures["rounded"]["merged"]["forget"] == pytest.approx(mean, abs=1e-3)  # of the best epoch, too
    assert figures["rounded"]["4 bits"]["retain"] != figures["rounded"]["merged"]["retain"]
    assert figures["relearning"]["before"] < 0.9
    assert figures["control"]["before"] > 0.99  # the model that stands for the control here knows the rows

    # What all cells share is measured once.
    (log,) = (models / "cache").glob("before-*.json")
    again = smollm2_tofu.Measured(None, base, models / "cache")(nn.Linear(1, 1))
    assert again == json.loads(log.read_text())
    assert len(list((models / "cache").glob("control-*.json"))) == 1

    out.write_text(json.dumps({**asdict(cell), **found}) + "\n")
    smollm2_tofu.main([*flags(models), *arm])
    assert "1 cells, 1 of them finished" in capsys.readouterr().out
    assert grid.finished(out, smollm2_tofu.Cell) == {cell}
    (models / "full" / "finetuning.json").write_text(json.dumps({**FACTS, **TEMPLATE, "epochs": 2.0}))
    with pytest.raises(SystemExit, match=r"out\.jsonl has the cells of other models"):
        smollm2_tofu.main([*flags(models), *arm])


def test_what_cannot_run_is_named_before_any_cell(models, capsys):
    import smollm2_tofu

    with pytest.raises(SystemExit) as caught:
        smollm2_tofu.main([*flags(models), "--method", "ihl", "unheard", "--forget-rows", "8", "9"])
    message = str(caught.value)
    assert "got 'unheard'" in message and "retain9_log.json is missing" in message
    assert not (models.parent / "out.jsonl").exists()
    (models / "full.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"has no full\.jsonl"):
        smollm2_tofu.main(flags(models))


def test_the_grid_is_one_of_cells():
    import grid
    import smollm2_tofu

    text = (ROOT / "experiments" / "smollm2_tofu.yaml").read_text(encoding="utf-8")
    cells = grid.cells_of(yaml.safe_load(text), smollm2_tofu.Cell)
    assert {cell.method for cell in cells} == {"ihl", "npo", "simnpo", "gd", "rmu"}
    assert {cell.forget_rows for cell in cells} == {40, 200}
    assert {cell.fila_balance for cell in cells} == {"normalised", "paper"}


def made_line(seed, rate, best, **settings):
    from smollm2_tofu import Cell

    sections = {"forget": {"probability": 0.5, "rouge": 0.4}, "retain": {"probability": 0.9, "rouge": 0.8}}
    curve = [
        {"epoch": epoch, "step": 5 * epoch, "forget_quality": quality, "model_utility": 0.8, **sections}
        for epoch, quality in enumerate([1e-9, best])
    ]
    rows = {name: [[0, p], [0, p], [1, 0.0]] for name, p in (("forget", 0.3), ("retain", 0.9))}
    rounded = {"not rounded": {"forget": 0.1, "retain": 0.9}, "4 bits": {"forget": 0.25, "retain": 0.75}}
    robustness = {"rounded": rounded, "relearning": {"best": 0.5}, "control": {"best": 0.375}}
    line = {**asdict(Cell(seed=seed, learning_rate=rate, **settings)), "curve": curve, "best_epoch": 1}
    return {**line, "rows": rows, "robustness": robustness, "models": {**FACTS, **TEMPLATE}, "seconds": 1.0}


def test_report(tmp_path, capsys):
    import smollm2_report

    path = tmp_path / "smollm2_tofu.jsonl"
    lines = [
        made_line(seed, rate, 0.01 if rate == 1e-3 else 0.5, fila_balance=balance, forget_rows=size)
        for size in (200, 40)
        for balance in ("normalised", "paper")
        for rate in (1e-3, 3e-3)
        for seed in (0, 1)
    ]
    lines.append({**made_line(0, 1e-3, 1e-9, method="gd"), "robustness": None, "best_epoch": 0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    smollm2_report.write_report(path)
    text = (tmp_path / "smollm2_tofu.md").read_text()
    assert text.startswith(
        "The models: somewhere, fine-tuned on 48 rows in 1 epochs at a learning rate of 1e-05"
    )
    assert text.index("## 40 rows forgotten") < text.index("## 200 rows forgotten")
    assert "| paper | ihl | fila | 0.003 | 2 | 5.00e-01 (5.0e-01 to 5.0e-01) | 5 |" in text
    robust = "| 0.500 | 0.375 | 0.250 | 0.750 |"
    assert text.count(robust) == 4
    assert (
        "| gd | fila | normalised | 0.001 | 0 | 0.200 (0.000 to 0.300) | 0.600 (0.000 to 0.900) | - | - |"
        in text
    )
    for name in ("tradeoff", "rates"):
        assert (tmp_path / f"smollm2_tofu_{name}.png").stat().st_size > 1000
    (tmp_path / "empty.jsonl").write_text("")
    smollm2_report.write_report(tmp_path / "empty.jsonl")
    assert "nothing to draw" in capsys.readouterr().out


def test_an_interval_is_that_of_clusters():
    import smollm2_report

    mean, low, high = smollm2_report.interval([{0: [1.0] * 20, 1: [0.0] * 20}])
    assert (mean, low, high) == (0.5, 0.0, 1.0)  # two clusters, however many rows they have
    many = [{cluster: [cluster % 2] for cluster in range(200)}]
    mean, low, high = smollm2_report.interval(many)
    assert mean == 0.5 and 0.42 < low < 0.45 and 0.55 < high < 0.58  # 1.96 sqrt(0.25 / 200) = 0.069
