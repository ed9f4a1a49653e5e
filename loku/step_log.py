"""The values of the steps since the last log: losses, probabilities, tokens a second, utilisation, memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loku.memory import peak_device_memory, peak_memory
from loku.utilization import ModelFlops, device_count, model_flops, peak_flops


class StepLog(TrainerCallback):
    """Gathers the values of micro-batches on their device, and reads them when the trainer logs.

    As a callback of the trainer it begins anew with each run. A run that failed leaves the values of a step
    that was not finished. Two runs have a time between them that is of neither.

    Attributes:
        parts: Each metric's parts of the step's mean, one 0-dimensional tensor for each micro-batch.
        shares: The shares of the step's tokens or rows that these parts are of, in the same form.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self.shares: dict[str, list[Tensor]] = {}
        self._tokens: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._flops: ModelFlops | None = None
        self._since: float | None = None  # seconds, of time.perf_counter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew."""
        self._begin()

    def start(self) -> None:
        """Start the clock at the first micro-batch, unless it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def count(self, tokens: Tensor, labels: Tensor) -> None:
        """Count the tokens of a micro-batch.

        Args:
            tokens: The number of tokens without padding, a 0-dimensional tensor.
            labels: The number of tokens before a label, a 0-dimensional tensor.
        """
        self._tokens.append(tokens)
        self._labels.append(labels)

    def add(self, values: Mapping[str, Tensor], shares: Mapping[str, Tensor]) -> None:
        """Add the metrics of a micro-batch.

        Args:
            values: The means over the micro-batch, 0-dimensional tensors by their names.
            shares: The share of the step's tokens or rows that each is a mean over, in the same form.
        """
        for name, value in values.items():
            self.parts.setdefault(name, []).append(value.detach() * shares[name])
            self.shares.setdefault(name, []).append(shares[name])

    def take(self, accelerator: Any, model: nn.Module, dtype: torch.dtype) -> dict[str, float]:
        """Return the values since the last call, over all processes, and begin anew.

        All processes must call this.

        Args:
            accelerator: The ``accelerate.Accelerator`` of the run.
            model: The model, for its FLOPs.
            dtype: The dtype of the model's products.

        Returns:
            The values by their names in the log; none without a micro-batch.
        """
        if not self.parts:
            return {}
        sums = [
            torch.stack([torch.stack(parts).sum() for parts in kept.values()])
            for kept in (self.parts, self.shares)
        ]
        counts = [torch.stack(kept).sum(dtype=torch.float64) for kept in (self._tokens, self._labels)]
        parts, shares, tokens, labels = accelerator.reduce([*sums, *counts], "sum")
        values = dict(zip(self.parts, (parts / shares).tolist(), strict=True))
        now, device = time.perf_counter(), accelerator.device
        assert self._since is not None  # start was called before the first micro-batch
        seconds = now - self._since
        values["tokens_per_second"] = tokens.item() / seconds
        peak = peak_flops(device, dtype)
        if peak is not None and self._flops is None:  # counted once: it goes through all modules
            self._flops = model_flops(model)
        if peak is not None and self._flops is not None:
            done = tokens.item() * self._flops.token + labels.item() * self._flops.label
            peak *= device_count(model, device) * accelerator.num_processes
            values["model_flop_utilization"] = done / (seconds * peak)
        memory = torch.tensor([peak_device_memory() or peak_memory()], dtype=torch.float64, device=device)
        values["peak_memory_gib"] = accelerator.gather(memory).max().item() / 2**30
        self._since = now
        for kept in (self.parts, self.shares, self._tokens, self._labels):
            kept.clear()
        return values
