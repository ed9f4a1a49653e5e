"""The experiments: grids run and go on, and their reports show the figures of the runs."""

import importlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from sums import Sum, add
from tiny_models import tiny_model

from loku import demo
from loku.data import tokenize_dataset
from loku.data.files import read_rows
from loku.demo import EMBEDDED

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    yield
    for folder in ("experiments", "benchmarks", "scripts"):
        for path in (ROOT / folder).glob("*.py"):
            sys.modules.pop(path.stem, None)


def run(qualities, utilities, **settings):
    """Return a line of a result file whose epochs have these forget qualities and utilities."""
    sections = {"forget": {"probability": 0.5, "rouge": 0.4}, "retain": {"probability": 0.9, "rouge": 0.8}}
    curve = [
        {"epoch": epoch, "step": 5 * epoch, "forget_quality": quality, "model_utility": utility, **sections}
        for epoch, (quality, utility) in enumerate(zip(qualities, utilities, strict=True))
    ]
    from tofu import Cell

    return {**asdict(Cell(**settings)), "curve": curve}


def test_grid():
    import grid
    from tofu import Cell

    mappings = [{"method": ["ga", "gd"], "lora_rank": [4, 8]}, {"method": "gd", "lora_rank": 8}]
    cells = grid.cells_of(mappings, Cell)
    assert [(cell.method, cell.lora_rank) for cell in cells] == [("ga", 4), ("ga", 8), ("gd", 4), ("gd", 8)]
    with pytest.raises(SystemExit, match="unknown settings in the grid: rank"):
        grid.cells_of([{"rank": 8}], Cell)
    (cell,) = grid.cells_of([{"learning_rate": "1e-3"}], Cell)  # as YAML reads it
    assert cell.learning_rate == 1e-3


def test_cells_go_on_where_one_fails(tmp_path, capsys, monkeypatch):
    import grid

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restored afterwards, since grid.run sets it
    out, cells = tmp_path / "sums.jsonl", grid.cells_of([{"a": [1, -1, 2]}], Sum)
    for unfinished in (3, 1):
        assert grid.run(cells, add, lambda cell: (10,), out, 1, lambda line: str(line["sum"])) == 1
        assert [(line["a"], line["sum"]) for line in read_rows(out)] == [(1, 11), (2, 12)]
        output = capsys.readouterr()
        assert f"3 cells, {3 - unfinished} of them finished" in output.out
        assert "failed: Sum(a=-1): ValueError('less than nothing')" in output.err
    log = [line[20:] for line in (tmp_path / "sums.log").read_text().splitlines()]  # without the times
    assert "3 of 3 cells to run" in log[0] and "commit " in log[0] and "cores " in log[0]
    failed = "failed: Sum(a=-1): ValueError('less than nothing')"
    assert log[1:5] == ["a 1: 11", failed, "a 2: 12", "the end: 1 cells failed, 0 are left"]
    assert "1 of 3 cells to run" in log[5] and log[6] == failed


def test_another_model_needs_a_result_file_of_its_own(capsys):
    import tdec
    import tofu

    for script in (tofu, tdec):
        with pytest.raises(SystemExit):
            script.main(["--model", "somewhere"])
        assert "--model needs --out" in capsys.readouterr().err


def committed_cells(name):
    import grid
    import yaml

    kind = importlib.import_module(name).Cell
    return kind, grid.cells_of(yaml.safe_load((ROOT / "experiments" / f"{name}.yaml").read_text()), kind)


@pytest.mark.parametrize("name", ["tofu", "tdec", "fila_ablation", "fila_balance"])
def test_committed_grids_make_the_committed_results(name):
    import grid

    kind, cells = committed_cells(name)
    assert grid.finished(RESULTS / f"{name}.jsonl", kind) == set(cells)
    assert len((RESULTS / f"{name}.jsonl").read_text().splitlines()) == len(cells)


