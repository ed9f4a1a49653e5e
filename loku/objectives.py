"""Losses, one small function each, and ``OBJECTIVES``, the registry of the methods that combine them.

A loss takes a ``Batch`` and returns a scalar. The scalar is differentiable in the batch's triplets and
divergences. A method is an ``Objective``: a loss to forget, a loss to retain, and the rows that they need. A
new method is a function and a line::

    OBJECTIVES["mine"] = Objective(my_loss)

``UnlearnConfig(method="mine")`` then minimises ``my_loss(batch)`` + retain_weight x LM loss. A loss that is a
mean over rows instead of tokens says so: ``Objective(my_loss, forget_over="rows")``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from loku_kernels import cross_entropy, reduce_loss, triplet_loss
from loku_kernels import inverted_hinge as inverted_hinge  # for losses of others, from where it always was


class Rows(NamedTuple):
    """The rows of one kind in a batch, as the model predicts them.

    Attributes:
        triplet: The softmax triplets (B, T, 3), float64, of ``loku.head.token_triplets``.
        counted: The mask (B, T), bool, of the positions that predict a label.
        reference_log_probability: The log-probability (B,), float64, in nats, of each row's counted tokens
            under the original model. None (default) if the method does not need it.
        divergence: KL(original || model) (B, T), float64, in nats, of each counted token. None (default) if
            the method does not need it.
    """

    # An Objective gives its losses every value that it asks for. So the types leave None out.
    triplet: Tensor
    counted: Tensor
    reference_log_probability: Tensor = None  # type: ignore[assignment]
    divergence: Tensor = None  # type: ignore[assignment]

    def log_probability(self) -> Tensor:
        """Log-probability (B,), in nats, of each row: the sum over its counted tokens, not the mean."""
        return -cross_entropy(self.triplet).where(self.counted, 0.0).sum(1)

    def labelled(self) -> Tensor:
        """The mask (B,), bool, of the rows with a counted token. Rows that only fill up a batch have none."""
        return self.counted.any(1)

    def log_ratio(self) -> Tensor:
        """log(pi / ref) (B,), in nats, of each row's probabilities under the model and the original model."""
        return self.log_probability() - self.reference_log_probability


@dataclass(frozen=True)
class Batch:
    """The rows of one batch. A kind of rows is None if the method does not ask for it.

    Args:
        forget: The rows of the forget set with their true answers.
        refusal: The same rows, in the same order, with refusals for answers.
        retain: The rows of the retain set.
        beta: The inverse temperature of DPO and NPO, ``UnlearnConfig.beta``; 0.1 by default.
    """

    # As in Rows, the types leave None out.
    forget: Rows = None  # type: ignore[assignment]
    refusal: Rows = None  # type: ignore[assignment]
    retain: Rows = None  # type: ignore[assignment]
    beta: float = 0.1


def _token_mean(loss: Literal["inverted_hinge", "cross_entropy"], rows: Rows) -> Tensor:
    """Compute the mean of a loss over the counted tokens. One kernel computes it and its gradient."""
    return triplet_loss(loss, rows.triplet, rows.counted.long(), ignore_index=0)


def lm_loss(rows: Rows) -> Tensor:
    """LM loss: the mean negative log-likelihood, in nats, of the counted tokens."""
    return _token_mean("cross_entropy", rows)


def answer_probability(triplet: Tensor, counted: Tensor) -> Tensor:
    """TOFU's answer probability (B,): exp of the mean log-probability of a row's counted tokens.

    Args:
        triplet: The softmax triplets (B, T, 3), float64.
        counted: The mask (B, T), bool, of the tokens that count.
    """
    count = counted.sum(1).clamp(min=1)
    return (-(cross_entropy(triplet).where(counted, 0.0).sum(1)) / count).exp()


def inverted_hinge_loss(batch: Batch) -> Tensor:
    """IHL: the mean over the forget tokens of 1 + p_target - max over other tokens of p (LoKU, Eq. 3)."""
    return _token_mean("inverted_hinge", batch.forget)


def gradient_ascent_loss(batch: Batch) -> Tensor:
    """GA: the mean log-likelihood, in nats, of the forget tokens (Jang et al., 2023)."""
    return -lm_loss(batch.forget)


def dpo_loss(batch: Batch) -> Tensor:
    """DPO: the mean over rows of -log sigmoid(beta (log pi(w)/ref(w) - log pi(l)/ref(l))).

    w is the refusal, which is preferred, and l the true answer. pi and ref are the probabilities of whole
    answers under the model and the original model (Rafailov et al., 2023, Eq. 7). TOFU applies it to refusals
    (Maini et al., 2024).
    """
    losses = -logsigmoid(batch.beta * (batch.refusal.log_ratio() - batch.forget.log_ratio()))
    return reduce_loss(losses, batch.refusal.labelled(), "mean")


