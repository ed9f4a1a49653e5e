"""Durability of unlearning: answer probabilities after weight rounding and during relearning.

    python experiments/robustness.py [--model PATH --adapter PATH --forget FILE --retain FILE] [--json FILE]

By default the embedded model is unlearned first, as in ``loku demo``. ``rounded`` is the mean answer
probability of both sets, for the original and the unlearned model, after the weights of the linear layers
were rounded to integers. ``relearning`` fine-tunes the unlearned model on every other row of the forget set,
and measures the rows between them. Beside it is the same fine-tuning on as many retain rows. ``--control
PATH`` adds the same fine-tuning of a model that never saw the forget rows. Knowledge that returns faster than
the control learns it was still there.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grid import RESULTS
from shared import result_files
from unlearned_models import parsed, unlearned_model_parser

from loku.adapter_folders import put_adapter, read_adapter_config
from loku.data import tokenize_dataset
from loku.data.files import read_rows
from loku.demo import EMBEDDED, load_model, load_rows, unlearn_rows
from loku.evaluation import mean_answer_probability, token_scores
from loku.robustness import relearning_curve, round_weights_

Line = dict[str, Any]  # a row of the result file

ROUNDINGS: dict[str, dict[str, int] | None] = {
    "not rounded": None,
    "8 bits, by channel": {"bits": 8},
    "4 bits, groups of 64": {"bits": 4, "group_size": 64},
    "4 bits, by channel": {"bits": 4},
}
RETAIN_STRIDE = 8  # every eighth retain row is measured
DEFAULT = RESULTS / "robustness_cpu.json"


def rounded(case: str, model: Any, sets: Mapping[str, list[Any]]) -> list[Line]:
    """Return the mean answer probability of each set after each rounding of a model."""
    rows = []
    for name, options in ROUNDINGS.items():
        copied = copy.deepcopy(model)
        if options is not None:
            round_weights_(copied, **options)
        probabilities = {
            f"{key}_probability": mean_answer_probability(token_scores(copied, tokens))
            for key, tokens in sets.items()
        }
        rows.append({"what": f"rounded: {case}", "name": name, **probabilities})
    return rows


def relearned(
    case: str,
    model: Any,
    tokenizer: Any,
    taught: list[Any],
    measured: Mapping[str, list[Any]],
    options: argparse.Namespace,
) -> list[Line]:
    """Return the measures during fine-tuning of a model.

    Args:
        case: The name of the run.
        model: The model, which stays as it is.
        tokenizer: Its tokenizer.
        taught: The rows to fine-tune on.
        measured: name -> the rows to measure.
        options: The parsed options.
    """
    curve = relearning_curve(
        copy.deepcopy(model),
        tokenizer,
        taught,
        measured,
        steps=options.steps,
        every=options.every,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    return [
        {
            "what": f"relearning: {case}",
            "name": f"step {entry['step']}",
            **{key: value for key, value in entry.items() if key not in ("step", "epoch")},
        }
        for entry in curve
    ]


def models_and_rows(options: argparse.Namespace) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    """Return original model, unlearned model, tokenizer, forget rows and retain rows."""
    original, tokenizer = load_model(options.model or EMBEDDED)
    unlearned = copy.deepcopy(original)
    if options.model is None:
        forget, retain = load_rows()
        with tempfile.TemporaryDirectory() as directory:
            result, _ = unlearn_rows(unlearned, tokenizer, forget, retain, directory, options.seed)
        return original, result.model.merge_and_unload(), tokenizer, forget, retain
    config = read_adapter_config(options.adapter)
    unlearned = put_adapter(unlearned, options.adapter, options.model, config).merge_and_unload()
    return original, unlearned, tokenizer, read_rows(options.forget), read_rows(options.retain)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = unlearned_model_parser(__doc__, "experiments/results/robustness_cpu.json")
    parser.add_argument("--control", metavar="PATH", help="a model that never saw the forget set")
    parser.add_argument("--steps", type=int, default=20, help="steps of fine-tuning")
    parser.add_argument("--every", type=int, default=2, help="steps between measurements")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the fine-tuning")
    options = parsed(parser, argv)

    original, unlearned, tokenizer, forget, retain = models_and_rows(options)
    sets = {"forget": forget, "retain": retain[::RETAIN_STRIDE]}
    tokens = {name: tokenize_dataset(rows, tokenizer, name=name) for name, rows in sets.items()}
    taught, rest = forget[::2], forget[1::2]
    measured = {"forget_rest": rest, "retain": retain[::RETAIN_STRIDE]}
    others = [row for i, row in enumerate(retain) if i % RETAIN_STRIDE != 0][: len(taught)]
    runs = [("half of the forget set", unlearned, taught), ("as many retain rows", unlearned, others)]
    if options.control is not None:
        control, _ = load_model(options.control)
        runs.append(("half of the forget set, by the control", control, taught))

    def tables() -> Iterator[list[Line]]:
        yield rounded("original", original, tokens)
        yield rounded("unlearned", unlearned, tokens)
        for name, model, rows in runs:
            yield relearned(name, model, tokenizer, rows, measured, options)

    file = result_files.ResultFile(options.json or DEFAULT)
    for table in tables():
        file.add(table)
    print("\nwritten:", file.path)


if __name__ == "__main__":
    main()
