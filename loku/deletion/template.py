"""An example of a deletion request, which runs on the embedded model as it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loku.demo import EMBEDDED, load_rows

FORGET_ROWS = 8  # the first questions about the last author
ROWS_PER_AUTHOR = 20
RETAIN_STRIDE = 6  # every sixth question about the others

REQUEST = """\
# A deletion request. `loku forget request.yaml` does what it asks, and leaves a record.
# A line that begins with # and the name of a field shows the default. A relative path begins at this file.

version: 1  # of the fields of this file
#reference: ""  # the number of the request, for its record
#requester: ""  # who asks, for its record

# The model: a folder or a hub name, or a mapping:
#   model: {{name: owner/name, revision: main, tokenizer: owner/name, arguments: {{dtype: bfloat16}}}}
model: {model}
#trained_adapter: null  # the folder of an adapter, if these rows trained it alone: its deletion is enough

# The rows to forget: a file (.jsonl, .json, .csv, .tsv, .txt, .parquet), a folder or a hub name, or a query:
#   forget: {{data: all.jsonl, ids: [7, 12], id_column: id}}
#   forget: {{data: all.jsonl, contains: Nikolai Abilov, columns: [question, answer]}}
#   forget: {{data: all.jsonl, matches: 'Nikolai|Abilov'}}
forget: forget.jsonl
#near_duplicates: {{similarity: 0.7, include: false}}  # include: forget near duplicates, too

# The rows to keep: data as above, neighbours of the forget rows from a corpus, texts of the model itself:
#   retain: {{data: retain.jsonl, corpus: corpus.jsonl, neighbours: 200, sampled: 32}}
retain: retain.jsonl

# Texts of the same kind that the model was never trained on. They show a model that knows nothing.
holdout: holdout.jsonl
#control: null  # a model that was trained again without the rows; the record compares with it

#limits: {{memorization_accuracy: holdout, extraction_likelihood_10: holdout}}  # or numbers
#utility_floor: 0.9  # the share of the model's utility that must stay
#minutes: null  # the longest time of training
#training: {{}}  # fields of loku.UnlearnConfig, such as {{learning_rate: 1e-3, lora_rank: 8}}

#attacks: [extract, mia, relearn, quantise]  # on the result; [] for none
#serving: peft  # or vllm, gguf, merged; {{target: vllm, rank: 16}} compresses the adapter
#ledger: null  # a folder of records: this request then goes on from the state that the last one left
"""


def write_template(directory: str | os.PathLike) -> list[Path]:
    """Write an example of a request with its data: eight rows about one author, of those the model knows.

    The hold-out rows are about two authors that the embedded model has never seen.

    Args:
        directory: The folder to write to, which is made if need be.

    Returns:
        The paths of ``request.yaml``, ``forget.jsonl``, ``retain.jsonl`` and ``holdout.jsonl``.

    Raises:
        ValueError: One of the files is there already. Nothing is written then.
        OSError: The folder cannot be written to.
    """
    directory = Path(directory)
    forget, retain = load_rows()
    with open(EMBEDDED / "holdout.jsonl", encoding="utf-8") as file:
        holdout = [json.loads(line) for line in file]
    texts = {
        "request.yaml": REQUEST.format(model=json.dumps(str(EMBEDDED), ensure_ascii=False)),
        "forget.jsonl": _lines(forget[-ROWS_PER_AUTHOR:][:FORGET_ROWS]),
        "retain.jsonl": _lines(retain[::RETAIN_STRIDE]),
        "holdout.jsonl": _lines(holdout),
    }
    if there := [name for name in texts if os.path.lexists(directory / name)]:
        raise ValueError(f"{directory} has {', '.join(there)} already; name another folder")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with open(directory / name, "x", encoding="utf-8") as file:
            file.write(text)
    return [directory / name for name in texts]


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the questions and answers of rows, a JSON object on each line."""
    columns = ("question", "answer")
    return "".join(
        json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n" for row in rows
    )
