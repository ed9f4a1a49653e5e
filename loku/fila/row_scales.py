"""How much each row of a weight matters to the forget set and not to the retain set: FILA's row scales.

    s_i^2 = sum_j F_forget[i, j] / (F_retain[i, j] + damping)

F is the diagonal of the empirical Fisher, the mean over samples of the squared gradient of the sample's
log-likelihood (Eq. 2). The score is linear in the forget samples, so the retain pass comes first, its Fisher
is the only matrix that is held, and the forget pass adds straight to one number a row.
"""

import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from accelerate.utils import convert_file_size_to_int
from tqdm.auto import tqdm

from loku.data.rows import IGNORE_INDEX
from loku.distributed import (
    is_main_process,
    same_in_all_processes_,
    share_of_batches,
    sum_over_processes_,
)
from loku.head import model_tokens, negative_log_likelihood
from loku.models import unwrapped
from loku_kernels import accumulate_squared_grad_

_KERNEL_BYTES = 8 << 20  # that ``accumulate_squared_grad_`` takes for itself, at most


def memory_bytes(budget):
    """Bytes of "4GiB", "500MB" or a number; None for None. ``ValueError`` for anything else."""
    if budget is None:
        return None
    size = int(budget) if isinstance(budget, str) and budget.isdecimal() else budget
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(f'a memory budget is a size like "4GiB", bytes or None, got {budget!r}')
    return convert_file_size_to_int(size)


@dataclass
class FilaConfig:
    """The settings of FILA's row scales, s_i^2 = sum_j F_forget[i, j] / (F_retain[i, j] + damping).

    Args:
        damping: The number that is added to the retain Fisher, >= 0.
        damping_mode: "relative" multiplies the damping by the mean retain Fisher of the module. "absolute"
            takes it as it is; the authors' code has 1e-5.
        fisher_samples: The number of rows of each data set that are measured; None for all.
        seed: The seed that chooses those rows.
        fisher_memory_budget: The memory that measuring may hold beside a forward and backward: a size like
            "4GiB", bytes, or None for no limit. The smaller it is, the more passes over the data there are.
            See ``loku.fila.row_scales.fisher_row_scales``.
        fisher_cache_dir: A directory that keeps row scales, so that a second run on the same model and data
            measures nothing; None to measure always. See ``loku.fila.row_scale_cache``.

    Raises:
        ValueError: A value is out of its range; the message names the field.
    """

    damping: float = 1.0
    damping_mode: Literal["relative", "absolute"] = "relative"
    fisher_samples: int | None = None
    seed: int = 0
    fisher_memory_budget: int | str | None = None
    fisher_cache_dir: str | None = None

    def __post_init__(self):
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"FilaConfig.damping must be finite and >= 0, got {self.damping}")
        if self.damping_mode not in ("relative", "absolute"):
            raise ValueError(
                f'FilaConfig.damping_mode must be "relative" or "absolute", got {self.damping_mode!r}'
            )
        if self.fisher_samples is not None and self.fisher_samples < 1:
            raise ValueError(f"FilaConfig.fisher_samples must be >= 1 or None, got {self.fisher_samples}")
        memory_bytes(self.fisher_memory_budget)


def reiterable(batches):
    """The batches, or a list of them if they can be iterated once only."""
    return list(batches) if iter(batches) is batches else batches


