"""A run of a deletion request, from its rows to the folder of its record.

The stages, in order: the choice of the rows, the measures before, the rows to keep, unlearning, the measures
after, the attacks, and the record. What is measured and attacked is what is served, as it was loaded from the
disk.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from loku.data import IGNORE_INDEX, split_documents, token_limits, tokenize_dataset
from loku.deletion import facts, ledger, measures, record, seal
from loku.deletion.entities import entities
from loku.deletion.measured_models import MeasuredModels
from loku.deletion.request import ATTACKS, Request, request_facts
from loku.deletion.request_rows import RequestRows
from loku.deletion.serve import check_serving, serve
from loku.deletion.stages import Stages
from loku.deletion.training import unlearn_to_limits
from loku.evaluation.endings import Endings, content_scores
from loku.evaluation.scores import token_measures, token_scores
from loku.probe import measure_probe, relative_ability
from loku.saving.directories import whole_file

PREFIXES = 200  # Extraction Likelihood continues about so many; each costs a greedy text
_FIRST = "rows"  # the first stage
_REQUEST = "request.yaml"  # in the private directory: the copy of the request's file
_RUN = "run.json"  # in the private directory: what identifies the run
_RETAIN = "rows_to_keep.json"  # in the private directory: the rows to keep
_RECORD = "record"  # in the private directory: the folder of the record, until it is whole


class Run:
    """One run of a request, or its continuation.

    Args:
        request: The request.
        directory: The folder of the record, which is not there yet.
        work: The private directory of the run, which exists.
        progress: Whether to show the stages and progress bars.
    """

    def __init__(self, request: Request, directory: Path, work: Path, progress: bool) -> None:
        self.request, self.directory, self.work, self.progress = request, directory, work, progress
        self.folder = work / _RECORD
        self.stages = Stages(work, progress)
        self.not_tested: dict[str, str] = {}
        self.models = MeasuredModels(request, self.folder)
        self.rows = RequestRows(request)

    def run(self, key: str | os.PathLike | None) -> None:
        """Run all stages that have not run, and put the sealed record into its place."""
        check_serving(self.request)
        if not Path(self.models.start).is_dir():
            self.models.held(self.models.start)  # so that all its files are here, and are hashed
        begin = self._identify()
        rows = self.stages(_FIRST, self.rows.found)
        kept: dict[str, Any] = {"rows": rows, **self._measure_before()}
        outcome = kept.pop("outcome")
        if outcome is None:
            outcome = self._unlearn(kept)
        self._write(kept, outcome, begin, key)

    # The stages.

    def _identify(self) -> str:
        """Note what identifies the run, or refuse to go on from another one. Return the time of its begin."""
        request = self.request
        selections = {
            "forget": request.forget,
            "retain": request.retain.given,
            "corpus": request.retain.corpus,
            "holdout": request.holdout,
        }
        self.inputs = {
            "model": facts.model_digests(
                self.models.start,
                revision=request.revision if self.models.start == request.model else None,
                model_arguments=self.models.arguments(self.models.start),
            ),
            "data": {
                name: {"source": selection.data, "sha256": facts.data_digest(selection.data)}
                for name, selection in selections.items()
                if selection is not None
            },
            "code": facts.code_digest(),
        }
        for name, place in (
            ("tokenizer", request.tokenizer),
            ("trained_adapter", request.trained_adapter),
            ("control", request.control),
        ):
            if place is not None and Path(place).is_dir():
                self.inputs[name] = facts.model_digests(place)
        given = self.inputs["model"]
        if self.models.start != request.model:
            arguments = self.models.arguments(request.model)
            given = facts.model_digests(request.model, revision=request.revision, model_arguments=arguments)
        if self.rows.earlier:
            ledger.check_model(self.rows.earlier[0], given)
        _check_base(self.inputs.get("trained_adapter", {}), self.inputs["model"], given)
        self.machine, self.versions = facts.machine_facts(), facts.versions()
        identity = {
            "request": request_facts(request),
            **self.inputs,
            "machine": self.machine,
            "versions": self.versions,
        }
        file = self.work / _RUN
        if not file.is_file() or not (self.work / f"{_FIRST}.json").is_file():
            shutil.copyfile(request.path, self.work / _REQUEST)  # the file may change while the run goes on
            with whole_file(file) as new:
                begin = _now()
                new.write_text(json.dumps({"begin": begin, "identity": identity}), encoding="utf-8")
            return begin
        kept = json.loads(file.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(identity))
        changed = [name for name in now if now[name] != kept["identity"].get(name)]
        if changed:
            raise ValueError(
                f"{self.work} has an unfinished run, and since it began {', '.join(changed)} has changed: "
                "delete that folder to begin anew, or pass another --output"
            )
        return kept["begin"]

    @cached_property
    def _options(self) -> dict[str, Any]:
        """The options of all measures. Extraction Likelihood continues about ``PREFIXES`` prefixes."""
        prefixes, n = 0, measures.ngram_of(self.request.limits)
        template = self.request.template
        for name, rows in (("forget", self.rows.forget), ("holdout", self.rows.holdout or [])):
            tokens = (
                tokenize_dataset(rows, self.models.tokenizer, name=name, template=template) if rows else []
            )
            lengths = (sum(label != IGNORE_INDEX for label in row["labels"]) for row in tokens)
            prefixes = max(prefixes, sum(max(0, length - n) for length in lengths))
        stride = max(1, round(prefixes / PREFIXES))
        options = {"n": n, "stride": stride, "progress": self.progress, "template": template}
        return {**options, "count_end": self.request.training.get("eval_count_end", True)}

    def _measure_rows(
        self, place: str, rows: Sequence[Any], name: str, **options: Any
    ) -> measures.RowMeasures:
        return measures.measure_rows(
            self.models.held(place), self.models.tokenizer, rows, name, **{**self._options, **options}
        )

    def _measure_before(self) -> dict[str, Any]:
        """Measure the rows under the model, and decide whether there is anything to forget."""
        found = self.stages("measures_before", lambda: self._knowledge(self.models.start))
        if found.pop("known"):
            return {**found, "outcome": None}
        outcome = "not known"
        adapter = self.request.trained_adapter
        if adapter is not None:  # the model does not know the rows without it
            with_adapter = self.stages("measures_with_adapter", lambda: self._knowledge(adapter))
            found["knowledge"]["with_the_adapter"] = with_adapter["knowledge"]
            if with_adapter["known"]:
                outcome = "delete the adapter"
        return {**found, "limits": {}, "outcome": outcome}

    def _knowledge(self, place: str) -> dict[str, Any]:
        forget = self._measure_rows(place, self.rows.forget, "forget")
        before = {"forget": measures.summary(forget)}
        holdout = None
        if self.rows.holdout is not None:
            holdout = self._measure_rows(place, self.rows.holdout, "holdout")
            before["holdout"] = measures.summary(holdout)
        verdict = measures.known(forget, holdout, self.request.limits)
        return {
            "known": verdict["known"],
            "knowledge": {
                "verdict": "the model knows the rows"
                if verdict["known"]
                else "the model does not know the rows",
                "reasons": verdict["reasons"],
            },
            "measures": {"before": before},
            "limits": measures.limits_of(self.request.limits, before.get("holdout"), before["forget"]),
        }

    def _keep(self) -> dict[str, Any]:
        """Build the retain set, and note its rows, some of which the model writes."""
        models = self.models
        rows, told = self.rows.to_keep(models.held(models.start), models.tokenizer, self.progress)
        with whole_file(self.work / _RETAIN) as new:
            new.write_text(json.dumps(rows, default=str), encoding="utf-8")
        return told

    @cached_property
    def _retain(self) -> dict[str, Any]:
        return json.loads((self.work / _RETAIN).read_text(encoding="utf-8"))

    def _measure_pass(self, place: str, sets: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Measure sets by one teacher-forced pass each, without Extraction Likelihood."""
        model = self.models.held(place)
        found = {}
        for name, rows in sets.items():
            tokens = tokenize_dataset(
                rows,
                self.models.tokenizer,
                name=name,
                limits=token_limits(model),
                template=self.request.template,
            )
            documents = split_documents(tokens)
            scores = token_scores(model, documents, progress=self.progress, description=name)
            content = None
            if not self._options["count_end"]:
                content = content_scores(
                    documents, scores, Endings(model, self.models.tokenizer, self.request.template)
                )
            measured = {"rows": len(rows), **token_measures(scores, content=content)}
            found[name] = {key: value if math.isfinite(value) else None for key, value in measured.items()}
        return found

    def _measure_all(self, place: str) -> dict[str, Any]:
        """Measure all sets. The limits are those of the forget rows, so the others get one pass."""
        others = dict(self._retain["measured"])
        if self.rows.holdout is not None:
            others = {"holdout": self.rows.holdout, **others}
        forget = measures.summary(self._measure_rows(place, self.rows.forget, "forget"))
        return {"forget": forget, **self._measure_pass(place, others)}

    def _probe(self, place: str) -> dict[str, Any]:
        """Measure the general ability, without the questions about what is forgotten."""
        names = entities(self.rows.forget, self.models.tokenizer)
        return measure_probe(
            self.models.held(place), self.models.tokenizer, exclude=names, progress=self.progress
        )

    def _unlearn(self, kept: dict[str, Any]) -> str:
        """Unlearn, measure and attack what came out. Add what was found to ``kept``; return the outcome."""
        kept["retain"] = self.stages("retain", self._keep)
        before = kept["measures"]["before"]
        before |= self.stages(
            "utility_before", lambda: self._measure_pass(self.models.start, self._retain["measured"])
        )
        probe = {"before": self.stages("probe_before", lambda: self._probe(self.models.start))}
        attacks: dict[str, Any] = {"before": self._attacks("before", self.models.start, ("extract", "mia"))}
        kept["training"] = trained = self.stages("unlearning", lambda: self._train(kept["limits"]))
        kept |= {"probe": probe, "attacks": attacks}
        outcome = trained.pop("outcome")
        limits = kept["limits"]
        if outcome == "undone":
            kept["limits"] = {name: _limit(limit, before, None, name) for name, limit in limits.items()}
            self.not_tested |= dict.fromkeys(ATTACKS, "no new model came out")
            return outcome
        after = kept["measures"]["after"] = self.stages(
            "measures_after", lambda: self._measure_all(self.models.served)
        )
        kept["limits"] = {name: _limit(limit, before, after, name) for name, limit in limits.items()}
        probe["after"] = self.stages("probe_after", lambda: self._probe(self.models.served))
        left = relative_ability(probe["before"], probe["after"])
        probe |= {"relative": left["least"], "shares": left["shares"], "not_judged": left["not_judged"]}
        attacks["after"] = self._attacks("after", self.models.served, self.request.attacks)
        if self.request.control is not None:
            control = self.request.control
            kept["measures"]["control"] = self.stages("control", lambda: self._measure_all(control))
        else:
            self.not_tested["control"] = "no model that was retrained without the rows was given"
        kept["serving"] = self.stages("serving", lambda: serve(self.request, self.models.served))
        if self.rows.earlier:
            kept["ledger"] = {"earlier": self.stages("earlier_requests", self._earlier_again)}
        met = all(limit["met"] for limit in kept["limits"].values())
        return "forgotten" if met and outcome == "forgotten" else "not forgotten"

    def _earlier_again(self) -> list[dict[str, Any]]:
        """Measure the rows of the earlier requests on what is served now."""
        told = []
        for earlier in self.rows.earlier:
            rows = self.rows.earlier_rows[earlier.entry.number]
            entry: dict[str, Any] = {"reference": earlier.entry.reference, "record": earlier.entry.record}
            # Other rows may be in the place of those that were to be deleted.
            if (
                rows is None
                or not earlier.forget
                or facts.data_digest(earlier.forget.data) != earlier.data_digest
            ):
                entry["still_forgotten"] = None
                entry["reason"] = earlier.reason or "its data is not there any more, or has changed"
            else:
                name, n = earlier.entry.record, measures.ngram_of(earlier.limits)
                found = measures.summary(self._measure_rows(self.models.served, rows, name, n=n))
                entry["measures"] = found
                entry["limits"] = dict(earlier.limits)
                values = [(found.get(name), limit) for name, limit in earlier.limits.items()]
                within = [value <= limit for value, limit in values if value is not None]
                entry["still_forgotten"] = all(within)
                if not within or (all(within) and len(within) < len(values)):
                    entry["still_forgotten"] = None
                    entry["reason"] = "a measure that its record limits does not exist for its rows"
            told.append(entry)
        return told

    def _train(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """Unlearn to the limits, and save what will be served."""
        request = self.request
        kind: Any = "merged" if request.target == "merged" else "portable"
        self.models.release()  # training loads the model itself
        trained = unlearn_to_limits(
            self.models.start,
            self.rows.forget,
            self._retain["trained"],
            limits=limits,
            utility_sets=self._retain["measured"],
            utility_floor=request.utility_floor,
            minutes=request.minutes,
            training=request.training,
            model_arguments=self.models.arguments(self.models.start),
            tokenizer=self.models.tokenizer,
            output_dir=self.work / "training",
            save_kind=kind,
            progress=self.progress,
        )
        if trained.result is not None:
            self.folder.mkdir(exist_ok=True)
            trained.result.save(self.models.served, kind, rank=request.rank)
        told = {name: value for name, value in trained.facts.items() if name != "seconds"}
        return {**told, "outcome": trained.outcome}

    def _attacks(self, when: str, place: str, names: Sequence[str]) -> dict[str, Any]:
        """Run the attacks of some names on a model, each as a stage."""
        done = {}
        for name in ATTACKS:
            if name not in names or name not in self.request.attacks:
                if when == "after":
                    self.not_tested[name] = "the request did not ask for it"
                continue
            if name == "mia" and self.rows.holdout is None:
                self.not_tested[name] = "there is no hold-out set"
                continue
            done[name] = self.stages(f"attack_{name}_{when}", partial(self._attack, name, place))
        return done

    def _attack(self, name: str, place: str) -> dict[str, Any]:
        from loku import attacks

        models = self.models
        model, tokenizer = models.held(place), models.tokenizer
        forget, holdout, start = self.rows.forget, self.rows.holdout, models.start
        compares = name in ("mia", "relearn") and place != start
        original = models.fresh(start) if compares else None
        more: dict[str, Any] = {"template": self.request.template}
        if name != "relearn":
            more["progress"] = self.progress
        if name == "extract":
            return attacks.extraction_attack(model, tokenizer, forget, holdout, **more)
        if name == "mia":
            assert holdout is not None
            return attacks.membership_attack(model, tokenizer, forget, holdout, original, **more)
        if name == "relearn":
            control = self.request.control
            return attacks.relearning_attack(
                model,
                tokenizer,
                forget,
                control_model=None if control is None else models.fresh(control),
                holdout=holdout,
                retain=next(iter(self._retain["measured"].values())),
                original_model=original,
                **more,
            )
        sets = {"forget": forget, **self._retain["measured"]}
        return attacks.quantisation_attack(model, tokenizer, sets, **more)

    def _write(self, kept: dict[str, Any], outcome: str, begin: str, key: str | os.PathLike | None) -> None:
        """Write the record, seal it, and move the folder into its place."""
        self.folder.mkdir(exist_ok=True)
        shutil.copyfile(self.work / _REQUEST, self.folder / ledger.REQUEST)
        record.write_record(
            self.folder,
            {
                "schema": record.SCHEMA,
                "outcome": outcome,
                "request": request_facts(self.request),
                "times": {"begin": begin, "end": _now(), "seconds": self.stages.seconds},
                "machine": self.machine,
                "versions": self.versions,
                "inputs": self.inputs,
                **kept,
                "not_tested": self.not_tested,
            },
        )
        seal.seal(self.folder, key)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.folder, self.directory)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _limit(
    limit: float, before: Mapping[str, Any], after: Mapping[str, Any] | None, name: str
) -> dict[str, Any]:
    value = None if after is None else after["forget"][name]
    met = None if after is None else value is not None and value <= limit
    return {"limit": limit, "before": before["forget"][name], "after": value, "met": met}


def _check_base(adapter: Mapping[str, Any], start: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse an adapter of another model: its deletion would not leave the model that is measured.

    Args:
        adapter: The ``model_digests`` of the adapter; empty if there is none.
        start: Those of the model from which the run starts. A state of a ledger may be an adapter on the
            model of the request. The adapter that is to be deleted may stand on that model then.
        model: Those of the model of the request.
    """
    base = adapter.get("base")
    states = [start] if start is model else [start, start.get("base", {})]
    if base is not None and not any(_same_weights(base, state) for state in states):
        raise ValueError(
            f"trained_adapter: the weights of its base, {base['name']}, are not those of the model "
            f"{start['name']}. Nothing was started; name an adapter of this model, or the base as the model"
        )


def _same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the weights of two models have the same digests, in the first format that both have."""
    for pattern in ("*model*.safetensors", "*model*.bin"):
        first, second = (
            {name: digest for name, digest in digests.get("files", {}).items() if fnmatch(name, pattern)}
            for digests in (one, other)
        )
        if first and second:
            return first == second
    return False
