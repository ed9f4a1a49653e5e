"""A causal LM's forward that yields softmax triplets and never the logits.

The model is called as it always is, wrappers and hooks and all. Only while it runs, the forward of its
output embedding is the fused linear operator on the labelled rows, so that what comes out as ``logits``
are three numbers a token, or four with the divergence from a reference model. Sharding wrappers gather and
cast the weight exactly where they expect to.
"""

from contextlib import contextmanager

import torch
from torch import nn

from loku.data.rows import IGNORE_INDEX
from loku.models import evaluating, unwrapped
from loku_kernels import (
    cross_entropy,
    linear_kl_divergence_loss,
    linear_softmax_triplet,
    softmax_triplet,
)

# What transformers' models do to their logits after the output embedding: the name of the attribute of
# their config or of the model itself, its neutral value, and what it means for the operator.
_POSTPROCESSING = {
    "final_logit_softcapping": (None, lambda value: {"softcap": value}),  # Gemma
    "logit_scale": (1.0, lambda value: {"logit_scale": value}),  # Cohere
    "logits_scaling": (1.0, lambda value: {"logit_scale": 1 / value}),  # Granite
}


def output_embedding(model):
    """The model's output embedding, a plain ``torch.nn.Linear``; ``ValueError`` if it is anything else."""
    base = unwrapped(model)
    kind = type(base).__name__
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{kind} has no output embedding (get_output_embeddings()); pass a causal LM")
    # By its forward and not its type, which FSDP2 replaces by a class of its own.
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or not head.weight.is_floating_point():
        raise ValueError(
            f"the output embedding of {kind} is a {type(head).__name__}; it must be a plain, unquantised "
            "torch.nn.Linear that is not a LoRA target"
        )
    return head


def _settings(base):
    """(owner, attribute, neutral value, operator arguments) of the post-processing that is switched on."""
    for owner in (base.config.get_text_config(), base):
        for name, (neutral, arguments) in _POSTPROCESSING.items():
            value = getattr(owner, name, None)
            if isinstance(value, (int, float)) and value != neutral:
                yield owner, name, neutral, arguments(value)


@contextmanager
def _computing(model, compute, shape):
    """While it is open, the output embedding's forward is ``compute(hidden, head, **postprocessing)``.

    shape: that of the tokens, and so of the hidden states (B, T, D) but for the last dimension.
    """
    base, head = unwrapped(model), output_embedding(model)
    settings = list(_settings(base))
    arguments = {}
    for *_, argument in settings:
        arguments |= argument
    calls = 0

    def forward(hidden):
        nonlocal calls
        calls += 1
        if hidden.shape[:-1] != shape:
            raise RuntimeError(
                f"the output embedding of {type(base).__name__} got hidden states of shape "
                f"{tuple(hidden.shape)} for tokens of shape {tuple(shape)}"
            )
        return compute(hidden, head, **arguments)

    replaced = head.__dict__.get("forward")  # accelerate puts hooks there
    saved = [(owner, name, getattr(owner, name)) for owner, name, *_ in settings]
    try:
        head.forward = forward
        for owner, name, neutral, _ in settings:
            setattr(owner, name, neutral)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced
    if calls != 1:
        raise RuntimeError(f"{type(base).__name__} called its output embedding {calls} times in one forward")


def _forward(model, compute, input_ids, **tokens):
    """One call of ``model``, whose logits are what ``compute`` makes of the last hidden states.

    tokens: ``attention_mask``, or the ``position_ids`` of packed sequences.
    """
    with _computing(model, compute, input_ids.shape):
        return model(input_ids=input_ids, use_cache=False, **tokens).logits


def model_tokens(batch):
    """What of a batch is the model's: ``input_ids``, ``labels``, ``attention_mask`` or ``position_ids``."""
    optional = [name for name in ("attention_mask", "position_ids") if name in batch]
    return {name: batch[name] for name in ("input_ids", "labels", *optional)}