def fisher_row_scales(
    model,
    modules,
    forget_batches,
    retain_batches,
    *,
    damping=1.0,
    damping_mode="relative",
    memory_budget=None,
    progress=True,
):
    """Row scales s of linear modules, normalised to a root mean square of 1 in each.

    Where torch.distributed is set up each process runs every so-many-th batch and gets the same scales. So
    all of them must call this, with the same batches in the same order. The weights may be sharded (FSDP2).

    Args:
        model: a causal LM, peft wrappers included. Its weights, their ``requires_grad`` and its mode are what
            they were afterwards.
        modules: name -> ``torch.nn.Linear`` of ``model``. Each may be called once in a forward.
        forget_batches, retain_batches: iterables, iterated several times, of dicts with ``input_ids``,
            ``attention_mask`` and ``labels`` (B, T). How samples are grouped and padded does not change the
            result. An iterator is read into a list.
        damping: added to the retain Fisher; relative to the module's mean retain Fisher, or with
            ``damping_mode="absolute"`` as it is (the official code's is 1e-5).
        memory_budget: "4GiB", bytes or None: what may be held on a device beside what a forward and backward
            without weight gradients takes. That is the retain Fishers, float32, 4 bytes a weight, and the
            modules' inputs of the largest batch. The modules are handled in as many groups as it takes, each
            with its own pair of passes over the data. None for one group.
        progress: print how many passes there will be and what they hold, and show a progress bar.

    Returns:
        name -> (d,), float32, on the module's device. All ones, with a warning that names the module, where
        the scales are zero.

    Raises:
        ValueError: no batch in a set; a memory budget that one module exceeds by itself, with the module's
            name and what it needs. RuntimeError: a module is called twice, or not at all, in a forward.
        FloatingPointError: a Fisher or a loss is NaN or Inf; the pass, module and batch are named.
    """
    retain_batches, forget_batches = reiterable(retain_batches), reiterable(forget_batches)
    tokens = max(
        _largest_batch(retain_batches, "retain Fisher"), _largest_batch(forget_batches, "forget Fisher")
    )
    budget = memory_bytes(memory_budget)
    groups = plan_groups(modules, tokens, budget)
    progress = progress and is_main_process()
    if progress:
        tqdm.write(_describe(groups, budget))
    scales = {}
    with gradients_for_activations_alone(model):
        for number, group in enumerate(groups, 1):
            suffix = f" {number}/{len(groups)}" if len(groups) > 1 else ""
            scores = _scores(
                model, group.modules, forget_batches, retain_batches, damping, damping_mode, suffix, progress
            )
            for name, score in scores.items():
                scales[name] = same_in_all_processes_(_normalised(score, name))
    return scales


class FisherGroup(NamedTuple):
    """Modules that are handled in one pair of passes, and the bytes that these hold."""

    modules: dict
    held: int = 0  # Fishers and inputs
    kernel: int = 0

    @property
    def bytes(self):
        return self.held + self.kernel


def _largest_batch(batches, description):
    """Tokens of the largest batch, padding included."""
    tokens = max((batch["input_ids"].numel() for batch in batches), default=None)
    if tokens is None:
        raise ValueError(f"no batch for the {description}")
    return tokens


def plan_groups(modules, tokens, budget):
    """The modules in groups, in their order, each as large as the budget (bytes or None) allows."""
    groups = [FisherGroup({})]
    for name, module in modules.items():
        weight = module.weight
        held = 4 * weight.numel() + tokens * weight.shape[1] * weight.element_size()
        alone = FisherGroup({name: module}, held, min(_KERNEL_BYTES, 12 * weight.numel()))
        if budget is not None and alone.bytes > budget:
            raise ValueError(
                f"{name} needs {_mebibytes(alone.bytes)} to measure its Fisher, more than the memory budget "
                f"of {_mebibytes(budget)}; raise the budget, take smaller batches (the largest has {tokens} "
                "tokens) or leave the module out of the target modules"
            )
        last = groups[-1]
        joined = FisherGroup({**last.modules, name: module}, last.held + held, max(last.kernel, alone.kernel))
        if budget is None or joined.bytes <= budget:
            groups[-1] = joined
        else:
            groups.append(alone)
    return groups


def _mebibytes(size):
    return f"{size / 2**20:.4g} MiB"


def _describe(groups, budget):
    modules = sum(len(group.modules) for group in groups)
    held, whole = max(group.bytes for group in groups), sum(group.held for group in groups)
    number = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
    limit = "" if budget is None else f" (budget {_mebibytes(budget)}, in one group {_mebibytes(whole)})"
    return (
        f"Fisher of {modules} modules in {number}, {2 * len(groups)} passes over the data: holds at most "
        f"{_mebibytes(held)} beside a forward and backward{limit}"
    )


