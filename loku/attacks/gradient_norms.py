"""The norm of the gradient of each row's loss, without a copy of the model and without a gradient kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from loku.data import collate
from loku.interrupts import uninterrupted_context
from loku.models import CausalLM, evaluating, model_device


def gradient_norms(
    model: CausalLM,
    rows: Sequence[Mapping[str, Any]],
    progress: bool = False,
    description: str = "gradient norms",
) -> list[float]:
    """Compute the norm of the gradient of each row's mean token loss.

        mean over the parameter tensors W of || d loss / d W ||_2

    It is open-unlearning's ``GradNormAttack`` with p = 2, after Wang et al. (2024, arXiv:2402.17012). Dropout
    is off. The gradient is by all weights in floating point, also by those that do not train. A LoRA adapter
    counts as merged: the gradient by a weight beneath it is that by the sum, so its factors are left out.

    A gradient is dropped as soon as its norm is known, so one tensor's gradient is in memory at a time,
    beside the activations of one row.

    Args:
        model: The causal LM, on the device where it runs. Its gradients and flags stay as they are.
        rows: The tokenised rows, each with a labelled token.
        progress: Whether to show a progress bar, False by default.
        description: The title of the progress bar.

    Returns:
        The norm of each row, >= 0. It is small for a row that the model fits well.

    Raises:
        FloatingPointError: A norm is NaN.
    """
    device = model_device(model)
    found: list[float] = []
    with evaluating(model), _norms_of_gradients(_weights(model)) as norms, torch.enable_grad():
        for index, row in enumerate(tqdm(rows, desc=description, disable=not progress, leave=False)):
            batch = {key: value.to(device) for key, value in collate([row], pad_token_id=0).items()}
            labels = batch.pop("labels")[0, 1:]  # logits at position i predict token i + 1
            logits = model(**batch, use_cache=False).logits[0, :-1]
            exact = torch.promote_types(logits.dtype, torch.float32)
            nn.functional.cross_entropy(logits.to(exact), labels.to(logits.device)).backward()
            mean = sum(norm.item() for norm in norms) / len(norms)
            norms.clear()
            if math.isnan(mean):
                raise FloatingPointError(
                    f"{description}: row {index}: the norm of the gradient is NaN: the dtype overflows, or "
                    "the weights are broken"
                )
            found.append(mean)
    return found


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a model in floating point, without the factors of its adapters."""
    factors: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for name in layer.adapter_layer_names:
                part: Any = getattr(layer, name, None)
                if isinstance(part, (nn.ModuleDict, nn.ParameterDict)):
                    factors |= {id(parameter) for parameter in part.parameters()}
    return [p for p in model.parameters() if p.is_floating_point() and id(p) not in factors]


@uninterrupted_context
def _norms_of_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Let parameters have gradients, of which only the norms are kept, and then put them back.

    Yields:
        A list, to which each backward adds the norms of the gradients of the parameters that it reaches.
    """
    norms: list[Tensor] = []

    def keep_norm(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            exact = torch.promote_types(gradient.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(gradient, dtype=exact))
            parameter.grad = None

    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    hooks = []
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(keep_norm))
        yield norms
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, (trained, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(trained)
            parameter.grad = gradient
