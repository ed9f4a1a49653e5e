"""Generation that depends on the weights alone: not on the batch, nor on the model's own settings.

It is greedy, or it samples by given numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from loku.counts import check_counts
from loku.data import token_limits
from loku.interrupts import uninterrupted_context
from loku.models import CausalLM, evaluating, model_device, unwrapped

PROBE_TOKENS = 16  # tokens of a probe's prompt at most, and of its padding
# Rounding changes logits by less than these shares of their range.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def generate_greedy(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Iterable[int],
    batch_size: int = 16,
    eos_token_id: int | Collection[int] | None = None,
    progress: bool = True,
    description: str = "generating",
) -> list[list[int]]:
    """Continue token lists greedily.

    Batches use the KV cache. Prompts with similar numbers of new tokens share a batch, padded on the left.
    Some recurrent models read the padding too, such as RecurrentGemma: the prompts of a batch then have one
    length. Others mix the rows of any batch, such as RWKV: a prompt is then a batch of its own. A probe of
    the model tells. The model's ``generation_config`` counts for its EOS alone.

    Args:
        model: The causal LM, on the device where it runs.
        prompts: The prompts, non-empty lists of ids.
        max_new_tokens: The greatest number of new tokens, one for each prompt.
        batch_size: The number of prompts in a batch, 16 by default.
        eos_token_id: The id or ids at which a continuation ends; None (default) stands for the model's own.
        progress: Whether to show a progress bar, True by default.
        description: The title of the progress bar, "generating" by default.

    Returns:
        The new ids of each prompt. A continuation ends after its first EOS, at its greatest number of tokens,
        or at the end of the model's context.

    Raises:
        ValueError: ``batch_size`` is less than 1.
        FloatingPointError: The logits of a continuation have a NaN.
    """
    return _generate_all(
        model,
        prompts,
        max_new_tokens,
        batch_size,
        eos_token_id,
        progress,
        description,
        lambda chosen: _NaNCheck(),
    )


def generate_sampled(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    keys: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    eos_token_id: int | Collection[int] | None = None,
    progress: bool = True,
    description: str = "sampling",
) -> list[list[int]]:
    """Continue token lists by sampling.

    A token is the inverse of the cumulative distribution of the nucleus, the likeliest tokens first, at a
    uniform number (Holtzman et al., ICLR 2020). The numbers of a prompt follow from its key alone, so a
    sample depends neither on the batch nor on torch's generator. Batches are those of ``generate_greedy``.

    Args:
        model: The causal LM, on the device where it runs.
        prompts: The prompts, non-empty lists of ids.
        max_new_tokens: The greatest number of new tokens, one for each prompt.
        keys: The seed of each prompt's numbers, a list of integers >= 0.
        temperature: The number by which the logits are divided, > 0; 1 by default.
        top_p: The probability of the nucleus, in (0, 1]; 1 by default, the whole vocabulary.
        batch_size: The number of prompts in a batch, 16 by default.
        eos_token_id: The id or ids at which a continuation ends; None (default) stands for the model's own.
        progress: Whether to show a progress bar, True by default.
        description: The title of the progress bar, "sampling" by default.

    Returns:
        The new ids of each prompt, as from ``generate_greedy``.

    Raises:
        ValueError: ``batch_size`` is less than 1, or the temperature or ``top_p`` is out of its range.
        FloatingPointError: The logits of a continuation have a NaN.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")

    def sampler(chosen: Sequence[int]) -> _Sampler:
        steps = max(max_new_tokens[i] for i in chosen)
        numbers = [np.random.default_rng(list(keys[i])).random(steps) for i in chosen]
        return _Sampler(torch.from_numpy(np.stack(numbers)), temperature, top_p)

    return _generate_all(
        model, prompts, max_new_tokens, batch_size, eos_token_id, progress, description, sampler
    )


