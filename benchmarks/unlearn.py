"""A step of ``UnlearnTrainer`` on a random GPT-Neo-125M, beside the same step on materialised logits.

    python benchmarks/unlearn.py [--shape 8x200 ...] [--threads N ...] [--json FILE]

A shape is forget rows (and as many retain rows) x predicted tokens in a row. ``after the last hidden state``
is the losses and their gradient for the hidden states alone. ``whole step`` is forward, backward and
optimizer step of LoRA with rank 16. ``half labelled`` is a step whose tokens carry a label in the second half
of a row alone, as in TOFU's questions. ``checkpointed`` is a step with gradient checkpointing. ``official``
is the same trainer with the logits of all tokens: it computes the authors' formula for the forget rows and
``cross_entropy`` for the retain rows. In bfloat16 and float16 it computes both in that dtype.

Before it is measured, a part is checked. The exact loss is the official one of the same model's logits,
computed in float32. Ours is at most 1e-5 plus one machine epsilon of the model's dtype away from it,
relative, or absolute below 1. Each of our gradients is at most 1e-3 plus ``GRADIENT_ULPS`` epsilons away from
the exact loss's, in the norm of their difference over the norm of the exact one.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from harness import DTYPES, Benchmark, Call, arguments, assert_close_loss, sizes
from peers import official_ihl
from subjects import gpt_neo_125m
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loku import UnlearnConfig, UnlearnTrainer
from loku.data import collate_pairs
from loku.head import next_token_labels
from loku.objectives import OBJECTIVES, Batch, Rows
from loku.target_modules import default_target_modules
from loku_kernels import linear_softmax_triplet

SHAPES = ["8x200"]
RANK = 16
GRADIENT_ULPS = 8  # 0.06 in bfloat16; the layers round both gradients, which come out some 2 epsilons apart


def official_loss(logits: Tensor, labels: Tensor, is_forget: Tensor) -> Tensor:
    """Return the authors' loss.

    Args:
        logits: The logits (B, T, V) of all tokens.
        labels: The labels (B, T), int64, -100 where a token does not count.
        is_forget: Whether a row is a forget row (B,), bool.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    forget_logits, forget_labels = logits[is_forget], labels[is_forget]
    labelled = forget_labels != -100
    forget = official_ihl(forget_logits[labelled], forget_labels[labelled])
    retain = cross_entropy(logits[~is_forget].flatten(0, 1), labels[~is_forget].flatten())
    return forget + retain


class OfficialTrainer(UnlearnTrainer):
    """The trainer with the authors' loss of the logits of all tokens, in the dtype of the logits."""

    loss_dtype: torch.dtype | None = None  # None: that of the logits

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch."""
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
        return official_loss(
            logits.to(self.loss_dtype or logits.dtype), inputs["labels"], inputs["is_forget"]
        )


class ExactTrainer(OfficialTrainer):
    """The same with the loss in float32, which does not round it to the dtype of a 16-bit model."""

    loss_dtype = torch.float32


def lora(model: PreTrainedModel) -> Any:
    """Return the model with an adapter whose B is not zero, so that no gradient is zero."""
    from peft import LoraConfig, get_peft_model

    targets = default_target_modules(model)
    adapted = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return adapted


def batch_of(rows: int, tokens: int, unlabelled: int, vocab: int, device: str) -> dict[str, Tensor]:
    """Return a batch of random pairs of rows.

    Args:
        rows: The number of pairs.
        tokens: The predicted tokens of a row, which has one token more.
        unlabelled: The number of tokens without label at the beginning of a row.
        vocab: The size of the vocabulary.
        device: The device of the batch.
    """
    torch.manual_seed(0)

    def row() -> dict[str, list[int]]:
        ids = torch.randint(0, vocab, (tokens + 1,)).tolist()
        return {"input_ids": ids, "labels": [-100] * unlabelled + ids[unlabelled:]}

    batch = collate_pairs([{"forget": row(), "retain": row()} for _ in range(rows)], pad_token_id=0)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def check(
    what: str,
    ours: Call,
    exact: Call,
    dtype: torch.dtype,
    gradients: Callable[[], Mapping[str, Tensor]],
    fresh: Call,
) -> None:
    """Assert that a function's loss and gradients are the exact ones, within the bounds of this module.

    Args:
        what: The name of the part, for messages.
        ours: Our function, which returns the loss and leaves gradients.
        exact: The exact function, which does the same.
        dtype: The dtype of the model.
        gradients: Returns name -> the gradients that the last function left.
        fresh: Drops them.
    """
    results: list[tuple[Tensor, Mapping[str, Tensor]]] = []
    for function in (ours, exact):
        fresh()
        loss = function()
        results.append((loss, {name: x.double() for name, x in gradients().items()}))
    fresh()
    (loss, found), (exact_loss, expected) = results
    eps = torch.finfo(dtype).eps
    assert_close_loss(loss, exact_loss, what, 1e-5 + eps)
    for name, gradient in expected.items():
        error = ((found[name] - gradient).norm() / gradient.norm()).item()
        assert error <= 1e-3 + GRADIENT_ULPS * eps, f"{what}: the gradient of {name} is off by {error:.1e}"


def has_clear_runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Return a mask (B, T), bool, of the positions that have one runner-up in the logits' dtype.

    Where the two best tokens beside the target differ by less than the dtype resolves, either may be it, and
    the gradient of IHL depends on the choice.

    Args:
        logits: The logits (B, T, V).
        labels: The labels (B, T), int64, aligned with the logits; -100 where there is none.
    """
    others = logits.detach().float().scatter(-1, labels.clamp(min=0)[..., None], -torch.inf).topk(2).values
    gap = others[..., 0] - others[..., 1]
    return gap > 8 * torch.finfo(logits.dtype).eps * others[..., 0].abs()


