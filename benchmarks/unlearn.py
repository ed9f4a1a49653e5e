"""A step of ``UnlearnTrainer`` on a random GPT-Neo-125M, beside the same step on materialised logits.

    python benchmarks/unlearn.py [--shape 8x200 ...] [--threads N ...] [--json FILE]

A shape is forget rows (and as many retain rows) x predicted tokens in a row. ``after the last hidden state``
is the losses and their gradient for the hidden states alone. ``whole step`` is forward, backward and
optimizer step of LoRA with rank 16. ``half labelled`` is a step whose tokens carry a label in the second half
of a row alone, as in TOFU's questions. ``checkpointed`` is a step with gradient checkpointing. ``official``
is the same trainer with the logits of all tokens: it computes the authors' formula for the forget rows and
``cross_entropy`` for the retain rows.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import DTYPES, Benchmark, Call, arguments, sizes
from peers import official_ihl
from subjects import gpt_neo_125m
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loku import UnlearnConfig, UnlearnTrainer
from loku.data import collate_pairs
from loku.fila.targets import default_target_modules
from loku.head import next_token_labels
from loku.objectives import OBJECTIVES, Batch, Rows
from loku_kernels import linear_softmax_triplet

SHAPES = ["8x200"]
RANK = 16


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
    """The trainer with the authors' loss of the logits of all tokens."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch."""
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
        return official_loss(logits, inputs["labels"], inputs["is_forget"])


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


def check(what: str, ours: Call, official: Call, parameters: Sequence[Tensor]) -> None:
    """Assert that both functions return the same loss and leave the same gradients of ``parameters``."""
    results: list[tuple[Tensor, list[Any]]] = []
    for function in (ours, official):
        for parameter in parameters:
            parameter.grad = None
        loss = function()
        results.append((loss, [parameter.grad for parameter in parameters]))
    for parameter in parameters:
        parameter.grad = None
    (loss, gradients), (expected_loss, expected) = results
    eps = torch.finfo(parameters[0].dtype).eps
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=64 * eps, atol=64 * eps)
    for ours_, theirs in zip(gradients, expected, strict=True):
        error = ((ours_ - theirs).norm() / theirs.norm()).item()
        assert error <= 1e-3 + 16 * eps, f"{what}: a gradient is off by {error:.1e}"


def measure_head(bench: Benchmark, shape: str, head: Any, batch: dict[str, Tensor]) -> None:
    """Measure the losses after the last hidden state."""
    is_forget, labels = batch["is_forget"], batch["labels"]
    hidden = torch.randn(*labels.shape, head.weight.shape[1]).to(head.weight).requires_grad_()

    def ours() -> Tensor:
        next_labels = next_token_labels(labels)
        counted = next_labels != -100
        triplet, _ = linear_softmax_triplet(hidden, head.weight, next_labels)
        forget, retain = (Rows(triplet[mask], counted[mask]) for mask in (is_forget, ~is_forget))
        loss = sum(OBJECTIVES["ihl"].losses(Batch(forget, retain=retain)).values())
        loss.backward()
        return loss.detach()

    def official() -> Tensor:
        loss = official_loss(head(hidden), labels, is_forget)
        loss.backward()
        return loss.detach()

    compare(bench, shape, "after the last hidden state", ours, official, [hidden])


def measure_step(
    bench: Benchmark, shape: str, part: str, model: Any, batch: dict[str, Tensor], directory: str
) -> None:
    """Measure a whole step of both trainers."""
    # The authors' loss is Eq. 3 of the paper: the retain loss counts once.
    options = UnlearnConfig(output_dir=directory, use_cpu=bench.device == "cpu", retain_weight=1.0)
    rows = [{"input_ids": [0, 0], "labels": [0, 0]}]  # unused: training_step gets the batch itself
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def stepper(kind: type[UnlearnTrainer]) -> tuple[UnlearnTrainer, Call]:
        trainer = kind(model, options, rows, rows)
        optimizer = trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # its loop sets it before training_step

        def step() -> Tensor:
            loss = trainer.training_step(model, batch)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return trainer, step

    (ours, our_step), (official, official_step) = stepper(UnlearnTrainer), stepper(OfficialTrainer)
    compare(
        bench,
        shape,
        part,
        our_step,
        official_step,
        parameters,
        lambda: ours.training_step(model, batch),
        lambda: official.training_step(model, batch),
    )


def compare(
    bench: Benchmark,
    shape: str,
    part: str,
    ours: Call,
    official: Call,
    parameters: Sequence[Tensor],
    check_ours: Call | None = None,
    check_official: Call | None = None,
) -> None:
    """Check and measure ours beside the official one.

    Args:
        bench: The benchmark.
        shape: The shape, in the rows.
        part: The name of the measured part, in the rows.
        ours: Our function, which returns the loss and leaves gradients.
        official: The official one.
        parameters: The tensors whose gradients are compared and then dropped before each call.
        check_ours: The function to check instead of ``ours``.
        check_official: The function to check instead of ``official``.
    """
    check(part, check_ours or ours, check_official or official, parameters)

    def fresh() -> None:
        for parameter in parameters:
            parameter.grad = None

    bench.compare(
        shape,
        {"loku": ours, "official": official},
        dtype=str(parameters[0].dtype).removeprefix("torch."),
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
