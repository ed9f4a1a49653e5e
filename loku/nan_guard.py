"""NaN and Inf stop a run. The error names the step and the module."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loku.distributed import first_error, local_tensor


@torch.no_grad()
def first_module_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name the first module of a model whose output has a NaN or Inf.

    Args:
        model: The model.
        forward: A function that runs the model once.

    Returns:
        The module's name in the model, or None if every output is finite.
    """
    found: list[str] = []

    def check(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            tensors = [value for value in outputs if isinstance(value, Tensor)]
            if not found and any(not torch.isfinite(value).all() for value in tensors):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@torch.no_grad()
def check_weights(model: nn.Module) -> None:
    """Check the weights of a model that is given, before it is trained or measured.

    Each weight is read once, and nothing of its size is allocated but for 8-bit floats. Packed weights
    (integers) and weights that are not in memory (meta) are passed over.

    Args:
        model: The model. A sharded parameter is checked by its part in each process. All processes must call
            this, and all raise if one finds a NaN or Inf.

    Raises:
        FloatingPointError: A weight has a NaN or Inf. The message names the first such parameter, and has the
            number of the values and of the parameters.
    """
    weights = ((name, _floats(local_tensor(weight))) for name, weight in model.named_parameters())
    bad = [(name, weight) for name, weight in weights if weight is not None and not _is_finite(weight)]
    message = None
    if bad:
        name, weight = bad[0]
        message = (
            f"the weights of {type(model).__name__} are not finite: {(~torch.isfinite(weight)).sum()} of the "
            f"{weight.numel()} values of {name} are NaN or Inf, and {len(bad) - 1} other parameters have some"
            ". Nothing was run: load the model again, or from an earlier checkpoint"
        )
    error = first_error(message)
    if error is not None:
        raise FloatingPointError(error)


def _floats(weight: Tensor) -> Tensor | None:
    """Return a weight in a dtype that torch compares; None if it has no floating-point values here."""
    if not weight.is_floating_point() or weight.is_meta or not weight.numel():
        return None
    return weight.to(torch.float16) if weight.dtype.itemsize == 1 else weight


def _is_finite(weight: Tensor) -> bool:
    least, greatest = torch.aminmax(weight)  # NaN if any value is; torch.isfinite takes ten times as long
    return bool(torch.isfinite(least) & torch.isfinite(greatest))


@torch.no_grad()
def check_parameters(model: nn.Module, step: int) -> None:
    """Check the parameters that are trained.

    Args:
        model: The model. A sharded parameter is checked by its part in each process. All processes must call
            this, and all raise if one finds a NaN or Inf.
        step: The number of the optimizer step, for the message.

    Raises:
        FloatingPointError: A parameter has a NaN or Inf; the message names the first.
    """
    bad = (
        f"step {step}: the trained parameter {name} is not finite; nothing was saved, and earlier "
        "checkpoints are kept. Lower learning_rate or max_grad_norm, or train in bfloat16 or float32"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not torch.isfinite(local_tensor(parameter)).all()
    )
    error = first_error(next(bad, None))
    if error is not None:
        raise FloatingPointError(error)


class LossCheck(TrainerCallback):
    """Stop at a loss that is NaN or Inf, before it changes a weight.

    The check reads from the device once each optimizer step. The trainer's own check
    (``logging_nan_inf_filter``) reads at each micro-batch, leaves such losses out of the log and goes on. All
    processes stop together. A process that went on alone would wait for the others for ever.

    Args:
        locate: A function that maps a batch to the name of the first module whose output is not finite, or
            to None.
    """

    def __init__(self, locate: Callable[[Any], str | None]) -> None:
        self._locate = locate
        self._pending: list[tuple[list[str], Tensor, Any]] = []  # names, losses, batch of each micro-batch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the losses of an earlier run, which may have failed within a step."""
        self._pending.clear()

    def add(self, losses: Mapping[str, Tensor], batch: Any) -> None:
        """Keep the losses of a micro-batch for the check.

        Args:
            losses: The 0-dimensional losses by their names.
            batch: The micro-batch, as ``locate`` takes it.
        """
        values = torch.stack([value.detach() for value in losses.values()])
        self._pending.append((list(losses), values, batch))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the losses of the step.

        Raises:
            FloatingPointError: A loss is NaN or Inf; the message names it, the step and the module.
        """
        pending, self._pending = self._pending, []
        error = first_error(self._error(pending, state.global_step + 1))
        if error is not None:
            raise FloatingPointError(error)

    def _error(self, pending: list[tuple[list[str], Tensor, Any]], step: int) -> str | None:
        if not pending or torch.isfinite(torch.cat([values for _, values, _ in pending])).all():
            return None
        names, values, batch = next(entry for entry in pending if not torch.isfinite(entry[1]).all())
        name, value = next((n, v) for n, v in zip(names, values.tolist(), strict=True) if v - v != 0)
        module = self._locate(batch)
        where = "every module's output is finite" if module is None else f"it begins in {module}"
        return (
            f"step {step}: {name} is {value} ({where}); the run was stopped before the weights changed, and "
            "earlier checkpoints are kept. Lower learning_rate, or train in bfloat16 or float32"
        )
