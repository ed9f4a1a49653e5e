"""The commands of ``loku``: settings, printed summaries, exit codes, and errors for people."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, TrainingArguments

import loku
import loku_kernels
from loku import UnlearnConfig, cli, demo
from loku import unlearn as unlearn_rows
from loku.commands.foreign_options import OPTIONS, own_names
from loku.commands.settings import read_fields
from loku.commands.unlearn import COMMON, PLACES, _speed
from loku.objectives import OBJECTIVES
from loku_kernels.backends import native

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a tokenizer, and the files of two data sets."""
    folder = tmp_path_factory.mktemp("cli")
    _, tokenizer = demo.load_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab=len(tokenizer)))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows, _ = demo.load_rows()
    write_rows(folder / "forget.jsonl", rows[:6])
    write_rows(folder / "retain.jsonl", rows[6:14])
    return folder


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def unlearn(folder, output, *more, **replaced):
    places = {
        "model": folder / "model",
        "forget": folder / "forget.jsonl",
        "retain": folder / "retain.jsonl",
        "output": output,
    }
    arguments = [f"--{name}={value}" for name, value in {**places, **replaced}.items()]
    return cli.main(["unlearn", *arguments, "--use_cpu", *more])


# Runs


def test_the_speed_and_the_precision_in_words():
    log = [
        {"tokens_per_second": speed, "model_flop_utilization": share, **first}
        for speed, share, first in ((10.0, 0.1, {"tf32": 1.0}), (400.4, 0.3125, {}), (500.0, 0.5, {}))
    ]
    speed, precision = _speed(log)
    assert speed == "training: 400 tokens a second, 31.2% of the peak in model FLOPs"
    assert "TF32" in precision and "--tf32 false" in precision
    assert _speed([{"tokens_per_second": 7.0}]) == ["training: 7 tokens a second"] and _speed([]) == []


def test_unlearn_by_file_and_options(folder, tmp_path, capfd):
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"model: {folder}/model\nforget: {folder}/forget.jsonl\nretain: {folder}/retain.jsonl\n"
        "lora-rank: 2\nlearning_rate: 1e-2  # YAML takes it for a text\nmethod: gd\nmax_steps: 3\n"
        "target_modules: [v_proj]\nsave_strategy: no\n"
    )
    arguments = ["unlearn", "--config", str(settings), "--output", str(tmp_path / "out"), "--quiet"]
    assert cli.main([*arguments, "--method=ihl", "--per-device-train-batch-size", "2", "--use_cpu"]) == 0
    printed, noise = capfd.readouterr()
    assert noise == "" and "{" not in printed  # neither bars nor dicts
    assert len(printed.splitlines()) < 24
    for text in ("6 rows", "8 rows", "method ihl", "lora_rank 2", "learning_rate 0.01", "per_device_train"):
        assert text in printed
    assert re.search(r"first \(step 1\)\s+last \(step 3\)", printed)
    for name in ("forget_loss", "retain_loss", "forget_probability", "retain_probability"):
        assert re.search(rf"{name}\s+[\d.]+\s+[\d.]+", printed)
    assert re.search(r"\d+ s, peak memory \d+ MiB resident", printed)
    assert re.search(r"training: [1-9]\d* tokens a second\n", printed) and "TF32" not in printed

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    names = {}
    exec(textwrap.dedent(printed.partition("To load it:\n")[2]), names)  # the summary's own lines
    model = names["model"]
    assert (
        isinstance(model, PeftModel) and model.peft_config["default"].r == 4
    )  # the portable adapter has twice the rank
    merged = model.merge_and_unload()
    changed = {
        name for name, parameter in merged.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 1)}


def test_full_tuning_saves_a_model(folder, tmp_path, capsys):
    assert unlearn(folder, tmp_path / "full", "--tuning", "full", "--max_steps=1") == 0
    printed, bars = capsys.readouterr()
    assert re.search(r"1/1 .*forget_loss=[\d.]+, retain_loss=[\d.]+", bars) and "{" not in printed + bars
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path}/full')" in printed
    assert "lora_rank" not in printed
    before, after = (
        AutoModelForCausalLM.from_pretrained(path) for path in (folder / "model", tmp_path / "full")
    )
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


