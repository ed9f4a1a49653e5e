"""NaN and Inf stop a run, with the step and the module named."""

import torch
from transformers import TrainerCallback

from loku.distributed import local_tensor


@torch.no_grad()
def first_module_not_finite(model, forward):
    """Name of the first module of ``model`` whose output is not finite while ``forward()`` runs, or None."""
    found = []

    def check(name):
        def hook(module, args, output):
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            tensors = [value for value in outputs if isinstance(value, torch.Tensor)]
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
def check_parameters(model, step):
    """FloatingPointError, naming the first, if a parameter that is trained has a NaN or Inf."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(local_tensor(parameter)).all():
            raise FloatingPointError(
                f"step {step}: the trained parameter {name} is not finite; nothing was saved, and earlier "
                "checkpoints are kept. Lower learning_rate or max_grad_norm, or train in bfloat16 or float32"
            )


class LossCheck(TrainerCallback):
    """Stop at a loss that is NaN or Inf, before it changes a weight.

    One look at the device for each optimizer step, in the place of the trainer's own at each micro-batch
    (``logging_nan_inf_filter``), which leaves such losses out of the log and goes on.

    Args:
        locate: batch -> name of the first module whose output is not finite, or None.
    """

    def __init__(self, locate):
        self._locate = locate
        self._pending = []  # (names, losses, batch) of the step's micro-batches

    def add(self, losses, batch):
        """losses: name -> 0-dim tensor, of a batch."""
        values = torch.stack([value.detach() for value in losses.values()])
        self._pending.append((list(losses), values, batch))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pending, self._pending = self._pending, []
        if not pending or torch.isfinite(torch.cat([values for _, values, _ in pending])).all():
            return
        for names, values, batch in pending:
            if torch.isfinite(values).all():
                continue
            name, value = next((n, v) for n, v in zip(names, values.tolist(), strict=True) if v - v != 0)
            module = self._locate(batch)
            where = "every module's output is finite" if module is None else f"it begins in {module}"
            raise FloatingPointError(
                f"step {state.global_step + 1}: {name} is {value} ({where}); the run was stopped before the "
                "weights changed, and earlier checkpoints are kept. Lower learning_rate, or train in "
                "bfloat16 or float32"
            )
