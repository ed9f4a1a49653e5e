"""Trainer callbacks that measure a model while it unlearns, and stop it.

They take data sets as ``loku.unlearn`` does, cut to the same length. What they measure is kept in
``history`` and in the trainer's log, one dict a measurement. Under DDP the rows are shared out among the
processes, which all see the same figures and stop together.
"""

import math

from transformers import TrainerCallback

from loku.data import split_documents, tokenize_dataset
from loku.distributed import is_sharded
from loku.evaluation.extraction import spread_extraction_likelihood
from loku.evaluation.scores import mean_answer_probability, spread_token_scores, token_measures


class _Gauge(TrainerCallback):
    """Measures at the start and every ``every`` steps, or at each epoch's end where that is None.

    Subclasses say what: ``begin(model, log)`` and ``measure(model)`` return ``{name: number}``, and
    ``should_stop(entry)`` is asked after each ``measure``. ``self.rows`` are the tokenised data sets, each
    document of a packed row by itself.
    """

    def __init__(self, sets, every, batch_size):
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, or None for each epoch's end, got {every}")
        self.sets, self.every, self.batch_size = sets, every, batch_size
        self.rows, self.history = {}, []

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        if any(map(is_sharded, model.parameters())):  # whose forwards all processes must run alike
            raise ValueError(f"{type(self).__name__} cannot measure a model that FSDP has sharded")
        max_length = getattr(args, "max_length", None)
        self.rows = {
            name: split_documents(tokenize_dataset(rows, processing_class, max_length=max_length, name=name))
            for name, rows in self.sets.items()
        }
        self.history = []
        self._record(state, self.begin(model, state.log_history))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every is not None and state.global_step % self.every == 0:
            self._measure(model, state, control)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if self.every is None:
            self._measure(model, state, control)

    def _measure(self, model, state, control):
        if self.should_stop(self._record(state, self.measure(model))):
            control.should_training_stop = True

    def _record(self, state, measured):
        entry = {"step": state.global_step, "epoch": state.epoch or 0.0, **measured}
        self.history.append(entry)
        state.log_history.append(dict(entry))
        return entry

    def scores(self, model, name):
        return spread_token_scores(model, self.rows[name], self.batch_size, progress=False)


def _logged(log, *names):
    """What a run that is now resumed measured at its very start, or None."""
    entry = next((entry for entry in log if entry.keys() >= set(names)), None)
    return entry and {name: entry[name] for name in names}


class ProbabilityGauge(_Gauge):
    """Measure the mean answer probability of data sets, logged as ``<name>_probability``.

    Args:
        sets: ``{name: rows}``.
        every: steps between measurements; None for each epoch's end.
        stop_when: called with what was measured, a dict; training stops where it returns True.
    """

    def __init__(self, sets, every=None, stop_when=None, batch_size=16):
        super().__init__(sets, every, batch_size)
        self.should_stop = stop_when or (lambda entry: False)

    def begin(self, model, log):
        return self.measure(model)

    def measure(self, model):
        return {
            f"{name}_probability": mean_answer_probability(self.scores(model, name)) for name in self.rows
        }


class ExtractionStopping(_Gauge):
    """The paper's stopping rule (section 4.1, after Jang et al., 2023): stop when the forget set is no better
    known than a held-out set was by the original model, by Extraction Likelihood and Memorisation Accuracy.

        EL_n(forget) <= EL_n(holdout) of the original model, and MA(forget) <= MA(holdout) of it

    The thresholds are measured once, before the first step. The paper asks at each epoch's end, and allows at
    most 20: ``UnlearnConfig(num_train_epochs=20)``. Logged are ``forget_extraction_likelihood_<n>`` and
    ``forget_memorization_accuracy``, and at the start the same of ``holdout``.

    Args:
        forget, holdout: the set that is unlearned, and texts of its kind that the model was not trained on.
        n, stride: see ``loku.evaluation.extraction_likelihood``.
        every: steps between measurements; None for each epoch's end.
        thresholds: those of the original model, if this one has unlearned another set already: the
            ``thresholds`` of the callback that was there then. By default they are measured.
    """

    def __init__(self, forget, holdout, n=10, stride=1, every=None, batch_size=16, thresholds=None):
        super().__init__({"forget": forget, "holdout": holdout}, every, batch_size)
        self.n, self.stride = n, stride
        self.known_thresholds, self.thresholds = thresholds, {}

    def begin(self, model, log):
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

    def measure(self, model):
        return self._extraction(model, "forget")

    def should_stop(self, entry):
        return all(
            entry[name.replace("holdout", "forget", 1)] <= value for name, value in self.thresholds.items()
        )

    def _extraction(self, model, name):
        scores = self.scores(model, name)
        likelihood = spread_extraction_likelihood(
            model, self.rows[name], scores, self.n, self.stride, self.batch_size, progress=False
        )
        return {
            f"{name}_extraction_likelihood_{self.n}": likelihood,
            f"{name}_memorization_accuracy": token_measures(scores)["memorization_accuracy"],
        }


class UtilityFloorStopping(_Gauge):
    """Stop when the model's utility has fallen below a share of what it was before the first step.

    The weights stay as they then are, below the floor. Logged are ``utility``, and at the start
    ``utility_floor``.

    Args:
        retain: the rows on which utility is measured.
        floor: the share of the initial utility that must be kept, in (0, 1].
        utility: a function of the rows' ``token_scores``, higher is better and positive; by default TOFU's
            mean answer probability. ``lambda scores: 1 / token_measures(scores)["perplexity"]`` is the
            likelihood of a token.
        every: steps between measurements; None for each epoch's end.
    """

    def __init__(self, retain, floor=0.95, utility=mean_answer_probability, every=None, batch_size=16):
        if not 0 < floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {floor}")
        super().__init__({"retain": retain}, every, batch_size)
        self.floor, self.utility = floor, utility
        self.utility_floor = None

    def begin(self, model, log):
        measured = self.measure(model)
        known = _logged(log, "utility_floor") or {"utility_floor": self.floor * measured["utility"]}
        self.utility_floor = known["utility_floor"]
        return {**known, **measured}

    def measure(self, model):
        return {"utility": self.utility(self.scores(model, "retain"))}

    def should_stop(self, entry):
        return entry["utility"] < self.utility_floor
