"""FILA's row scales: the importance of each row of a weight to the forget set and not to the retain set.

    s_i^2 = sum_j F_forget[i, j] / (F_retain[i, j] + damping)

F is the diagonal of the empirical Fisher: the mean over samples of the squared gradient of the sample's
log-likelihood (Eq. 2). The squared row scale is linear in the forget samples. So the retain pass comes first,
and its Fisher is the only matrix that is held. The forget pass adds to one number a row.

The authors' code has another Fisher: the mean over batches, weighted by their label tokens, of the squared
gradient of a batch's mean loss. So a batch takes the place of a sample. The gradient of a mean loss over n
tokens is n times smaller than that of their summed loss. So this Fisher is about n squared times smaller, and
an absolute damping has another unit.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loku.adapters import linear_weight
from loku.data.rows import IGNORE_INDEX
from loku.distributed import (
    is_main_process,
    same_in_all_processes_,
    share_of_batches,
    sum_over_processes_,
)
from loku.fila.sample_layout import by_row, check_rows_are_apart
from loku.fila.settings import Balance, Fisher, memory_bytes
from loku.head import model_tokens, negative_log_likelihood
from loku.interrupts import uninterrupted_context
from loku.models import evaluating, model_device, unwrapped
from loku_kernels import accumulate_squared_grad_

_KERNEL_BYTES = 8 << 20  # the most bytes that ``accumulate_squared_grad_`` allocates
# The activations of more tokens would be the second largest part of a card's memory, and gain no speed.
_DEVICE_TOKENS = 1024

Batches = Iterable[Mapping[str, Tensor]]


def reiterable(batches: Batches) -> Batches:
    """The batches, or a list of them if they can be iterated only once."""
    return list(batches) if iter(batches) is batches else batches


def fisher_row_scales(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    forget_batches: Batches,
    retain_batches: Batches,
    *,
    damping: float = 1.0,
    damping_mode: Literal["relative", "absolute"] = "relative",
    fisher: Fisher = "per-sample",
    memory_budget: int | str | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Measure the row scales of linear modules.

    All processes of torch.distributed must call this, with the same batches in the same order. Each process
    of n runs every n-th batch, and all get the same row scales. The weights may be sharded (FSDP2).

    Args:
        model: The causal LM, with peft's wrappers or without. Its weights, their ``requires_grad`` and its
            mode are afterwards as before.
        modules: The linear modules of ``model`` to measure, by their names: ``torch.nn.Linear`` or
            transformers' Conv1D. A forward may call each once. Their inputs may be flattened, such as
            (B * T, k), but must have the tokens of one row after the other.
        forget_batches: An iterable of dicts with ``input_ids``, ``attention_mask`` and ``labels`` (B, T),
            int64. It is iterated several times; an iterator is read into a list. The grouping and padding of
            the samples do not change the result of the per-sample Fisher. A card takes at most 1024 tokens,
            or one row, in a forward: it takes the rows of a larger batch in parts.
        retain_batches: The batches of the retain set, as for ``forget_batches``.
        damping: The number that is added to the retain Fisher, >= 0; 1 by default.
        damping_mode: "relative" (default) multiplies the damping by the mean retain Fisher of the module.
            "absolute" takes it as it is, in the unit of the Fisher. The authors' code has 1e-5 in the unit of
            the per-batch Fisher.
        fisher: The kind of Fisher. "per-sample" (default) is Eq. 2: the mean over rows of the squared
            gradient of a row's loss, which is summed over its label tokens. "per-batch" is that of the
            authors' code: the mean over batches, weighted by their label tokens, of the squared gradient of a
            batch's mean loss. It depends on the grouping of the rows, and a batch is never taken in parts.
        memory_budget: The memory that may be held on a device beside a forward and backward without weight
            gradients: a size like "4GiB", a number of bytes, or None (default) for no limit. It pays for the
            retain Fishers, float32, 4 bytes a weight, and for the modules' inputs of the largest forward. The
            modules are measured in as many groups as the budget needs, and each group takes its own pair of
            passes over the data. There is one group without a limit.
        progress: Whether to print the number of passes and the memory that they hold, and to show a progress
            bar.

    Returns:
        The row scales (d,), float32, of each module, on the module's device, as measured: ``balanced``
        normalises them. They are all 1 if the module's Fisher is zero, and a warning names the module.

    Raises:
        ValueError: A set has no batch. One module alone needs more than the memory budget. Or the inputs of a
            module cannot be told apart by rows. The message names the module.
        RuntimeError: A forward calls a module twice or never, or a module takes no part in the gradient.
        FloatingPointError: A Fisher or a loss is NaN or Inf. The message names the pass, module and batch.
    """
    retain_batches, forget_batches = reiterable(retain_batches), reiterable(forget_batches)
    limit = None if fisher == "per-batch" else _token_limit(model_device(model))
    tokens = max(
        _largest_batch(retain_batches, "retain Fisher", limit),
        _largest_batch(forget_batches, "forget Fisher", limit),
    )
    budget = memory_bytes(memory_budget)
    groups = plan_groups(modules, tokens, budget)
    progress = progress and is_main_process()
    if progress:
        tqdm.write(_describe(groups, budget))
    check_rows_are_apart(model, modules)
    row_scales = {}
    with gradients_for_activations_alone(model):
        for number, group in enumerate(groups, 1):
            suffix = f" {number}/{len(groups)}" if len(groups) > 1 else ""
            accumulate = partial(
                _accumulate, model, group.modules, kind=fisher, limit=limit, progress=progress
            )
            squared = _squared_row_scales(
                accumulate, group.modules, forget_batches, retain_batches, damping, damping_mode, suffix
            )
            for name, squares in squared.items():
                row_scales[name] = same_in_all_processes_(_row_scales(squares, name))
    return row_scales


