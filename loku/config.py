"""The settings of an unlearning run."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from loku.fila.row_scales import FilaConfig
from loku.objectives import OBJECTIVES
from loku.target_modules import check_patterns

# The fields of TrainingArguments that decide the result of a run. UnlearnConfig's own fields also decide it,
# except its FREE_FIELDS.
_DECIDING_TRAINING_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "dataloader_drop_last",
    "fp16",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "neftune_noise_alpha",
    "optim",
    "optim_args",
    "seed",
    "warmup_steps",
    "weight_decay",
)


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
        method: The method, a key of ``loku.objectives.OBJECTIVES``: "ihl" (default), "ga", "gd", "kl", "dpo",
            "npo" or "idk".
        tuning: The parameters that are trained. "lora" (default) trains adapters. "full" trains all
            parameters that require a gradient, and ignores ``init``, the LoRA fields and ``target_modules``.
        init: The initialisation of LoRA. "fila" (default) uses the Fisher information of the two sets,
            "pissa" the leading singular directions of the weights, "default" is peft's own.
        lora_rank: The rank of the adapter, 16 by default.
        lora_alpha: The alpha of the adapter, 32 by default. Its scaling is lora_alpha / lora_rank.
        target_modules: The modules to adapt: a sweep of the paper's Figure 4, names, or a regular expression.
            The sweeps are "qv" (query and value), "qkvo" (key and output as well), "ffn" (every MLP linear),
            and "qv+ffn" (default). "all-linear" is every linear of the text decoder. A list has names. A text
            of letters, digits, underscores and dots is one name. Any other text is a regular expression,
            which must match whole names. See ``loku.target_modules.choose_targets``.
        exclude_modules: The names of targets that are left out, or a regular expression; None (default)
            leaves none out.
        fused_lora: Whether training multiplies the adapters of linears in the dtype of the model's own
            products and adds into their outputs, True by default. False leaves the products to peft, which
            casts the inputs to the adapters' dtype. See ``loku.lora_linear``.
        retain_weight: The factor of the retain loss beside the forget loss, 1.5 by default; Eq. 3 has 1.
        beta: The inverse temperature of DPO and NPO, 0.1 by default.
        refusals: The refusals of DPO and IDK: a list of strings, or the path of a file with one on each line.
            None (default) stands for TOFU's 100. Each epoch draws one for every forget row.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them.
        fisher_damping: The damping of the retain Fisher, 1 by default; see ``loku.FilaConfig``.
        fisher_damping_mode: The unit of the damping, "relative" (default) or "absolute"; see
            ``loku.FilaConfig``.
        fisher_samples: The number of rows of each set that are measured; None (default) measures all.
        fisher_memory_budget: The memory of the Fisher passes, a size like "4GiB" or a number of bytes; None
            (default) sets no limit. See ``loku.FilaConfig``.
        fisher_cache_dir: The directory of measured row scales; None (default) keeps none.
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
        "model_init_kwargs",
    ]

    # The fields of this class that may differ between a run and the run that goes on from its checkpoint. The
    # texts of the refusals count in place of ``refusals``. The number of rows in a step counts in place of
    # the batch size.
    FREE_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {
            "fisher_cache_dir",
            "fisher_memory_budget",
            "logging_nan_inf_filter",
            "logging_steps",
            "model_init_kwargs",
            "output_dir",
            "per_device_train_batch_size",
            "refusals",
            "report_to",
            "resume_from_checkpoint",
            "save_strategy",
        }
    )

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

    method: str = field(default="ihl", metadata={"help": "The method: ihl, ga, gd, kl, dpo, npo or idk."})
    tuning: Literal["lora", "full"] = field(
        default="lora", metadata={"help": "Train LoRA adapters, or the full model."}
    )
    init: Literal["fila", "default", "pissa"] = field(
        default="fila", metadata={"help": "The initialisation of the adapters."}
    )
    lora_rank: int = field(default=16, metadata={"help": "The rank of the adapters."})
    lora_alpha: float = field(
        default=32, metadata={"help": "The alpha of the adapters; their scaling is alpha / rank."}
    )
    target_modules: list[str] | str | None = field(
        default="qv+ffn",
        metadata={
            "help": "The modules to adapt: a sweep (qv, qkvo, ffn or qv+ffn), all-linear, names with spaces "
            "between, or one regular expression, which has other signs than letters, digits, _ and dots."
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
    beta: float = field(default=0.1, metadata={"help": "The inverse temperature of DPO and NPO."})
    refusals: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The refusals of DPO and IDK, or a file with one on each line; TOFU's 100 by default."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "The number of tokens at which rows are cut."}
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
        super().__post_init__()
        self.remove_unused_columns = False  # the columns are pairs of rows, not arguments of the model
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # a forward uses all trained parameters
        if self.method not in OBJECTIVES:
            raise ValueError(f"method must be one of {sorted(OBJECTIVES)}, got {self.method!r}")
        if self.tuning not in ("lora", "full"):
            raise ValueError(f'tuning must be "lora" or "full", got {self.tuning!r}')
        if self.init not in ("fila", "default", "pissa"):
            raise ValueError(f'init must be "fila", "default" or "pissa", got {self.init!r}')
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
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.max_steps == 0:  # transformers would train num_train_epochs
            raise ValueError("max_steps must be > 0, or -1 for num_train_epochs, got 0")
        if self.num_train_epochs < 0:
            raise ValueError(f"num_train_epochs must be >= 0, got {self.num_train_epochs}")
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device for which to pin
        if self.retain_weight < 0:
            raise ValueError(f"retain_weight must be >= 0, got {self.retain_weight}")
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")

    def fila_config(self) -> FilaConfig:
        """The settings of the row scales, as ``loku.get_fila_state_dict`` takes them."""
        return FilaConfig(
            damping=self.fisher_damping,
            damping_mode=self.fisher_damping_mode,
            fisher_samples=self.fisher_samples,
            seed=self.seed,
            fisher_memory_budget=self.fisher_memory_budget,
            fisher_cache_dir=self.fisher_cache_dir,
        )

    def init_arguments(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained``, as ``loku.models.load_model`` takes them."""
        arguments: Any = self.model_init_kwargs  # TrainingArguments has parsed a JSON text
        return arguments or {}

    def deciding_settings(self) -> dict[str, Any]:
        """The settings that two runs must share for one to go on from a checkpoint of the other.

        They are all fields of this class and its subclasses except the ``FREE_FIELDS``, the fields of
        ``TrainingArguments`` that decide the result, and the number of forget rows in a step.

        Returns:
            The values by their names in messages.
        """
        inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
        redeclared = set(UnlearnConfig.__annotations__)
        settings = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.init and (f.name not in inherited or f.name in redeclared) and f.name not in self.FREE_FIELDS
        }
        settings |= {n: getattr(self, n) for n in _DECIDING_TRAINING_ARGUMENTS if hasattr(self, n)}
        settings["rows a step"] = (
            self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps
        )
        return settings