def measure_head(bench: Benchmark, shape: str, head: Any, batch: dict[str, Tensor]) -> None:
    """Measure the losses after the last hidden state."""
    is_forget, labels = batch["is_forget"], batch["labels"]
    hidden = torch.randn(*labels.shape, head.weight.shape[1]).to(head.weight).requires_grad_()
    next_labels = next_token_labels(labels)
    with torch.no_grad():
        clear = is_forget[:, None] & has_clear_runner_up(head(hidden), next_labels)

    def ours() -> Tensor:
        counted = next_labels != -100
        triplet, _ = linear_softmax_triplet(hidden, head.weight, next_labels)
        forget, retain = (Rows(triplet[mask], counted[mask]) for mask in (is_forget, ~is_forget))
        losses = OBJECTIVES["ihl"].losses(Batch(forget, retain=retain))
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        return loss.detach()

    def official(dtype: torch.dtype | None = None) -> Tensor:
        logits = head(hidden)
        loss = official_loss(logits.to(dtype or logits.dtype), labels, is_forget)
        loss.backward()
        return loss.detach()

    def gradients() -> dict[str, Tensor]:
        # Apart, because the forget loss of a random model has a far smaller gradient than the retain loss.
        assert hidden.grad is not None
        return {"forget states": hidden.grad[clear], "retain states": hidden.grad[~is_forget]}

    compare(
        bench,
        shape,
        "after the last hidden state",
        ours,
        official,
        head.weight.dtype,
        [hidden],
        exact=partial(official, torch.float32),
        gradients=gradients,
    )


def measure_step(
    bench: Benchmark, shape: str, part: str, model: Any, batch: dict[str, Tensor], directory: str
) -> None:
    """Measure a whole step of both trainers."""
    # The authors' loss is Eq. 3 of the paper: the retain loss counts once.
    options = UnlearnConfig(output_dir=directory, use_cpu=bench.device == "cpu", retain_weight=1.0)
    # Unused: training_step gets the batch.
    forget, retain = ([{"input_ids": [i, i], "labels": [i, i]}] for i in (0, 1))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def stepper(kind: type[UnlearnTrainer]) -> tuple[Call, Call]:
        """Return a whole step, and its forward and backward alone."""
        trainer = kind(model, options, forget, retain)
        optimizer = trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # its loop sets it before training_step

        def step() -> Tensor:
            loss = trainer.training_step(model, batch)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step, lambda: trainer.training_step(model, batch)

    (our_step, ours), (official_step, _), (_, exact) = map(
        stepper, (UnlearnTrainer, OfficialTrainer, ExactTrainer)
    )

    def gradients() -> dict[str, Tensor]:
        return {name: value.grad for name, value in trained.items() if value.grad is not None}

    compare(
        bench,
        shape,
        part,
        our_step,
        official_step,
        model.get_base_model().dtype,
        list(trained.values()),
        check_ours=ours,
        exact=exact,
        gradients=gradients,
    )


def compare(
    bench: Benchmark,
    shape: str,
    part: str,
    ours: Call,
    official: Call,
    dtype: torch.dtype,
    leaves: Sequence[Tensor],
    *,
    exact: Call,
    gradients: Callable[[], Mapping[str, Tensor]],
    check_ours: Call | None = None,
) -> None:
    """Check ours, and measure it beside the official one.

    Args:
        bench: The benchmark.
        shape: The shape, in the rows.
        part: The name of the measured part, in the rows.
        ours: Our function, which returns the loss and leaves gradients.
        official: The official one.
        dtype: The dtype of the model.
        leaves: The tensors whose gradients are dropped before each call.
        exact: The official function with its loss in float32, which ours is checked with.
        gradients: Returns name -> the gradients to compare, after a call.
        check_ours: The function to check instead of ``ours``.
    """

    def fresh() -> None:
        for leaf in leaves:
            leaf.grad = None

    check(part, check_ours or ours, exact, dtype, gradients, fresh)
    bench.compare(
        shape,
        {"loku": ours, "official": official},
        dtype=str(dtype).removeprefix("torch."),
        over=["official"],
        prepare=fresh,
        part=part,
    )


def main(
    argv: Sequence[str] | None = None, build_model: Callable[[], PreTrainedModel] = gpt_neo_125m
) -> None:
    """Run the command on the model that ``build_model`` makes."""
    parser = arguments(__doc__, SHAPES, ("float32",), "forget rows x labelled tokens")
    bench = Benchmark("unlearn", parser, argv)
    with tempfile.TemporaryDirectory() as directory:
        for dtype, shape in bench.cases(bench.options.dtype, bench.options.shape):
            model = lora(build_model().to(bench.device, DTYPES[dtype]))
            head = model.get_base_model().get_output_embeddings()
            rows, tokens = sizes(shape)
            vocab = head.weight.shape[0]
            full, half = (
                batch_of(rows, tokens, unlabelled, vocab, bench.device) for unlabelled in (0, tokens // 2)
            )
            measure_head(bench, shape, head, full)
            measure_step(bench, shape, "whole step", model, full, directory)
            measure_step(bench, shape, "whole step, half labelled", model, half, directory)
            # Without the body's own activations the difference of the heads shows.
            model.gradient_checkpointing_enable({"use_reentrant": False})
            measure_step(bench, shape, "whole step, checkpointed", model, full, directory)
    bench.close()


if __name__ == "__main__":
    main()