def test_best_point_keeps_the_utility():
    import tofu_report

    line = run([1e-9, 1e-3, 0.04, 0.9], [0.8, 0.79, 0.77, 0.5])
    assert tofu_report.best_point(line)["epoch"] == 2
    assert tofu_report.steps_to_forget(line) is None
    assert tofu_report.steps_to_forget(run([1e-9, 0.06, 0.9], [0.8, 0.78, 0.1])) == 5
    # A run counts as if nothing had been done if every epoch loses too much.
    assert tofu_report.best_point(run([1e-9, 0.9], [0.8, 0.1]))["epoch"] == 0


def test_best_learning_rate_needs_all_seeds():
    import tofu_report

    lucky = [run([1e-9, 0.9], [0.8, 0.8], learning_rate=2e-3)]
    steady = [run([1e-9, 0.2], [0.8, 0.8], seed=seed) for seed in (0, 1)]
    poor = [run([1e-9, 0.01], [0.8, 0.8], seed=seed, learning_rate=1e-4) for seed in (0, 1)]
    assert tofu_report.best_learning_rate([*poor, *lucky, *steady]) == steady


def test_report(tmp_path):
    import tofu_report

    path = tmp_path / "tofu.jsonl"
    runs = [
        run([1e-9, 0.2 / (1 + seed), 0.5], [0.8, 0.8, 0.7], method=method, init=init, seed=seed)
        for method in ("ihl", "gd")
        for init in ("fila", "default")
        for seed in (0, 1)
    ]
    runs[0]["curve"][1]["forget_quality"] = 0.3
    other_sets = [run([1e-9, 0.1], [0.8, 0.8], forget_authors=n, num_train_epochs=5) for n in (10, 4)]
    full = run([1e-9, 0.1], [0.8, 0.8], method="gd", tuning="full")
    both = run([1e-9, 0.1], [0.8, 0.8], tuning="full", lora_rank=4)  # has no counterpart in the first table
    path.write_text("".join(json.dumps(line) + "\n" for line in [*other_sets, *runs, full, both]))
    tofu_report.write_report(path)
    _, methods, _, tuning, _, sets, _, steps = (tmp_path / "tofu.md").read_text().split("\n\n")
    assert [line.split(" | ")[:5] for line in tuning.splitlines()[2:]] == [
        ["| full", "gd", "-", "0.001", "1"],
        ["| lora", "gd", "fila", "0.001", "2"],
    ]
    assert [line.split(" | ")[:6] for line in sets.splitlines()[2:]] == [
        ["| 2", "8", "ihl", "fila", "0.001", "2"],
        ["| 4", "5", "ihl", "fila", "0.001", "1"],
        ["| 10", "5", "ihl", "fila", "0.001", "1"],
    ]
    header, _, first, *others = methods.splitlines()
    assert header.startswith("| method | init | learning rate | seeds |")
    assert first.startswith("| ihl | fila | 0.001 | 2 | 1.73e-01 (1.0e-01 to 3.0e-01) | 5 | 1.000 |")
    assert len(others) == 3 and all(line.count("|") == header.count("|") for line in (first, *others))
    assert [line.split(" | ")[:6] for line in steps.splitlines()[2:]] == [
        ["| 2", "1", "0.001", "fila", "2", "5"],
        ["| 2", "1", "0.001", "default", "2", "5"],
        ["| 4", "1", "0.001", "fila", "1", "5"],
        ["| 10", "1", "0.001", "fila", "1", "5"],
    ]
    for name in ("tradeoff", "steps", "forget_sets"):
        assert (tmp_path / f"tofu_{name}.png").stat().st_size > 1000


def test_steps_are_those_of_the_seeds_together():
    import tofu_report

    seeds = [run([1e-9, 0.5, 0.5], [0.8, 0.6, 0.6]), run([1e-9, 1e-4, 0.02], [0.8, 0.8, 0.4], seed=1)]
    found = tofu_report.first_forgotten(seeds)
    assert found is not None
    points, quality = found
    assert [point["step"] for point in points] == [10, 10] and quality == pytest.approx(0.1)
    assert tofu_report.steps_row(seeds)[5:] == ["10", "0.10", "0.500", "0.900", "0.625"]
    assert tofu_report.steps_row(seeds[1:])[5:7] == ["not in 10", "-"]


