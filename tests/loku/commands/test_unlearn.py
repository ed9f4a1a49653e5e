"""``loku unlearn`` looks at the places that it writes to before it reads a row, and fails by name."""

import errno
import json
import os
import re

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

import loku
from loku import cli, demo

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a tokenizer, and the files of two data sets."""
    folder = tmp_path_factory.mktemp("unlearn")
    _, tokenizer = demo.load_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab=len(tokenizer)))
    model.save_pretrained(folder / "models" / "base")
    tokenizer.save_pretrained(folder / "models" / "base")
    tokenizer.save_pretrained(folder / "tokenizer")
    rows, _ = demo.load_rows()
    for name, part in (("forget", rows[:6]), ("retain", rows[6:14])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return folder


def unlearn(folder, output, *more, model=None):
    places = {
        "model": model or folder / "models" / "base",
        "forget": folder / "forget.jsonl",
        "retain": folder / "retain.jsonl",
        "output": output,
    }
    options = [f"--{name}={value}" for name, value in places.items()]
    quick = ("--use_cpu", "--quiet", "--max_steps=1", "--init=default")
    return cli.main(["unlearn", *options, *quick, *more])


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def no_rows(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("it went on")

    monkeypatch.setattr("loku.data.files.read_rows", never)


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("models", (), "models holds"),
        ("models", ("--save=merged",), "models holds"),
        ("models/base", (), "base is"),
        ("models/base/new", ("--save=residual",), "new lies in"),
        ("models/../models/base", ("--tuning=full",), "base is"),
        ("link", (), "link is"),
        (
            "tokenizer/new",
            ("--tokenizer={folder}/tokenizer",),
            "tokenizer, the tokenizer, which is only read",
        ),
        ("new", ("--output_dir={folder}/models/base/run",), "run lies in"),
        ("forget.jsonl", (), "would write over"),
    ],
)
def test_an_output_over_what_is_read_is_refused(output, more, message, folder, no_rows, capsys):
    if not (folder / "link").exists():
        (folder / "link").symlink_to(folder / "models" / "base")
    before = contents(folder)
    assert unlearn(folder, folder / output, *(word.format(folder=folder) for word in more)) == 2
    assert message in capsys.readouterr().err and contents(folder) == before


@pytest.mark.parametrize(
    ("option", "kind", "entry"),
    [
        ("output_dir", "residual", "base"),
        ("output_dir", "residual", "adapter/checkpoints"),
        ("fisher_cache_dir", "residual", "other/../reference"),
        ("fisher_cache_dir", "portable", "additional_chat_templates"),
    ],
)
def test_what_a_run_writes_may_not_be_in_the_way_of_its_save(
    option, kind, entry, folder, no_rows, tmp_path, capsys
):
    output = tmp_path / "out"
    assert unlearn(folder, output, f"--{option}={output / entry}", f"--save={kind}") == 2
    message = capsys.readouterr().err
    assert f"{option} {output / entry} would be in the way of the save into {output}" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "adapter_config.json", "loku_save.json", "config.json"])
def test_a_file_in_the_way_is_refused(name, folder, no_rows, tmp_path, capsys):
    (tmp_path / name).write_text("a user's")
    (tmp_path / "notes.txt").write_text("a user's")
    assert unlearn(folder, tmp_path) == 2
    assert f"{tmp_path} holds {name}, which is not a save of loku" in capsys.readouterr().err
    assert contents(tmp_path) == {name: b"a user's", "notes.txt": b"a user's"}


def test_a_place_that_cannot_be_written_is_refused(folder, no_rows, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert unlearn(folder, tmp_path / "file") == 2
    assert "file is a file; pass a directory" in capsys.readouterr().err
    assert unlearn(folder, tmp_path / "file" / "out") == 2
    assert "cannot be written to (Not a directory); nothing was started" in capsys.readouterr().err


def test_the_base_of_a_given_adapter_is_not_replaced(folder, tmp_path, monkeypatch, capsys):
    """It is an unaltered save, which any other run may replace."""
    base, adapter = tmp_path / "merged", tmp_path / "adapter"
    assert unlearn(folder, base, "--save=merged") == 0
    assert unlearn(folder, adapter, model=base) == 0
    before = contents(tmp_path)
    monkeypatch.setattr("loku.UnlearnTrainer.train", None)  # it is not called
    capsys.readouterr()
    for output, what in ((base, "model"), (adapter, "model"), (base / "new", "model")):
        assert unlearn(folder, output, model=adapter) == 2
        assert f"the {what}, which is only read" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_result_is_not_saved_over_the_adapter_that_it_came_from(folder, tmp_path):
    assert unlearn(folder, tmp_path / "first") == 0
    config = loku.UnlearnConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, init="default", use_cpu=True, disable_tqdm=True
    )
    rows = [{"text": "a b c d"}, {"text": "e f g h"}]
    result = loku.unlearn(tmp_path / "first", rows, [{"text": "i j k l"}], config=config)
    before = contents(tmp_path / "first")
    with pytest.raises(ValueError, match=r"first is .*first, the given adapter, which is only read"):
        result.save(tmp_path / "first")
    assert contents(tmp_path / "first") == before
    result.save(tmp_path / "second")


def test_too_little_room_ends_with_1_before_the_training(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loku.saving.destinations.shutil.disk_usage", lambda path: os.statvfs_result)
    monkeypatch.setattr(os.statvfs_result, "free", 1000, raising=False)
    monkeypatch.setattr("loku.UnlearnTrainer.train", None)  # it is not called
    assert unlearn(folder, tmp_path / "out", "--save=merged") == 1
    assert "has room for 0.0 MiB, and the save needs about" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("saving", [(), ("--save_strategy=steps", "--save_steps=1")])
def test_a_disk_that_is_full_at_the_save_ends_with_1(saving, folder, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "out"
    assert unlearn(folder, output) == 0
    before = contents(output)
    # The last file of a save, which checkpoints do not have.
    monkeypatch.setattr("loku.saving.destinations.file_digests", full)
    capsys.readouterr()
    assert unlearn(folder, output, f"--output_dir={tmp_path}/run", *saving) == 1
    text = capsys.readouterr().err
    assert text.startswith(
        f"loku: the run failed: {output} was not written, and is as it was: there is no room"
    )
    assert "Make room, and save again" in text and "repeat the command" in text
    assert ("--resume_from_checkpoint true" in text) == bool(saving)
    assert contents(output) == before and not list(output.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--export_rank=0",), "--export_rank must be an integer >= 1, got 0"),
        (
            ("--export-rank=4", "--save=merged"),
            "is the rank of a portable adapter, and there is --save merged",
        ),
        (("--export_rank=4", "--save=residual"), "and there is --save residual"),
        (("--export_rank=4", "--tuning=full"), "--tuning full trains none"),
    ],
    ids=["zero", "merged", "residual", "full"],
)
def test_a_rank_of_a_save_that_has_none_is_refused(options, message, folder, no_rows, tmp_path, capsys):
    assert unlearn(folder, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_adapter_at_a_rank_and_the_line_that_serves_it(folder, tmp_path, capsys):
    output = tmp_path / "out"
    fila = ("--init=fila", "--lora_rank=12", "--learning_rate=1e-2")
    assert unlearn(folder, output, *fila) == 0
    printed = capsys.readouterr().out
    base = folder / "models" / "base"
    serve = f"vllm serve {base} --enable-lora --lora-modules unlearned={output}"
    assert f"To serve it with vLLM:\n    {serve} --max-lora-rank 32\n" in printed
    assert "relative error" not in printed
    assert unlearn(folder, output, *fila, "--export_rank=16") == 0
    printed = capsys.readouterr().out
    assert f"    {serve} --max-lora-rank 16\n" in printed
    assert "adapter of rank 16 in the place of the exact one of rank 24: relative error 0." in printed
    assert re.search(r"forget: a logit changes by 0\.\d+ at most.*\(the first 6 rows\)", printed)
    assert re.search(r"retain: a logit changes by .*\(the first 8 rows\)", printed)
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 16
    assert unlearn(folder, output, "--lora_rank=4", "--export_rank=16") == 0
    assert "the adapter is exact: its rank is 4" in capsys.readouterr().out


def test_evaluation_sets_are_named_on_the_command_line(folder, tmp_path, monkeypatch, capsys):
    """Each has its own file, also one that has the name of a training set."""
    measured = []

    def measure(trainer, *args, **kwargs):
        measured.append(trainer.eval_dataset)
        return {}

    monkeypatch.setattr("loku.trainer_evaluation.EvaluatingTrainer.evaluate", measure)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "Another text."}) + "\n")
    sets = (f"forget={folder / 'forget.jsonl'}", f"what else={other}")
    steps = ("--eval_strategy=steps", "--eval_steps=1")
    assert unlearn(folder, tmp_path / "new", *steps, "--eval_dataset", *sets) == 0
    assert {name: len(rows) for name, rows in measured[-1].items()} == {"forget": 6, "what else": 1}

    capsys.readouterr()
    other.write_text('{"text": "A text."}\n{"text": ""}\n')
    assert unlearn(folder, tmp_path / "new", *steps, "--eval_dataset", f"forget={other}") == 2
    assert f"{other}, line 2: row 1 of the forget set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval_dataset", "a={folder}/forget.jsonl"), "--eval_dataset has no effect without evaluation"),
        (("--eval-dataset", "a=x.jsonl", "a=y.jsonl"), "two data sets have one name: ['a', 'a']"),
    ],
)
def test_evaluation_sets_without_effect_are_refused(more, message, folder, tmp_path, no_rows, capsys):
    more = [text.format(folder=folder) for text in more]
    assert unlearn(folder, tmp_path / "new", *more) == 2
    assert message in capsys.readouterr().err
