"""PDU: the logits of forget tokens become flat, and a dual variable weighs the retain loss.

The problem is to flatten the logits while the retain loss stays at most eps. Its Lagrangian is the forget
loss plus lambda (retain loss - eps). The model goes down its gradient, and lambda up:

    lambda = max(0, lambda + step size x (retain loss - eps))
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from loku.distributed import same_in_all_processes_, sum_over_processes_
from loku.head import postprocessing
from loku.objectives.arguments import Argument
from loku.objectives.objective import Objective
from loku.objectives.quantities import At, Quantity
from loku.objectives.retain_weight import RetainWeight
from loku.objectives.rows import Batch
from loku_kernels import reduce_loss


@dataclass(frozen=True)
class MeanLogit(Quantity):
    """The mean of the logits of all words at each position that predicts a label.

    It is the product of the hidden state with the mean row of the output embedding, so no logits are needed.
    """

    name: ClassVar[str] = "mean_logit"

    def check(self, model: nn.Module) -> None:
        """Check that the model's logits are linear in its last hidden states.

        Args:
            model: The causal LM without the wrappers of peft and of sharding.

        Raises:
            ValueError: They have a softcap.
        """
        _check_linear(postprocessing(model))

    def of_model(self, at: At, original: Tensor | None) -> Tensor:
        """The means (n,)."""
        _check_linear(at.postprocessing)
        dtype = torch.promote_types(at.hidden.dtype, torch.float32)
        # No @: autocast would round both to 16 bits.
        mean = (at.hidden.to(dtype) * at.weight.mean(0, dtype=dtype)).sum(-1)
        if at.bias is not None:
            mean = mean + at.bias.mean(dtype=dtype)
        return at.postprocessing.get("logit_scale", 1.0) * mean


def _check_linear(settings: Mapping[str, Any]) -> None:
    if "softcap" in settings:
        raise ValueError(
            f"the model caps its logits softly (at {settings['softcap']:g}), so their mean is not that of "
            'its output embedding: method "pdu" does not train such a model'
        )


def pdu_loss(batch: Batch) -> Tensor:
    """PDU: the mean over the forget tokens of (largest logit - mean logit)^2 (Entesari et al., 2025)."""
    rows = batch.forget
    margin = rows.triplet[..., :2].amax(-1) - rows.values[MeanLogit.name]
    return reduce_loss(margin.square(), rows.counted, "mean")


_STATE = "loku retain weight"  # the entry of TrainerState.stateful_callbacks


class DualRetainWeight(RetainWeight):
    """The dual variable of the bound on the retain loss. It changes after each step.

    A checkpoint keeps it in ``trainer_state.json``, as all numbers of JSON without rounding.

    Args:
        value: The first value.
        bound: The eps that the retain loss should not exceed, in nats for the LM loss.
        step_size: The factor of (retain loss - eps).
        warmup_epochs: The number of epochs in which the value stays.
    """

    def __init__(self, value: float, bound: float, step_size: float, warmup_epochs: float) -> None:
        super().__init__(value)
        self.first, self.bound, self.step_size = value, bound, step_size
        self.warmup_epochs = warmup_epochs
        self._parts: list[Tensor] = []
        self._changes = False

    def add(self, part: Tensor) -> None:
        """Take the part of a step's retain loss that a micro-batch of this process has."""
        self._parts.append(part.detach())

    def logged(self) -> dict[str, float]:
        """The value after the last step."""
        return {"retain_weight": self.value}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the value of the checkpoint that the run goes on from, or the first one."""
        kept: Any = state.stateful_callbacks  # transformers types it as a list
        self.value = kept.get(_STATE, {}).get("value", self.first)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See whether the warm-up is over. A step that failed may have left parts."""
        self._parts.clear()
        self._changes = (state.epoch or 0.0) >= self.warmup_epochs

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Change the value by the retain loss of the step, over all processes."""
        if self._changes:
            loss = sum_over_processes_(torch.stack(self._parts).sum())
            change = self.step_size * (same_in_all_processes_(loss).item() - self.bound)
            self.value = max(0.0, self.value + change)
        kept: Any = state.stateful_callbacks
        kept[_STATE] = {"value": self.value}


def _with_bound(objective: Objective, values: Mapping[str, Any]) -> Objective:
    return replace(
        objective,
        retain_weight=partial(
            DualRetainWeight,
            bound=values["retain_loss_eps"],
            step_size=values["dual_step_size"],
            warmup_epochs=values["dual_warmup_epochs"],
        ),
    )


PDU = Objective(
    pdu_loss,
    quantities={"forget": (MeanLogit(),)},
    summary="flat logits; LM loss on retain rows below a bound, with a dual weight (Entesari et al., 2025)",
    arguments={
        "retain_loss_eps": Argument.number(
            0.3,
            "The bound on the retain loss, above that of the given model; TOFU's in open-unlearning.",
            0.0,
        ),
        "dual_step_size": Argument.number(1.0, "The step size of the retain weight.", 0.0),
        "dual_warmup_epochs": Argument.number(5.0, "The epochs in which the retain weight stays.", 0.0),
    },
    configure=_with_bound,
)