def _generate_all(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Iterable[int],
    batch_size: int,
    eos_token_id: int | Collection[int] | None,
    progress: bool,
    description: str,
    processor_of: Callable[[Sequence[int]], _NaNCheck],
) -> list[list[int]]:
    """Continue token lists, with a logits processor for each batch, which is given the batch's indices."""
    check_counts(batch_size=batch_size)
    if eos_token_id is None:
        eos_token_id = eos_ids(model)
    eos = [eos_token_id] if isinstance(eos_token_id, int) else sorted(eos_token_id)
    context = token_limits(model).context or math.inf
    lengths = [
        min(length, context - len(prompt)) for prompt, length in zip(prompts, max_new_tokens, strict=True)
    ]
    wanted = [i for i, length in enumerate(lengths) if length > 0]
    generated: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), _empty_generation_config(model):
        batches = _right_batches(model, prompts, wanted, lengths, batch_size, context)
        for chosen in tqdm(batches, desc=description, disable=not progress, leave=False):
            check = processor_of(chosen)
            output = _generate(model, [prompts[i] for i in chosen], int(lengths[chosen[0]]), eos, check)
            for row, (index, tokens) in enumerate(zip(chosen, output.tolist(), strict=True)):
                generated[index] = until_eos(tokens[: int(lengths[index])], eos)
                if check.found is not None and check.found[row]:
                    raise FloatingPointError(
                        f"{description}: the model's logits have a NaN after prompt {index}, so its measures "
                        f"would mean nothing: the weights are broken, or the dtype overflows"
                    )
    return generated


def eos_ids(model: CausalLM) -> list[int]:
    """Return the model's end-of-sequence ids in ascending order; chat models have several."""
    sources = (getattr(model, "generation_config", None), model.config)
    eos: Any = next((e for s in sources if (e := getattr(s, "eos_token_id", None)) is not None), [])
    return [eos] if isinstance(eos, int) else sorted(eos)


