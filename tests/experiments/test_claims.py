"""The experiment on the claims: its cells run, go on, are checked before they run, and its report."""

import json
import math
import shutil
import sys
from dataclasses import asdict, replace
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
    import claims
    import claims_report
    import grid
    from torch import nn

    monkeypatch.setattr(claims_report, "FORGOTTEN", 1e-12)  # one long step counts as forgetting
    arm = ["--method", "ihl", "--init", "default", "--learning-rate", "0.4"]
    out = models.parent / "out.jsonl"
    claims.main([*flags(models), *arm, "--minutes", "0"])
    assert "the time is over, and 1 cells are left" in capsys.readouterr().out

    options = SimpleNamespace(
        models=models,
        real_authors=str(models.parent / "authors.jsonl"),
        world_facts=str(models.parent / "facts.jsonl"),
    )
    made = claims.models_of(options)
    settings = {"lora_rank": 4, "num_train_epochs": 1, "utility_rows": 2, "relearning_steps": 1}
    cell = claims.Cell(init="default", learning_rate=0.4, forget_rows=8, **settings)
    base = claims.base_of(cell, made)
    found = claims.run_cell(cell, base, made)
    before, after = found["curve"]
    assert (before["step"], after["step"]) == (0, 1)
    assert before["forget"]["probability"] > 0.99 and before["world_facts"]["probability"] > 0.5
    assert 0 < before["model_utility"] <= 1
    assert after["forget"]["probability"] < 0.9
    mean = sum(probability for _, probability in after["rows"]["forget"]) / 8
    assert mean == pytest.approx(after["forget"]["probability"], abs=1e-6)
    assert {author for author, _ in after["rows"]["forget"]} == {0}
    assert len(before["rows"]["retain"]) == 2
    figures = found["robustness"]
    assert figures["rounded"]["merged"]["forget"] == pytest.approx(mean, abs=1e-3)  # of the best epoch, too
    assert figures["rounded"]["4 bits"]["retain"] != figures["rounded"]["merged"]["retain"]
    assert figures["relearning"]["before"] < 0.9
    assert figures["control"]["before"] > 0.99  # the model that stands for the control here knows the rows

    # What all cells share is measured once.
    (log,) = (models / "cache").glob("before-*.json")
    again = claims.Measured(None, base, made)(nn.Linear(1, 1))
    assert again == json.loads(log.read_text())
    assert len(list((models / "cache").glob("control-*.json"))) == 1

    out.write_text(json.dumps({**asdict(cell), **found}) + "\n")
    claims.main([*flags(models), *arm])
    assert "1 cells, 1 of them finished" in capsys.readouterr().out
    assert grid.finished(out, claims.Cell) == {cell}
    (models / "full" / "finetuning.json").write_text(json.dumps({**FACTS, **TEMPLATE, "epochs": 2.0}))
    with pytest.raises(SystemExit, match=r"out\.jsonl has the cells of other models"):
        claims.main([*flags(models), *arm])


