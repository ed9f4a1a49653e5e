"""The interface of a benchmark: its data, its columns, and the measures of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from loku.benchmarks.sources import Source
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback


class Column(NamedTuple):
    """A column of a benchmark's table.

    Attributes:
        name: Its heading, as the benchmark has it.
        better: The better direction: "higher", "lower", or "near 0".
        meaning: What it is, in one sentence.
    """

    name: str
    better: str
    meaning: str


@dataclass(frozen=True)
class Sets:
    """The data of one split of a benchmark.

    Attributes:
        requests: The sets to forget. They are forgotten one after the other, each from the model that the one
            before has left. Most benchmarks have one.
        retain: The rows to keep.
        evaluation: The rows that are measured, by the names that the benchmark gives them.
    """

    requests: list[Any]
    retain: Any
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class Measuring:
    """How a model is measured.

    Attributes:
        batch_size: The number of rows in a batch, 16 by default.
        limit: The number of rows that are used of each set, its first ones; None (default) uses all.
        progress: Whether progress bars are shown, False by default.
        config: The settings of the run; None (default) stands for the defaults.
    """

    batch_size: int = 16
    limit: int | None = None
    progress: bool = False
    config: Any = None

    def first(self, rows: Sequence[Any]) -> list[Any]:
        """Return the rows of a set that are used."""
        return list(rows if self.limit is None else rows[: self.limit])


@dataclass(frozen=True)
class Measures:
    """The measures of a model.

    Attributes:
        values: The values of the columns that are available, by the names of the columns.
        not_available: The reasons for the others, by the names of the columns.
        reference: What the measures of another model are compared with, a JSON object; {} for nothing.
        leaderboard: The values of open-unlearning's leaderboard by its names; {} if it has none.
    """

    values: dict[str, float]
    not_available: dict[str, str] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    leaderboard: dict[str, float] = field(default_factory=dict)


class Benchmark(ABC):
    """A benchmark.

    Attributes:
        name: Its name in commands and files.
        title: Its name in tables, with its source.
        splits: The names of its splits, and the names of those that have parameters; for messages.
        default_split: The split that is run if none is named.
        columns: The columns of its table.
        defaults: The fields of ``loku.UnlearnConfig`` that it sets if the user does not.
        averages_splits: Whether its splits are samples, over which a table takes the mean if they are of one
            ``sample_kind``.
        leaderboard: The split and the name of each column of open-unlearning's leaderboard; () if it has no
            table of this benchmark.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    default_split: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    defaults: ClassVar[Mapping[str, Any]] = {}
    averages_splits: ClassVar[bool] = False
    leaderboard: ClassVar[tuple[tuple[str, str], ...]] = ()

    def check(self) -> None:  # noqa: B027  # most need no check
        """Check that the packages that the measures need are installed, before anything is read.

        Raises:
            ImportError: A package is missing. The message says how it is installed.
        """

    def sample_kind(self, split: str) -> str:
        """Return what a split is a sample of: "" of the usual kind (the default), else a name of the kind.

        Args:
            split: The name of the split.
        """
        return ""

    @abstractmethod
    def sets(self, source: Source, split: str) -> Sets:
        """Read and check the data of a split.

        Args:
            source: The place of the data.
            split: The name of the split.

        Raises:
            ValueError: There is no such split, a set is not there, or a row lacks a column.
        """

    def training_rows(self, rows: Any, tokenizer: PreTrainedTokenizerBase, config: Any) -> Any:
        """Return rows as ``loku.unlearn`` takes them.

        Args:
            rows: Rows to forget or to keep, of ``sets``.
            tokenizer: The tokenizer.
            config: The settings of the run, ``loku.UnlearnConfig``.
        """
        return rows

    def callbacks(
        self, request: Any, sets: Sets, tokenizer: PreTrainedTokenizerBase, measuring: Measuring
    ) -> list[TrainerCallback]:
        """Return the callbacks that training has, such as a stopping rule.

        Args:
            request: The rows to forget, of ``training_rows``.
            sets: The data.
            tokenizer: The tokenizer.
            measuring: How a model is measured.
        """
        return []

    @abstractmethod
    def measure(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sets: Sets,
        measuring: Measuring,
    ) -> Measures:
        """Measure a model by itself.

        Args:
            model: The causal LM, on the device where it runs.
            tokenizer: The tokenizer.
            sets: The data.
            measuring: How it is measured.
        """

    def compared(self, measures: Measures, reference: Mapping[str, Any] | None) -> Measures:
        """Return the measures of a model with those that compare it with a retain-only model.

        Args:
            measures: The measures of ``measure``.
            reference: The ``reference`` of the measures of a model that never saw what is forgotten; None if
                there is no such model.

        Raises:
            ValueError: The reference is none of this benchmark and these rows.
        """
        return measures

    def split_error(self, split: str) -> ValueError:
        """Return the error of a split that does not exist."""
        return ValueError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
