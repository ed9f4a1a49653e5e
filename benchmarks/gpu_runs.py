"""The steps of ``gpu.py`` that run a whole model: a training step, a FILA initialisation, a whole run.

The model is a Llama with random weights, made on the device, in bfloat16. The adapter has rank ``RANK`` on
all linear layers. A shape begins with layers, width, width of the MLP and vocabulary.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Case
from gpu_plan import RANK
from harness import Call, OutOfTime, measured_once
from peft import LoraConfig, get_peft_model
from result_files import Row
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from unlearn import batch_of

from loku import UnlearnConfig, UnlearnTrainer, unlearn
from loku.fila.initialize import initialize_from_row_scales, restore_base_
from loku.fila.targets import fila_targets
from loku.target_modules import default_target_modules

HEAD_WIDTH = 128  # of an attention head


def llama(device: str, layers: int, width: int, mlp: int, vocab: int) -> PreTrainedModel:
    """Return a Llama with random bfloat16 weights, made on the device, the same at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD_WIDTH),
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)


def all_linears(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers of attention and MLP, for ``target_modules``."""
    return sorted({name for sweep in ("qkvo", "ffn") for name in default_target_modules(model, sweep)})


def adapted(model: Any) -> Any:
    """Return the model with an adapter on all its linear layers."""
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=all_linears(model), task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def random_rows(count: int, tokens: int, vocab: int, seed: int) -> list[dict[str, list[int]]]:
    """Return rows of random tokens, all labelled, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (count, tokens), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def settings(device: str, **changes: Any) -> UnlearnConfig:
    """Return the settings of a run on the device, in bfloat16."""
    return UnlearnConfig(use_cpu=device == "cpu", bf16=True, disable_tqdm=True, **changes)


# --- a training step ------------------------------------------------------------------------------


def step(device: str, layers: int, width: int, mlp: int, vocab: int, rows: int, tokens: int) -> Case:
    """A step of ``UnlearnTrainer`` on ``rows`` forget and ``rows`` retain rows of ``tokens`` tokens.

    The floor is the forward and backward of the same model and loss without adapters, down to the input of
    the first layer. Both models have the same weights in memory.
    """
    base = llama(device, layers, width, mlp, vocab).requires_grad_(False)
    plain = copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
    plain.enable_input_require_grads()
    model = adapted(base)
    batch = batch_of(rows, tokens - 1, 0, vocab, device)
    # Unused: training_step gets the batch.
    forget, retain = (random_rows(1, 2, vocab, seed) for seed in (0, 1))
    # Nothing is written: a step alone saves no checkpoint.
    options = partial(settings, device, output_dir=tempfile.gettempdir())

    def trainer_of(model: Any, config: UnlearnConfig) -> UnlearnTrainer:
        trainer = UnlearnTrainer(model, config, forget, retain)
        trainer.current_gradient_accumulation_steps = 1  # its loop sets it before training_step
        return trainer

    def forward_backward(trainer: UnlearnTrainer, model: Any) -> Call:
        return lambda: trainer.training_step(model, batch)

    trainer, bare = trainer_of(model, options()), trainer_of(plain, options(tuning="full"))
    optimizer = trainer.create_optimizer()

    def whole_step() -> None:
        trainer.training_step(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    weights = sum(module.weight.numel() for module in plain.modules() if isinstance(module, nn.Linear))
    count = 2 * rows * tokens
    return Case(
        {
            "without adapters": forward_backward(bare, plain),
            "forward and backward": forward_backward(trainer, model),
            "whole step": whole_step,
        },
        floor=lambda times: times["without adapters"],
        target=lambda times: 1.5 * times["without adapters"],
        prepare=lambda: model.zero_grad(),
        # The base model's own products: the forward, and the gradient of the activations.
        rates={"teraflops": 4 * weights * count / 1e12, "tokens_per_second": count},
    )


# --- runs that are measured once ------------------------------------------------------------------


def initialise(device: str, layers: int, width: int, mlp: int, vocab: int) -> Iterator[Row]:
    """``initialize_from_row_scales`` of a new adapter, with random row scales, twice.

    The first call has what is made once in a process too, such as compiled kernels.
    """
    model = adapted(llama(device, layers, width, mlp, vocab))
    scales = {name: torch.rand(len(layer.weight)) + 0.5 for name, layer in fila_targets(model).items()}
    for name in ("first call", "second call"):
        yield measured_once(name, partial(initialize_from_row_scales, model, scales), device)
        model = adapted(restore_base_(model))


class Clock(TrainerCallback):
    """Notes when the training of a run begins and ends.

    Args:
        wait: Waits for the device.
    """

    def __init__(self, wait: Call) -> None:
        self.wait = wait
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Note the time of the wall clock, in seconds."""
        self.wait()
        self.marks[name] = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the beginning."""
        self.mark("initialised")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the end."""
        self.mark("trained")

    def parts(self) -> Iterator[Row]:
        """Yield a row for each finished part of the run."""
        marks = list(self.marks.values())
        names = ("Fisher and initialisation", "training", "saving")
        for name, begin, end in zip(names, marks, marks[1:], strict=False):
            yield {"name": name, "milliseconds": (end - begin) * 1e3}


def run(
    device: str, layers: int, width: int, mlp: int, vocab: int, rows: int, tokens: int, epochs: int
) -> Iterator[Row]:
    """``loku.unlearn`` on ``rows`` forget and ``rows`` retain rows of ``tokens`` tokens, and saving.

    The rows of the finished parts come out too if the run fails or its time is over.
    """
    model = llama(device, layers, width, mlp, vocab)
    forget, retain = (random_rows(rows, tokens, vocab, seed) for seed in (0, 1))
    clock = Clock(torch.cuda.synchronize if device == "cuda" else lambda: None)
    with tempfile.TemporaryDirectory() as directory:
        config = settings(
            device,
            output_dir=directory,
            num_train_epochs=epochs,
            learning_rate=1e-4,
            logging_steps=20,
            lora_rank=RANK,
            lora_alpha=2 * RANK,
            target_modules=all_linears(model),
        )

        def whole() -> None:
            clock.mark("begun")
            result = unlearn(model, forget, retain, config=config, callbacks=[clock])
            result.save(Path(directory) / "adapter")
            clock.mark("saved")

        try:
            row = measured_once("whole run", whole, device)
        except (Exception, OutOfTime):
            yield from clock.parts()
            raise
    yield row
    yield from clock.parts()


CASES: dict[str, Callable[..., Case]] = {"step": step}
RUNS: dict[str, Callable[..., Iterator[Row]]] = {"initialise": initialise, "run": run}
