"""Trainer callbacks that measure a model while it unlearns, and stop it.

They take data sets as ``loku.unlearn`` does, and cut rows at the same length. ``history`` and the trainer's
log get one dict for each measurement. The rows are shared out among the processes of DDP and FSDP2. All
processes see the same figures and stop together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loku.config import UnlearnConfig
from loku.counts import check_counts
from loku.data import TOFU_TEMPLATE
from loku.data.rows import DataSet
from loku.evaluation.endings import Endings, content_scores
from loku.evaluation.extraction import spread_extraction_likelihood
from loku.evaluation.scores import (
    TokenScores,
    mean_answer_probability,
    spread_token_scores,
    token_measures,
)
from loku.trainer_evaluation import EvalSets, tokenized_eval_sets


class _Gauge(TrainerCallback):
    """The base of callbacks that measure a model at the start and then regularly.

    Subclasses define ``begin``, ``measure`` and ``should_stop``. ``rows`` are the tokenised data sets, in
    which each document of a packed row is a row of its own. ``history`` are the measurements.

    Args:
        sets: The data sets, ``{name: rows}``.
        every: The number of steps between measurements; None stands for the end of each epoch.
        batch_size: The number of rows in a batch.

    Raises:
        ValueError: ``every`` or ``batch_size`` is less than 1.
    """

    def __init__(self, sets: Mapping[str, DataSet], every: int | None, batch_size: int):
        if every is not None:  # each epoch's end
            check_counts(every=every)
        check_counts(batch_size=batch_size)
        self.sets, self.every, self.batch_size = sets, every, batch_size
        self.rows: EvalSets = {}
        self.tokenizer: Any = None
        self.template = TOFU_TEMPLATE
        self.history: list[dict[str, float]] = []

    def begin(self, model: Any, log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Measure the model before the first step, and return ``{name: number}``.

        Args:
            model: The model.
            log: The log of the run that is resumed; empty in a new run.
        """
        raise NotImplementedError

    def measure(self, model: Any) -> dict[str, float]:
        """Measure the model, and return ``{name: number}``."""
        raise NotImplementedError

    def should_stop(self, entry: dict[str, float]) -> bool:
        """Decide from the entry of a measurement, with its step and epoch, whether training stops."""
        raise NotImplementedError

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Tokenise the data sets and measure the model."""
        max_length = getattr(args, "max_length", None)  # relearning runs under transformers' own arguments
        self.tokenizer = processing_class
        self.template = args.template() if isinstance(args, UnlearnConfig) else TOFU_TEMPLATE
        self.rows = tokenized_eval_sets(model, self.sets, processing_class, max_length, self.template)
        self.history = []
        self._record(state, self.begin(model, state.log_history))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure the model if this step is due, and stop training if the measurement says so."""
        if self.every is not None and state.global_step % self.every == 0:
            self._measure(model, state, control)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure the model if epochs are measured, and stop training if the measurement says so."""
        if self.every is None:
            self._measure(model, state, control)

    def _measure(self, model: Any, state: TrainerState, control: TrainerControl) -> None:
        if self.should_stop(self._record(state, self.measure(model))):
            control.should_training_stop = True

    def _record(self, state: TrainerState, measured: dict[str, float]) -> dict[str, float]:
        entry: dict[str, float] = {"step": state.global_step, "epoch": state.epoch or 0.0, **measured}
        self.history.append(entry)
        state.log_history.append(dict(entry))
        return entry

    def scores(self, model: Any, name: str) -> list[TokenScores]:
        """Return the ``token_scores`` of a data set, from all processes."""
        return spread_token_scores(model, self.rows[name], self.batch_size, progress=False, description=name)


def _logged(log: Iterable[Mapping[str, Any]], *names: str) -> dict[str, float] | None:
    """Return the first logged values of some names, measured at the start of a run that is now resumed."""
    entry = next((entry for entry in log if entry.keys() >= set(names)), None)
    return None if entry is None else {name: entry[name] for name in names}


class ProbabilityGauge(_Gauge):
    """Measure the mean answer probability of data sets, logged as ``<name>_probability``, in [0, 1].

    Args:
        sets: The data sets, ``{name: rows}``.
        every: The number of steps between measurements; None (default) stands for the end of each epoch.
        stop_when: A function of the entry of a measurement, a dict with ``step``, ``epoch`` and the
            probabilities. Training stops when it returns True. None (default) never stops.
        batch_size: The number of rows in a batch, 16 by default.

    Raises:
        ValueError: ``every`` or ``batch_size`` is less than 1.
    """

    def __init__(
        self,
        sets: Mapping[str, DataSet],
        every: int | None = None,
        stop_when: Callable[[dict[str, float]], bool] | None = None,
        batch_size: int = 16,
    ):
        super().__init__(sets, every, batch_size)
        self.stop_when = stop_when

    def begin(self, model: Any, log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Measure the model."""
        return self.measure(model)

    def should_stop(self, entry: dict[str, float]) -> bool:
        """Ask ``stop_when``."""
        return self.stop_when is not None and self.stop_when(entry)

    def measure(self, model: Any) -> dict[str, float]:
        """Measure the mean answer probability of each data set."""
        return {
            f"{name}_probability": mean_answer_probability(self.scores(model, name)) for name in self.rows
        }


