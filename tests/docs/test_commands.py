"""The shell commands of the documentation: run, or their options read by the real parsers."""

import argparse
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from loku import cli, demo
from loku.data.files import read_rows

ROOT = Path(__file__).parents[2]
# Programs that are not run, by the reason.
NOT_RUN = {
    "pip": "needs a registry; its extras and groups are looked up",
    "pytest": "runs this test",
    "mkdocs": "test_site.py runs it",
    "scripts/sanitize.sh": "builds the core again",
    "scripts/thread_sanitizer.sh": "builds the kernels again",
    "ruff": "CI runs it",
    "clang-format": "CI runs it",
    "mypy": "CI runs it",
    "openssl": "tests/loku/deletion/test_seal.py runs the same",
    "sha256sum": "tests/loku/deletion/test_seal.py runs the same",
    "tail": "tests/loku/deletion/test_ledger.py runs the same",
    "cd": "changes the folder",
    "git": "needs a network",
    "hf": "needs a network",
}
# Commands of ``loku`` whose options are read and no more, by the reason.
READ_ONLY = {
    "forget": "tests/docs/test_tutorial.py runs it",
    "demo": "tests/loku/test_demo.py runs it",
    "record": "tests/loku/commands/test_record.py runs it",
    "alternates": "tests/loku/test_alternates.py runs it",
    "benchmark": "tests/loku/benchmarks/test_run.py runs it",
}
FAST = {
    "unlearn": ["--max_steps=1", "--fisher_samples=2", "--use_cpu", "--quiet"],
    "evaluate": ["--quiet"],
    "export": ["--quiet"],
}

pytestmark = pytest.mark.usefixtures("one_thread")


class Read(BaseException):
    """The parser has taken the options."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the commands name: a tiny model, an adapter, data sets and a file of settings."""
    folder = tmp_path_factory.mktemp("commands")
    _, tokenizer = demo.load_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab=len(tokenizer)))
    model.save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")
    forget, retain = demo.load_rows()
    for name, rows in (("forget", forget[:2]), ("retain", retain[:2])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    alternates = [json.dumps({**row, "alternate": ["Nobody knows."]}) for row in forget[:2]]
    (folder / "alternates.jsonl").write_text("\n".join(alternates) + "\n")
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (folder / "run.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", guide, re.S | re.M)[1])
    return folder


def test_command(command, folder, tmp_path, monkeypatch, capsys):
    program, *arguments = command.arguments
    if program == "pip":
        check_requirements(arguments)
    elif program in NOT_RUN:
        assert "/" not in program or (ROOT / program).is_file()
    elif program == "loku":
        run_loku(folder, arguments, monkeypatch)
    elif program in ("torchrun", "accelerate"):
        read_launcher(folder, arguments, monkeypatch)
    elif program == "python" and arguments[0] == "-c":
        run_code(arguments[1], tmp_path, monkeypatch, capsys)
    elif program == "python" and arguments[0] == "-m":
        assert arguments[1] == "build"  # it makes the wheel: CI runs it
    elif program == "python":
        read_script(arguments, monkeypatch)
    else:
        pytest.fail(f"{program} is not known here")


def check_requirements(arguments):
    """The extras and groups that are installed exist."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for argument in arguments:
        extras = re.fullmatch(r"(?:\.|loku-kernels)\[([\w,-]+)\]", argument)
        for extra in extras[1].split(",") if extras else ():
            assert extra in project["project"]["optional-dependencies"]
    if "--group" in arguments:
        assert arguments[arguments.index("--group") + 1] in project["dependency-groups"]


def run_loku(folder, arguments, monkeypatch):
    """Run a command on small files. A command that needs the hub, or takes minutes, is only read."""
    name, *_ = arguments
    arguments = [re.sub(r"^(\$MODEL|TWIN)$", "MODEL", argument) for argument in arguments]
    if name in READ_ONLY or "locuslab" in " ".join(arguments):
        return read_loku(folder, arguments, monkeypatch)
    monkeypatch.chdir(folder)
    if name == "export" or "--adapter" in arguments:
        adapter = arguments[1] if name == "export" else arguments[arguments.index("--adapter") + 1]
        if not Path(adapter).exists():
            places = [
                "--model=MODEL",
                "--forget=forget.jsonl",
                "--retain=retain.jsonl",
                f"--output={adapter}",
            ]
            assert cli.main(["unlearn", *places, *FAST["unlearn"]]) == 0
    assert cli.main([*arguments, *FAST.get(name, [])]) == 0


def read_loku(folder, arguments, monkeypatch):
    """Give the arguments to the command's parser, and its file of settings to its reader."""
    name = arguments[0]
    taken = []
    monkeypatch.setattr(f"loku.commands.{name}.run", taken.append)
    assert cli.main(arguments) == 0 and len(taken) == 1
    if getattr(taken[0], "config", None):
        from loku.commands.settings import read_yaml
        from loku.commands.unlearn import PLACES

        assert read_yaml(folder / taken[0].config, taken[0].fields, PLACES)


def read_launcher(folder, arguments, monkeypatch):
    """``torchrun`` and ``accelerate launch``: their files exist, and ``loku`` takes the rest."""
    launcher, rest = arguments[: arguments.index("-m")], arguments[arguments.index("-m") + 1 :]
    if "--config_file" in launcher:
        assert (ROOT / launcher[launcher.index("--config_file") + 1]).is_file()
    else:
        assert launcher[0] == "--nproc-per-node" and int(launcher[1]) > 0 and len(launcher) == 2
    assert rest[0] == "loku"
    read_loku(folder, rest[1:], monkeypatch)


def run_code(code, folder, monkeypatch, capsys):
    """Run ``python -c CODE``: it prints the path of a model, or writes data sets that ``loku`` reads."""
    monkeypatch.chdir(folder)
    exec(code, {"__name__": "__main__"})
    printed = capsys.readouterr().out.strip()
    written = sorted(folder.glob("*.jsonl"))
    if printed:
        assert (Path(printed) / "config.json").is_file()
    else:
        assert [path.name for path in written] == ["forget.jsonl", "retain.jsonl"]
        assert all(read_rows(path) for path in written)


def read_script(arguments, monkeypatch):
    """Start a script and stop it once its parser has taken the options."""
    script = ROOT / arguments[0]
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr("multiprocessing.set_start_method", lambda method: None)  # it can be set once
    monkeypatch.setattr(sys, "argv", [str(script), *arguments[1:]])
    monkeypatch.syspath_prepend(script.parent)
    before = set(sys.modules)
    try:
        with pytest.raises(Read):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == script.parent:
                del sys.modules[name]
    for argument in arguments[1:]:  # grids
        assert not argument.endswith(".yaml") or (ROOT / argument).is_file()


def test_settings_of_yesterday_still_run(folder, monkeypatch):
    """The YAML of the guide names settings that ``loku unlearn`` reads."""
    read_loku(folder, ["unlearn", "--config", "run.yaml"], monkeypatch)