def balanced(row_scales: Mapping[str, Tensor], balance: Balance) -> dict[str, Tensor]:
    """Multiply the row scales of each module by one number, which chooses the balance of A and B.

    FILA's factors of c * s, for a number c > 0, are sqrt(c) A and B / sqrt(c). B A stays.

    Args:
        row_scales: The row scales (d,) of each module, as measured.
        balance: "normalised" divides them by their root mean square in the module, "paper" leaves them as
            they are, and a number c multiplies the normalised ones.

    Returns:
        The row scales in that balance. Scales that are all 0 stay 0.
    """
    if balance == "paper":
        return dict(row_scales)
    factor = 1.0 if balance == "normalised" else float(balance)
    result = {}
    for name, scales in row_scales.items():
        largest = scales.amax()  # squares of small scales might be 0
        relative = scales / torch.where(largest > 0, largest, 1.0)
        mean = relative.square().mean()
        result[name] = relative * (factor / torch.where(mean > 0, mean, 1.0).sqrt())
    return result


class FisherGroup(NamedTuple):
    """Modules that are measured in one pair of passes, and the bytes that the passes hold.

    Args:
        modules: The linear modules by their names.
        held: The bytes of the retain Fishers and the modules' inputs; 0 by default.
        kernel: The bytes that the kernel allocates for itself; 0 by default.
    """

    modules: dict[str, nn.Linear]
    held: int = 0
    kernel: int = 0

    @property
    def bytes(self) -> int:
        """All bytes that the passes hold."""
        return self.held + self.kernel


def _token_limit(device: torch.device) -> int | None:
    """The most tokens that a forward takes at once, if it can take fewer; None on the CPU."""
    return None if device.type == "cpu" else _DEVICE_TOKENS


