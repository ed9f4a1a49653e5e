"""A tiny model, its original and small batches, which the code of other repositories has run, too.

The figures in the tests are of open-unlearning (github.com/locuslab/open-unlearning), commit
d3d7cf9e6b3c125d16687d4232680d8d83548f1a, on these models and batches in float64. Its methods ran with
``ref_model = original()`` and ``gamma = alpha = 1``.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loku.objectives import Batch, Rows
from loku.token_values import original_values, token_values

SIZE, VOCAB = 16, 23


def _random_model(seed):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=SIZE,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # the same numbers with any version of transformers
        for name, parameter in sorted(model.named_parameters()):
            scale = 2.0 if name == "lm_head.weight" else 0.4
            numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * numbers)
    return model


def original():
    """The original model."""
    return _random_model(1)


def changed():
    """A model near the original."""
    model, base = _random_model(2), original()
    with torch.no_grad():
        for parameter, start in zip(model.parameters(), base.parameters(), strict=True):
            parameter.mul_(0.1).add_(start)
    return model


def token_batch(seed, prompts=(4, 2, 5)):
    """Make three rows of nine tokens, whose first ``prompts`` have no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (3, 9), generator=generator, dtype=torch.int64)
    labels = ids.clone()
    for row, prompt in enumerate(prompts):
        labels[row, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def projection(model):
    """The inner product of the gradients of all parameters with a random direction."""
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for _, parameter in sorted(model.named_parameters()):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.grad is not None:
            total += (parameter.grad * direction).sum().item()
    return total


def losses_of(objective, model, batches, beta=None, arguments=None):
    """Compute the losses of an objective, each kind of rows by a forward of its own.

    Args:
        objective: The objective, with its arguments.
        model: The model.
        batches: The batch of tokens of each kind of rows.
        beta: The beta of the method.
        arguments: Its other arguments.
    """
    reference, kinds = original(), {}
    head = reference.lm_head.weight.detach(), None
    for kind, tokens in batches.items():
        everything = torch.ones(len(tokens["labels"]), dtype=torch.bool)
        needed = [(quantity, everything) for quantity in objective.quantities.get(kind, ())]
        compared = [(quantity, rows) for quantity, rows in needed if quantity.compares]
        kept = original_values(reference, needed=compared, **tokens) if compared else {}
        found = token_values(model, needed=needed, originals=kept, original_head=head, **tokens)
        kinds[kind] = Rows(found.triplet, found.counted, found.values, found.positions)
    return objective.losses(Batch(**kinds, beta=beta or 0.0, arguments=arguments or {}))
