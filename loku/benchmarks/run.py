"""A run of a benchmark: a model is measured, unlearned by each of some settings, and measured again."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from loku.attacks.copies import check_one_process
from loku.benchmarks.protocol import Benchmark, Measures, Measuring, Sets
from loku.benchmarks.results import Entry, Results
from loku.benchmarks.sources import Source
from loku.config import UnlearnConfig
from loku.data import infer_tokenizer, load_refusals
from loku.deletion.facts import machine_facts, rows_digest, versions
from loku.evaluation.generation import eos_ids
from loku.fingerprints import base_fingerprint
from loku.learning_rates import default_learning_rate
from loku.models import load_model
from loku.objectives import OBJECTIVES
from loku.unlearning import unlearn

MEASURED_SETTINGS = (  # all runs have one value
    "max_length",
    "question_template",
    "answer_template",
    "model_init_kwargs",
    "use_cpu",
)
OWN_SETTINGS = ("output_dir", "resume_from_checkpoint")  # the benchmark sets them


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        benchmark: The benchmark.
        model: The path or hub name of the model that has learnt what is forgotten.
        runs: The settings of each run, fields of ``loku.UnlearnConfig`` that differ from its defaults and
            from the benchmark's. Without runs the models are measured alone.
        splits: The splits, by default the benchmark's own default.
        tokenizer: The tokenizer; None (default) for the one beside the model.
        retain_model: A model that never saw what is forgotten, or one for each split, ``{split: model}``;
            None (default) for none. It is measured, too, and the others are compared with it.
        reference: The reference of such a model that was measured before; None (default) for none.
        measuring: How a model is measured. Without ``runs`` its ``config`` has the settings that belong to
            the measures (``MEASURED_SETTINGS``).
    """

    benchmark: Benchmark
    model: str | os.PathLike
    runs: Sequence[Mapping[str, Any]]
    splits: Sequence[str] = ()
    tokenizer: Any = None
    retain_model: str | os.PathLike | Mapping[str, str] | None = None
    reference: Mapping[str, Any] | None = None
    measuring: Measuring = field(default_factory=Measuring)


