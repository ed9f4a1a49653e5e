"""What is minimised: one small function for each loss, and a registry of the methods made of them.

A loss takes a ``Batch`` and returns a scalar, differentiable in its triplets (and divergence). A method is an
``Objective``: a loss to forget, one to retain, and what they need. A new one is a function and a line::

    OBJECTIVES["mine"] = Objective(my_loss)

after which ``UnlearnConfig(method="mine")`` minimises ``my_loss(batch)`` + retain_weight x LM loss. A loss
that is a mean over rows and not over tokens says so: ``Objective(my_loss, forget_over="rows")``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from loku_kernels import cross_entropy, inverted_hinge, reduce_loss


class Rows(NamedTuple):
    """The rows of one kind in a batch, as the model predicts them.

    triplet: (B, T, 3), float64, and counted: (B, T), bool, as ``loku.head.token_triplets`` has them.
    reference_log_probability: (B,), float64: log-probability of the counted tokens under the original model.
    divergence: (B, T), float64: KL(original || model), in nats, of each counted token.
    """

    triplet: Tensor
    counted: Tensor
    reference_log_probability: Tensor | None = None
    divergence: Tensor | None = None

    def log_probability(self):
        """Log-probability (B,) of each row's counted tokens, in nats: their sum, not their mean."""
        return -cross_entropy(self.triplet).where(self.counted, 0.0).sum(1)

    def labelled(self):
        """Which rows (B,), bool, have a counted token: all but those that only fill up a batch."""
        return self.counted.any(1)

    def log_ratio(self):
        """log(pi / pi_ref) (B,) of each row: how much likelier its tokens are than in the original model."""
        return self.log_probability() - self.reference_log_probability


@dataclass(frozen=True)
class Batch:
    """What a loss may use; ``None`` for rows that the method does not ask for.

    forget: rows of the forget set with their true answers. refusal: the same rows, in the same order, with
    refusals for answers. retain: rows of the retain set. beta: ``UnlearnConfig.beta``.
    """

    forget: Rows | None = None
    refusal: Rows | None = None
    retain: Rows | None = None
    beta: float = 0.1


def lm_loss(rows):
    """LM loss: mean negative log-likelihood, in nats, over the counted tokens."""
    return reduce_loss(cross_entropy(rows.triplet), rows.counted, "mean")


def answer_probability(triplet, counted):
    """exp of the mean log-probability of a row's counted tokens (B,): TOFU's answer probability."""
    count = counted.sum(1).clamp(min=1)
    return (-(cross_entropy(triplet).where(counted, 0.0).sum(1)) / count).exp()


def inverted_hinge_loss(batch):
    """IHL: mean over the forget tokens of 1 + p_target - max over other tokens of p (LoKU, Eq. 3)."""
    return reduce_loss(inverted_hinge(batch.forget.triplet), batch.forget.counted, "mean")


def gradient_ascent_loss(batch):
    """GA: mean log-likelihood of the forget tokens, which is to fall (Jang et al., 2023)."""
    return -lm_loss(batch.forget)


def dpo_loss(batch):
    """DPO: mean over rows of -log sigmoid(beta (log pi(w)/ref(w) - log pi(l)/ref(l))).

    w is the refusal, which is preferred, l the true answer; pi and ref are whole answers' probabilities, of
    the model and of the original one (Rafailov et al., 2023, Eq. 7; on refusals: TOFU, Maini et al., 2024).
    """
    losses = -logsigmoid(batch.beta * (batch.refusal.log_ratio() - batch.forget.log_ratio()))
    return reduce_loss(losses, batch.refusal.labelled(), "mean")


def npo_loss(batch):
    """NPO: (2 / beta) x mean over forget rows of log(1 + (pi / ref)^beta) (Zhang et al., 2024).

    pi and ref are whole answers' probabilities, of the model and of the original one.
    """
    losses = logsigmoid(-batch.beta * batch.forget.log_ratio())
    return -2 / batch.beta * reduce_loss(losses, batch.forget.labelled(), "mean")


def refusal_loss(batch):
    """IDK: LM loss of refusals in the place of the forget set's answers (TOFU, Maini et al., 2024)."""
    return lm_loss(batch.refusal)


def retain_loss(batch):
    """LM loss of the retain tokens (gradient difference, Liu et al., 2022; LoKU, Eq. 3)."""
    return lm_loss(batch.retain)


def retain_divergence(batch):
    """KL: mean over the retain tokens of KL(original || model), in nats (TOFU, Maini et al., 2024)."""
    return reduce_loss(batch.retain.divergence, batch.retain.counted, "mean")


@dataclass(frozen=True)
class Objective:
    """A method: minimise ``forget(batch)`` + retain_weight x ``retain(batch)``.

    Args:
        forget: a loss of a ``Batch``, on rows of the forget set.
        retain: the same on retain rows, or None: then no retain rows are run.
        rows: what is run of the forget set: "forget", the true answers, "refusal", or both.
        reference: what the losses need of the original model. None, "log_probability" (of ``rows``) or
            "divergence" (from it, of the retain rows).
        forget_over, retain_over: what each loss is a mean over, "tokens" (counted ones) or "rows" (labelled
            ones). The trainer weights the losses of micro-batches and processes by how many they have of
            them, so that together they are the loss of the whole batch.
    """

    forget: Callable[[Batch], Tensor]
    retain: Callable[[Batch], Tensor] | None = retain_loss
    rows: tuple[str, ...] = ("forget",)
    reference: Literal["log_probability", "divergence"] | None = None
    forget_over: Literal["tokens", "rows"] = "tokens"
    retain_over: Literal["tokens", "rows"] = "tokens"

    def __post_init__(self):
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
    def kinds(self):
        """The kinds of rows of a batch, in their order there."""
        return self.rows if self.retain is None else (*self.rows, "retain")

    @property
    def reference_kinds(self):
        """Those of which something is needed of the original model."""
        return {None: (), "log_probability": self.rows, "divergence": ("retain",)}[self.reference]

    def losses(self, batch):
        """``forget_loss`` and, if there is one, ``retain_loss``, unweighted."""
        losses = {"forget_loss": self.forget(batch)}
        if self.retain is not None:
            losses["retain_loss"] = self.retain(batch)
        return losses

    def counts(self, counted):
        """How many tokens or rows each of the ``losses`` is a mean over: 0-dim int64 tensors.

        counted: (B, T), bool, for each of ``kinds``, as ``Rows.counted``.
        """

        def count(over, kinds):
            if over == "rows":
                return counted[kinds[0]].any(1).sum()
            return sum(counted[kind].sum() for kind in kinds)

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