def test_what_cannot_run_is_named_before_any_cell(models, capsys):
    import claims

    with pytest.raises(SystemExit) as caught:
        claims.main([*flags(models), "--method", "ihl", "unheard", "--forget-rows", "8", "9"])
    message = str(caught.value)
    assert "got 'unheard'" in message and "retain9_log.json is missing" in message
    assert not (models.parent / "out.jsonl").exists()
    (models / "full.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"has no full\.jsonl"):
        claims.main(flags(models))


def test_the_grids_are_of_cells():
    import claims
    import grid

    cells = {
        name: grid.cells_of(
            yaml.safe_load((ROOT / "experiments" / f"claims_{name}.yaml").read_text(encoding="utf-8")),
            claims.Cell,
        )
        for name in ("smollm2", "smollm2_200", "embedded")
    }
    assert {cell.method for cell in cells["smollm2"]} == {"ihl", "npo", "simnpo", "gd", "rmu"}
    assert {cell.forget_rows for cell in cells["smollm2"]} == {40}
    assert {cell.forget_rows for cell in cells["smollm2_200"]} == {200}
    assert {cell.fila_balance for cell in cells["smollm2"]} == {"normalised", "paper"}
    embedded = cells["embedded"]
    arms = [{replace(cell, seed=0) for cell in embedded if cell.seed == seed} for seed in range(3)]
    assert arms[0] > arms[1] == arms[2] and len(arms[1]) == 10
    claims.check_cells(embedded, claims.models_of(SimpleNamespace(models=None)))


def test_the_embedded_model_is_the_default(tmp_path, monkeypatch, one_thread):
    import claims
    import tofu

    monkeypatch.setattr(claims, "EMBEDDED_CACHE", tmp_path)
    models = claims.models_of(SimpleNamespace(models=None))
    base = claims.base_of(claims.Cell(utility_rows=1), models)
    assert base.retain_log == tofu.twin_log(2)
    assert [row["question"] for row in base.forget] == [r["question"] for r in models.rows[-40:]]
    assert list(base.utility_rows) == ["retain"]
    with pytest.raises(SystemExit, match="an author has 20 rows, got forget_rows 30"):
        claims.base_of(claims.Cell(forget_rows=30), models)


def made_line(seed, rate, best, retain=0.9, **settings):
    from claims import Cell

    def point(epoch, quality, forget, retain):
        rows = {name: [[0, p], [0, p], [1, 0.0]] for name, p in (("forget", forget), ("retain", retain))}
        means = {
            name: {"probability": p * 2 / 3, "rouge": 0.4}
            for name, p in (("forget", forget), ("retain", retain))
        }
        return {
            "epoch": epoch,
            "step": 5 * epoch,
            "forget_quality": quality,
            "model_utility": 0.8 * retain / 0.9,
            **means,
            "rows": rows,
        }

    curve = [point(0, 1e-9, 0.9, 0.9), point(1, best, 0.3, retain), point(2, best / 2, 0.3, retain / 3)]
    rounded = {"not rounded": {"forget": 0.1, "retain": 0.9}, "4 bits": {"forget": 0.25, "retain": 0.75}}
    relearning = {"before": 0.3, "best": 0.5}
    robustness = {"rounded": rounded, "relearning": relearning, "control": {"best": 0.375}}
    if best < 0.05:
        robustness = None
    line = {**asdict(Cell(seed=seed, learning_rate=rate, **settings)), "curve": curve}
    return {**line, "robustness": robustness, "models": {**FACTS, **TEMPLATE}, "seconds": 1.0}


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_report(tmp_path, capsys):
    import claims_report

    lines = [
        made_line(seed, rate, 0.01 if rate == 1e-3 else 0.5, fila_balance=balance, forget_rows=size)
        for size in (200, 40)
        for balance in ("normalised", "paper")
        for rate in (1e-3, 3e-3)
        for seed in (0, 1)
    ]
    lines.append({**made_line(0, 1e-3, 1e-9, method="gd"), "robustness": None})
    path = written(tmp_path / "cells.jsonl", lines)
    claims_report.write_report(path)
    text = (tmp_path / "cells.md").read_text()
    assert text.startswith(
        "The model: somewhere, fine-tuned on 48 rows in 1 epochs at a learning rate of 1e-05"
    )
    assert text.index("## 40 rows forgotten") < text.index("## 200 rows forgotten")
    assert "| paper | ihl | fila | 0.003 | 2 | 5.00e-01 (5.0e-01 to 5.0e-01) | 5 |" in text
    robust = "0.003 | 1, 1 | 0.200 | 0.600 | 0.300 | 0.500 | 0.375 | 0.250 | 0.750 |"
    assert text.count(robust) == 4 and f"| ihl | fila | paper | {robust}" in text
    for name in ("tradeoff", "equal_quality"):
        assert (tmp_path / f"cells_{name}.png").stat().st_size > 1000
    (tmp_path / "empty.jsonl").write_text("")
    claims_report.write_report(tmp_path / "empty.jsonl")
    assert "nothing to draw" in capsys.readouterr().out


def test_report_of_the_claims(tmp_path):
    import claims_report

    lines = [
        *(made_line(seed, rate, 0.5, 0.9, init="default") for seed in (0, 1) for rate in (1e-3, 3e-3)),
        made_line(0, 1e-3, 0.5, 0.6, init="fila"),
        made_line(0, 1e-3, 0.5, 0.9, init="pissa"),
        made_line(0, 1e-3, 0.5, 0.3, method="npo", init="default"),
        *(made_line(seed, 3e-3, 0.01, 0.9, method="npo", init="default") for seed in (0, 1)),  # never forgets
        made_line(0, 1e-3, 0.01, 0.9, method="gd", init="default"),
        made_line(0, 1e-3, 0.5, 0.9, method="simnpo", init="default", num_train_epochs=9),
    ]
    claims_report.write_report(written(tmp_path / "cells.jsonl", lines))
    text = (tmp_path / "cells.md").read_text()
    # Where the quality is 0.05 between 1e-9 and 0.5: log(0.05 / 1e-9) / log(0.5 / 1e-9) = 0.885 of epoch 1.
    share = math.log(0.05e9) / math.log(0.5e9)
    forget, retain = ((0.9 + share * (after - 0.9)) * 2 / 3 for after in (0.3, 0.3))
    assert f"{share:.1f} | {forget:.3f} | {retain:.3f}" == "0.9 | 0.246 | 0.246"
    # The rate at which a seed forgets, and authors alone make the interval.
    npo = "| npo | default | - | 5 | **0.001** | 1 of 1 | 0.9 | 0.246 | 0.246 (0.000 to 0.369) |"
    best = "1 | 0.5 | 0.200 (0.000 to 0.300) |"
    assert f"{npo} -0.354 (-0.531 to +0.000) | 0.333 | {best}" in text
    own = "| ihl | default | - | 5 | **0.001** | 2 of 2 | 0.9, 0.9 | 0.246 | 0.600 (0.000 to 0.900) |"
    assert f"{own} - | 1.000 |" in text
    assert "| ihl | default | - | 5 | 0.003 | 2 of 2 |" in text  # another rate
    assert "| npo | default | - | 5 | 0.003 | 0 of 2 | - |" in text
    assert "| gd | default | - | 5 | 0.001 | 0 of 1 | - | - | - | - | - | - |" in text
    # There is no baseline of nine epochs.
    assert "| simnpo | default | - | 9 | 0.001 | 1 of 1 | 0.9 | 0.246 | 0.600 (0.000 to 0.900) | - |" in text
    fisher = "| normalised | 0.001 | 1 | {} | 0.200 | 0.200 | {} | {} | {} |"
    assert fisher.format(1, 0.5, 0.5, "-0.200 (-0.300 to +0.000)") in text
    assert fisher.format(2, 0.25, 0.25, "-0.067 (-0.100 to +0.000)") in text
    assert "| npo | default | - | **0.11, 0.11** | **0.33, 0.33** |" in text


RECORDS = sorted((ROOT / "experiments" / "records").glob("*-claims-*/cells.jsonl"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.parent.name)
def test_the_tables_of_a_record_are_those_of_its_cells(record, tmp_path):
    import claims
    import claims_report
    import grid

    claims_report.write_report(shutil.copy(record, tmp_path))
    made, committed = (folder.joinpath("cells.md").read_text() for folder in (tmp_path, record.parent))
    assert made == committed
    name = record.parent.name.split("-claims-")[1]
    text = (ROOT / "experiments" / f"claims_{name}.yaml").read_text(encoding="utf-8")
    assert grid.finished(record, claims.Cell) <= set(grid.cells_of(yaml.safe_load(text), claims.Cell))


def test_a_run_crosses_at_the_first_passing():
    from claims_report import crossing

    line = made_line(0, 1e-3, 0.5)
    dipped = {**line, "curve": [*line["curve"][:2], {**line["curve"][0], "epoch": 2}, *line["curve"][1:]]}
    assert crossing(dipped) == crossing(line)
    assert crossing({**line, "curve": line["curve"][:1]}) is None
    at = {**line["curve"][0], "forget_quality": 0.05, "epoch": 1}
    assert crossing({**line, "curve": [line["curve"][0], at]}).epoch == 1.0  # equal is enough


def test_an_interval_is_that_of_clusters():
    from bootstrap import interval

    assert interval([{0: [1.0] * 20, 1: [0.0] * 20}]) == (0.5, 0.0, 1.0)  # two clusters, of however many rows
    many = {cluster: [float(cluster % 2)] for cluster in range(200)}
    mean, low, high = interval([many])
    assert mean == 0.5 and 0.42 < low < 0.45 and 0.55 < high < 0.58  # 1.96 sqrt(0.25 / 200) = 0.069
    # Both groups of a difference have the same authors in a resample, and paired ones the same seeds.
    higher = {author: [value + 0.25 for value in values] for author, values in many.items()}
    assert interval([higher], [many]) == pytest.approx((0.25, 0.25, 0.25))
    two = [[many, {a: [0.0] for a in many}], [higher, {a: [0.25] for a in many}]]
    assert interval(two[1], two[0], paired=True) == pytest.approx((0.25, 0.25, 0.25))
    assert interval(two[1], two[0])[1] < 0.0 < 0.5 < interval(two[1], two[0])[2]
