"""Small data of each benchmark, in the files and columns of the real one, and a tiny model for it."""

import csv
import json
from pathlib import Path

import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from loku import demo

PEOPLE = ("Ann Lee", "Bo Kim")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def write_model(folder: Path, seed: int = 0, chat: bool = False, context: int = 1024) -> Path:
    """Write a tiny random Llama with the embedded tokenizer, and return its folder."""
    _, tokenizer = demo.load_model()
    torch.manual_seed(seed)
    config = tiny_config("llama", vocab=len(tokenizer))
    config.max_position_embeddings = context
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(file: Path, rows: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_tofu(folder: Path, forget: int = 3, retain: int = 4) -> Path:
    """Write TOFU's sets as the hub has them: a file of JSON lines for each config."""

    def row(name):
        answers = {"paraphrased_answer": f"It is {name}.", "perturbed_answer": ["Bo.", "It is Cy."]}
        return {"question": f"Who is {name}?", "answer": f"{name} Lee.", **answers}

    known = [row(name) for name in ("Ann", "Eve", "Sue", "Ida")[:forget]]
    kept = [row(name) for name in ("Tom", "Jim", "Max", "Ben")[:retain]]

    def plain(rows):
        return [{"question": row["question"], "answer": row["answer"]} for row in rows]

    def choices(rows):
        return [{k: row[k] for k in ("question", "answer", "perturbed_answer")} for row in rows]

    sets = {
        "full": plain(kept + known),
        "forget01": plain(known),
        "retain99": plain(kept),
        "forget10": plain(known),
        "retain90": plain(kept),
        "forget01_perturbed": known,
        "forget10_perturbed": known,
        "retain_perturbed": kept,
        "real_authors_perturbed": choices([row("Rome"), row("Bern")]),
        "world_facts_perturbed": choices([row("iron"), row("gold")]),
    }
    for name, rows in sets.items():
        write_lines(folder / f"{name}.json", rows)
    return folder


def write_muse(folder: Path) -> Path:
    """Write MUSE-News as its repository has it: a folder for each config, a JSON list for each split."""
    texts = [
        f"The {place} opened in {year}. It is {year - 1900} years young and big." for place, year in PLACES
    ]
    questions = [{"question": f"When did the {p} open?", "answer": f"{y}"} for p, y in PLACES]
    sets = {
        "raw": {"forget": texts[:3], "retain1": texts[3:]},
        "scal": {f"forget_{i}": texts[:i] for i in range(1, 5)},
        "sust": {f"forget_{i}": texts[i - 1 : i] for i in range(1, 5)},
        "verbmem": {"forget": [{"prompt": text[:20], "gt": text[20:]} for text in texts[:3]]},
        "knowmem": {
            "forget_qa": questions[:2],
            "forget_qa_icl": questions[2:3],
            "retain_qa": questions[3:5],
            "retain_qa_icl": questions[5:6],
        },
        "privleak": {"forget": texts[:3], "holdout": texts[3:]},
    }
    for config, splits in sets.items():
        for split, rows in splits.items():
            file = folder / "MUSE-News" / config / f"{split}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows), encoding="utf-8")
    return folder


PLACES = [("zoo", 1991), ("museum", 1972), ("bridge", 1964), ("tower", 1953), ("park", 1980), ("pool", 1999)]


def write_wmdp(folder: Path) -> Path:
    """Write WMDP's corpora and questions: a download of each repository."""
    texts = [{"text": f"{name} {'is a long text about the network and its parts. ' * 2}"} for name in "abcd"]
    for name in ("cyber-forget-corpus", "cyber-retain-corpus", "bio-retain-corpus"):
        write_lines(folder / "wmdp-corpora" / f"{name}.jsonl", texts)
    write_lines(
        folder / "wmdp-bio-forget-corpus" / "data" / "train.jsonl", [{**t, "title": "x"} for t in texts]
    )
    question = {"question": "What is it?", "choices": ["a", "b", "c", "d"], "answer": 1}
    for name in ("wmdp-bio", "wmdp-cyber"):
        write_lines(folder / "wmdp" / name / "test.jsonl", [question] * 3)
    return folder


def write_rwku(folder: Path) -> Path:
    """Write RWKU as the hub has it: files in ``All``, which the head of README.md gives their names."""

    def of_people(**columns):
        return [{"subject": name, **columns} for name in PEOPLE]

    mmlu = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "task": "high_school"}
    probe = {"query": "She was born in ___.", "answer": "Ulm"}
    files = {
        ("train_positive_llama3", "train"): ("positive", of_people(text="She was born in Ulm, a town.")),
        ("forget_level1", "test"): ("forget_level1", of_people(**probe, level="1", type="cloze")),
        ("forget_level2", "test"): ("forget_level2", of_people(**probe, level="2", type="simple question")),
        ("forget_level3", "test"): (
            "forget_level3",
            of_people(**probe, level="3", type="affirmative suffix")
            + of_people(**probe, level="3", type="incontext learning")
            + of_people(**probe, level="3", type="prefix injection"),
        ),
        ("neighbor_level1", "test"): ("neighbor_level1", of_people(**probe, neighbor="Cy", level="1")),
        ("neighbor_level2", "test"): ("neighbor_level2", of_people(**probe, neighbor="Cy", level="2")),
        ("mia_forget", "test"): ("forget_mia", of_people(text="She is from Ulm.")),
        ("mia_retain", "test"): ("retain_mia", of_people(text="He is from Rome.")),
        ("utility_general", "test"): ("retain_mmlu", of_people(**mmlu, examples=[mmlu] * 5)),
        ("utility_reason", "test"): (
            "retain_bbh",
            of_people(question="1 + 2?", answer="3", cot="Q: 1 + 1?\nA: the answer is 2.", task="sum"),
        ),
        ("utility_fluency", "test"): ("fluency", of_people(instruction="Write a line.")),
    }
    lines = ["---", "pretty_name: RWKU", "configs:"]
    for (config, split), (name, rows) in files.items():
        file = folder / "RWKU" / "All" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", "    path:"]
        lines += [f"    - All/{name}.json"]
    (folder / "RWKU" / "README.md").write_text("\n".join([*lines, "---", "# RWKU"]), encoding="utf-8")
    return folder


def write_tdec(folder: Path) -> Path:
    """Write the files of a checkout of knowledge-unlearning."""
    text = " ".join(f"word{i} is the {i}th of these words" for i in range(3))

    def write(file, header, rows):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([header, *rows])

    for number in range(2):
        rows = [[i, "pile-cc", f"\n{number}{i} {text}"] for i in range(2)]
        name = f"lm_extraction_2_{number}.csv"
        write(folder / "data" / "main" / name, ["doc_id", "corpus", "text"], rows)
    validation = folder / "validation_data"
    write(
        validation / "pile.csv",
        ["doc_id", "text", "corpus"],
        [[i, f"Pile {i} {text}", "x"] for i in range(2)],
    )
    write(validation / "wikitext.csv", ["", "text"], [[i, f"Wiki {i} {text}"] for i in range(3)])
    turns = {"0": ["hello there .", "i am well", "good"], "1": ["how are you ?", "i'm fine ."]}
    for name in ("blended_skill_talk", "empathetic_dialogues", "wizard_of_internet", "wizard_of_wikipedia"):
        (validation / f"{name}.json").write_text(json.dumps({"text": turns}), encoding="utf-8")
    return folder
