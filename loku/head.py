"""A causal LM's forward that yields softmax triplets and never the logits.

The model is called as usual, with its wrappers and hooks. While it runs, the forward of its output embedding
is the fused linear operator on the labelled rows. Its output ``logits`` then has three numbers a token, and
one more for each quantity of ``loku.token_values``. Sharding wrappers gather and cast the weight where they
always do.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from loku.data.rows import IGNORE_INDEX
from loku.interrupts import uninterrupted_context
from loku.models import evaluating, model_device, unwrapped
from loku_kernels import (
    cross_entropy,
    linear_softmax_triplet,
    softmax_triplet,
)

# A softcap c that changes no number below 2^30, for models that always apply theirs: y / c and c * y are
# exact, and tanh(y / c) is y / c.
_NO_CAP = 2.0**60
# The settings by which transformers' models change their logits after the output embedding. The key is the
# name of an attribute of the config, of the model or of its base model. The value has the neutral value of
# the attribute and a function from other values to arguments of the operator.
_POSTPROCESSING: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
    "final_logit_softcapping": (None, lambda value: {"softcap": value}),  # Gemma
    "logits_soft_cap": (_NO_CAP, lambda value: {"softcap": value}),  # RecurrentGemma
    "output_logit_soft_cap": (None, lambda value: {"softcap": value}),  # xLSTM
    "logit_scale": (1.0, lambda value: {"logit_scale": value}),  # Cohere
    "logits_scaling": (1.0, lambda value: {"logit_scale": 1 / value}),  # Granite
    "lm_head_multiplier": (1.0, lambda value: {"logit_scale": value}),  # Falcon-H1
}
# Model types that mean something else by such a name.
_OTHER_MEANINGS: dict[tuple[str, str], Callable[[Any], dict[str, Any]] | None] = {
    ("hyperclovax", "logits_scaling"): lambda value: {"logit_scale": value},  # a factor, not a divisor
    ("minicpm3", "logits_scaling"): None,  # it divides the hidden states, before the output embedding
}


def output_embedding(model: nn.Module) -> nn.Linear:
    """The output embedding of a causal LM.

    Args:
        model: The causal LM, with the wrappers of DDP and peft or without.

    Raises:
        ValueError: There is none, or it is not a plain, unquantised ``torch.nn.Linear``.
    """
    base: Any = unwrapped(model)
    kind = type(base).__name__
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{kind} has no output embedding (get_output_embeddings()); pass a causal LM")
    # FSDP2 replaces the type by a class of its own. So the check looks at the forward.
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or not head.weight.is_floating_point():
        raise ValueError(
            f"the output embedding of {kind} is a {type(head).__name__}; it must be a plain, unquantised "
            "torch.nn.Linear that is not a LoRA target"
        )
    return head


def _settings(base: Any) -> Iterator[tuple[Any, str, Any, dict[str, Any]]]:
    """(owner, attribute, neutral value, operator arguments) of each post-processing that is switched on."""
    config = base.config.get_text_config()
    owners = {id(owner): owner for owner in (config, base, getattr(base, "base_model", base))}
    for owner in owners.values():
        for name, (neutral, arguments) in _POSTPROCESSING.items():
            value = getattr(owner, name, None)
            known: Any = _OTHER_MEANINGS.get((config.model_type, name), arguments)
            if isinstance(value, (int, float)) and value != neutral and known is not None:
                yield owner, name, neutral, known(value)


def postprocessing(model: nn.Module) -> dict[str, Any]:
    """The ``softcap`` and the ``logit_scale`` that a causal LM applies to its logits; none that is neutral.

    Args:
        model: The causal LM without the wrappers of peft and of sharding.
    """
    found: dict[str, Any] = {}
    for *_, arguments in _settings(model):
        found |= arguments
    return found


@uninterrupted_context
def _neutral(settings: list[tuple[Any, str, Any, dict[str, Any]]]) -> Iterator[None]:
    """A context in which the attributes of ``_settings`` are neutral."""
    with ExitStack() as stack:
        for owner, name, neutral, _ in settings:
            name = getattr(owner, "attribute_map", {}).get(name, name)
            # Some configs check what is assigned, and Gemma3n's refuses None. The model reads the value only.
            stack.callback(object.__setattr__, owner, name, getattr(owner, name))
            object.__setattr__(owner, name, neutral)
        yield


@uninterrupted_context
def _computing(model: nn.Module, compute: Callable[..., Tensor], shape: torch.Size) -> Iterator[None]:
    """A context in which the output embedding's forward is ``compute(hidden, head, **postprocessing)``.

    Args:
        model: The causal LM.
        compute: The function. It takes the hidden states (B, T, D), the output embedding and the arguments of
            the operator.
        shape: The shape (B, T) of the tokens, which the hidden states must have.

    Raises:
        RuntimeError: The hidden states have another shape, or the output embedding is not called exactly
            once.
    """
    base, head = unwrapped(model), output_embedding(model)
    settings = list(_settings(base))
    arguments = postprocessing(base)
    calls = 0

    def forward(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if hidden.shape[:-1] != shape:
            raise RuntimeError(
                f"the output embedding of {type(base).__name__} got hidden states of shape "
                f"{tuple(hidden.shape)} for tokens of shape {tuple(shape)}"
            )
        wanted = head.weight.dtype
        if hidden.dtype != wanted and not torch.is_autocast_enabled(hidden.device.type):
            if replaced is None:
                raise ValueError(
                    f"the output embedding of {type(base).__name__} is {wanted} and its hidden states are "
                    f"{hidden.dtype}, which no model multiplies: cast the embedding, "
                    f"model.get_output_embeddings().to({hidden.dtype}), or its input in a forward pre-hook"
                )
            hidden = hidden.to(wanted)  # the model's own forward of the embedding does so
        return compute(hidden, head, **arguments)

    replaced = head.__dict__.get("forward")  # accelerate puts hooks there
    try:
        head.forward = forward  # type: ignore[method-assign, assignment]
        with _neutral(settings):
            yield
    finally:
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced  # type: ignore[method-assign]
    if calls != 1:
        raise RuntimeError(f"{type(base).__name__} called its output embedding {calls} times in one forward")


def forward_with(
    model: nn.Module, compute: Callable[..., Tensor], input_ids: Tensor, **tokens: Tensor
) -> Tensor:
    """Call the model once and return ``compute`` of the last hidden states.

    Args:
        model: The causal LM.
        compute: A function of the inputs (B, T, D) of the output embedding, of the embedding itself, and of
            the keywords ``softcap`` and ``logit_scale`` if the model has them. Its result (B, T, K), K >= 1,
            takes the place of the logits.
        input_ids: The tokens (B, T), int64.
        tokens: ``attention_mask``, or the ``position_ids`` of packed sequences.
    """
    results = []

    def kept(*args: Any, **kwargs: Any) -> Tensor:
        results.append(compute(*args, **kwargs))
        return results[-1]

    with _computing(model, kept, input_ids.shape):
        output = model(input_ids=input_ids, use_cache=False, **tokens).logits
    (result,) = results
    if output.dtype != result.dtype:  # Mamba's and others cast their logits to float32
        cast = output.to(result.dtype)
        # The value as it was, with the gradient of the cast. Infinite values have no difference.
        output = cast + torch.where(cast == result, 0.0, result - cast).detach()
    return output


def model_tokens(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's inputs in a batch: ``input_ids``, ``labels``, ``attention_mask`` or ``position_ids``."""
    optional = [name for name in ("attention_mask", "position_ids") if name in batch]
    return {name: batch[name] for name in ("input_ids", "labels", *optional)}


