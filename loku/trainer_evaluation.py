"""The trainer's evaluation: measures of whole data sets between steps, and the choice of the best checkpoint.

``transformers.Trainer`` evaluates the loss of its training batches. Here an evaluation set is a set of rows,
and it gets the measures of one teacher-forced pass (``loku.evaluation.scores``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import speed_metrics

from loku.checkpoints import ResumableTrainer
from loku.config import UnlearnConfig
from loku.data import (
    RefusalRows,
    has_input_ids,
    infer_tokenizer,
    split_documents,
    token_limits,
    tokenize_dataset,
)
from loku.data.large_sets import DrawnRows
from loku.evaluation.scores import TokenScores, spread_token_scores, token_measures
from loku.fingerprints import ordered_rows_fingerprint, texts_fingerprint
from loku.models import CausalLM
from loku.prepared_rows import PreparedRows
from loku.process_state import torch_modes_kept

EVAL_MEASURES = ("loss", "probability", "memorization_accuracy", "extraction_strength")

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
    model: CausalLM, eval_dataset: Any, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
) -> EvalSets:
    """Tokenise evaluation sets, with each document of a packed row as a row of its own.

    Args:
        model: The causal LM. A tokenizer is looked for beside it if one is needed and none is given.
        eval_dataset: One set, in the forms of a forget set, or a dict of sets by their names.
        tokenizer: The tokenizer, or None.
        max_length: The number of tokens at which rows are cut, or None.

    Returns:
        The rows of each set by its name. "" is the name of a set that is not in a dict.

    Raises:
        ValueError: A set is empty, or a row is unusable or beyond the limits of the model.
    """
    tokenized, limits = {}, token_limits(model)
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    for name, rows in sets.items():
        known = tokenizer
        if known is None and not has_input_ids(rows):
            known = infer_tokenizer(model)
        told = name or "evaluation"
        tokens = tokenize_dataset(rows, known, max_length=max_length, name=told, limits=limits)
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
        ValueError: A set cannot be used, or ``metric_for_best_model`` is no measure of the evaluation.
    """
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    if eval_dataset is not None:
        sets = tokenized_eval_sets(model, eval_dataset, rows.tokenizer, args.max_length)
    elif evaluates:
        sets = default_eval_sets(rows.forget, rows.retain)
    else:
        return None
    metric = args.metric_for_best_model
    if metric is not None and args.eval_strategy != "no":
        names = ["_".join(filter(None, (name, measure))) for name in sets for measure in EVAL_MEASURES]
        if metric.removeprefix("eval_") not in names:
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(names)}, with or without eval_ before it, "
                f"got {metric!r}"
            )
    return sets


def eval_measures(scores: Iterable[TokenScores]) -> dict[str, float]:
    """The ``EVAL_MEASURES`` of a set.

    Args:
        scores: The ``token_scores`` of its rows. Rows without labelled tokens do not count.

    Returns:
        ``loss`` is the mean negative log-probability of a labelled token, in nats. The others are those of
        ``loku.evaluation.scores.token_measures``.
    """
    labelled = [score for score in scores if len(score.losses)]
    measures = token_measures(labelled)
    loss = torch.cat([score.losses for score in labelled]).mean().item() if labelled else math.nan
    return {"loss": loss, **{name: measures[name] for name in EVAL_MEASURES[1:]}}


class EvaluatingTrainer(ResumableTrainer):
    """A ``ResumableTrainer`` that evaluates data sets, and can load the best checkpoint at the end.

    ``evaluate`` gives each set ``eval_<set>_loss``, the mean negative log-probability of its labelled tokens
    (nats), ``eval_<set>_probability``, ``eval_<set>_memorization_accuracy`` and
    ``eval_<set>_extraction_strength``. A set that is not in a dict has no name: its loss is ``eval_loss``.
    These are the values of ``metric_for_best_model``, with or without "eval_".

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

        Raises:
            ValueError: A set cannot be used.
        """
        model: Any = self.model
        own = self.eval_dataset or default_eval_sets(*self._run[:2])
        if isinstance(eval_dataset, str):
            if eval_dataset not in own:
                raise ValueError(f"there is no evaluation set {eval_dataset!r}; there are {sorted(own)}")
            sets = {"": own[eval_dataset]}
        else:
            sets = own
            if eval_dataset is not None:
                tokenizer: Any = self.processing_class
                sets = tokenized_eval_sets(model, eval_dataset, tokenizer, self.args.max_length)
        self._memory_tracker.start()
        metrics: dict[str, float] = {}
        size = self.args.eval_batch_size
        for name, rows in sets.items():
            begin, prefix = time.time(), "_".join(filter(None, (metric_key_prefix, name)))
            with self.accelerator.autocast():  # before training the model has no autocast of its own
                scores = spread_token_scores(
                    model, rows, size, progress=not self.args.disable_tqdm, description=prefix
                )
            for measure, value in eval_measures(scores).items():
                if measure == "loss" or not self.args.prediction_loss_only:
                    metrics[f"{prefix}_{measure}"] = value
            batches = math.ceil(len(rows) / (size * self.args.world_size))
            metrics |= speed_metrics(prefix, begin, num_samples=len(rows), num_steps=batches)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

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