def npo_loss(batch: Batch) -> Tensor:
    """NPO: (2 / beta) x the mean over forget rows of log(1 + (pi / ref)^beta) (Zhang et al., 2024).

    pi and ref are the probabilities of whole answers under the model and the original model.
    """
    losses = logsigmoid(-batch.beta * batch.forget.log_ratio())
    return -2 / batch.beta * reduce_loss(losses, batch.forget.labelled(), "mean")


def refusal_loss(batch: Batch) -> Tensor:
    """IDK: the LM loss of refusals in the place of the forget set's answers (TOFU, Maini et al., 2024)."""
    return lm_loss(batch.refusal)


def retain_loss(batch: Batch) -> Tensor:
    """LM loss of the retain tokens (gradient difference, Liu et al., 2022; LoKU, Eq. 3)."""
    return lm_loss(batch.retain)


def retain_divergence(batch: Batch) -> Tensor:
    """KL: the mean over the retain tokens of KL(original || model), in nats (TOFU, Maini et al., 2024)."""
    return reduce_loss(batch.retain.divergence, batch.retain.counted, "mean")


@dataclass(frozen=True)
class Objective:
    """A method: minimise ``forget(batch)`` + retain_weight x ``retain(batch)``.

    The trainer weights the loss of each micro-batch and process by the number of tokens or rows that it is a
    mean over. The weighted losses add up to the loss of the whole batch.

    Args:
        forget: The loss of a ``Batch`` on rows of the forget set.
        retain: The loss of a ``Batch`` on retain rows, ``retain_loss`` by default. None runs no retain rows.
        rows: The forget rows that are run: "forget" (default) with the true answers, "refusal" with refusals,
            or both.
        reference: The values of the original model that the losses need: the "log_probability" of ``rows``,
            or the KL "divergence" from the original of the retain rows. None (default) needs none.
        forget_over: The unit that the forget loss is a mean over: counted "tokens" (default) or labelled
            "rows".
        retain_over: The unit that the retain loss is a mean over, as for ``forget_over``.

    Raises:
        ValueError: A value is none of these, or "divergence" comes without ``retain``.
    """

    forget: Callable[[Batch], Tensor]
    retain: Callable[[Batch], Tensor] | None = retain_loss
    rows: tuple[str, ...] = ("forget",)
    reference: Literal["log_probability", "divergence"] | None = None
    forget_over: Literal["tokens", "rows"] = "tokens"
    retain_over: Literal["tokens", "rows"] = "tokens"

    def __post_init__(self) -> None:
        if not self.rows or not set(self.rows) <= {"forget", "refusal"}:
            raise ValueError(f'Objective.rows must be of "forget" and "refusal", got {self.rows!r}')
        if self.reference not in (None, "log_probability", "divergence"):
            raise ValueError(
                f'Objective.reference must be None, "log_probability" or "divergence", got {self.reference!r}'
            )
        if self.reference == "divergence" and self.retain is None:
            raise ValueError('Objective.reference="divergence" is that of the retain rows: it needs retain')
        for name, over in (("forget_over", self.forget_over), ("retain_over", self.retain_over)):
            if over not in ("tokens", "rows"):
                raise ValueError(f'Objective.{name} must be "tokens" or "rows", got {over!r}')

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rows of a batch, in their order there."""
        return self.rows if self.retain is None else (*self.rows, "retain")

    @property
    def reference_kinds(self) -> tuple[str, ...]:
        """The kinds of rows that the original model runs."""
        return {None: (), "log_probability": self.rows, "divergence": ("retain",)}[self.reference]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The scalar ``forget_loss`` and, unless ``retain`` is None, ``retain_loss``, without weights."""
        losses = {"forget_loss": self.forget(batch)}
        if self.retain is not None:
            losses["retain_loss"] = self.retain(batch)
        return losses

    def counts(self, counted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The number of tokens or rows that each of the ``losses`` is a mean over.

        Args:
            counted: The mask ``Rows.counted`` (B, T), bool, of each of ``kinds``.

        Returns:
            A 0-dimensional int64 tensor for each loss, by the loss's name.
        """

        def count(over: str, kinds: tuple[str, ...]) -> Tensor:
            if over == "rows":
                return counted[kinds[0]].any(1).sum()
            first, *others = (counted[kind].sum() for kind in kinds)
            return sum(others, first)

        counts = {"forget_loss": count(self.forget_over, self.rows)}
        if self.retain is not None:
            counts["retain_loss"] = count(self.retain_over, ("retain",))
        return counts


OBJECTIVES = {
    "ihl": Objective(inverted_hinge_loss),
    "ga": Objective(gradient_ascent_loss, retain=None),
    "gd": Objective(gradient_ascent_loss),
    "kl": Objective(gradient_ascent_loss, retain_divergence, reference="divergence"),
    "dpo": Objective(dpo_loss, rows=("forget", "refusal"), reference="log_probability", forget_over="rows"),
    "npo": Objective(npo_loss, reference="log_probability", forget_over="rows"),
    "idk": Objective(refusal_loss, rows=("refusal",)),
}