def until_eos(tokens: list[int], eos: Collection[int]) -> list[int]:
    """Return the tokens up to the first EOS, with it."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]


class _NaNCheck:
    """A logits processor that remembers, on the device, the rows whose logits had a NaN."""

    found: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        now = scores.isnan().any(-1)
        self.found = now if self.found is None else self.found | now
        return scores


class _Sampler(_NaNCheck):
    """A logits processor that leaves one sampled token of each row, so that greedy generation takes it.

    Args:
        numbers: The uniform numbers in [0, 1) of each row and step, float64 (rows, steps).
        temperature: As for ``generate_sampled``.
        top_p: As for ``generate_sampled``.
    """

    def __init__(self, numbers: torch.Tensor, temperature: float, top_p: float):
        self.numbers, self.temperature, self.top_p = numbers, temperature, top_p
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        super().__call__(input_ids, scores)
        ordered, tokens = (scores.double() / self.temperature).sort(dim=-1, descending=True, stable=True)
        reached = ordered.softmax(-1).cumsum(-1)
        within = reached - ordered.softmax(-1) < self.top_p  # the first token always is
        mass = reached.masked_fill(~within, 0.0).amax(-1)
        at = (self.numbers[:, self.step].to(mass.device) * mass)[:, None]
        self.step += 1
        place = torch.minimum((reached <= at).sum(-1, keepdim=True), within.sum(-1, keepdim=True) - 1)
        place = place.clamp(min=0)  # no token of NaN logits is within
        chosen = tokens.gather(-1, place)
        return torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)


@uninterrupted_context
def _empty_generation_config(model: CausalLM) -> Iterator[None]:
    """Take the model's own generation config away, and put it back.

    ``generate`` fills every setting that it is not given from there: suppressed tokens, stop strings,
    penalties, time limits, watermarks, and whatever the next version of transformers knows.
    """
    from transformers import GenerationConfig

    # peft copies a config of the wrapper to the base.
    owners = [m for m in {model, unwrapped(model)} if "generation_config" in vars(m)]
    own = [m.generation_config for m in owners]
    for owner in owners:
        setattr(owner, "generation_config", GenerationConfig())  # noqa: B010  # nn.Module types no such field
    try:
        yield
    finally:
        for owner, config in zip(owners, own, strict=True):
            setattr(owner, "generation_config", config)  # noqa: B010


def _generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    length: int,
    eos: Sequence[int],
    processor: Any = None,
    **kwargs: Any,
) -> Any:
    """Continue prompts in one batch, padded on the left.

    Returns:
        The new tokens, int64 (prompts, at most ``length``); with ``output_logits``, the whole output.
    """
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,
        **kwargs,
    )
    generate: Any = model.generate
    device = model_device(model)
    output = generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=None if processor is None else [processor],
    )
    return output if kwargs else output[:, width:]


def _right_batches(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[int],
    lengths: Sequence[float],
    batch_size: int,
    context: float,
) -> list[list[int]]:
    """Group prompts into batches in which the model continues a prompt as it does alone."""
    widths = [len(prompt) for prompt in prompts]
    batches = _batches(wanted, widths, lengths, batch_size, context)
    if any(len({widths[i] for i in batch}) > 1 for batch in batches):
        if _same_as_alone(model, [prompts[i] for i in wanted], PROBE_TOKENS, context):
            return batches
        of_width = defaultdict(list)
        for index in wanted:
            of_width[widths[index]].append(index)
        batches = [
            batch
            for same in of_width.values()
            for batch in _batches(same, widths, lengths, batch_size, context)
        ]
    if any(len(batch) > 1 for batch in batches) and not _same_as_alone(
        model, [prompts[i] for i in wanted], 0, context
    ):
        batches = [[index] for batch in batches for index in batch]
    return batches


def _same_as_alone(model: CausalLM, prompts: Sequence[Sequence[int]], padding: int, context: float) -> bool:
    """Whether another row in the batch changes the logits of two new tokens by rounding alone.

    Args:
        model: The causal LM.
        prompts: Prompts, from which the probe is made.
        padding: The number of tokens by which the other row is longer.
        context: The greatest number of tokens that the model takes.
    """
    shortest: Sequence[int] = min(prompts, key=len)
    prompt = list(shortest[:PROBE_TOKENS])
    width = len(prompt) + padding
    if width + 2 > context:
        return False
    other = [token for ids in prompts for token in ids[: width + 1]][::-1]
    other = (other * width)[:width]
    alone, together = (
        _generate(model, rows, 2, [], output_logits=True, return_dict_in_generate=True).logits
        for rows in ([prompt], [prompt, other])
    )
    dtype: Any = unwrapped(model).dtype
    tolerance = ROUNDING.get(dtype, ROUNDING[torch.bfloat16])
    for expected, found in zip(alone, together, strict=True):
        expected, found = expected[0], found[0]
        known = expected.isfinite()
        extent = expected[known].max() - expected[known].min()
        if not (expected - found)[known].abs().max() <= tolerance * extent:  # NaN is not less
            return False
        if expected.argmax() != found.argmax():  # a near tie: the second tokens follow different ones
            break
    return True


def _batches(
    wanted: Iterable[int],
    widths: Sequence[int],
    lengths: Sequence[float],
    batch_size: int,
    context: float,
) -> list[list[int]]:
    """Group prompts into batches.

    The first prompt of a batch needs the most new tokens. The longest prompt of a batch and the most new
    tokens together fit into the context.

    Args:
        wanted: The indices of the prompts.
        widths: The number of tokens of each prompt.
        lengths: The number of new tokens of each prompt.
        batch_size: The greatest number of prompts in a batch.
        context: The greatest number of tokens that the model takes.

    Returns:
        The indices of the prompts in each batch.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(wanted, key=lambda i: (-lengths[i], -widths[i])):
        width = max(width, widths[index])
        if not batches or len(batches[-1]) == batch_size or width + lengths[batches[-1][0]] > context:
            batches.append([])
            width = widths[index]
        batches[-1].append(index)
    return batches