def combinations(
    settings: Mapping[str, Any | Sequence[Any]], lists: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return all combinations of the values of some settings, the last one varying fastest.

    Args:
        settings: The settings, ``{name: value or list of values}``.
        lists: The names of settings whose list is one value.
    """
    found: list[dict[str, Any]] = [{}]
    for name, value in settings.items():
        values = value if isinstance(value, (list, tuple)) and name not in lists else [value]
        found = [{**settings, name: one} for settings in found for one in values]
    return found


def run_benchmark(
    plan: Plan,
    out: str | os.PathLike,
    source: Source | None = None,
    report: Callable[[str], None] = print,
) -> Results:
    """Run a benchmark, and write its results.

    The model is measured before unlearning. Each run then begins from the model anew, and is measured after
    it. A measure is written when it is finished, and what is finished is not run again: by the same model,
    data, settings and way of measuring, whatever else the file holds. A run that fails is reported, and the
    others go on.

    Args:
        plan: What is run.
        out: The folder of the results, which is made: ``results.json`` and ``table.md``.
        source: The place of the data; None (default) stands for the hub.
        report: A function that shows a line of progress, ``print`` by default.

    Returns:
        The results that the folder has now.

    Raises:
        ValueError: A setting is wrong or the benchmark's own, a set of the data is missing or has not the
            benchmark's columns, the folder has files of another origin, or there are several processes.
            Nothing has been trained.
        ImportError: A package is missing, and nothing has been read.
        RuntimeError: Some runs failed; the others are written.
    """
    benchmark = plan.benchmark
    check_one_process("a benchmark")
    benchmark.check()
    configs = run_configs(benchmark, plan.runs)
    source = source or Source()
    splits = list(plan.splits) or [benchmark.default_split]
    sets = {split: benchmark.sets(source, split) for split in splits}
    shared = configs[0] if configs else plan.measuring.config or run_config(benchmark, {})
    plan = replace(plan, measuring=replace(plan.measuring, config=shared))
    failed: list[str] = []
    with Results.open(out, benchmark) as results:
        work = _Work(plan, results, shared, report)
        for split in splits:
            work.run_split(split, sets[split], plan.runs, configs, failed)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed: {'; '.join(failed)}")
    return results


def run_config(benchmark: Benchmark, settings: Mapping[str, Any]) -> UnlearnConfig:
    """Return the settings of a run: the benchmark's defaults, and what is given.

    Args:
        benchmark: The benchmark.
        settings: Fields of ``loku.UnlearnConfig``.

    Raises:
        ValueError: A value is wrong, or the benchmark sets the field itself.
    """
    own = [name for name in OWN_SETTINGS if name in settings]
    if own:
        raise ValueError(f"a benchmark sets {own[0]} itself: checkpoints lie in the folder of its results")
    return UnlearnConfig(**{"logging_strategy": "no", **benchmark.defaults, **settings})


def run_configs(benchmark: Benchmark, runs: Sequence[Mapping[str, Any]]) -> list[UnlearnConfig]:
    """Return the settings of several runs of one benchmark.

    Args:
        benchmark: The benchmark.
        runs: Fields of ``loku.UnlearnConfig`` for each run.

    Raises:
        ValueError: As for ``run_config``; or the runs differ in a setting that belongs to the measures.
    """
    configs = [run_config(benchmark, settings) for settings in runs]
    for name in MEASURED_SETTINGS:
        values = {json.dumps(settings.get(name), sort_keys=True, default=str) for settings in runs}
        if len(values) > 1:
            raise ValueError(
                f"{name} belongs to the measures, so all runs of a benchmark have one value of it"
            )
    return configs


class _Work:
    """The models of a plan, measured and unlearned."""

    def __init__(
        self, plan: Plan, results: Results, config: UnlearnConfig, report: Callable[[str], None]
    ) -> None:
        self.plan, self.results, self.config, self.report = plan, results, config, report
        self.benchmark = plan.benchmark
        self.environment = {**machine_facts(), "versions": versions()}
        model, tokenizer = self.loaded(plan.model)
        self.identity = {
            "benchmark": self.benchmark.name,
            "parameters": vars(self.benchmark),
            "limit": plan.measuring.limit,
            "measured": {name: getattr(config, name) for name in MEASURED_SETTINGS if name != "use_cpu"},
            "tokenizer": tokenizer_digest(tokenizer),
        }
        self.fingerprint = _fingerprint(model)
        self.tokenizer = tokenizer

    def loaded(self, place: str | os.PathLike) -> tuple[Any, Any]:
        """Load a model on the device where it runs, and its tokenizer."""
        model: Any = load_model(place, self.config.init_arguments())
        tokenizer = self.plan.tokenizer or infer_tokenizer(model)
        on_accelerator = torch.accelerator.is_available() and not self.config.use_cpu
        if on_accelerator and getattr(model, "hf_device_map", None) is None:
            model.to(torch.accelerator.current_accelerator())
        return model.eval(), tokenizer

    def run_split(
        self,
        split: str,
        sets: Sets,
        runs: Sequence[Mapping[str, Any]],
        configs: Sequence[UnlearnConfig],
        failed: list[str],
    ) -> None:
        """Measure the models of a split, and unlearn by each setting."""
        of_split = {"split": split, "data": _digest(sets), **self.identity}
        reference: Mapping[str, Any] | None = self.plan.reference
        places = self.plan.retain_model
        place = places.get(split) if isinstance(places, Mapping) else places
        if place is not None:
            model, _ = self.loaded(place)
            identity = {**of_split, "kind": "retain", "model": _fingerprint(model)}
            if not self.results.has(identity):
                self.measured(identity, place, split, sets, model, None)
            reference = self.results.reference(identity)
            del model
        identity = {**of_split, "model": self.fingerprint, "reference": _text_digest(reference)}
        before = {**identity, "kind": "before"}
        if not self.results.has(before):
            model, _ = self.loaded(self.plan.model)
            self.measured(before, self.plan.model, split, sets, model, reference)
            del model
        for settings, config in zip(runs, configs, strict=True):
            name = f"{split}: {config.method} {json.dumps(dict(settings), default=str)}"
            try:
                deciding = {**identity, "kind": "unlearned", "settings": _deciding_settings(config)}
                if self.results.has(deciding):
                    continue
                self.unlearned(deciding, split, sets, settings, config, reference)
            except Exception as error:  # another setting may work
                failed.append(f"{name} ({type(error).__name__}: {error})")
                self.report(f"failed: {failed[-1]}")

    def measured(
        self,
        identity: Mapping[str, Any],
        place: str | os.PathLike,
        split: str,
        sets: Sets,
        model: Any,
        reference: Mapping[str, Any] | None,
    ) -> None:
        """Measure a model that is given, and write its entry.

        Args:
            identity: What identifies the entry.
            place: The place of the model.
            split: The split.
            sets: Its data.
            model: The model.
            reference: The reference of a retain-only model; None if there is none, or the model is it.
        """
        start = time.perf_counter()
        measures = self.measure(model, sets)
        is_retain = identity["kind"] == "retain"
        compared = self.benchmark.compared(measures, measures.reference if is_retain else reference)
        entry = self.entry(identity, place, split, {}, compared, time.perf_counter() - start)
        self.results.add(identity, entry, measures.reference if is_retain else None)
        self.report(self.results.line(entry))

    def measure(self, model: Any, sets: Sets) -> Measures:
        """Measure a model by itself."""
        return self.benchmark.measure(model, self.tokenizer, sets, self.plan.measuring)

    def unlearned(
        self,
        identity: Mapping[str, Any],
        split: str,
        sets: Sets,
        settings: Mapping[str, Any],
        config: UnlearnConfig,
        reference: Mapping[str, Any] | None,
    ) -> None:
        """Unlearn the requests of a split one after the other, measure the model and write its entry."""
        start = time.perf_counter()
        model: Any
        model, tokenizer = self.loaded(self.plan.model)
        retain = self.benchmark.training_rows(sets.retain, tokenizer, config)
        epochs: list[float] = []
        with self.results.checkpoints(identity) as folder:
            for number, texts in enumerate(sets.requests):
                request = self.benchmark.training_rows(texts, tokenizer, config)
                own: Any = copy.copy(config)
                own.output_dir = str(folder / str(number))
                own.resume_from_checkpoint = True if own.save_strategy != "no" else None
                own.model_init_kwargs = None  # the model is loaded
                own.disable_tqdm = not self.plan.measuring.progress
                callbacks = self.benchmark.callbacks(request, sets, tokenizer, self.plan.measuring)
                result = unlearn(model, request, retain, config=own, tokenizer=tokenizer, callbacks=callbacks)
                epochs.append(max((line.get("epoch") or 0.0 for line in result.history), default=0.0))
                model = result.model
                rate = config.learning_rate or default_learning_rate(model)
                if number + 1 < len(sets.requests) and config.tuning == "lora":
                    model = model.merge_and_unload()
                del result
        training = time.perf_counter() - start
        measures = self.benchmark.compared(self.measure(model, sets), reference)
        entry = self.entry(identity, self.plan.model, split, settings, measures, time.perf_counter() - start)
        entry |= {
            "method": config.method,
            "learning_rate": rate,
            "epochs": epochs,
            "training_seconds": training,
        }
        self.results.add(identity, entry)
        self.report(self.results.line(entry))
        del model
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def entry(
        self,
        identity: Mapping[str, Any],
        place: str | os.PathLike,
        split: str,
        settings: Mapping[str, Any],
        measures: Measures,
        seconds: float,
    ) -> Entry:
        return {
            "kind": identity["kind"],
            "split": split,
            "model": os.fspath(place),
            "settings": {**self.benchmark.defaults, **settings},
            "limit": self.plan.measuring.limit,
            "measures": measures.values,
            "not_available": measures.not_available,
            "leaderboard": measures.leaderboard,
            "seconds": seconds,
            "environment": self.environment,
        }


def _fingerprint(model: Any) -> dict[str, Any]:
    """Return the digests of a model, and the ids at which its generation config ends a text."""
    return {**base_fingerprint(model), "ends": sorted(eos_ids(model))}


def _deciding_settings(config: UnlearnConfig) -> dict[str, Any]:
    """Return the settings that decide a result, and the texts of the refusals if the method has some."""
    settings = config.deciding_settings()
    objective = OBJECTIVES.get(config.method)
    if objective is not None and "refusal" in objective.rows and not objective.alternates:
        settings["refusals"] = _text_digest(load_refusals(config.refusals))
    return settings


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of what a tokenizer computes with, and of its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    text += str(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(sets: Sets) -> str:
    """Return the digest of the data of a split."""
    parts = [*sets.requests, sets.retain, *sets.evaluation.values()]
    digests = [rows_digest(rows) for rows in parts]
    return _text_digest([digests, list(sets.evaluation)])


def _text_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
