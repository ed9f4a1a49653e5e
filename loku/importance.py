"""How much each row of a weight matters to the forget set and not to the retain set: FILA's row scales.

    s_i^2 = sum_j F_forget[i, j] / (F_retain[i, j] + damping)

F is the diagonal of the empirical Fisher, the mean over samples of the squared gradient of the sample's
log-likelihood (Eq. 2). The score is linear in the forget samples, so the retain pass comes first, its Fisher
is the only matrix that is held, and the forget pass adds straight to one number a row.
"""

import warnings
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from loku.head import negative_log_likelihood, unwrapped
from loku_kernels import accumulate_squared_grad_


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

    Args:
        model: a causal LM, peft wrappers included. Its weights, their ``requires_grad`` and its mode are what
            they were afterwards.
        modules: name -> ``torch.nn.Linear`` of ``model``. Each may be called once in a forward.
        forget_batches, retain_batches: iterables, iterated once for each group of modules, of dicts with
            ``input_ids``, ``attention_mask`` and ``labels`` (B, T). How samples are grouped and padded does
            not change the result.
        damping: added to the retain Fisher; relative to the module's mean retain Fisher, or with
            ``damping_mode="absolute"`` as it is (the official code's is 1e-5).
        memory_budget: bytes that retain Fishers (4 a weight) may take; the modules are then handled in
            groups, each with its own pair of passes. None for one group.
        progress: show a progress bar.

    Returns:
        name -> (d,), float32, on the module's device. All ones, with a warning that names the module, where
        the scales are zero.

    Raises:
        ValueError: no batch in a set. RuntimeError: a module is called twice, or not at all, in a forward.
        FloatingPointError: a Fisher or a loss is NaN or Inf; the pass, module and batch are named.
    """
    scales = {}
    groups = _groups(modules, memory_budget)
    with _gradients_for_activations_alone(model):
        for number, group in enumerate(groups, 1):
            suffix = f" {number}/{len(groups)}" if len(groups) > 1 else ""
            retain = {name: _zeros(module, module.weight.shape) for name, module in group.items()}
            count = _accumulate(model, group, retain_batches, retain, {}, f"retain Fisher{suffix}", progress)
            for fisher in retain.values():
                fisher /= count
                mean = fisher.mean()
                unit = torch.where(mean > 0, mean, 1.0)  # no retain Fisher: that of the forget set decides
                fisher += damping * (unit if damping_mode == "relative" else 1.0)
            scores = {name: _zeros(module, module.weight.shape[:1]) for name, module in group.items()}
            count = _accumulate(
                model, group, forget_batches, scores, retain, f"forget Fisher{suffix}", progress
            )
            for name, score in scores.items():
                scales[name] = _normalised(score / count, name)
    return scales


def _zeros(module, shape):
    return torch.zeros(shape, dtype=torch.float32, device=module.weight.device)


def _groups(modules, memory_budget):
    groups, held = [{}], 0
    for name, module in modules.items():
        size = 4 * module.weight.numel()
        if memory_budget is not None and groups[-1] and held + size > memory_budget:
            groups.append({})
            held = 0
        groups[-1][name] = module
        held += size
    return groups


def _normalised(score, name):
    mean = score.mean()
    if mean == 0:
        warnings.warn(f"{name}: its Fisher information is zero, so its row scales are all 1", stacklevel=3)
        return torch.ones_like(score)
    return (score / mean).sqrt()


@contextmanager
def _gradients_for_activations_alone(model):
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
        for batch in tqdm(batches, desc=description, disable=not progress, leave=False):
            batch = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
            loss = negative_log_likelihood(model, batch)
            loss.backward()
            losses.append(loss.detach())
            missing = [name for name in modules if inputs.get(name, True) is not None]
            if missing:
                raise RuntimeError(f"{missing[0]} took no part in the forward and backward of the model")
            inputs.clear()
            count += len(batch["input_ids"])
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError(f"no batch for the {description}")
    _check_finite(totals, losses, description)
    return count


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
