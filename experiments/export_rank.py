"""What an adapter loses when it is saved at a smaller rank, by rank from 2 to its exact one.

    python experiments/export_rank.py [--model PATH --adapter PATH --forget FILE --retain FILE] [--json FILE]

By default the embedded model is unlearned first, as in ``loku demo``: FILA of rank 8, so the exact adapter
has rank 16. A line has the relative error of the adapter (Frobenius norm, all modules and the worst one), and
by data set the largest change of a logit and the mean answer probability, beside that of the exact adapter
and of the original model. The picture is beside the result file.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grid import RESULTS
from shared import result_files
from unlearned_models import parsed, unlearned_model_parser

from loku.adapter_folders import put_adapter, read_adapter
from loku.data import tokenize_dataset
from loku.data.files import read_rows
from loku.demo import EMBEDDED, load_model, load_rows, unlearn_rows
from loku.evaluation import mean_answer_probability, token_scores
from loku.evaluation.answer_changes import answer_changes
from loku.evaluation.report import plot_rank_errors
from loku.saving.compression import adapter_modules, compressed_adapter

RETAIN_STRIDE = 8  # every eighth retain row is measured
DEFAULT = RESULTS / "export_rank.json"
BATCH_SIZE = 32


def lines_by_rank(
    model_place: str | Path, adapter: str, sets: dict[str, list[Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of the result file and those of the picture.

    Args:
        model_place: The folder of the base.
        adapter: The folder of the exact adapter.
        sets: The rows to measure by data set.
    """
    base, tokenizer = load_model(model_place)
    before = {
        f"{name}_probability_of_the_original": mean_answer_probability(
            token_scores(base, tokenize_dataset(rows, tokenizer, name=name), BATCH_SIZE, progress=False)
        )
        for name, rows in sets.items()
    }
    config, state = read_adapter(adapter)
    model = put_adapter(base, adapter, str(model_place), config)
    exact = max(module.A.shape[1] for module in adapter_modules(config, state, {}).values())
    lines, points = [], []
    for rank in [*range(2, exact, 2), exact]:
        new_config, new_state, lost = compressed_adapter(config, state, rank)
        found = answer_changes(
            model, new_config, new_state, tokenizer, sets, batch_size=BATCH_SIZE, progress=False
        )
        figures = {
            f"{name}_{key}": value for name, measured in found.items() for key, value in measured.items()
        }
        errors = {"relative_error": lost.relative_error, "worst_relative_error": lost.worst[1]}
        what = f"an adapter of rank {exact} at a smaller rank"
        lines.append({"what": what, "name": f"rank {rank}", **errors, **figures, **before})
        points.append({"rank": rank, **errors, "sets": found})
    return lines, points


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = unlearned_model_parser(__doc__, "experiments/results/export_rank.json")
    options = parsed(parser, argv)
    with tempfile.TemporaryDirectory() as directory:
        adapter = options.adapter
        if options.model is None:
            forget, retain = load_rows()
            result, _ = unlearn_rows(*load_model(), forget, retain, f"{directory}/run", options.seed)
            adapter = f"{directory}/adapter"
            result.save(adapter)
        else:
            forget, retain = read_rows(options.forget), read_rows(options.retain)
        sets = {"forget": list(forget), "retain": list(retain)[::RETAIN_STRIDE]}
        lines, points = lines_by_rank(options.model or EMBEDDED, adapter, sets)
    file = result_files.ResultFile(options.json or DEFAULT)
    file.add(lines)
    picture = file.path.with_suffix(".png")
    plot_rank_errors(picture, points)
    print("\nwritten:", file.path, picture)


if __name__ == "__main__":
    main()
