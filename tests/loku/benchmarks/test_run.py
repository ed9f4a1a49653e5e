"""Whole small runs of each benchmark by ``loku benchmark``: what is measured, resumed, refused, written."""

import json
import sys

import benchmark_data
import pytest
from harness_in_place import use_harness
from transformers import AutoTokenizer

from loku import cli
from loku.benchmarks import BENCHMARKS, Measures, Tofu, combinations, leaderboard_rows, run

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--max-steps=1", "--fisher-samples=1", "--lora-rank=2", "--use-cpu", "--quiet", "--batch-size=64"]
WRITE = {
    "tofu": benchmark_data.write_tofu,
    "muse": benchmark_data.write_muse,
    "wmdp": benchmark_data.write_wmdp,
    "rwku": benchmark_data.write_rwku,
    "tdec": benchmark_data.write_tdec,
}
SPLIT = {
    "tofu": ["forget10"],
    "muse": ["News-sust2"],  # two requests one after the other
    "wmdp": ["cyber"],
    "rwku": ["Ann Lee", "Bo Kim"],
    "tdec": ["lm_extraction_2_0"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a retain-only model and the data of each benchmark."""
    folder = tmp_path_factory.mktemp("benchmarks")
    benchmark_data.write_model(folder / "model", chat=True)
    benchmark_data.write_model(folder / "retain", seed=1, chat=True)
    for name, write in WRITE.items():
        write(folder / name)
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """RWKU's longest answers are short, because the model is random."""
    for name in ("REASONING_TOKENS", "FLUENCY_TOKENS"):
        monkeypatch.setattr(f"loku.benchmarks.rwku.{name}", 8)


def benchmark(folder, name, out, *more, fast=True):
    places = [f"--model={folder / 'model'}", f"--data={folder / name}", f"--out={out}"]
    splits = [] if "--split" in more else ["--split", *SPLIT[name]]
    flags = FAST if fast else FAST[-3:]
    if "--init=default" in more:  # it measures no Fisher
        flags = [flag for flag in flags if not flag.startswith("--fisher")]
    return cli.main(["benchmark", name, *places, *splits, *flags, *more])


def entries(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["entries"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_whole_run(folder, tmp_path, capsys, monkeypatch, name):
    use_harness(monkeypatch)
    more = ["--init=default", "--seed", "0", "1", "--limit=1"]
    if name in ("tofu", "muse"):
        more += [f"--retain-model={folder / 'retain'}"]
    assert benchmark(folder, name, tmp_path, *more) == 0
    printed = capsys.readouterr().out
    found = entries(tmp_path)
    kinds = [entry["kind"] for entry in found]
    splits = len(SPLIT[name])
    assert kinds.count("before") == splits and kinds.count("unlearned") == 2 * splits
    assert kinds.count("retain") == (splits if name in ("tofu", "muse") else 0)
    columns = [column.name for column in BENCHMARKS[name].columns]
    for entry in found:
        assert sorted([*entry["measures"], *entry["not_available"]]) == sorted(columns)
        assert entry["limit"] == 1 and entry["environment"]["versions"]["torch"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in printed and all(column in table for column in columns)
    rows = [line for line in table.splitlines() if line.startswith("| ") and "first 1 rows" in line]
    assert len(rows) == 2 + kinds.count("retain")  # seeds, and people, share a row
    assert [row.split(" | ")[-1] for row in rows][-1] == f"{2 * splits} |"
    # it is not run again
    monkeypatch.setattr(run, "unlearn", lambda *args, **kwargs: pytest.fail("it was unlearned again"))
    monkeypatch.setattr(BENCHMARKS[name], "measure", lambda *args: pytest.fail("it was measured again"))
    assert benchmark(folder, name, tmp_path, *more) == 0
    assert entries(tmp_path) == found


def test_an_unlearned_model_is_measured_after_training(folder, tmp_path):
    """Gradient ascent lowers the probability of the answers."""
    settings = ["--max-steps=8", "--learning-rate=0.05", "--method=ga", "--init=default"]
    assert benchmark(folder, "tofu", tmp_path, *settings) == 0
    before, after = entries(tmp_path)
    assert (before["kind"], after["kind"]) == ("before", "unlearned")
    assert after["measures"]["forget_Q_A_Prob"] < before["measures"]["forget_Q_A_Prob"]
    assert after["method"] == "ga" and after["settings"]["learning_rate"] == 0.05


def test_requests_are_forgotten_one_after_the_other(folder, tmp_path, monkeypatch):
    seen = []
    unlearn = run.unlearn

    def watched(model, forget, retain, **options):
        result = unlearn(model, forget, retain, **options)
        seen.append((type(model).__name__, len(forget), options["config"].output_dir))
        return result

    monkeypatch.setattr(run, "unlearn", watched)
    assert benchmark(folder, "muse", tmp_path, "--init=default") == 0
    assert [kind for kind, *_ in seen] == ["LlamaForCausalLM", "LlamaForCausalLM"]
    assert len({place for *_, place in seen}) == 2
    assert len(entries(tmp_path)[-1]["epochs"]) == 2


def test_a_grid_and_a_run_that_fails(folder, tmp_path, capsys):
    """IDK needs questions, and MUSE's texts are tokens: its runs fail, and the others go on."""
    more = ["--init=default", "--limit=1", "--method", "idk", "ga", "--learning-rate", "1e-3", "2e-3"]
    assert benchmark(folder, "muse", tmp_path, *more, "--split", "News") == 1
    error = capsys.readouterr().err
    assert "the run failed: RuntimeError: 2 runs failed" in error and "failed: News: idk" in error
    runs = [entry for entry in entries(tmp_path) if entry["kind"] == "unlearned"]
    done = [(entry["method"], entry["settings"]["learning_rate"]) for entry in runs]
    assert done == [("ga", 1e-3), ("ga", 2e-3)]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| News | ga, learning_rate 0.002, first 1 rows |" in table and "max_steps 1" in table


def test_what_decides_a_result_makes_a_new_one(folder, tmp_path):
    assert benchmark(folder, "tofu", tmp_path / "out", "--init=default") == 0
    first = entries(tmp_path / "out")
    assert benchmark(folder, "tofu", tmp_path / "out", "--init=default", "--limit=1") == 0
    assert [entry["limit"] for entry in entries(tmp_path / "out")] == [None, None, 1, 1]
    other = benchmark_data.write_model(tmp_path / "other", seed=2, chat=True)
    data = [f"--data={folder / 'tofu'}", f"--out={tmp_path / 'out'}"]
    command = ["benchmark", "tofu", f"--model={other}", *data, *FAST[-3:], "--measure-only"]
    assert cli.main(command) == 0
    last = entries(tmp_path / "out")[-1]
    assert last["model"] == str(other) and last["measures"] != first[0]["measures"]
    assert str(other) in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    # greedy answers end at the generation config's EOS
    file = other / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**config, "eos_token_id": [3, 4]}), encoding="utf-8")
    assert cli.main(command) == 0
    assert len(entries(tmp_path / "out")) == 6


def test_other_refusals_make_a_new_result(folder, tmp_path):
    """A file of refusals counts by its texts: another file, or the same one with other texts."""
    settings = ["--init=default", "--method=idk", "--limit=1"]
    steps = (("a", "I do not know.", 2), ("b", "No idea.", 3), ("a", "I do not know.", 3), ("a", "Why?", 4))
    for name, text, count in steps:
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert benchmark(folder, "tofu", tmp_path / "out", *settings, f"--refusals={tmp_path / name}") == 0
        assert len(entries(tmp_path / "out")) == count


def test_the_log_of_a_retain_only_model(folder, tmp_path, capsys):
    args = ["--init=default", f"--retain-model={folder / 'retain'}"]
    assert benchmark(folder, "tofu", tmp_path / "a", *args) == 0
    (log,) = (tmp_path / "a").glob("reference-*.json")
    assert benchmark(folder, "tofu", tmp_path / "b", "--init=default", f"--retain-log={log}") == 0
    by_model, by_log = (entries(tmp_path / name) for name in "ab")
    assert [entry["kind"] for entry in by_model] == ["retain", "before", "unlearned"]
    assert by_model[0]["measures"]["forget_quality"] == 1.0
    for ours, theirs in zip(by_model[1:], by_log, strict=True):
        assert ours["measures"] == theirs["measures"] and "forget_quality" in ours["measures"]
    (log.parent / log.name).unlink()
    capsys.readouterr()
    assert benchmark(folder, "tofu", tmp_path / "a", *args, "--seed=3") == 2
    assert "what the retain-only model was measured at, cannot be read" in capsys.readouterr().err


def test_fine_tuning_makes_both_models_once(folder, tmp_path, capsys):
    tune = ["--finetune", '{"max_steps": 2, "learning_rate": 0.01}', "--init=default"]
    assert benchmark(folder, "tofu", tmp_path, *tune) == 0
    assert sorted(place.name for place in (tmp_path / "models").iterdir() if place.is_dir()) == [
        "full",
        "retain90",
    ]
    assert [entry["kind"] for entry in entries(tmp_path)] == ["retain", "before", "unlearned"]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "models").rglob("*.safetensors")}
    assert benchmark(folder, "tofu", tmp_path, *tune) == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times and len(entries(tmp_path)) == 3
    capsys.readouterr()
    assert benchmark(folder, "tofu", tmp_path, "--finetune", '{"max_steps": 3}', "--init=default") == 2
    assert "has a model of other settings (settings)" in capsys.readouterr().err
    fixed = ["--finetune", '{"save_strategy": "no"}', "--init=default"]
    assert benchmark(folder, "tofu", tmp_path / "fixed", *fixed) == 2
    assert "save_strategy cannot be set for fine-tuning" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)
    tokenizer.chat_template = "another"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = f"--tokenizer={tmp_path / 'tokenizer'}"
    assert benchmark(folder, "tofu", tmp_path, *tune, other) == 2
    assert "has a model of other settings (tokenizer)" in capsys.readouterr().err
    (tmp_path / "models" / "full" / "finetuning.json").unlink()
    assert benchmark(folder, "tofu", tmp_path, *tune) == 2
    assert "has a model of an unknown origin, without finetuning.json" in capsys.readouterr().err


