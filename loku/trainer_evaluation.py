"""The trainer's evaluation: measures of whole data sets between steps, and the choice of the best checkpoint.

``transformers.Trainer`` evaluates the loss of its training batches. Here an evaluation set is a set of rows,
and it gets the measures of one teacher-forced pass (``loku.evaluation.scores``).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import speed_metrics

from loku.checkpoints import ResumableTrainer
from loku.config import UnlearnConfig
from loku.data import (
    IGNORE_INDEX,
    TOFU_TEMPLATE,
    QuestionTemplate,
    RefusalRows,
    has_input_ids,
    infer_tokenizer,
    split_documents,
    token_limits,
    tokenize_dataset,
)
from loku.data.files import read_rows
from loku.data.large_sets import DrawnRows
from loku.data.row_errors import row_places
from loku.eval_bounds import (
    EVAL_MEASURES,
    JOINT_MEASURE,
    LikelihoodLimit,
    check_bound_names,
    joint_measure,
    likelihood_limits,
    measure_name,
)
from loku.evaluation.endings import Endings, content_rows, content_scores
from loku.evaluation.extraction import end_ids, extracted_tokens, spread_extraction_likelihood
from loku.evaluation.scores import TokenScores, mean_over_rows, spread_token_scores, token_measures
from loku.fingerprints import ordered_rows_fingerprint, texts_fingerprint
from loku.models import CausalLM
from loku.prepared_rows import PreparedRows
from loku.process_state import torch_modes_kept

__all__ = [
    "EVAL_MEASURES",
    "EvalSets",
    "EvaluatingTrainer",
    "check_trainer_arguments",
    "default_eval_sets",
    "eval_measures",
    "prepare_eval_sets",
    "tokenized_eval_sets",
]

# Arguments of transformers.Trainer, and fields of its TrainingArguments, that would silently do nothing.
_WITHOUT_EFFECT = {
    "compute_metrics": "pass a callback such as loku.ProbabilityGauge, or measure by loku.evaluation",
    "preprocess_logits_for_metrics": "no logits are kept",
    "compute_loss_func": "the loss is that of args.method; override compute_loss",
    "model_init": "pass the model",
}
_FIELDS_WITHOUT_EFFECT = {
    "batch_eval_metrics": "no logits are kept",
    "include_for_metrics": "no logits are kept",
    "bf16_full_eval": "load the model in bfloat16, or set bf16=True",
    "fp16_full_eval": "load the model in bfloat16, or set bf16=True",
    "label_smoothing_factor": "the losses of the methods have no smoothing",
}


def check_trainer_arguments(args: UnlearnConfig, arguments: Mapping[str, Any]) -> None:
    """Refuse what ``UnlearnTrainer`` would ignore.

    Args:
        args: The settings.
        arguments: The arguments for ``transformers.Trainer``.

    Raises:
        ValueError: An argument or a field of the settings has no effect. The message names it and says what
            to do instead.
    """
    given = {name: arguments.get(name) is not None for name in _WITHOUT_EFFECT}
    given |= {name: bool(getattr(args, name, None)) for name in _FIELDS_WITHOUT_EFFECT}
    if args.world_size > 1 and args.accelerator_config.dispatch_batches:  # type: ignore[union-attr]
        raise ValueError(
            "dispatch_batches=True would leave all processes but one waiting, because each reads its own "
            "share of the rows: leave it out of accelerator_config"
        )
    if getattr(args, "deepspeed_plugin", None) is not None or getattr(args, "deepspeed", None):
        raise ValueError(
            "UnlearnTrainer does not run under DeepSpeed, whose shards neither FILA nor the saves can "
            "gather: use FSDP2 (configs/accelerate/fsdp2.yaml) or DDP (configs/accelerate/ddp.yaml)"
        )
    for name, remedy in {**_WITHOUT_EFFECT, **_FIELDS_WITHOUT_EFFECT}.items():
        if given[name]:
            raise ValueError(f"{name} has no effect on UnlearnTrainer: leave it out; {remedy}")


EvalSets: TypeAlias = "dict[str, list[Mapping[str, Any]]]"


def tokenized_eval_sets(
    model: CausalLM,
    eval_dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> EvalSets:
    """Tokenise evaluation sets, with each document of a packed row as a row of its own.

    Args:
        model: The causal LM. A tokenizer is looked for beside it if one is needed and none is given.
        eval_dataset: One set, in the forms of a forget set, or a dict of sets by their names. In place of a
            set, the path of a file or a hub name, as for ``loku.data.read_rows``.
        tokenizer: The tokenizer, or None.
        max_length: The number of tokens at which rows are cut, or None.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        The rows of each set by its name. "" is the name of a set that is not in a dict.

    Raises:
        ValueError: A set is empty or cannot be read, or its name is no text; or a row is unusable or beyond
            the limits of the model.
    """
    tokenized, limits = {}, token_limits(model)
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    for name, rows in sets.items():
        if not isinstance(name, str):
            raise ValueError(f"the name of an evaluation set must be a text, got {name!r}")
        known, told = tokenizer, name or "evaluation"
        places = {told: rows} if isinstance(rows, (str, os.PathLike)) else {}
        rows = read_rows(rows) if places else rows
        if known is None and not has_input_ids(rows):
            known = infer_tokenizer(model)
        with row_places(places):
            tokens = tokenize_dataset(
                rows, known, max_length=max_length, name=told, limits=limits, template=template
            )
        tokenized[name] = split_documents(tokens)
    return tokenized


def default_eval_sets(forget: Iterable[Any], retain: Any) -> EvalSets:
    """The tokenised forget and retain set as evaluation sets.

    Args:
        forget: The tokenised forget rows.
        retain: The tokenised retain rows. Of a set that is not held in memory the first 100 rows count.
    """
    retain = retain.first() if isinstance(retain, DrawnRows) else retain
    return {"forget": split_documents(forget), "retain": split_documents(retain)}


def prepare_eval_sets(
    model: CausalLM, args: UnlearnConfig, eval_dataset: Any, rows: PreparedRows
) -> EvalSets | None:
    """The evaluation sets of a run, and a check of the settings that concern evaluation.

    Args:
        model: The causal LM.
        args: The settings.
        eval_dataset: The sets, as for ``tokenized_eval_sets``. None stands for the ``default_eval_sets``.
        rows: The rows of the run.

    Returns:
        The sets; or None if none are given and training does not evaluate.

    Raises:
        ValueError: A set cannot be used, or ``metric_for_best_model`` or a bound is no measure of the
            evaluation.
    """
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    if eval_dataset is not None:
        sets = tokenized_eval_sets(model, eval_dataset, rows.tokenizer, args.max_length, args.template())
    elif evaluates:
        sets = default_eval_sets(rows.forget, rows.retain)
    else:
        return None
    limits, floors = args.eval_bounds()
    check_bound_names(sets, limits, floors)
    for limit in likelihood_limits(limits):
        counted = sets[limit.set]
        if not args.eval_count_end:
            counted = content_rows(counted, Endings(model, rows.tokenizer, args.template()))
        if all(_answer_length(row) <= limit.n for row in counted):
            raise ValueError(
                f"eval_limits: no row of the {limit.set or 'evaluation'} set has more than {limit.n} answer "
                "tokens, which Extraction Likelihood needs: limit extraction_strength"
            )
    metric = args.metric_for_best_model
    if metric is not None and args.eval_strategy != "no":
        names = [measure_name(name, measure) for name in sets for measure in EVAL_MEASURES]
        names += [JOINT_MEASURE] if limits else []
        if metric.removeprefix("eval_") == JOINT_MEASURE and not limits:
            raise ValueError(f"metric_for_best_model {metric} needs eval_limits and eval_floors")
        if metric.removeprefix("eval_") not in names:
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(names)}, with or without eval_ before it, "
                f"got {metric!r}"
            )
    return sets


def _answer_length(row: Mapping[str, Any]) -> int:
    """The number of tokens from the first that is labelled and predicted to the last."""
    at = [i for i, label in enumerate(row["labels"]) if i and label != IGNORE_INDEX]
    return at[-1] - at[0] + 1 if at else 0


def eval_measures(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[TokenScores],
    ends: Collection[int] = (),
    content: Sequence[TokenScores] | None = None,
) -> dict[str, float]:
    """The ``EVAL_MEASURES`` of a set.

    Args:
        rows: Its tokenised rows. Rows without labelled tokens do not count.
        scores: The ``token_scores`` of the rows.
        ends: The ids that end a text, which need not come back; none by default.
        content: The scores without the endings of the answers, from
            ``loku.evaluation.endings.content_scores``. All measures but loss and probability are theirs. None
            (default) counts the endings as well.

    Returns:
        ``loss`` is the mean negative log-probability of a labelled token, in nats. ``extracted`` is the share
        of rows that come back word by word (``loku.evaluation.extraction.extracted_tokens``). The others are
        those of ``loku.evaluation.scores.token_measures``.
    """
    content = scores if content is None else content
    measures = token_measures(scores, content=content)
    labelled = [score.losses for score in scores if len(score.losses)]
    loss = torch.cat(labelled).mean().item() if labelled else math.nan
    counts = zip(content, extracted_tokens(rows, content, ends), strict=True)
    extracted = mean_over_rows(float(count > 0) for score, count in counts if len(score.losses))
    return {**{name: measures.get(name, extracted) for name in EVAL_MEASURES}, "loss": loss}


class EvaluatingTrainer(ResumableTrainer):
    """A ``ResumableTrainer`` that evaluates data sets, and can load the best checkpoint at the end.

    ``evaluate`` gives each set ``eval_<set>_loss``, the mean negative log-probability of its labelled tokens
    (nats), and ``eval_<set>_probability``, ``eval_<set>_memorization_accuracy``,
    ``eval_<set>_extraction_strength`` and ``eval_<set>_extracted``. A set that is not in a dict has no name:
    its loss is ``eval_loss``. These are the values of ``metric_for_best_model``, with or without "eval_".
    With ``args.eval_limits`` and ``args.eval_floors`` there is one more, ``eval_forgotten_with_utility``, and
    ``loku.eval_bounds`` defines it.

    With ``load_best_model_at_end`` each new best evaluation is saved, so that it can be loaded. Evaluation
    draws no random numbers. So a run ends with the same weights with evaluation and without.

    Args:
        model: The model to train.
        args: The settings.
        forget: The tokenised forget rows.
        retain: The tokenised retain rows.
        refusals: The ``loku.data.RefusalRows`` of the run, or None (default).
        eval_sets: The evaluation sets, by ``prepare_eval_sets``, or None for the ``default_eval_sets``.
        kwargs: The other arguments of ``transformers.Trainer``.
    """

    eval_dataset: EvalSets | None

    def __init__(
        self,
        model: nn.Module,
        args: UnlearnConfig,
        forget: Sequence[Mapping[str, Any]],
        retain: Sequence[Mapping[str, Any]] | DrawnRows,
        refusals: RefusalRows | None = None,
        *,
        eval_sets: EvalSets | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, forget, retain, refusals, eval_dataset=eval_sets, **kwargs)

    def _further_facts(self) -> dict[str, Any]:
        """The evaluation sets, if they decide the result: by the best model, or a learning rate by it."""
        args = self.args
        if args.metric_for_best_model is None or args.eval_strategy == "no" or self.eval_dataset is None:
            return {}
        sets = [f"{name} {ordered_rows_fingerprint(rows)}" for name, rows in self.eval_dataset.items()]
        return {"evaluation sets": texts_fingerprint(sets)}

    @torch_modes_kept()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the model on the evaluation sets, and log the measures.

        All processes must call this. They share the rows, and all get the measures.

        Args:
            eval_dataset: Other sets than the trainer's, in the same forms, or the name of one of the
                trainer's sets. None (default) stands for all of the trainer's.
            ignore_keys: Not used: no outputs are gathered.
            metric_key_prefix: The begin of the names of the measures, "eval" by default.

        Returns:
            ``{prefix}_{set}_{measure}`` for each measure of ``EVAL_MEASURES``, without ``{set}_`` for a set
            that has no name, and the seconds that it took. ``prediction_loss_only`` leaves the losses alone.
            The trainer's own sets also get ``{prefix}_forgotten_with_utility``, if it has bounds, and the
            Extraction Likelihood that a limit needs.

        Raises:
            ValueError: A set cannot be used.
        """
        model: Any = self.model
        tokenizer: Any = self.processing_class
        own = self.eval_dataset or default_eval_sets(*self._run[:2])
        if isinstance(eval_dataset, str):
            if eval_dataset not in own:
                raise ValueError(f"there is no evaluation set {eval_dataset!r}; there are {sorted(own)}")
            sets = {"": own[eval_dataset]}
        else:
            sets = own
            if eval_dataset is not None:
                sets = tokenized_eval_sets(
                    model, eval_dataset, tokenizer, self.args.max_length, self.args.template()
                )
        self._memory_tracker.start()
        metrics: dict[str, float] = {}
        measured: dict[str, float] = {}
        scores_of: dict[str, list[TokenScores]] = {}
        size, template = self.args.eval_batch_size, self.args.template()
        ends = end_ids(model, tokenizer, template)
        endings = None if self.args.eval_count_end else Endings(model, tokenizer, template)
        for name, rows in sets.items():
            begin, prefix = time.time(), "_".join(filter(None, (metric_key_prefix, name)))
            with self.accelerator.autocast():  # before training the model has no autocast of its own
                scores = spread_token_scores(
                    model, rows, size, progress=not self.args.disable_tqdm, description=prefix
                )
            counted = scores if endings is None else content_scores(rows, scores, endings)
            scores_of[name] = counted
            for measure, value in eval_measures(rows, scores, ends, counted).items():
                measured[measure_name(name, measure)] = value
                if measure == "loss" or not self.args.prediction_loss_only:
                    metrics[f"{prefix}_{measure}"] = value
            batches = math.ceil(len(rows) / (size * self.args.world_size))
            metrics |= speed_metrics(prefix, begin, num_samples=len(rows), num_steps=batches)
        if sets is own:
            joint = self._joint_measure(measured, sets, scores_of)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in joint.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _joint_measure(
        self, measured: dict[str, float], sets: EvalSets, scores: Mapping[str, list[TokenScores]]
    ) -> dict[str, float]:
        """``forgotten_with_utility`` and the Extraction Likelihood that it needs; nothing without bounds."""
        limits, floors = self.args.eval_bounds()
        if not limits:
            return {}
        generated = {limit.name: limit for limit in likelihood_limits(limits)}
        others = {name: limit for name, limit in limits.items() if name not in generated}
        further: dict[str, float] = {}
        if joint_measure(measured, others, floors) >= 0:  # the same in all processes
            for name, limit in generated.items():
                further[name] = self._likelihood(limit, sets[limit.set], scores[limit.set])
        return {**further, JOINT_MEASURE: joint_measure(measured | further, limits, floors)}

    def _likelihood(
        self, limit: LikelihoodLimit, rows: list[Mapping[str, Any]], scores: list[TokenScores]
    ) -> float:
        model: Any = self.model
        size, progress = self.args.eval_batch_size, not self.args.disable_tqdm
        with self.accelerator.autocast():
            return spread_extraction_likelihood(
                model, rows, scores, limit.n, batch_size=size, progress=progress
            )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return best

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            NotImplementedError: Always; the message names the functions that measure and that generate.
        """
        raise NotImplementedError(
            "UnlearnTrainer keeps no logits, so it has no predict: measure by trainer.evaluate(rows, "
            'metric_key_prefix="test") or loku.evaluation.token_scores, or generate by model.generate'
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Refuse.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "UnlearnTrainer.evaluate reads the tokenised rows of trainer.eval_dataset without a dataloader"
        )

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Refuse, as ``predict``.

        Raises:
            NotImplementedError: Always.
        """
        return self.predict()
