"""A deletion request: the file that says what is asked, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1  # of the schema of a request
ATTACKS = ("extract", "mia", "relearn", "quantise")
TARGETS = ("peft", "vllm", "gguf", "merged")
HOLDOUT = "holdout"  # the limit of a measure: that of the hold-out set under the original model


@dataclass(frozen=True)
class RowSelection:
    """Rows of a data set: all, or those that a query finds.

    Attributes:
        data: A file, a folder or a hub name, as for ``loku.data.read_rows``. A path is absolute.
        ids: The values of ``id_column`` of the rows; empty for no such condition.
        id_column: The column of the ids.
        contains: A string that a column of the row must contain, in any case; None for no such condition.
        matches: A regular expression that must be found in a column of the row; None for no such condition.
        columns: The columns that are searched; empty for all columns of text.
    """

    data: str
    ids: tuple[str | int, ...] = ()
    id_column: str = "id"
    contains: str | None = None
    matches: str | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class RetainSource:
    """Where the rows to keep come from. The parts add up.

    Attributes:
        given: The user's own retain rows; None for none.
        corpus: Rows of which the neighbours of the forget rows are taken; None for none.
        neighbours: The number of rows that are taken from the corpus, at most.
        sampled: The number of texts that the model itself writes, with the entities of the forget rows
            masked. They stand for its general ability.
    """

    given: RowSelection | None = None
    corpus: RowSelection | None = None
    neighbours: int = 200
    sampled: int = 32


@dataclass(frozen=True)
class Request:
    """A validated request; ``read_request`` makes it of a file.

    Attributes:
        path: The file of the request.
        model: A path or hub name. A path is absolute.
        forget: The rows to forget.
        retain: Where the rows to keep come from.
        holdout: Texts of the same kind that the model was never trained on; None for none.
        revision: The revision of a model on the hub; None for the newest.
        tokenizer: A path or hub name; None for the model's own.
        model_arguments: Arguments of ``from_pretrained``.
        trained_adapter: The folder of an adapter of the user's, if the rows trained it alone; else None.
        control: The path or hub name of a model that was retrained without the rows; None for none.
        limits: The greatest value of each measure of the forget rows, ``HOLDOUT`` or a number.
        utility_floor: The share of the utility of the original model that must be kept, in (0, 1].
        minutes: The greatest wall-clock time of training, in minutes; None for no limit.
        near_duplicate_similarity: The Jaccard similarity from which two rows are near duplicates, in (0, 1].
        include_near_duplicates: Whether the near duplicates are forgotten, too.
        training: Fields of ``loku.UnlearnConfig``.
        attacks: The attacks on the result, of ``ATTACKS``.
        target: What serves the result, of ``TARGETS``.
        rank: The rank of the served adapter; None for the exact one.
        ledger: The folder of the ledger, absolute; None for none.
        reference: The reference number of the request; "" for none.
        requester: Who asks; "" if it is not said.
    """

    path: Path
    model: str
    forget: RowSelection
    retain: RetainSource = field(default_factory=RetainSource)
    holdout: RowSelection | None = None
    revision: str | None = None
    tokenizer: str | None = None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    trained_adapter: str | None = None
    control: str | None = None
    limits: Mapping[str, float | str] = field(default_factory=dict)
    utility_floor: float = 0.9
    minutes: float | None = None
    near_duplicate_similarity: float = 0.7
    include_near_duplicates: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[str, ...] = ATTACKS
    target: str = "peft"
    rank: int | None = None
    ledger: str | None = None
    reference: str = ""
    requester: str = ""