def test_a_rule_stops_training(folder, tmp_path):
    """The forget texts are never known by a random model, so the first epoch is the last."""
    more = ["--init=default", "--thresholds", "1", "1", "--num-train-epochs=5", "--max-steps=-1"]
    assert benchmark(folder, "tdec", tmp_path / "a", *more) == 0
    assert entries(tmp_path / "a")[-1]["epochs"] == [1.0]
    more[1:4] = [f"--holdout={folder / 'tdec' / 'validation_data' / 'pile.csv'}"]
    assert benchmark(folder, "tdec", tmp_path / "b", *more) == 0
    assert 1 <= entries(tmp_path / "b")[-1]["epochs"][0] <= 5


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("muse", ["--finetune"], "--finetune is for tofu, and not for muse"),
        ("tofu", ["--reasoning"], "--reasoning is for tdec, and not for tofu"),
        ("wmdp", ["--retain", "x"], "--retain is for rwku and tdec, and not for wmdp"),
        ("tofu", ["--retain-log", "a", "--retain-model", "b"], "each give the retain-only model"),
        (
            "tofu",
            ["--measure-only", "--seed=1"],
            "--measure-only unlearns by no setting, and there is --seed",
        ),
        ("tofu", ["--split", "forget10", "forget10"], "a split is named twice"),
        ("tofu", ["--limit=0"], "--limit must be"),
        ("wmdp", ["--leaderboard"], "open-unlearning's leaderboard has no table of wmdp"),
        ("tofu", ["--method", "ihl", "nothing"], "method must be one of"),
        ("tofu", ["--output-dir=x"], "a benchmark sets output_dir itself"),
        ("muse", ["--max-length", "8", "16"], "max_length belongs to the measures"),
        ("tofu", ["--model-init-kwargs", "{}", "--split", "forget01", "forget05"], "no set 'forget05'"),
    ],
)
def test_what_cannot_be_right_is_refused_before_a_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch, name, more, message
):
    use_harness(monkeypatch)
    monkeypatch.setattr(run, "load_model", lambda *args: pytest.fail("a model was loaded"))
    assert benchmark(folder, name, tmp_path / "out", *more, fast=False) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_several_processes_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert benchmark(folder, "tofu", tmp_path / "out") == 2
    assert "a benchmark runs in one process" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_the_harness_nothing_is_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert benchmark(folder, "wmdp", tmp_path / "out") == 2
    assert "pip install 'loku-kernels[lm-eval]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_another_origin_stay(folder, tmp_path, capsys):
    for file, text, message in (
        ("table.md", "mine", "would be overwritten"),
        ("results.json", "{}", "holds no results of a benchmark"),
        ("results.json", '{"benchmark": "muse", "entries": []}', "has the results of muse"),
    ):
        out = tmp_path / str(len(message))
        out.mkdir()
        (out / file).write_text(text)
        assert benchmark(folder, "tofu", out) == 2
        assert message in capsys.readouterr().err
        assert (out / file).read_text() == text and len([*out.iterdir()]) == 1