def next_token_labels(labels: Tensor) -> Tensor:
    """Move labels (B, T), int64, to the positions that predict them. The last position gets -100."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], 1)


def token_triplets(model: nn.Module, labels: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run one forward of a causal LM, differentiable, without logits.

    Args:
        model: The causal LM.
        labels: The labels (B, T), int64, aligned with the tokens; -100 is ignored.
        tokens: The other tensors (B, T) of ``loku.data.collate``, int64: ``input_ids``, and
            ``attention_mask`` or ``position_ids``.

    Returns:
        The softmax triplets (B, T, 3), float64, of each position's prediction of the next token
        (``loku_kernels.softmax_triplet``). They are zero where no label is predicted. And the mask (B, T),
        bool, of the positions that predict a label.

    Raises:
        ValueError: The output embedding cannot be handled; see ``output_embedding``.
    """
    next_labels = next_token_labels(labels)

    def compute(hidden: Tensor, head: nn.Linear, **postprocessing: Any) -> Tensor:
        triplet, _ = linear_softmax_triplet(hidden, head.weight, next_labels, head.bias, **postprocessing)
        return triplet.clone()  # FSDP2 warns of outputs that are views

    return forward_with(model, compute, **tokens), next_labels != IGNORE_INDEX


def hidden_states(model: nn.Module, **tokens: Tensor) -> Tensor:
    """Run one forward of a causal LM and return the inputs (B, T, D) of its output embedding.

    Args:
        model: The causal LM.
        tokens: ``input_ids`` (B, T), int64, and ``attention_mask`` or ``position_ids``.
    """
    dtypes = []

    def compute(hidden: Tensor, head: nn.Linear, **postprocessing: Any) -> Tensor:
        dtypes.append(hidden.dtype)
        return hidden.float() if hidden.dtype == torch.float16 else hidden  # too few exponents for _NO_CAP

    return forward_with(model, compute, **tokens).to(dtypes[0])