@pytest.mark.parametrize("name", ["tofu", "tdec"])
def test_committed_tables_are_made_from_the_results(name, tmp_path):
    report = importlib.import_module(f"{name}_report")
    shutil.copyfile(RESULTS / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    report.write_report(tmp_path / f"{name}.jsonl")
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


def test_a_cell_runs_and_is_not_run_again(tmp_path, capsys, one_thread):
    import grid
    import tofu

    out = tmp_path / "tofu.jsonl"
    flags = ["--num-train-epochs", "1", "--init", "default", "--seed", "3", "--out", str(out)]
    rows = read_rows(EMBEDDED / "tofu.jsonl")
    log = {  # of the same eight questions
        name: {quantity: dict(list(values.items())[:8]) for quantity, values in section.items()}
        for name, section in tofu.twin_log(2).items()
    }
    base = tofu.Base(str(EMBEDDED), rows[-40:-32], rows[:16], {"retain": rows[400:404]}, log)
    cell = tofu.Cell(num_train_epochs=1, init="default", seed=3)
    line = {**asdict(cell), **tofu.run_cell(cell, base)}
    assert [point["step"] for point in line["curve"]] == [0, 1]
    before, after = line["curve"]
    assert before["forget"]["probability"] > 0.99 and before["model_utility"] > 0.5
    assert after["forget"]["probability"] < before["forget"]["probability"]
    out.write_text(json.dumps(line) + "\n")
    assert grid.finished(out, tofu.Cell) == {cell}
    tofu.main(flags)
    assert "1 cells, 1 of them finished" in capsys.readouterr().out
    assert (tmp_path / "tofu.md").exists()


def test_finetune(tmp_path, one_thread):
    import finetune_tofu

    rows = read_rows(EMBEDDED / "tofu.jsonl")[400:408]
    for name, chosen in (("full", rows), ("forget", rows[-2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    finetune_tofu.main(
        [str(EMBEDDED), "--full", str(tmp_path / "full.jsonl")]
        + ["--forget", str(tmp_path / "forget.jsonl"), "--out", str(tmp_path), "--epochs", "1"]
    )
    assert len(read_rows(tmp_path / "retain.jsonl")) == 6
    log = json.loads((tmp_path / "retain_log.json").read_text())
    assert set(log["eval_log_forget.json"]["average_perturb_loss"]) == {"0", "1"}
    assert (tmp_path / "full" / "config.json").exists() and (tmp_path / "retain" / "config.json").exists()


def test_finetuning_goes_on_and_keeps_its_settings(tmp_path, one_thread, capsys, monkeypatch):
    import finetune_tofu

    from loku.benchmarks import finetuning

    rows = read_rows(EMBEDDED / "tofu.jsonl")[399:406]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = rows[1:]
    flags = [str(EMBEDDED), "--full", str(tmp_path / "rows.jsonl"), "--last", "2", "3", "--epochs", "2"]
    flags += ["--rows", "6"]
    flags += ["--rows-per-step", "4", "--question-template", "[INST] {question} [/INST]"]
    flags += ["--answer-template", "{answer}", "--out"]

    class Stopped(finetuning.Trainer):
        def _save_checkpoint(self, *args, **kwargs):
            super()._save_checkpoint(*args, **kwargs)
            with pytest.raises(ValueError, match=r"fine-tunes in .*/.full-.*; nothing was started"):
                finetune_tofu.main([*flags, str(tmp_path / "out")])  # a second run meanwhile
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "Trainer", Stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            finetune_tofu.main([*flags, str(tmp_path / "out")])
    (checkpoint,) = (tmp_path / "out").glob(".full-*/checkpoint-2")
    broken = checkpoint.with_name("checkpoint-3")  # a writer that was killed
    broken.mkdir()
    finetune_tofu.main([*flags, str(tmp_path / "out")])
    assert not checkpoint.exists() and not broken.exists()
    printed = capsys.readouterr().out
    for name in ("full", "retain2", "retain3"):
        assert f"{name}: its own rows: answer probability" in printed
    assert "retain3: the rows that it never saw: answer probability" in printed
    assert read_rows(tmp_path / "out" / "retain2.jsonl") == rows[:4]
    log = json.loads((tmp_path / "out" / "retain3_log.json").read_text())["eval_log_forget.json"]
    assert log["generated_text"]["2"][0] == f"[INST] {rows[5]['question']} [/INST]"

    finetune_tofu.main([*flags, str(tmp_path / "whole")])  # never stopped
    for name in ("full", "retain2"):
        ours, theirs = (
            (tmp_path / folder / name / "model.safetensors").read_bytes() for folder in ("out", "whole")
        )
        assert ours == theirs
    with pytest.raises(SystemExit, match=r"a model of other settings \(learning_rate\)"):
        finetune_tofu.main([*flags, str(tmp_path / "out"), "--learning-rate", "1e-3"])
    with pytest.raises(SystemExit, match="--last 6 leaves no row of the 6"):
        finetune_tofu.main([*flags, str(tmp_path / "none"), "--last", "6"])
    with pytest.raises(SystemExit):
        finetune_tofu.main([*flags, str(tmp_path / "none"), "--rows", "8"])
    assert "--rows must be from 1 to 7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune_tofu.main([*flags, str(tmp_path / "none"), "--question-template", "chat"])
    assert "leave answer_template" in capsys.readouterr().err


def tdec_run(epochs, perplexity, forgotten=True, tasks=1, **settings):
    measured = {"retain_perplexity": perplexity, "retain_accuracy": 0.9, "unseen_perplexity": 50.0}
    stages = [
        {
            "extraction_likelihood": [0.1 if task < done else 1.0 for task in range(tasks)],
            "memorization_accuracy": [0.3 if task < done else 1.0 for task in range(tasks)],
            **measured,
        }
        for done in range(tasks + 1)
    ]
    steps = [
        {"epochs": epochs, "forgotten": forgotten, "training_flops": 1e12, **stage} for stage in stages[1:]
    ]
    defaults = {
        "method": "ihl",
        "init": "fila",
        "lora_rank": 8,
        "target_modules": "qv",
        "learning_rate": 1e-3,
    }
    return {**defaults, "tasks": tasks, "seed": 0, **settings, "before": stages[0], "steps": steps}


def test_tdec_report(tmp_path):
    import tdec_report

    path = tmp_path / "tdec.jsonl"
    runs = [
        tdec_run(9, 2.0, learning_rate=1e-4),
        tdec_run(20, 1.1, forgotten=False),  # keeps most, but does not forget
        tdec_run(4, 2.5, lora_rank=16),
        tdec_run(5, 3.0, init="default"),
        tdec_run(3, 2.0, tasks=2),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in runs))
    tdec_report.write_report(path)
    lines = (tmp_path / "tdec.md").read_text().splitlines()
    assert lines[0].startswith("| init | lora rank | tasks | learning rate | seeds | forgotten | epochs |")
    assert lines[3].startswith("| fila | 8 | 1 | 0.0001 | 1 | 100% | 9.0 | 10.0 | 30.0 | 2.00 |")
    assert len(lines) == 2 + 1 + 4 and len({line.count("|") for line in lines}) == 1
    assert lines[-1].startswith("| fila | 8 | 2 | 0.001 | 1 | 100% | 6.0 |")
    for name in ("flops", "epochs", "continual"):
        assert (tmp_path / f"tdec_{name}.png").stat().st_size > 1000


def test_tdec_best_learning_rate_needs_all_seeds():
    import tdec_report

    lucky = [tdec_run(4, 1.1, learning_rate=3e-3)]
    steady = [tdec_run(9, 2.0, seed=seed) for seed in (0, 1)]
    unforgotten = [tdec_run(20, 1.0, forgotten=False, seed=seed, learning_rate=1e-4) for seed in (0, 1)]
    assert tdec_report.best_settings([*lucky, *unforgotten, *steady]) == [steady]


def test_a_tdec_cell(tmp_path, one_thread):
    import tdec
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    rows = tdec.cut(["one two three four five six seven eight nine ten " * 60] * 4, tokenizer, 6)
    assert all(len(row["input_ids"]) == tdec.TOKENS for row in rows)
    short = [{name: ids[:24] for name, ids in row.items()} for row in rows]
    tdec.memorise(short, tmp_path / "model", tokenizer, rounds=(1, 1), sizes=(2, 32))
    base = tdec.Base(str(tmp_path / "model"), [short[:1], short[1:2]], short[2:3], short[3:5], short[5:])
    line = tdec.run_cell(tdec.Cell(num_train_epochs=2, lora_rank=2, tasks=2, learning_rate=0.1), base)
    # The thresholds of the original model hold for all tasks.
    first, second = (step["history"][0] for step in line["steps"])
    assert {k: v for k, v in first.items() if "holdout" in k} == {
        k: v for k, v in second.items() if "holdout" in k
    }
    assert len(line["steps"]) == 2 and len(line["before"]["memorization_accuracy"]) == 2
    for step in line["steps"]:
        assert 1 <= step["epochs"] <= 2 and step["retain_perplexity"] > 1 and step["training_flops"] > 0


def test_training_flops_are_of_what_a_method_runs():
    from tdec import Cell, training_flops

    def flops(method, **settings):
        return training_flops(10, Cell(method=method, init="default", **settings), 100, 700, 3) / (
            10 * 100 * 3
        )

    assert flops("ihl") == flops("gd") == 4 * 2 and flops("ga") == 4
    assert flops("npo") == flops("kl") == 4 * 2 + 2  # plus a forward of the original model
    assert flops("ihl", tuning="full") == 6 * 2
    fisher = training_flops(10, Cell(), 100, 700, 3) - 10 * 100 * 3 * flops("ihl")
    assert fisher == 6 * 10 * (100 + 700)


def test_tdec_of_a_given_model(tmp_path):
    import tdec

    files = {}
    for name, count in (("forget", 2), ("holdout", 1), ("retain", 3), ("unseen", 1)):
        file = tmp_path / (f"{name}.txt" if name == "retain" else f"{name}.jsonl")
        texts = [f"{name} {i} " + "word " * 300 for i in range(count * 32)]
        file.write_text("".join((t if name == "retain" else json.dumps({"text": t})) + "\n" for t in texts))
        files[f"{name}_text"] = str(file)
    options = SimpleNamespace(model=str(EMBEDDED), **files)
    base = tdec.given_base(options)
    assert [len(task) for task in base.tasks] == [32, 32]
    assert (len(base.holdout), len(base.retain), len(base.unseen)) == (32, 96, 32)
    assert all(len(row["input_ids"]) == tdec.TOKENS for row in (*base.tasks[1], *base.holdout))
    (tmp_path / "forget.jsonl").write_text(json.dumps({"text": "too short"}) + "\n")
    with pytest.raises(SystemExit, match="sets of 32 texts of 200 tokens"):
        tdec.given_base(options)
    options.unseen_text = None
    with pytest.raises(SystemExit, match="missing: unseen_text"):
        tdec.given_base(options)


def test_fila_ablation_compares_with_what_ships(one_thread, monkeypatch):
    import fila_ablation

    subject = fila_ablation.Subject()
    subject.modules = {n: m for n, m in subject.modules.items() if n.startswith("model.layers.0.")}
    rows = [
        {name: row["input_ids"][:20] for name in ("input_ids", "labels")}
        for row in tokenize_dataset(subject.base.retain[:12], subject.tokenizer)
    ]
    subject.sets = rows[:4], rows[4:]
    _, same = fila_ablation.compare(fila_ablation.Cell(svd="exact"), subject)
    assert (
        same["rank_correlation"] > 0.9999 and same["worst_deficit"] < 1e-12 and same["worst_overlap"] > 0.99
    )
    # With batches of one row, and rows of equal length, the per-batch Fisher is the per-sample one.
    monkeypatch.setattr(fila_ablation, "BATCH_SIZE", 1)
    _, single = fila_ablation.compare(fila_ablation.Cell(fisher="per-batch"), subject)
    assert single["worst_rank_correlation"] > 0.999 and single["worst_shuffle_correlation"] > 0.999
    monkeypatch.setattr(fila_ablation, "BATCH_SIZE", 4)
    subject.scales.clear()
    _, batched = fila_ablation.compare(fila_ablation.Cell(fisher="per-batch", svd="svd_lowrank"), subject)
    assert batched["rank_correlation"] < 0.999 and batched["worst_deficit"] > 1e-3


def balance_run(probabilities, retain, **settings):
    """Return a line of the balance's result file with these probabilities after every second step."""
    from fila_balance import Cell

    pairs = zip(probabilities, retain, strict=True)
    curve = [
        {"step": 2 * i, "forget_probability": forget, "retain_probability": kept}
        for i, (forget, kept) in enumerate(pairs)
    ]
    curve[-1]["forget_quality"] = 0.25
    return {**asdict(Cell(**settings)), "step_size": 100.0, "curve": curve}


def test_fila_balance_report(tmp_path, capsys):
    import fila_balance_report

    runs = [
        balance_run([1.0, 0.3, 0.05], [1.0, 0.9, 0.8]),
        balance_run([1.0, 0.5, 0.1], [1.0, 0.9, 0.7], seed=1),
        balance_run([1.0, 0.5, 0.2], [1.0, 0.9, 0.7], fila_balance="0.01", learning_rate=5e-4),
        balance_run([1.0, 0.0, 0.0], [1.0, 0.5, 0.4], init="official-fila"),
        balance_run([1.0, 0.0, 0.0], [1.0, 0.5, 0.4], init="default", learning_rate=4e-3),
    ]
    for init, between in (("pissa", 0.8), ("fila", 0.6)):
        runs.append(balance_run([1.0, 0.4, 0.0], [1.0, 0.9, 0.5], init=init, forget="rows"))
        for point, probability in zip(runs[-1]["curve"], [1.0, between, 0.0], strict=True):
            point["neighbour_probability"] = probability
    path = tmp_path / "fila_balance.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in runs))
    fila_balance_report.write_report(path)
    assert (tmp_path / "fila_balance.png").stat().st_size > 10_000
    table, overlap = capsys.readouterr().out.split("\n\n")
    assert overlap.splitlines()[2:] == [
        "| FILA | normalised | 0.002 | 3.5 | 0.15 | 0.60 | 0.00 |",
        "| PiSSA | normalised | 0.002 | 3.5 | 0.20 | 0.60 | 0.00 |",
    ]
    assert table.splitlines()[2:] == [
        "| FILA | normalised | 0.002 | 0.20 | 3.6, 4.0 | 0.760 | 0.25, 0.25 | 0.750 |",
        "| FILA | 0.01 | 0.0005 | 0.05 | - | - | 0.25 | 0.700 |",
        "| official FILA | paper | 0.002 | 0.20 | 1.8 | 0.550 | 0.25 | 0.400 |",
        "| default LoRA | - | 0.004 | 0.40 | 1.8 | 0.550 | 0.25 | 0.400 |",
    ]


def test_the_rows_between_are_retained_and_measured():
    import fila_balance

    base, neighbours = fila_balance.base_of(fila_balance.Cell(forget="rows"))
    rows = read_rows(demo.EMBEDDED / "tofu.jsonl")
    assert base.forget == rows[-40::2] and neighbours == rows[-39::2]
    assert base.retain == [*rows[:-40], *neighbours] and base.retain_log is None
    _, tokenizer = demo.load_model()
    measured = fila_balance.Curve(tokenizer, base, neighbours).rows
    assert {name: len(of_name) for name, of_name in measured.items()} == {
        "forget": 20,
        "retain": 40,
        "neighbour": 20,
    }
    with pytest.raises(ValueError, match='forget must be "authors" or "rows", got \'half\''):
        fila_balance.base_of(fila_balance.Cell(forget="half"))


def test_step_size_is_that_of_random_signs(seeded):
    import fila_balance
    import torch

    model = get_peft_model(
        tiny_model("llama"),
        LoraConfig(r=2, lora_alpha=6, target_modules=["down_proj"], init_lora_weights=False),
    )
    sizes = []
    for _ in range(20):
        total = 0.0
        for _, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
                dA, dB = torch.randn_like(A).sign(), torch.randn_like(B).sign()
                total += (3 * (dB @ A + B @ dA)).square().sum().item()
        sizes.append(total)
    assert abs((sum(sizes) / 20) ** 0.5 / fila_balance.step_size(model) - 1) < 0.05


def test_robustness(tmp_path, capsys):
    _, tokenizer = demo.load_model()
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    forget, retain = demo.load_rows()
    for name, rows in [("forget", forget[:3]), ("retain", retain[:9])]:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    adapted_model = get_peft_model(
        tiny_model("llama", len(tokenizer)),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted_model.save_pretrained(tmp_path / "adapter")
    importlib.import_module("robustness").main(
        [
            *("--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")),
            *("--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")),
            *("--control", str(tmp_path / "model"), "--steps", "1", "--every", "1"),
            *("--json", str(tmp_path / "result.json")),
        ]
    )
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    tables: dict[str, dict[str, dict]] = {}
    for row in rows:
        tables.setdefault(row["what"], {})[row["name"]] = row
    roundings = {"not rounded", "8 bits, by channel", "4 bits, groups of 64", "4 bits, by channel"}
    assert tables["rounded: original"].keys() == tables["rounded: unlearned"].keys() == roundings
    assert {table for table in tables if table.startswith("relearning")} == {
        "relearning: half of the forget set",
        "relearning: as many retain rows",
        "relearning: half of the forget set, by the control",
    }
    plain = {table: rows["not rounded"] for table, rows in tables.items() if table.startswith("rounded")}
    assert (
        plain["rounded: original"]["forget_probability"] != plain["rounded: unlearned"]["forget_probability"]
    )
    steps = tables["relearning: half of the forget set"]
    assert steps.keys() == {"step 0", "step 1"}
    assert steps["step 1"]["forget_rest_probability"] != steps["step 0"]["forget_rest_probability"]
    assert "4 bits, by channel" in capsys.readouterr().out


def test_export_rank(tmp_path, capsys):
    _, tokenizer = demo.load_model()
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    forget, retain = demo.load_rows()
    for name, rows in [("forget", forget[:2]), ("retain", retain[:9])]:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = LoraConfig(r=5, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_model("llama", len(tokenizer)), config).save_pretrained(tmp_path / "adapter")
    importlib.import_module("export_rank").main(
        [
            *("--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")),
            *("--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")),
            *("--json", str(tmp_path / "result.json")),
        ]
    )
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["rank 2", "rank 4", "rank 5"]
    for measure in ("relative_error", "forget_largest_logit_change", "retain_largest_logit_change"):
        assert rows[0][measure] > rows[1][measure] > rows[2][measure] == 0
    assert rows[2]["forget_probability"] == rows[2]["forget_exact_probability"]
    assert rows[0]["forget_probability_of_the_original"] != rows[0]["forget_exact_probability"]
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "rank 4" in capsys.readouterr().out


def test_the_committed_loss_by_rank():
    rows = json.loads((RESULTS / "export_rank.json").read_text())["rows"]
    errors = [row["relative_error"] for row in rows]
    assert [row["name"] for row in rows] == [f"rank {rank}" for rank in range(2, 17, 2)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    for row in rows:
        cells = (
            *(f"{row[key]:.3f}" for key in ("relative_error", "worst_relative_error")),
            *(f"{row[f'{name}_largest_logit_change']:.2f}" for name in ("forget", "retain")),
            *(f"{row[f'{name}_probability']:.3f}" for name in ("forget", "retain")),
        )
        assert f"| {row['name'].removeprefix('rank ')} | {' | '.join(cells)} |" in guide
    assert (RESULTS / "export_rank.png").is_file()