def test_a_missing_model_or_folder_is_named(folder, tmp_path, capsys):
    assert cli.main(["benchmark", "tofu", "--split=forget10"]) == 2
    assert "there is no --model" in capsys.readouterr().err
    assert cli.main(["benchmark", "tofu", f"--model={folder / 'model'}", f"--data={tmp_path / 'x'}"]) == 2
    assert "is not a directory" in capsys.readouterr().err


def test_settings_of_a_file_and_checkpoints(folder, tmp_path):
    (tmp_path / "run.yaml").write_text("method: gd\nsave_strategy: steps\nsave_steps: 1\n")
    assert benchmark(folder, "tofu", tmp_path / "out", f"--config={tmp_path / 'run.yaml'}") == 0
    assert entries(tmp_path / "out")[-1]["settings"]["method"] == "gd"
    (checkpoints,) = (tmp_path / "out").glob("checkpoints-*")
    assert [*checkpoints.rglob("checkpoint-1")]


def test_combinations():
    settings = {"method": ["ihl", "npo"], "seed": [0, 1], "lora_rank": 4, "target_modules": ["q", "v"]}
    found = combinations(settings, ["target_modules"])
    assert [(run["method"], run["seed"]) for run in found] == [
        ("ihl", 0),
        ("ihl", 1),
        ("npo", 0),
        ("npo", 1),
    ]
    assert all(run["lora_rank"] == 4 and run["target_modules"] == ["q", "v"] for run in found)
    assert combinations({}) == [{}]