@pytest.mark.parametrize("kind", ["residual", "merged"])
def test_saves_and_resuming(kind, folder, tmp_path, capsys):
    more = ("--quiet", "--init=pissa", "--num_train_epochs=1", "--save_strategy=epoch", f"--save={kind}")
    assert unlearn(folder, tmp_path / "out", *more) == 0
    logits = []
    for again in (False, True):
        if again:  # no step is left, and the same is saved
            assert unlearn(folder, tmp_path / "out", *more, "--resume_from_checkpoint") == 0
        names = {}
        exec(textwrap.dedent(capsys.readouterr().out.partition("To load it:\n")[2]), names)
        assert isinstance(names["model"], PeftModel) == (kind == "residual")
        with torch.no_grad():
            logits.append(names["model"].eval()(torch.arange(3, 9)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_info(capsys, monkeypatch):
    monkeypatch.delenv("LOKU_BACKEND", raising=False)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in printed and "peft" in printed
    served = "native" if native._core else "reference"
    for op in ("triplet_forward", "accumulate_squared_grad_"):
        assert re.search(rf"^{op} +cpu +{served} +{served} +{served} +reference$", printed, re.M)
    monkeypatch.setenv("LOKU_BACKEND", "reference")
    assert cli.main(["info"]) == 0
    assert re.search(r"^triplet_forward +cpu +reference +reference", capsys.readouterr().out, re.M)


def test_every_field_is_an_option_and_help_shows_the_chosen(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["unlearn", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    shown = set(re.findall(r"^  --(\w+)", text, re.M))
    fields, inherited = read_fields(UnlearnConfig), read_fields(TrainingArguments)
    own = fields.keys() - inherited.keys()
    assert {"method", "lora_rank", "fisher_damping"} <= own and set(COMMON) <= inherited.keys()
    further = {"config", "eval_dataset", "export_rank", "quiet", "save"}
    assert shown == own | set(COMMON) | set(PLACES) | further
    for name in own:
        assert re.search(rf"^  --{name} \S.*(\n +)?  +\w", text, re.M), f"{name} is not described"
    for field in fields.values():
        assert field.types, field.name


# Errors


@pytest.fixture
def bad(tmp_path):
    """Files with one fault each."""
    (tmp_path / "no_model").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": "a b c"}\n\n{"text": \n')
    (tmp_path / "odd.jsonl").write_text('{"text": "a b c"}\n\n{"txt": "d e f"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "plain.txt").write_text("one two three\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 cr\xe8me\n")
    (tmp_path / "list.json").write_text('[{"text": "a"},]')
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    (tmp_path / "unknown.yaml").write_text("seed: 1\nlora_rnk: 4\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"forget": "missing.jsonl"}, ["there is no file", "missing.jsonl"]),
        ({"forget": "broken.jsonl"}, ["broken.jsonl, line 3 is not JSON"]),
        ({"retain": "odd.jsonl"}, ["odd.jsonl, line 3: row 1 of the retain set", "'txt'"]),
        ({"retain": "empty.jsonl"}, ["empty.jsonl is empty"]),
        ({"retain": "latin.txt"}, ["latin.txt, line 1 is not text in UTF-8"]),
        ({"retain": "list.json"}, ["list.json is not a JSON list"]),
        ({"forget": "plain.txt", "method": "dpo"}, ["plain.txt, line 1: row 0 of the forget set"]),
        ({"model": "missing"}, ["missing, the --model, is not a directory"]),
        ({"model": "no_model"}, ["config.json"]),
        ({"config": "bad.yaml"}, ["bad.yaml is not YAML", "line"]),
        ({"config": "unknown.yaml"}, ["unknown.yaml, line 2", "'lora_rnk'; did you mean lora_rank?"]),
        ({"output": "plain.txt"}, ["plain.txt is a file"]),
        ({"method": "unheard"}, ["method must be one of"]),
        ({"target_modules": "nothing_proj"}, ["target_modules"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_input_is_2_and_says_where(arguments, parts, folder, bad, capsys):
    files = {
        name: value if name in ("method", "target_modules") else bad / value
        for name, value in arguments.items()
    }
    assert unlearn(folder, files.pop("output", bad / "out"), "--quiet", **files) == 2
    printed, text = capsys.readouterr()
    assert printed == "" and text.startswith("loku: error: ") and "Traceback" not in text
    for part in parts:
        assert part in text
    assert not (bad / "out" / "adapter_config.json").exists()


def test_what_cannot_be_saved_is_refused_before_training(folder, capsys, monkeypatch):
    monkeypatch.setattr("loku.UnlearnTrainer.train", None)  # it is not called
    before = sorted((folder / "model").iterdir())
    for more in ((), ("--save=residual",), ("--tuning=full",)):
        assert unlearn(folder, folder / "model", "--quiet", *more) == 2
        message = f"{folder / 'model'} is {folder / 'model'}, the model, which is only read"
        assert message in capsys.readouterr().err
    assert sorted((folder / "model").iterdir()) == before

    def refuse(model):
        raise ValueError("no such kind for this model")

    monkeypatch.setitem(loku.saving.kinds._SAVES, "merged", (refuse, None))
    assert unlearn(folder, folder / "out", "--quiet", "--save=merged") == 2
    assert "no such kind for this model" in capsys.readouterr().err and not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ["unlearn", "--lerning_rate", "1"],
            "there is no option --lerning_rate; did you mean --learning_rate?",
        ),
        (["unlearn", "--lora_rank", "x"], "'x' is not a whole number"),
        (["unlearn", "--tuning", "half"], "'half' is not one of lora, full"),
        (["demo", "--sed", "1"], "did you mean --seed?"),
        (["unlearn", "--lr", "1e-4"], "there is no option --lr; did you mean --learning_rate?"),
        (["unlearn", "--lr=1e-4"], "there is no option --lr; did you mean --learning_rate?"),
        (["unlearn", "--batch_size", "4"], "did you mean --per_device_train_batch_size?"),
        (["unlearn", "--model_name_or_path", "m"], "did you mean --model?"),
        (["unlearn", "--num-epochs", "3"], "did you mean --num_train_epochs?"),
        (["unlearn", "--lora_r", "8"], "did you mean --lora_rank?"),
        (["unlearn", "--dataset_name", "d"], "did you mean --forget or --retain?"),
        (["evaluate", "m", "--data", "a=b", "--adapter_path", "a"], "did you mean --adapter?"),
        ([], "COMMAND"),
    ],
)
def test_wrong_options_are_2(arguments, part, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and part in capsys.readouterr().err


def test_names_of_other_trainers_are_ours_in_none_but_hints():
    """A hint names an option that exists, and never one that the user has typed."""
    options = {*read_fields(UnlearnConfig), *PLACES, "adapter", "batch_size", "data"}
    for own, others in OPTIONS.items():
        assert own in options
        assert own_names(f"{others[0]}") and own not in others
    fields = read_fields(UnlearnConfig)
    assert not [
        name for others in OPTIONS.values() for name in others if name in fields and name != "output_dir"
    ]


def test_missing_places_are_named(capsys):
    assert cli.main(["unlearn", "--model", "m", "--retain", "r.jsonl"]) == 2
    assert "--forget, --output" in capsys.readouterr().err
    assert cli.main(["unlearn"]) == 2
    assert capsys.readouterr().err.startswith("usage: loku unlearn --model PATH")
    places = ["--model=m", "--forget=f", "--retain=r", "--output_dir=o"]
    assert cli.main(["unlearn", *places]) == 2
    assert "--output_dir is the directory of checkpoints" in capsys.readouterr().err


def test_the_methods_are_listed_without_a_model(capsys):
    assert cli.main(["unlearn", "--method", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*OBJECTIVES]


def test_the_arguments_of_a_method_are_json(folder, tmp_path, capsys):
    options = ["--method", "simnpo", "--max_steps", "1"]
    assert unlearn(folder, tmp_path / "a", *options, "--method_args", '{"delta": 0.5}') == 0
    assert "simnpo" in capsys.readouterr().out
    assert unlearn(folder, tmp_path / "b", *options, "--method_args", '{"gamma": 0.5}') == 2
    assert "has no argument 'gamma': it has delta" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"loku-kernels {loku_kernels.__version__}\n"


def test_a_reader_that_goes_away_is_no_error():
    """``loku info | head -1``: the pipe breaks while the command prints, or when its output is flushed."""
    for lines in (1, 100_000):
        code = (
            "import sys; from unittest import mock; from loku import cli, commands\n"
            f"mock.patch('loku.commands.info.run', lambda options: print('x\\n' * {lines})).start()\n"
            "sys.stdin.read(); sys.exit(cli.main(['info']))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        process.stdout.close()
        process.stdin.close()
        errors = process.stderr.read()
        assert process.wait(60) == cli.BROKEN_PIPE and errors == b""


def test_no_training_is_not_unlearning(folder, tmp_path, capsys):
    nothing = ("--num_train_epochs=0", "--init=pissa", "--quiet")
    assert unlearn(folder, tmp_path / "out", *nothing) == 2
    assert "nothing would be unlearned" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert unlearn(folder, tmp_path / "out", "--max_steps=0", "--quiet") == 2
    assert "max_steps must be > 0" in capsys.readouterr().err
    assert unlearn(folder, tmp_path / "out", *nothing, "--save=residual") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("initialised") and "unlearned " not in printed


def test_the_chosen_learning_rate_is_in_the_summary(folder, tmp_path, capsys):
    assert unlearn(folder, tmp_path / "out", "--max_steps=1", "--init=default") == 0
    printed = capsys.readouterr().out
    assert "learning_rate 0.002, chosen for adapters of a model of" in printed
    assert re.search(r"^settings: .*learning_rate 0.002", printed, re.M | re.S)


@pytest.mark.parametrize("option", ["model", "tokenizer"])
@pytest.mark.parametrize("name", ["./absent", "tests/absent", "a/b/c"])
def test_an_absent_path_is_not_looked_for_on_the_hub(option, name, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("loku.data.files.read_rows", lambda source: pytest.fail("it went on"))
    assert unlearn(folder, tmp_path / "out", **{option: name}) == 2
    assert f"{name}, the --{option}, is not a directory" in capsys.readouterr().err


def test_a_run_on_a_cpu_warns_of_nothing(folder, tmp_path):
    """Warnings of libraries would be shown as ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = UnlearnConfig(output_dir=str(tmp_path / "new"), max_steps=1, disable_tqdm=True)
        rows = [demo.load_rows()[0][:4], demo.load_rows()[1][:4]]
        unlearn_rows(str(folder / "model"), *rows, config=config)
    of_libraries = ("pin_memory", "is_gradient_checkpointing", "use_cache", "torch_dtype")
    assert not [w for w in caught if any(word in str(w.message) for word in of_libraries)]
    assert not (tmp_path / "new").exists()  # an empty directory of checkpoints


def test_a_failed_run_is_1_and_debug_shows_where(folder, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the loss is NaN")

    monkeypatch.setattr("loku.UnlearnTrainer.compute_loss", fail)
    assert unlearn(folder, tmp_path, "--quiet", "--init=default") == 1
    text = capsys.readouterr().err
    assert text.startswith("loku: the run failed: RuntimeError: the loss is NaN") and "LOKU_DEBUG" in text
    monkeypatch.setenv("LOKU_DEBUG", "1")
    with pytest.raises(RuntimeError, match="NaN"):
        unlearn(folder, tmp_path, "--quiet", "--init=default")
    monkeypatch.delenv("LOKU_DEBUG")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("loku.UnlearnTrainer.compute_loss", interrupt)
    assert unlearn(folder, tmp_path, "--quiet", "--init=default") == 130
    assert capsys.readouterr().err == "loku: interrupted\n"


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.005, 0.05])
def test_two_interrupts_end_a_command_with_one_line(pause, folder, tmp_path):
    places = {"model": folder / "model", "output": tmp_path}
    places |= {name: folder / f"{name}.jsonl" for name in ("forget", "retain")}
    options = ["--quiet", "--use_cpu", "--max_steps=1000", "--save_strategy=steps", "--save_steps=1"]
    command = [sys.executable, "-m", "loku", "unlearn", *options]
    command += [f"--{name}={place}" for name, place in places.items()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        while run.poll() is None and not (tmp_path / "checkpoint-1").exists():
            time.sleep(0.01)
        for _ in range(3):
            run.send_signal(signal.SIGINT)
            time.sleep(pause)
        _, errors = run.communicate(timeout=300)
    assert errors == "loku: interrupted\n"
    assert run.returncode == 130


def test_warnings_are_a_line(folder, tmp_path, capsys):
    assert unlearn(folder, tmp_path, "--quiet", "--max_steps=1", "--max_length=40", "--init=default") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "were cut to" in line]
    assert all(line.startswith("loku: warning: ") for line in lines)


def test_codes_are_documented(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert "exit codes" in text and "LOKU_DEBUG" in text and all(f"  {code} " in text for code in (0, 1, 2))