class ExtractionStopping(_Gauge):
    """The paper's stopping rule (section 4.1, after Jang et al., 2023).

    Training stops when the model knows the forget set no better than the original model knew a held-out set,
    by Extraction Likelihood (EL) and by Memorisation Accuracy (MA):

        EL_n(forget) <= EL_n(holdout)   and   MA(forget) <= MA(holdout)

    The right sides are the thresholds. They are measured once, before the first step. The paper measures at
    the end of each epoch, and allows at most 20 epochs: ``UnlearnConfig(num_train_epochs=20)``. The log has
    ``forget_extraction_likelihood_<n>`` and ``forget_memorization_accuracy``, and at the start the same two
    of ``holdout``.

    Args:
        forget: The forget set.
        holdout: Texts of the same kind that the model was not trained on.
        n: The length of the n-grams, in tokens, 10 by default; see ``loku.evaluation.extraction_likelihood``.
        stride: The distance between the prefixes that are continued, in tokens, 1 by default.
        every: The number of steps between measurements; None (default) stands for the end of each epoch.
        batch_size: The number of rows in a batch, 16 by default.
        thresholds: The thresholds of the original model, for a model that has unlearned another set already:
            the ``thresholds`` of the callback of that run. None (default) measures them.
        count_end: Whether the endings of answers count, an EOS and the special tokens of a chat template
            (``loku.evaluation.endings``), True by default.

    Raises:
        ValueError: As for ``ProbabilityGauge``; ``n`` or ``stride`` is less than 1; or, at the start of
            training, no row of a set has more than ``n`` answer tokens.
    """

    def __init__(
        self,
        forget: DataSet,
        holdout: DataSet,
        n: int = 10,
        stride: int = 1,
        every: int | None = None,
        batch_size: int = 16,
        thresholds: Mapping[str, float] | None = None,
        count_end: bool = True,
    ):
        super().__init__({"forget": forget, "holdout": holdout}, every, batch_size)
        check_counts(n=n, stride=stride)
        self.n, self.stride = n, stride
        self.known_thresholds, self.count_end = thresholds, count_end
        self.thresholds: dict[str, float] = {}

    def begin(self, model: Any, log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Find the thresholds and measure the forget set."""
        names = (f"holdout_extraction_likelihood_{self.n}", "holdout_memorization_accuracy")
        known = self.known_thresholds or _logged(log, *names)
        self.thresholds = dict(known or self._extraction(model, "holdout"))
        entry = {**self.thresholds, **self.measure(model)}
        if any(math.isnan(value) for value in entry.values()):
            raise ValueError(
                f"no row of the forget or of the holdout set has more than n={self.n} answer tokens, which "
                f"Extraction Likelihood needs; lower n or give longer texts"
            )
        return entry

    def measure(self, model: Any) -> dict[str, float]:
        """Measure EL and MA of the forget set."""
        return self._extraction(model, "forget")

    def should_stop(self, entry: dict[str, float]) -> bool:
        """Compare the forget set with the thresholds."""
        return all(
            entry[name.replace("holdout", "forget", 1)] <= value for name, value in self.thresholds.items()
        )

    def _extraction(self, model: Any, name: str) -> dict[str, float]:
        scores = self.scores(model, name)
        if not self.count_end:
            scores = content_scores(self.rows[name], scores, Endings(model, self.tokenizer, self.template))
        likelihood = spread_extraction_likelihood(
            model, self.rows[name], scores, self.n, self.stride, self.batch_size, progress=False
        )
        return {
            f"{name}_extraction_likelihood_{self.n}": likelihood,
            f"{name}_memorization_accuracy": token_measures(scores)["memorization_accuracy"],
        }


class UtilityFloorStopping(_Gauge):
    """Stop when the model's utility has fallen below a share of its initial utility.

    The weights stay as they are at that step, with a utility below the floor. The log has ``utility``, and at
    the start ``utility_floor``.

    Args:
        retain: The rows on which utility is measured.
        floor: The share of the initial utility that must be kept, in (0, 1], 0.95 by default.
        utility: A function of the ``token_scores`` of the rows; its values are positive, and higher is
            better. By default it is TOFU's mean answer probability. ``lambda scores: 1 /
            token_measures(scores)["perplexity"]`` is the likelihood of a token.
        every: The number of steps between measurements; None (default) stands for the end of each epoch.
        batch_size: The number of rows in a batch, 16 by default.

    Raises:
        ValueError: ``floor`` is not in (0, 1], or as for ``ProbabilityGauge``.
    """

    def __init__(
        self,
        retain: DataSet,
        floor: float = 0.95,
        utility: Callable[[list[TokenScores]], float] = mean_answer_probability,
        every: int | None = None,
        batch_size: int = 16,
    ):
        if not 0 < floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {floor}")
        super().__init__({"retain": retain}, every, batch_size)
        self.floor, self.utility = floor, utility
        self.utility_floor: float | None = None

    def begin(self, model: Any, log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Measure the utility and set the floor."""
        measured = self.measure(model)
        known = _logged(log, "utility_floor") or {"utility_floor": self.floor * measured["utility"]}
        self.utility_floor = known["utility_floor"]
        return {**known, **measured}

    def measure(self, model: Any) -> dict[str, float]:
        """Measure the utility."""
        return {"utility": self.utility(self.scores(model, "retain"))}

    def should_stop(self, entry: dict[str, float]) -> bool:
        """Compare the utility with the floor."""
        return self.utility_floor is not None and entry["utility"] < self.utility_floor