def test_the_rows_of_the_leaderboard(folder, tmp_path, capsys):
    more = [f"--retain-model={folder / 'retain'}", "--init=default", "--leaderboard", "--seed", "0", "1"]
    assert benchmark(folder, "tofu", tmp_path, *more) == 0
    printed = capsys.readouterr().out
    for label in ("Finetuned", "Retain", "ihl"):
        assert f"<tr>\n  <th>{label}</th>\n  <td>" in printed
    found = entries(tmp_path)
    quality, utility = (
        sum(entry["measures"][name] for entry in found if entry["kind"] == "unlearned") / 2
        for name in ("forget_quality", "model_utility")
    )
    shown = [f"{x:.2f}" if x >= 0.01 or x == 0 else f"{x:.2e}" for x in (quality, utility)]
    assert "\n".join(f"  <td>{text}</td>" for text in shown) in printed.split("<th>ihl</th>")[1]
    only = [{**entry, "split": "forget01"} for entry in found]
    with pytest.raises(ValueError, match="leaderboard has forget10 alone"):
        leaderboard_rows(Tofu(), only)


def test_a_measure_that_is_no_number_is_none_in_the_file(folder, tmp_path, monkeypatch):
    broken = Measures({"model_utility": float("nan")}, {}, {}, {})
    monkeypatch.setattr(Tofu, "measure", lambda *args: broken)
    assert benchmark(folder, "tofu", tmp_path, "--measure-only", fast=False) == 0
    assert entries(tmp_path)[0]["measures"] == {"model_utility": None}
    assert "| - |" in (tmp_path / "table.md").read_text(encoding="utf-8")
