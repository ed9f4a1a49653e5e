"""The settings of an unlearning run."""

import dataclasses
import json
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from loku.counts import check_counts, check_max_length
from loku.data.question_templates import QuestionTemplate
from loku.eval_bounds import JOINT_MEASURE, check_bounds
from loku.fila.settings import FilaConfig, check_balance
from loku.free_fields import EVALUATION_FIELDS, REASONS
from loku.objectives import OBJECTIVES, Objective, described_methods, resolved
from loku.target_modules import check_patterns
from loku.unused_settings import is_given, refuse_unused_settings

# The values that a run can have.
_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lora_rank",
    "fisher_samples",
)
_POSITIVE = ("learning_rate", "beta", "lora_alpha")
_NOT_NEGATIVE = (
    "num_train_epochs",
    "retain_weight",
    "forget_weight",
    "fisher_damping",
    "weight_decay",
    "adam_epsilon",
    "warmup_steps",
    "dataloader_num_workers",
)
_SHARES = ("adam_beta1", "adam_beta2")
_MAY_BE_NONE = ("learning_rate", "beta", "fisher_samples", "max_grad_norm")
_CHOICES = {
    "loss_reduction": ("batch", "micro_batch"),
    "loss_mean": ("separate", "joint"),
    "retain_sampling": ("without_replacement", "with_replacement"),
}