def _scores(model, modules, forget_batches, retain_batches, damping, damping_mode, suffix, progress):
    """name -> (d,), s^2 before it is normalised. What it holds of the modules goes when it returns."""
    fishers = {name: _zeros(module, module.weight.shape) for name, module in modules.items()}
    count = _accumulate(model, modules, retain_batches, fishers, {}, f"retain Fisher{suffix}", progress)
    for fisher in fishers.values():
        fisher /= count
        mean = fisher.mean()
        unit = torch.where(mean > 0, mean, 1.0)  # no retain Fisher: that of the forget set decides
        fisher += damping * (unit if damping_mode == "relative" else 1.0)
    scores = {name: _zeros(module, module.weight.shape[:1]) for name, module in modules.items()}
    count = _accumulate(model, modules, forget_batches, scores, fishers, f"forget Fisher{suffix}", progress)
    return {name: score / count for name, score in scores.items()}


def _zeros(module, shape):
    return torch.zeros(shape, dtype=torch.float32, device=module.weight.device)


def _normalised(score, name):
    mean = score.mean()
    if mean == 0:
        warnings.warn(f"{name}: its Fisher information is zero, so its row scales are all 1", stacklevel=3)
        return torch.ones_like(score)
    return (score / mean).sqrt()


@contextmanager
def gradients_for_activations_alone(model):
    """Evaluation mode, no weight that needs a gradient, and a graph from the embedded tokens on."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    embedding = unwrapped(model).get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in training:
            module.training = mode


def _accumulate(model, modules, batches, totals, divisors, description, progress):
    """Add every sample's squared gradients to ``totals``; return the number of samples."""
    inputs = {}

    def capture(name):
        def forward_hook(module, args, output):
            if name in inputs:
                raise RuntimeError(
                    f"{name} is called more than once in a forward, so its gradient is a sum that is not "
                    "handled; leave it out of the target modules"
                )
            inputs[name] = args[0].detach()
            output.register_hook(backward_hook)

        def backward_hook(grad):
            x = inputs[name]
            inputs[name] = None  # used up, but the call is remembered
            accumulate_squared_grad_(totals[name], x, grad.to(x.dtype), divisors.get(name))

        return forward_hook

    handles = [module.register_forward_hook(capture(name)) for name, module in modules.items()]
    device = next(model.parameters()).device
    count, losses = 0, []
    try:
        batches = tqdm(batches, desc=description, disable=not progress, leave=False)
        for batch, counts in share_of_batches(batches):
            batch = {name: values.to(device) for name, values in model_tokens(batch).items()}
            if not counts:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            loss = negative_log_likelihood(model, batch)
            loss.backward()
            losses.append(loss.detach())
            missing = [name for name in modules if inputs.get(name, True) is not None]
            if missing:
                raise RuntimeError(f"{missing[0]} took no part in the forward and backward of the model")
            inputs.clear()
            count += len(batch["input_ids"]) if counts else 0
    finally:
        for handle in handles:
            handle.remove()
    for total in totals.values():
        sum_over_processes_(total)
    _check_finite(totals, losses, description)
    return sum_over_processes_(torch.tensor(count, device=device)).item()


def _check_finite(totals, losses, description):
    """FloatingPointError, naming the first module and batch, if a total or a loss has a NaN or Inf."""
    bad = next((name for name, total in totals.items() if not torch.isfinite(total.sum())), None)
    batches = (~torch.isfinite(torch.stack(losses))).nonzero().flatten().tolist()
    if bad is None and not batches:
        return
    where = "every module's is finite" if bad is None else f"{bad} is the first module whose is not"
    loss = f"the loss is not finite from batch {batches[0]} on" if batches else "every batch's loss is finite"
    raise FloatingPointError(
        f"{description}: the Fisher information is not finite ({where}; {loss}); nothing was initialised. "
        "Check the model's weights, measure in float32, or if the damping is 0 raise it"
    )