def negative_log_likelihood(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Negative log-likelihood, in nats, summed over a batch's label tokens: the Fisher's loss (Eq. 2)."""
    triplet, counted = token_triplets(model, **model_tokens(batch))
    return cross_entropy(triplet).where(counted, 0.0).sum()


def check_head(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Compare the triplets with those of the model's own logits, on the first 16 tokens of one row.

    Args:
        model: The causal LM.
        batch: A batch of ``loku.data.collate``; its first row counts.

    Raises:
        ValueError: They differ, because the model changes its logits in a way that is not handled here. Or
            the logits of a token depend on the tokens after it, so the model is no causal LM.
    """
    output_embedding(model)
    if any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in model.parameters()):
        return  # DeepSpeed or accelerate holds the weights elsewhere
    device = model_device(model)
    rows = {name: values[:1, :16].to(device) for name, values in model_tokens(batch).items()}
    labels = rows["labels"] = rows["input_ids"]
    with evaluating(model):
        ours, counted = token_triplets(model, **rows)
        del rows["labels"]
        logits = model(**rows, use_cache=False).logits
        theirs, _ = softmax_triplet(logits, next_token_labels(labels))
        first = labels.shape[1] // 2
        other = _with_other_tokens(rows, first)
        before = model(**other, use_cache=False).logits[:, :first]
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    allowed = tolerance * (1 + logits.abs().max().item())
    error = (ours - theirs)[counted].abs().max().item() if counted.any() else 0.0
    if not error <= allowed:
        raise ValueError(
            f"{type(unwrapped(model)).__name__} changes its logits after the output embedding in a way that "
            f"is not supported (off by {error:.3g} where {allowed:.3g} is allowed)"
        )
    # Rounding may send a token of a mixture of experts another way. It does not so with most tokens.
    later = (before - logits[:, :first]).float().square().mean(-1).sqrt()
    share = 0.005 if logits.dtype in (torch.float32, torch.float64) else 0.05
    if later.numel() and not later.median() <= share * logits.float().std():
        raise ValueError(
            f"{type(unwrapped(model)).__name__} lets a token see the tokens after it, so it is no causal LM: "
            f"the logits of the first {first} tokens change by {later.median():.3g} with the others"
        )


def _with_other_tokens(rows: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """Return a row in which each token from position ``first`` on is another one.

    The row keeps its shape, so a model rounds the tokens before them in the same way. A row of one token
    repeated has no other one to take; it is cut off at ``first``.

    Args:
        rows: ``input_ids`` (1, T), int64, and the other tensors of a row.
        first: The number of tokens that stay.
    """
    ids = rows["input_ids"]
    known = ids.unique()
    if len(known) == 1:
        return {name: values[:, : max(first, 1)] for name, values in rows.items()}
    later = known[(torch.searchsorted(known, ids[:, first:].contiguous()) + 1) % len(known)]
    return {**rows, "input_ids": torch.cat([ids[:, :first], later], -1)}


def check_packing(model: Any) -> None:
    """Check that documents that share a row (``position_ids``) do not see each other in a causal LM.

    Raises:
        ValueError: They see each other.
    """
    device = model_device(model)
    positions = torch.arange(6, dtype=torch.int64, device=device)
    documents = [positions[1:], positions[2:].flip(0)]
    with evaluating(model):
        apart = [hidden_states(model, input_ids=ids[None])[0] for ids in documents]
        orders = [[0, 1], [1, 0]]  # two rows, as in training: flash attention packs only in batches of one
        together = hidden_states(
            model,
            input_ids=torch.stack([torch.cat([documents[i] for i in order]) for order in orders]),
            position_ids=torch.stack(
                [torch.cat([positions[: len(documents[i])] for i in order]) for order in orders]
            ),
        )
    expected = torch.stack([torch.cat([apart[i] for i in order]) for order in orders])
    error = ((together - expected).norm() / expected.norm()).item()
    if not error <= (1e-3 if expected.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"rows have several documents (position_ids), and {type(unwrapped(model)).__name__} with "
            f"attn_implementation={model.config._attn_implementation!r} lets them see each other; load it "
            "with another one, such as 'sdpa', or give each document a row"
        )