def _check_ranges(config: Any) -> None:
    """Raise ValueError if a number is one with which no run can be right; the message names the field."""

    def check(names: tuple[str, ...], wanted: str, holds: Callable[[Any], bool]) -> None:
        for name in names:
            value = getattr(config, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not (isinstance(value, numbers.Real) and holds(value)):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")

    counts = {name: getattr(config, name) for name in _COUNTS}
    check_counts(**{k: v for k, v in counts.items() if not (v is None and k in _MAY_BE_NONE)})
    check_max_length(config.max_length)
    check((*_POSITIVE, *_NOT_NEGATIVE), "a finite number", math.isfinite)
    check(_POSITIVE, "> 0", lambda v: v > 0)
    check(_NOT_NEGATIVE, ">= 0", lambda v: v >= 0)
    check(("max_grad_norm",), ">= 0 or inf", lambda v: v >= 0)  # inf clips nothing, and the log has the norm
    check(_SHARES, ">= 0 and < 1", lambda v: 0 <= v < 1)
    integers = "an integer from 0 to 2^32 - 1"
    check(("seed",), integers, lambda v: isinstance(v, numbers.Integral) and 0 <= int(v) < 2**32)


def _check_json(config: Any) -> None:
    """Raise ValueError if a text that stands for a dict is no JSON; ``TrainingArguments`` names no field."""
    for name in config._VALID_DICT_FIELDS:
        value = getattr(config, name)
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise ValueError(
                    f"{name} must be a JSON object, with its names in double quotes, got {value!r}: {error}"
                ) from None


@dataclass
class UnlearnConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the fields that unlearning adds and other defaults.

    An epoch is one pass over the forget set. Each forget row comes with one retain row, and with one refusal
    if the method asks for it. So a batch of one process has ``per_device_train_batch_size`` rows of each
    kind.

    The default of the retain weight gives the best results of IHL and FILA on the embedded model.

    ``greater_is_better`` follows ``metric_for_best_model``: a better model has lower losses and higher values
    of the other measures, except on the set "forget", where it has forgotten more.

    Args:
        output_dir: The directory of checkpoints, "loku-output" by default.
        per_device_train_batch_size: The number of forget rows in a batch of one process, 8 by default.
        learning_rate: The peak learning rate of the optimizer. None (default) chooses it by the model's size
            and by what is trained, from 2e-3 to 1e-5, and says so; see
            ``loku.learning_rates.default_learning_rate``.
        num_train_epochs: The number of passes over the forget set, 10 by default.
        save_strategy: The times at which checkpoints are written: "no" (default), "epoch", or "steps", which
            means every ``save_steps`` steps.
        resume_from_checkpoint: True to go on from the newest checkpoint in ``output_dir``, or the path of a
            checkpoint. None (default) begins anew.
        report_to: The reporters of the log, such as "tensorboard" or "wandb"; "none" by default.
        logging_steps: The number of steps between two lines of the log, 1 by default.
        logging_nan_inf_filter: Not used. The trainer stops at the first loss that is NaN or Inf.
        tf32: Whether float32 products on CUDA are multiplied in TF32. None (default) does so in training if
            the card has TF32 and the model float32 weights without autocast, and the log then has ``tf32``.
        method: The method, a key of ``loku.objectives.OBJECTIVES``; "ihl" by default. The error of "list" has
            a line about each.
        method_args: The further arguments of the method, ``{name: value}``; None (default) for the defaults.
            ``Objective.arguments`` of the method documents them.
        tuning: The parameters that are trained. "lora" (default) trains adapters. "full" trains all
            parameters that require a gradient, and ignores ``init``, the LoRA fields and ``target_modules``.
        init: The initialisation of LoRA. "fila" (default) uses the Fisher information of the two sets.
            "official-fila" is FILA as the authors' code has it (``loku.FilaConfig.official``): it fixes the
            damping and the balance, and draws the measured rows by ``seed``
            (``loku.fila.measured_rows.official_rows``). "pissa" uses the leading singular directions of the
            weights, "default" is peft's own.
        lora_rank: The rank of the adapter, 16 by default.
        lora_alpha: The alpha of the adapter, 32 by default. Its scaling is lora_alpha / lora_rank.
        target_modules: The modules to adapt: a sweep of the paper's Figure 4, names, or a regular expression.
            The sweeps are "qv" (query and value), "qkvo" (key and output as well), "ffn" (every MLP linear),
            "qv+ffn" (default), and "all" ("qkvo" and "ffn", the targets of the authors' TOFU runs).
            "all-linear" is every linear of the text decoder. A list has names. A text
            of letters, digits, underscores and dots is one name. Any other text is a regular expression,
            which must match whole names. See ``loku.target_modules.choose_targets``.
        exclude_modules: The names of targets that are left out, or a regular expression; None (default)
            leaves none out.
        fused_lora: Whether training multiplies the adapters of linears in the dtype of the model's own
            products and adds into their outputs, True by default. False leaves the products to peft, which
            casts the inputs to the adapters' dtype. See ``loku.lora_linear``.
        retain_weight: The factor of the retain loss beside the forget loss, 1.5 by default; Eq. 3 has 1.
        forget_weight: The factor of the forget loss, 1 by default.
        loss_reduction: "batch" (default): the loss of a step is that of one batch with all its rows, however
            many micro-batches and processes divide it. "micro_batch": it is the mean of the losses of the
            micro-batches, as other trainers have it. So tokens of a micro-batch with few tokens count more.
        loss_mean: "separate" (default): the forget loss and the retain loss are each a mean over their own
            tokens. "joint": they are one mean over the tokens of both, as IDK in TOFU's code.
        retain_sampling: "without_replacement" (default): no retain row comes again until all have been used.
            "with_replacement": each is drawn from all, as in TOFU's code and in open-unlearning.
        beta: The beta of the method, such as the inverse temperature of DPO and NPO. None (default) stands
            for the method's own default. Methods without one refuse it.
        refusals: The refusals of DPO and IDK: a list of strings, or the path of a file with one on each line.
            None (default) stands for TOFU's 100. Each epoch draws one for every forget row.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them.
        question_template: The prompt of a row of ``question`` and ``answer``: a text with ``{question}``; or
            "chat" for the tokenizer's chat template. None (default) stands for TOFU's,
            ``"Question: {question}\\nAnswer:"``. See ``loku.data.QuestionTemplate``.
        answer_template: The labelled text after it, with ``{answer}``. None (default) stands for TOFU's,
            ``" {answer}"``. A text as ``question_template`` needs one, and "chat" takes none.
        fila_balance: The size of FILA's row scales, which balances the factors A and B and so acts like a
            learning rate: "normalised" (default), "paper" (as measured), or a number from 1e-30 to 1e30
            that multiplies the normalised ones, and PiSSA's ones, too. Numbers far from 1 make larger steps.
            "default" LoRA has no balance, and PiSSA has no "paper". See ``loku.FilaConfig``.
        fisher_damping: The damping of the retain Fisher, 1 by default; see ``loku.FilaConfig``.
        fisher_damping_mode: The unit of the damping, "relative" (default) or "absolute"; see
            ``loku.FilaConfig``.
        fisher_samples: The number of rows of each set that are measured; None (default) measures all.
        fisher_memory_budget: The memory of the Fisher passes, a size like "4GiB" or a number of bytes; None
            (default) sets no limit. See ``loku.FilaConfig``.
        fisher_cache_dir: The directory of measured row scales; None (default) keeps none.
        eval_count_end: Whether the endings of answers count in the measures of evaluation sets but loss and
            probability, True by default. An ending is an EOS and the special tokens of a chat template; see
            ``loku.evaluation.endings``. False lets a model that knows the template alone look forgotten.
        eval_limits: The greatest values that measures of evaluation sets may have, such as
            ``{"forget_memorization_accuracy": 0.4}``; None (default) for none. See ``loku.eval_bounds``.
        eval_floors: The least values that measures of other evaluation sets must have, such as
            ``{"retain_probability": 0.8}``; None (default) for none. With both,
            ``metric_for_best_model="forgotten_with_utility"`` chooses the best model by both.
        model_init_kwargs: The arguments of ``from_pretrained``, for a model that is given by its path or
            name; None (default) stands for none.
        train_sampling_strategy: The order of the forget rows in an epoch: "random" (default), "sequential",
            or "group_by_length", which is random but runs rows of similar length together. The retain row and
            the refusal of a forget row do not depend on the order.

    Raises:
        ValueError: A value is out of its range; the message names the field.
    """

    _VALID_DICT_FIELDS: ClassVar = [  # type: ignore[misc]  # TrainingArguments has it without ClassVar
        *TrainingArguments._VALID_DICT_FIELDS,
        "method_args",
        "eval_limits",
        "eval_floors",
        "model_init_kwargs",
    ]

    # A subclass that adds fields adds the names of those that decide nothing.
    FREE_FIELDS: ClassVar[frozenset[str]] = frozenset(REASONS)

    output_dir: str | None = field(default="loku-output", metadata={"help": "The directory of checkpoints."})
    per_device_train_batch_size: int = field(
        default=8,
        metadata={"help": "The number of forget rows in a batch of one process; it has as many retain rows."},
    )
    learning_rate: float | None = field(  # type: ignore[assignment]  # chosen before the base class reads it
        default=None,
        metadata={"help": "The peak learning rate of the optimizer; by default chosen by the model's size."},
    )
    num_train_epochs: float = field(
        default=10, metadata={"help": "The number of passes over the forget set."}
    )
    save_strategy: str = field(
        default="no",
        metadata={
            "help": 'The times at which checkpoints are written: "no", "epoch", or "steps" (see save_steps).'
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "true to go on from the newest checkpoint in output_dir, or the path of a checkpoint."
        },
    )
    report_to: list[str] | str | None = field(
        default="none", metadata={"help": "tensorboard, wandb, another reporter, or none."}
    )
    logging_steps: float = field(
        default=1, metadata={"help": "The number of steps between two lines of the log."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Not used: UnlearnTrainer stops at the first loss that is NaN or Inf."},
    )
    tf32: bool | None = field(
        default=None,
        metadata={"help": "Multiply float32 in TF32; by default in training, on cards that have it."},
    )

    method: str = field(
        default="ihl",
        metadata={"help": f"The method: {', '.join(OBJECTIVES)}; list shows a line about each."},
    )
    method_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The further arguments of the method, a JSON object."}
    )
    tuning: Literal["lora", "full"] = field(
        default="lora", metadata={"help": "Train LoRA adapters, or the full model."}
    )
    init: Literal["fila", "official-fila", "default", "pissa"] = field(
        default="fila", metadata={"help": "The initialisation of the adapters."}
    )
    lora_rank: int = field(default=16, metadata={"help": "The rank of the adapters."})
    lora_alpha: float = field(
        default=32, metadata={"help": "The alpha of the adapters; their scaling is alpha / rank."}
    )
    target_modules: list[str] | str | None = field(
        default="qv+ffn",
        metadata={
            "help": "The modules to adapt: a sweep (qv, qkvo, ffn, qv+ffn or all), all-linear, names with "
            "spaces between, or one regular expression, which has other signs than letters, digits, _ and "
            "dots."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "The targets to leave out: names with spaces between, or one regular expression."},
    )
    fused_lora: bool = field(
        default=True,
        metadata={"help": "Multiply the adapters in the dtype of the model's products, in training."},
    )
    retain_weight: float = field(default=1.5, metadata={"help": "The factor of the retain loss."})
    forget_weight: float = field(default=1.0, metadata={"help": "The factor of the forget loss."})
    loss_reduction: Literal["batch", "micro_batch"] = field(
        default="batch",
        metadata={"help": "The loss of a step: that of one batch, or the mean of its micro-batches' losses."},
    )
    loss_mean: Literal["separate", "joint"] = field(
        default="separate",
        metadata={"help": "The means of the two losses: over their own tokens, or one over those of both."},
    )
    retain_sampling: Literal["without_replacement", "with_replacement"] = field(
        default="without_replacement", metadata={"help": "The draws of the retain rows."}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "The beta of the method, such as that of DPO and NPO; its own by default."},
    )
    refusals: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The refusals of DPO and IDK, or a file with one on each line; TOFU's 100 by default."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "The number of tokens at which rows are cut."}
    )
    question_template: str | None = field(
        default=None,
        metadata={
            "help": "The prompt of a row of question and answer: a text with {question}, or chat for the "
            "tokenizer's chat template; TOFU's by default."
        },
    )
    answer_template: str | None = field(
        default=None,
        metadata={"help": "The text of its answer, with {answer}; it belongs to question_template."},
    )
    fila_balance: float | str | None = field(  # None: HfArgumentParser then leaves texts as they are
        default="normalised",
        metadata={"help": "The size of FILA's row scales: normalised, paper, or a number."},
    )
    fisher_damping: float = field(default=1.0, metadata={"help": "The damping of the retain Fisher."})
    fisher_damping_mode: Literal["relative", "absolute"] = field(
        default="relative",
        metadata={"help": "The damping is relative to the mean retain Fisher of a module, or absolute."},
    )
    fisher_samples: int | None = field(
        default=None,
        metadata={"help": "The number of rows of each set whose Fisher is measured; all by default."},
    )
    fisher_memory_budget: int | str | None = field(
        default=None,
        metadata={"help": "The memory of the Fisher passes beside a forward and backward, such as 4GiB."},
    )
    fisher_cache_dir: str | None = field(
        default=None, metadata={"help": "A directory that keeps measured row scales."}
    )
    eval_count_end: bool = field(
        default=True,
        metadata={"help": "Count the endings of answers (EOS, template tokens) in MA, ES, EL and extracted."},
    )
    eval_limits: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "The greatest values of measures of evaluation sets, a JSON object."},
    )
    eval_floors: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "The least values of measures of evaluation sets, a JSON object."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained, a JSON object."}
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = field(
        default="random", metadata={"help": "The order of the forget rows in an epoch."}
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # The better model has forgotten more: a higher loss, and lower values of the other measures.
            forgets = self.metric_for_best_model.removeprefix("eval_").startswith("forget_")
            self.greater_is_better = forgets == self.metric_for_best_model.endswith("loss")
        _check_json(self)
        super().__post_init__()
        self.remove_unused_columns = False  # the columns are pairs of rows, not arguments of the model
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # a forward uses all trained parameters
        if self.method == "list":
            raise ValueError(f"method must be one of\n{described_methods()}")
        if self.method not in OBJECTIVES:
            raise ValueError(f"method must be one of {sorted(OBJECTIVES)}, got {self.method!r}")
        if self.tuning not in ("lora", "full"):
            raise ValueError(f'tuning must be "lora" or "full", got {self.tuning!r}')
        if self.init not in ("fila", "official-fila", "default", "pissa"):
            raise ValueError(f'init must be "fila", "official-fila", "default" or "pissa", got {self.init!r}')
        self.fila_balance = check_balance(self.fila_balance, "fila_balance")
        self.target_modules = self.target_modules or "qv+ffn"
        check_patterns("target_modules", self.target_modules)
        self.exclude_modules = self.exclude_modules or None
        if self.exclude_modules is not None:
            check_patterns("exclude_modules", self.exclude_modules)
        if self.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
            raise ValueError(
                'train_sampling_strategy must be "random", "sequential" or "group_by_length", got '
                f"{self.train_sampling_strategy!r}"
            )
        # transformers would train num_train_epochs
        if not isinstance(self.max_steps, numbers.Integral) or self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be > 0, or -1 for num_train_epochs, got {self.max_steps!r}")
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device for which to pin
        _check_ranges(self)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = " or ".join(f'"{choice}"' for choice in choices)
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        objective = self.objective()  # it checks beta and method_args
        refuse_unused_settings(self, objective)
        self.fila_config()  # it checks its own
        self.template()  # it, too
        self.eval_limits = check_bounds("eval_limits", self.eval_limits)
        self.eval_floors = check_bounds("eval_floors", self.eval_floors)
        if (self.eval_limits is None) != (self.eval_floors is None):
            raise ValueError(
                "eval_limits and eval_floors belong together: without limits nothing must be forgotten, and "
                "without floors a broken model would be the best"
            )
        joint = (self.metric_for_best_model or "").removeprefix("eval_") == JOINT_MEASURE
        if joint and not self.greater_is_better:
            raise ValueError(f"a greater {JOINT_MEASURE} is better: leave greater_is_better out")

    def method_arguments(self) -> tuple[float | None, dict[str, Any]]:
        """The beta of the method, or None if it has none, and the values of its further arguments.

        Raises:
            ValueError: The method has no beta but one is given, or ``method_args`` are wrong.
        """
        objective, given = OBJECTIVES[self.method], self.method_args
        if self.beta is not None and objective.beta is None:
            raise ValueError(f"method {self.method!r} has no beta (Objective.beta): leave it out")
        beta = objective.beta if self.beta is None else self.beta
        return beta, resolved(self.method, objective.arguments, given)  # type: ignore[arg-type]  # JSON is parsed

    def objective(self) -> Objective:
        """The method with its arguments.

        Raises:
            ValueError: As of ``method_arguments``.
        """
        return OBJECTIVES[self.method].configured(*self.method_arguments())

    def fila_config(self) -> FilaConfig:
        """The settings of FILA, as ``loku.initialize_lora_fila_weights`` takes them.

        Raises:
            ValueError: A value is out of its range. Or ``init="official-fila"`` fixes a field that is not at
                its default.
        """
        options: dict[str, Any] = {
            "fisher_samples": self.fisher_samples,
            "seed": self.seed,
            "fisher_memory_budget": self.fisher_memory_budget,
            "fisher_cache_dir": self.fisher_cache_dir,
        }
        own = ("fisher_damping", "fisher_damping_mode", "fila_balance")
        if self.init != "official-fila":
            damping, damping_mode, balance = (getattr(self, name) for name in own)
            return FilaConfig(damping=damping, damping_mode=damping_mode, balance=balance, **options)
        for name in own:
            if is_given(self, name):
                raise ValueError(
                    f'init="official-fila" has its own {name}, got {getattr(self, name)!r}: leave it out, or '
                    'use init="fila"'
                )
        return FilaConfig.official(**options)

    def template(self) -> QuestionTemplate:
        """The template of rows of questions and answers."""
        return QuestionTemplate(self.question_template, self.answer_template)

    def init_arguments(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained``, as ``loku.models.load_model`` takes them."""
        arguments: Any = self.model_init_kwargs  # TrainingArguments has parsed a JSON text
        return arguments or {}

    def eval_bounds(self) -> tuple[dict[str, float], dict[str, float]]:
        """The limits and the floors of the evaluation, ``{measure: number}``; both empty for none."""
        limits: Any = self.eval_limits
        floors: Any = self.eval_floors
        return limits or {}, floors or {}

    def deciding_settings(self) -> dict[str, Any]:
        """The settings that two runs must share for one to go on from a checkpoint of the other.

        They are all fields of this class, its subclasses and ``TrainingArguments`` that are not in
        ``FREE_FIELDS``, the number of processes and the number of devices of a process. The fields of
        evaluation count if ``metric_for_best_model`` is set, because an evaluation then decides.

        Returns:
            The values by their names in messages.
        """
        free = (
            self.FREE_FIELDS
            if self.metric_for_best_model is not None
            else self.FREE_FIELDS | EVALUATION_FIELDS
        )
        names = [f.name for f in dataclasses.fields(self) if f.init and f.name not in free]
        settings = {name: getattr(self, name) for name in names}
        objective = OBJECTIVES.get(self.method)
        if objective is not None:  # a default that a later version changes decides, too
            defaults = {name: argument.default for name, argument in objective.arguments.items()}
            settings["beta"] = objective.beta if self.beta is None else self.beta
            if self.method_args is None or isinstance(self.method_args, dict):
                settings["method_args"] = {**defaults, **(self.method_args or {})}
        return {**settings, "world_size": self.world_size, "n_gpu": self.n_gpu}
