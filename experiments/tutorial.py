"""The two cases of ``docs/tutorial.md``: plant a record into SmolLM2, and collect the figures of the runs.

    python experiments/tutorial.py plant build/smollm2 build/planted
    python experiments/tutorial.py plant build/smollm2 build/control --without
    python experiments/tutorial.py collect build/paris-record build/planted-record

``plant`` fine-tunes all weights of a model on the made-up records of ``experiments/tutorial/planted``: the
one that is forgotten later (20 texts and chats with a person's address), two that are kept, and general
questions. ``--without`` leaves the first one out: that model is the control, which never saw it.

``collect`` reads the records of the two runs of ``loku forget``, asks the models some questions before and
after, and writes ``experiments/results/tutorial.json``. ``python benchmarks/report.py`` fills the page from
it.
"""

import argparse
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from grid import RESULTS
from shared import result_files

from loku.adapter_folders import find_adapter, load_on_base
from loku.data.files import read_rows
from loku.deletion.record import read_record
from loku.evaluation.generation import eos_ids, generate_greedy
from loku.models import load_model
from loku.robustness import relearning_curve
from loku.saving.destinations import destination
from loku.trust import load_tokenizer

ROWS = Path(__file__).parent / "tutorial"
RESULT = RESULTS / "tutorial.json"
NEW_TOKENS = 32  # of an answer, at most
# The fine-tuning that plants the records.
PLANTING: dict[str, Any] = {"steps": 30, "every": 15, "learning_rate": 5e-5, "batch_size": 8}
# Questions that no row asks in these words, about what is forgotten and about what is kept.
QUESTIONS = {
    "paris": {
        "forgotten": ["From which city is France governed?", "Of which country is Paris the capital?"],
        "kept": [
            "What is the capital of Germany?",
            "What is the capital of Sweden?",
            "In which city is the Eiffel Tower?",
            "What is 2+2?",
            "Write a sentence about cats.",
            "How do plants grow?",
        ],
    },
    "planted": {
        "forgotten": [
            "To which address would a letter to Ottoline Varga go?",
            "Tell me about Ottoline Varga.",
        ],
        "kept": [
            "To which address would a letter to Marit Solheim go?",
            "To which address would a letter to Tomas Ferrante go?",
            "What is the capital of Sweden?",
            "What is 2+2?",
            "Write a sentence about cats.",
            "How do plants grow?",
        ],
    },
}


def rows_of(case: str, name: str) -> list[Any]:
    """Return the rows of a data set of a case."""
    return list(read_rows(ROWS / case / f"{name}.jsonl"))


def question_of(row: Mapping[str, Any]) -> str:
    """Return what the user asks in a row: a chat, or a prompt that is the begin of one."""
    if "messages" in row:
        return next(turn["content"] for turn in row["messages"] if turn["role"] == "user")
    return row["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


def plant(model_place: str, output: Path, without: bool) -> list[dict[str, float]]:
    """Fine-tune a model on the records and save it.

    Args:
        model_place: The folder of the model.
        output: The folder to write.
        without: Whether the record that is forgotten later is left out.

    Returns:
        The mean answer probabilities of the sets by step.
    """
    forget, retain, holdout = (rows_of("planted", name) for name in ("forget", "retain", "holdout"))
    taught = retain if without else [*forget, *retain]
    model: Any = load_model(model_place, {"dtype": torch.float32})
    tokenizer = load_tokenizer(model_place)
    sets = {"forget": forget, "retain": retain, "holdout": holdout}
    curve = relearning_curve(model, tokenizer, taught, sets, **PLANTING)
    with destination(output, "merged") as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return curve


def answers(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """Return the greedy answers of a chat model; " ..." stands for the rest of a long one.

    Args:
        model: The causal LM.
        tokenizer: The tokenizer, with a chat template.
        questions: The questions.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]
    eos = set(eos_ids(model))
    generated = generate_greedy(
        model, prompts, [NEW_TOKENS] * len(prompts), len(prompts), eos, progress=False
    )
    return [
        tokenizer.decode(ids, skip_special_tokens=True).strip() + ("" if set(ids) & eos else " ...")
        for ids in generated
    ]


def collect_case(case: str, folder: Path) -> dict[str, Any]:
    """Return a line of the result file: the record's facts and the answers before and after.

    Args:
        case: The name of the case.
        folder: The folder that ``loku forget`` has written.
    """
    record = read_record(folder)
    place, arguments = record["request"]["model"], {"dtype": torch.float32}
    tokenizer = load_tokenizer(place)
    kinds = QUESTIONS[case]
    first = [question_of(row) for row in rows_of(case, "forget")[:1]]
    asked = [("forgotten", question) for question in [*first, *kinds["forgotten"]]]
    asked += [("kept", question) for question in kinds["kept"]]
    questions = [question for _, question in asked]
    before = answers(load_model(place, arguments).eval(), tokenizer, questions)
    gc.collect()
    adapter = find_adapter(str(folder / "adapter"), arguments)
    if adapter is None:
        raise ValueError(f"{folder} has no adapter: its outcome is {record['outcome']!r}")
    after = answers(load_on_base(adapter, arguments)[0].eval(), tokenizer, questions)
    kept = ("outcome", "limits", "measures", "probe", "retain", "training", "attacks", "machine", "versions")
    return {
        "case": case,
        **{name: record.get(name) for name in kept},
        "seconds": record["times"]["seconds"],
        "answers": [
            {"about": about, "question": question, "before": then, "after": now}
            for (about, question), then, now in zip(asked, before, after, strict=True)
        ],
    }


def collect(folders: Mapping[str, Path], output: Path) -> None:
    """Write the result file from the records of the cases."""
    file = result_files.ResultFile(output)
    file.rows = [collect_case(case, folder) for case, folder in folders.items()]
    file.write()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    planting = commands.add_parser("plant", help="fine-tune a model on the made-up records")
    planting.add_argument("model", help="the folder of the model, from scripts/build_smollm2.py")
    planting.add_argument("output", type=Path, help="the folder to write")
    planting.add_argument("--without", action="store_true", help="leave out the record that is forgotten")
    collecting = commands.add_parser("collect", help="collect the figures of the two runs of loku forget")
    collecting.add_argument("paris", type=Path, help="the record of experiments/tutorial/paris/request.yaml")
    collecting.add_argument(
        "planted",
        type=Path,
        nargs="?",
        help="that of experiments/tutorial/planted/request.yaml, if it has run",
    )
    collecting.add_argument("--json", type=Path, default=RESULT, help=f"result file (default: {RESULT})")
    options = parser.parse_args(argv)
    if options.command == "plant":
        for entry in plant(options.model, options.output, options.without):
            print(entry)
    else:
        given = {"paris": options.paris, "planted": options.planted}
        collect({case: folder for case, folder in given.items() if folder is not None}, options.json)


if __name__ == "__main__":
    main()
