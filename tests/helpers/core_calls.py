"""A call of each kernel of the compiled core, by the functions that check its arguments."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loku_kernels.backends import native, one_call
from loku_kernels.backends.online_state import OnlineState

IGNORE = -100


class Call(NamedTuple):
    """A call, and the tensors that it reads or writes."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    operands: tuple[Tensor, ...]

    def results(self) -> list[Tensor]:
        """Call, and return the returned tensors and the operands."""
        returned = self.function(**self.arguments)
        several = returned if isinstance(returned, tuple) else (returned,)
        return [x for x in (*several, *self.operands) if isinstance(x, Tensor)]


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copy tensors."""
    return [x.clone() for x in tensors]


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Say whether tensors are as many and have the same bits, in NaN too."""
    pairs = zip(some, others, strict=False)
    equal = all(torch.equal(*(x.reshape(-1).view(torch.uint8) for x in pair)) for pair in pairs)
    return len(some) == len(others) and equal


def calls(rows: int, vocab: int, dtype: torch.dtype, tokens: int = 0) -> Iterator[Call]:
    """Yield a call of each kernel.

    Args:
        rows: The number of rows N of logits, at least 2. The second one is ignored.
        vocab: The number of columns V of logits.
        dtype: The dtype of logits, weight and Fisher inputs.
        tokens: The number of tokens of the Fisher's samples, or ``rows`` for 0.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width = 5
    logits = random(rows, vocab).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1] = IGNORE
    weight, direction = random(vocab, width).to(dtype), random(rows, width).to(dtype)
    factor = random(rows)
    triplet, runner_up_id = native.triplet_forward(logits, labels, IGNORE)
    grad = random(rows, 3).double()
    _, saved = one_call.logits_loss("cross_entropy", logits, labels, IGNORE, "mean", torch.float32)
    of_labels = {"labels": labels, "ignore_index": IGNORE}
    reduced = {"reduction": "mean", "dtype": torch.float32}
    of_hidden = {"factor": factor, "weight": weight, "labels": labels, "direction": direction}
    scales = {"softcap": 0.0, "logit_scale": 1.0}
    kept = {"triplet": triplet, "runner_up_id": runner_up_id}

    def call(name: str, *more: dict[str, Any], of: Any = native) -> Call:
        arguments: dict[str, Any] = {}
        for part in more:
            # Each call has operands of its own, since some are overwritten.
            arguments |= {k: x.clone() if isinstance(x, Tensor) else x for k, x in part.items()}
        state = arguments.get("state", ())
        operands = (*(x for x in arguments.values() if isinstance(x, Tensor)), *state)
        return Call(name, getattr(of, name), arguments, operands)

    of_logits = {"logits": logits}
    yield call("triplet_forward", of_logits, of_labels)
    yield call("triplet_backward", {"grad_triplet": grad, "factor": factor}, of_logits, of_labels, kept)
    yield call("inverted_hinge_", of_logits, of_labels, {"scale": torch.ones((), dtype=torch.float64)})
    yield call("rest_probabilities_", of_logits, of_labels)
    columns = {"first_column": 0, "softcap": 0.0, "store": True}
    yield call("triplet_columns_", of_logits, {"labels": labels, "state": OnlineState.start(labels)}, columns)
    yield call("scale_rows_", of_logits, {"factor": factor})
    yield call("mean_scale", of_labels)
    losses = {"loss": "inverted_hinge", **reduced, "want_grad": True}
    yield call("token_losses", {"triplet": triplet}, of_labels, losses)
    for overwrite in (False, True):
        loss = {"loss": "cross_entropy", "overwrite": overwrite, **reduced}
        yield call("logits_loss", of_logits, of_labels, loss, of=one_call)
    # A mean would count the labels in a call of its own.
    yield call(
        "inverted_hinge_loss_",
        of_logits,
        of_labels,
        {"late": False, **reduced, "reduction": "sum"},
        of=one_call,
    )
    backward = {"saved": saved, "factor": factor}
    yield call("logits_loss_backward", backward, of_logits, of_labels, of=one_call)
    yield call("hidden_gradient", {"grad_triplet": grad}, of_hidden, kept, scales)
    yield call("hidden_loss_backward", {"saved": saved}, of_hidden, scales, of=one_call)
    tokens = tokens or rows
    inputs, deltas = random(2, tokens, 300).to(dtype), random(2, tokens, 140).to(dtype)
    samples = {"inputs": inputs, "grad_outputs": deltas}
    for divisor in (None, random(140, 300).abs() + 0.5):
        fisher = torch.zeros(140, 300) if divisor is None else torch.zeros(140)
        yield call("accumulate_squared_grad_", {"fisher": fisher}, samples, {"divisor": divisor})
    product = {"fisher": torch.zeros(rows, vocab), "product": logits.bfloat16(), "scratch": None}
    yield call("_add_squares", product)
