"""No code of a model, a tokenizer or an adapter runs unless the user's own argument says so.

The commands run in one process whose standard input says yes to every question, as ``yes |`` does. Each piece
of foreign code writes a file.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import killed_runs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from loku import demo
from loku.checkpoint_files import MANIFEST
from loku.data import infer_tokenizer, tokenize_dataset
from loku.file_digests import file_digest
from loku.models import load_model
from loku.trust import check_base

ROOT = Path(__file__).parents[2]
TRUST = '{"trust_remote_code": true}'
# The model is a Llama whose repository brings its own classes.
MODELING = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZATION = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({marker!r}).touch()


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
RUN_COMMANDS = """
import contextlib, io, json, pathlib, sys
from loku import cli

ends = {}
for name, line in json.loads(sys.argv[2]).items():
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = cli.main(line)
        except SystemExit as error:
            code = error.code
    marker = pathlib.Path(sys.argv[1])
    ends[name] = [code, marker.exists(), output.getvalue()]
    marker.unlink(missing_ok=True)
print(json.dumps(ends))
"""


def change_json(path, **fields):
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **fields}))


def add_code(folder, text, marker, name="own.py"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text.format(marker=str(marker)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Repositories with code of their own: models, tokenizers and adapters."""
    folder = tmp_path_factory.mktemp("foreign")
    marker = folder / "marker"
    _, tokenizer = demo.load_model()
    rows, _ = demo.load_rows()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    (folder / "retain.jsonl").write_text("\n".join(map(json.dumps, rows[4:8])))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab=len(tokenizer)))
    for name in ("plain", "own_model", "known_model", "own_tokenizer"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    for name in ("own_model", "known_model"):
        add_code(folder / name, MODELING, marker)
        change_json(folder / name / "config.json", auto_map=classes)
    change_json(folder / "own_model" / "config.json", model_type="own")
    add_code(folder / "known_model", MODELING, marker, "custom_generate/generate.py")
    # The tokenizer alone has code. Its class is unknown to transformers, as is its model's type.
    add_code(folder / "own_tokenizer", TOKENIZATION, marker)
    (folder / "own_tokenizer" / "config.json").unlink()
    change_json(
        folder / "own_tokenizer" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
        tokenizer_class="OwnTokenizer",
    )
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, base in (("adapter", "plain"), ("own_adapter", "own_model")):
        adapter.save_pretrained(folder / name)
        change_json(folder / name / "adapter_config.json", base_model_name_or_path=str(folder / base))
    # A module on the path of the process.
    (folder / "path").mkdir()
    (folder / "path" / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    adapter.save_pretrained(folder / "importing_adapter")
    change_json(
        folder / "importing_adapter" / "adapter_config.json",
        base_model_name_or_path=str(folder / "plain"),
        megatron_config={"hidden_size": 2},
        megatron_core="evil",
    )
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Run commands in one process: (exit code, whether foreign code ran, output) by their names."""

    def run(lines):
        code = [sys.executable, "-c", RUN_COMMANDS, str(folder / "marker"), json.dumps(lines)]
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": str(folder / "modules"),
            "PYTHONPATH": os.pathsep.join([str(folder / "path"), *sys.path]),
        }
        done = subprocess.run(
            code,
            input="yes\n" * 1000,
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def unlearn(folder, model, *more):
    names = {"model": model, "forget": "rows.jsonl", "retain": "retain.jsonl"}
    places = [f"--{option}={folder / name}" for option, name in names.items()]
    output = folder / "out" / f"{model}_{len(more)}"
    return ["unlearn", *places, "--use_cpu", "--max_steps=1", "--quiet", f"--output={output}", *more]


def evaluate(folder, model, *more):
    data = f"forget={folder / 'rows.jsonl'}"
    return ["evaluate", str(folder / model), "--data", data, f"--out={folder / 'report.json'}", *more]


def export(folder, adapter, *more):
    return ["export", str(folder / adapter), "--ranks", "--data", f"forget={folder / 'rows.jsonl'}", *more]


def test_code_runs_by_the_users_own_argument_alone(folder, run):
    tokenizer = f"--tokenizer={folder / 'own_tokenizer'}"
    refused = {
        "unlearn a model": (unlearn(folder, "own_model"), "own_model"),
        "unlearn with a tokenizer": (unlearn(folder, "plain", tokenizer), "own_tokenizer"),
        "unlearn an adapter": (unlearn(folder, "own_adapter"), "own_model"),
        "evaluate a model": (evaluate(folder, "own_model"), "own_model"),
        "evaluate with a tokenizer": (evaluate(folder, "plain", tokenizer), "own_tokenizer"),
        "evaluate an adapter": (evaluate(folder, "own_adapter"), "own_model"),
        "evaluate with an adapter": (
            evaluate(folder, "own_model", f"--adapter={folder / 'adapter'}"),
            "own_model",
        ),
        "export an adapter": (export(folder, "own_adapter"), "own_model"),
        "export with a tokenizer": (export(folder, "adapter", tokenizer), "own_tokenizer"),
        "export merged": (
            ["export", str(folder / "own_adapter"), "--merged", f"--output={folder / 'merged'}"],
            "own_model",
        ),
    }
    trusted = {
        "trust in unlearn": unlearn(folder, "own_model", "--model_init_kwargs", TRUST),
        "trust in a tokenizer": unlearn(folder, "plain", tokenizer, "--model_init_kwargs", TRUST),
        "trust in evaluate": evaluate(folder, "own_model", "--model-init-kwargs", TRUST),
        "trust in a base": evaluate(folder, "own_adapter", "--model-init-kwargs", TRUST),
    }
    importing = {
        "import by unlearn": unlearn(folder, "importing_adapter"),
        "import by evaluate": evaluate(folder, "plain", f"--adapter={folder / 'importing_adapter'}"),
        "import by export": export(folder, "importing_adapter"),
    }
    # transformers has the class of this one, which is taken in place of the repository's.
    known = {"known model": evaluate(folder, "known_model")}
    ends = run({**{name: line for name, (line, _) in refused.items()}, **importing, **known, **trusted})
    for name, (_, place) in refused.items():
        code, ran, output = ends[name]
        assert not ran, name
        assert code == 2 and f"{folder / place} needs code of its own" in output, output
        assert f"--model_init_kwargs '{TRUST}'" in output, output
    for name in importing:
        code, ran, output = ends[name]
        assert not ran, name
        assert code == 2 and "importing_adapter has megatron_config" in output, output
    assert ends["known model"][:2] == [0, False], ends["known model"]
    for name in trusted:  # a module is imported once
        assert ends[name][:2] == [0, name in ("trust in unlearn", "trust in a tokenizer")], ends[name]


def test_the_tokenizer_of_a_trusted_model(folder, monkeypatch):
    """The argument that lets a model's code run lets its tokenizer's run, and nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    model = load_model(folder / "plain", {"trust_remote_code": True})
    model.config._name_or_path = str(folder / "own_tokenizer")
    assert type(infer_tokenizer(model)).__name__ == "OwnTokenizer"
    model = load_model(folder / "plain")
    model.config._name_or_path = str(folder / "own_tokenizer")
    with pytest.raises(ValueError, match=r"own_tokenizer needs code of its own.*trust_remote_code"):
        infer_tokenizer(model)
    for word in ("yes", "false", 2):
        with pytest.raises(ValueError, match="trust_remote_code must be true or false"):
            load_model(folder / "plain", {"trust_remote_code": word})


def test_a_config_that_asks_for_a_kernel_of_the_hub(tmp_path):
    """transformers fetches such a kernel if the package ``kernels`` is installed."""
    tiny_model("llama").save_pretrained(tmp_path)
    kernel = "kernels-community/evil"
    message = f"code from the hub, the kernel '{kernel}'"
    for field in ("_attn_implementation", "attn_implementation"):
        change_json(tmp_path / "config.json", **{field: kernel})
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    with pytest.raises(ImportError, match="kernels"):  # transformers gets the user's own choice
        load_model(tmp_path, {"attn_implementation": kernel})
    parts = {"model_type": "llava", "attn_implementation": {"text_config": kernel}}
    (tmp_path / "config.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match=message):
        check_base(tmp_path, AutoConfig.from_pretrained(tmp_path), {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{{ raise_exception.__globals__.os.system('touch MARKER') }}",
        "{% for i in range(10 ** 9) %}a{% endfor %}",
    ],
)
def test_a_chat_template_is_sandboxed(template, tmp_path):
    _, tokenizer = demo.load_model()
    tokenizer.chat_template = template.replace("MARKER", str(tmp_path / "marker"))
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(ValueError, match="row 0"):
        tokenize_dataset(rows, tokenizer)
    assert not (tmp_path / "marker").exists()


class _Payload:
    """A pickle that writes a file when it is read by an unguarded ``torch.load``."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    killed_runs.run(directory, max_steps=3)
    return directory


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin"]
)
def test_pickles_in_a_checkpoint_run_no_code(name, checkpoints, tmp_path):
    """The manifest vouches for each of them: who can write the folder can write it, too."""
    marker, checkpoint = tmp_path / "marker", tmp_path / "run" / "checkpoint-2"
    shutil.copytree(checkpoints / "checkpoint-2", checkpoint)
    torch.save(_Payload(marker), checkpoint / name)
    path = checkpoint / MANIFEST
    manifest = json.loads(path.read_text())
    facts = {"bytes": (checkpoint / name).stat().st_size, "sha256": file_digest(checkpoint / name)}
    path.write_text(json.dumps({**manifest, "files": {**manifest["files"], name: facts}}))
    if name in ("training_args.bin", "adapter_model.bin"):  # nobody reads them
        killed_runs.run(tmp_path / "new", max_steps=3, resume_from_checkpoint=str(checkpoint))
    else:
        with pytest.raises(Exception, match=r"(?i)weights_only|unsupported"):
            killed_runs.run(tmp_path / "new", max_steps=3, resume_from_checkpoint=str(checkpoint))
    assert not marker.exists()
    torch.load(checkpoint / name, weights_only=False)
    assert marker.exists()


def calls(tree, names):
    """The calls of methods and functions with these names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in names:
                yield node


def sources():
    for folder in ("loku", "loku_kernels", "scripts", "experiments", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_every_loader_says_whether_code_may_run():
    """transformers and datasets ask where ``trust_remote_code`` is None. peft has no such argument."""
    found = {}
    for path, tree in sources():
        for call in calls(tree, {"from_pretrained", "from_config", "load_dataset", "HFLM", "pipeline"}):
            given = {keyword.arg for keyword in call.keywords}
            of_peft = ast.unparse(call.func).startswith(("PeftModel.", "PeftConfig."))
            assert of_peft or "trust_remote_code" in given, f"{path}:{call.lineno}"
            # scripts/check_serving.py loads its own adapters as a server does that has peft alone.
            own = ("loku/adapter_folders.py", "scripts/check_serving.py")
            assert not of_peft or path in own, f"{path}:{call.lineno}"
            found.setdefault(path, []).append(call.lineno)
    assert len(found) >= 6


def test_nothing_else_runs_code_from_files():
    """No pickle is read and no text is executed. YAML goes through the safe loader."""
    readers = {"load", "loads", "eval", "exec", "full_load", "unsafe_load", "read_pickle"}
    for path, tree in sources():
        if not path.startswith("loku") or "/triton/" in path:  # a load of Triton is one from memory
            continue
        for call in calls(tree, readers):
            name = ast.unparse(call.func)
            allowed = name.endswith(".eval") or name in ("json.load", "json.loads")
            assert allowed, f"{path}:{call.lineno} {name}"
        imported = {
            name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
        }
        assert not imported & {"pickle", "marshal", "shelve", "dill", "joblib"}, path