def next_token_labels(labels):
    """Labels (B, T) moved to the position that predicts them; the last position predicts nothing."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], 1)


def token_triplets(model, labels, **tokens):
    """One forward of ``model``, differentiable, without logits.

    Args:
        labels and tokens: (B, T), int64, as ``loku.data.collate`` has them: ``input_ids``, and
            ``attention_mask`` or ``position_ids``; labels are aligned with the tokens, -100 is ignored.

    Returns:
        triplet (B, T, 3): of each position's prediction of the next token (``loku_kernels.softmax_triplet``);
        zeros where nothing is predicted.
        counted (B, T), bool: where something is.
    """
    next_labels = next_token_labels(labels)

    def compute(hidden, head, **postprocessing):
        triplet, _ = linear_softmax_triplet(hidden, head.weight, next_labels, head.bias, **postprocessing)
        return triplet.clone()  # FSDP2 warns of outputs that are views

    return _forward(model, compute, **tokens), next_labels != IGNORE_INDEX


def _hidden_states(model, **tokens):
    return _forward(model, lambda hidden, head, **postprocessing: hidden, **tokens)


def label_hidden_states(model, labels, **tokens):
    """The last hidden states (n, D) at the n positions that predict a label, row by row."""
    return _hidden_states(model, **tokens)[next_token_labels(labels) != IGNORE_INDEX]


def token_triplets_and_divergence(
    model, labels, diverging, reference_hidden, reference_head=(None, None), **tokens
):
    """``token_triplets``, and in the same forward the KL divergence from a reference model.

    Args:
        diverging: (B,), bool: the rows whose divergence is wanted.
        reference_hidden: (n, D), ``label_hidden_states`` of those rows in the reference model.
        reference_head: weight (V, D) and bias (V,) of its output embedding, where it is not the model's.

    Returns:
        triplet, counted as ``token_triplets``; divergence (B, T), float64: KL(reference || model), in nats,
        of each counted token of those rows, 0 elsewhere.
    """
    next_labels = next_token_labels(labels)
    counted = next_labels != IGNORE_INDEX
    where = counted & diverging[:, None]
    reference_weight, reference_bias = reference_head

    def compute(hidden, head, **postprocessing):
        triplet, _ = linear_softmax_triplet(hidden, head.weight, next_labels, head.bias, **postprocessing)
        divergence = linear_kl_divergence_loss(
            hidden[where],
            head.weight,
            reference_hidden,
            bias=head.bias,
            reference_weight=reference_weight,
            reference_bias=reference_bias,
            reduction="none",
            **postprocessing,
        )
        divergences = torch.zeros_like(triplet[..., 0]).masked_scatter(where, divergence.to(triplet.dtype))
        return torch.cat([triplet, divergences[..., None]], -1)

    output = _forward(model, compute, **tokens)
    return output[..., :3], counted, output[..., 3]


def negative_log_likelihood(model, batch):
    """Negative log-likelihood, in nats, summed over a batch's label tokens: the Fisher's loss (Eq. 2)."""
    triplet, counted = token_triplets(model, **model_tokens(batch))
    return cross_entropy(triplet).where(counted, 0.0).sum()


def check_head(model, batch):
    """Compare the triplets with those of the model's own logits on the start of one row.

    Raises ``ValueError`` if they differ: the model does something to its logits that is not known here.
    """
    device = next(model.parameters()).device
    rows = {name: values[:1, :16].to(device) for name, values in model_tokens(batch).items()}
    labels = rows["labels"] = rows["input_ids"]
    with evaluating(model):
        ours, counted = token_triplets(model, **rows)
        del rows["labels"]
        logits = model(**rows, use_cache=False).logits
        theirs, _ = softmax_triplet(logits, next_token_labels(labels))
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    allowed = tolerance * (1 + logits.abs().max().item())
    error = (ours - theirs)[counted].abs().max().item() if counted.any() else 0.0
    if not error <= allowed:
        raise ValueError(
            f"{type(unwrapped(model)).__name__} changes its logits after the output embedding in a way that "
            f"is not supported (off by {error:.3g} where {allowed:.3g} is allowed)"
        )


def check_packing(model):
    """Raise ``ValueError`` if documents that share a row (``position_ids``) see each other in this model."""
    device = next(model.parameters()).device
    documents = [torch.arange(1, 6, device=device), torch.arange(5, 1, -1, device=device)]
    with evaluating(model):
        apart = [_hidden_states(model, input_ids=ids[None])[0] for ids in documents]
        orders = [[0, 1], [1, 0]]  # two rows, as in training: flash attention packs in batches of one alone
        together = _hidden_states(
            model,
            input_ids=torch.stack([torch.cat([documents[i] for i in order]) for order in orders]),
            position_ids=torch.stack(
                [
                    torch.cat([torch.arange(len(documents[i]), device=device) for i in order])
                    for order in orders
                ]
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