def _parts(batches: Batches, limit: int | None) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    """Yield the number and the rows of each batch, in equal parts of at most ``limit`` tokens or one row."""
    for number, batch in enumerate(batches):
        rows, length = batch["input_ids"].shape
        most = rows if limit is None else max(1, limit // length)
        if rows <= most:
            yield number, batch
            continue
        parts = -(-rows // most)
        step = -(-rows // parts)
        for start in range(0, rows, step):
            yield number, {name: x[start : start + step] for name, x in model_tokens(batch).items()}


def _largest_batch(batches: Batches, description: str, limit: int | None) -> int:
    """The number of tokens of the largest part of a batch, with its padding."""
    tokens = max((part["input_ids"].numel() for _, part in _parts(batches, limit)), default=None)
    if tokens is None:
        raise ValueError(f"no batch for the {description}")
    return tokens


def plan_groups(modules: Mapping[str, nn.Linear], tokens: int, budget: int | None) -> list[FisherGroup]:
    """Divide modules into groups, in their order, each as large as the memory budget allows.

    Args:
        modules: The linear modules by their names.
        tokens: The number of tokens of the largest batch, with its padding.
        budget: The memory budget in bytes, or None for one group.

    Raises:
        ValueError: One module alone needs more than the budget.
    """
    groups = [FisherGroup({})]
    for name, module in modules.items():
        weight = linear_weight(module)
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


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.4g} MiB"


def _describe(groups: list[FisherGroup], budget: int | None) -> str:
    modules = sum(len(group.modules) for group in groups)
    held, whole = max(group.bytes for group in groups), sum(group.held for group in groups)
    number = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
    limit = "" if budget is None else f" (budget {_mebibytes(budget)}, in one group {_mebibytes(whole)})"
    return (
        f"Fisher of {modules} modules in {number}, {2 * len(groups)} passes over the data: holds at most "
        f"{_mebibytes(held)} beside a forward and backward{limit}"
    )


def _squared_row_scales(
    accumulate: Callable[..., int],
    modules: Mapping[str, nn.Linear],
    forget_batches: Batches,
    retain_batches: Batches,
    damping: float,
    damping_mode: str,
    suffix: str,
) -> dict[str, Tensor]:
    """The squared row scales (d,), float32, of each module.

    ``accumulate`` is ``_accumulate`` for these modules. The retain Fishers are freed at the end.
    """
    fishers = {name: _zeros(module, linear_weight(module).shape) for name, module in modules.items()}
    count = accumulate(retain_batches, fishers, {}, f"retain Fisher{suffix}")
    for fisher in fishers.values():
        fisher /= max(count, 1)  # a per-batch Fisher counts label tokens, and there may be none
        mean = fisher.mean()
        unit = torch.where(mean > 0, mean, 1.0)  # without a retain Fisher the forget Fisher decides
        fisher += damping * (unit if damping_mode == "relative" else 1.0)
    sums = {name: _zeros(module, linear_weight(module).shape[:1]) for name, module in modules.items()}
    count = accumulate(forget_batches, sums, fishers, f"forget Fisher{suffix}")
    return {name: total / max(count, 1) for name, total in sums.items()}


def _zeros(module: nn.Linear, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=module.weight.device)


def _row_scales(squares: Tensor, name: str) -> Tensor:
    if not squares.any():
        warnings.warn(f"{name}: its Fisher information is zero, so its row scales are all 1", stacklevel=3)
        return torch.ones_like(squares)
    return squares.sqrt()


@uninterrupted_context
def gradients_for_activations_alone(model: nn.Module) -> Iterator[None]:
    """A context in evaluation mode, in which no weight needs a gradient and the embedded tokens do.

    Args:
        model: The causal LM. Its mode and the ``requires_grad`` of its parameters are afterwards as before.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    base: Any = unwrapped(model)
    handle = base.get_input_embeddings().register_forward_hook(
        # A copy, because some models (CTRL) scale the embedded tokens in place, which a leaf forbids.
        lambda module, args, output: output.detach().requires_grad_().clone()
    )
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _accumulate(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    batches: Batches,
    totals: Mapping[str, Tensor],
    divisors: Mapping[str, Tensor],
    description: str,
    *,
    kind: Fisher,
    limit: int | None,
    progress: bool,
) -> int:
    """Add every sample's squared gradients to ``totals``; return the number of samples.

    For the per-batch Fisher a sample is a batch, with a weight of its number of label tokens. The weights are
    inside the losses, and their sum is returned.
    """
    inputs: dict[str, Tensor | None] = {}
    samples = 0

    def capture(name: str) -> Callable[..., None]:
        def forward_hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if name in inputs:
                raise RuntimeError(
                    f"{name} is called more than once in a forward, so its gradient is a sum that is not "
                    "handled; leave it out of the target modules"
                )
            if not output.requires_grad:
                raise RuntimeError(
                    f"{name} takes no part in the gradient of the model (it computes without one), so it has "
                    "no Fisher; leave it out of the target modules"
                )
            inputs[name] = args[0].detach()
            output.register_hook(backward_hook)

        def backward_hook(grad: Tensor) -> None:
            x = inputs[name]
            assert x is not None
            inputs[name] = None  # freed; the key remembers the call
            x, grad = by_row(x, samples), by_row(grad.to(x.dtype), samples)
            accumulate_squared_grad_(totals[name], x, grad, divisors.get(name))

        return forward_hook

    handles = [module.register_forward_hook(capture(name)) for name, module in modules.items()]
    device = model_device(model)
    count, losses, numbers = 0, [], []
    try:
        shown = tqdm(batches, desc=description, disable=not progress, leave=False)
        for (number, batch), counts in share_of_batches(_parts(shown, limit)):
            batch = {name: values.to(device) for name, values in model_tokens(batch).items()}
            if not counts:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            loss = negative_log_likelihood(model, batch)
            if kind == "per-batch":
                samples, weight = 1, _label_tokens(batch["labels"])
                # The squared gradient of the mean loss over the predicted labels, times all labels, as there.
                loss = loss * (weight**0.5 / max(_label_tokens(batch["labels"][:, 1:]), 1))
            else:
                samples = weight = len(batch["input_ids"])
            loss.backward()
            losses.append(loss.detach())
            numbers.append(number)
            missing = [name for name in modules if inputs.get(name, True) is not None]
            if missing:
                raise RuntimeError(f"{missing[0]} took no part in the forward and backward of the model")
            inputs.clear()
            count += weight if counts else 0
    finally:
        for handle in handles:
            handle.remove()
    for total in totals.values():
        sum_over_processes_(total)
    _check_finite(totals, losses, numbers, description)
    return int(sum_over_processes_(torch.tensor(count, dtype=torch.int64, device=device)).item())


def _label_tokens(labels: Tensor) -> int:
    return int((labels != IGNORE_INDEX).sum())


def _check_finite(
    totals: Mapping[str, Tensor], losses: list[Tensor], numbers: list[int], description: str
) -> None:
    """Raise FloatingPointError if a total or a loss has a NaN or Inf. It names the first module and batch.

    ``numbers`` has the number of the batch of each loss.
    """
    bad = next((name for name, total in totals.items() if not torch.isfinite(total.sum())), None)
    finite = torch.isfinite(torch.stack(losses)).tolist()
    batches = [number for number, good in zip(numbers, finite, strict=True) if not good]
    if bad is None and not batches:
        return
    where = "every module's is finite" if bad is None else f"{bad} is the first module whose is not"
    loss = f"the loss is not finite from batch {batches[0]} on" if batches else "every batch's loss is finite"
    raise FloatingPointError(
        f"{description}: the Fisher information is not finite ({where}; {loss}); nothing was initialised. "
        "Check the model's weights, measure in float32, or if the damping is 0 raise it"
    )
