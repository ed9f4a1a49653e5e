"""The callbacks that ``UnlearnTrainer`` adds to its own: the progress bar and the epochs of the pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loku.data import PairedDataset


class LossBar(ProgressCallback):
    """The trainer's progress bar, with the last losses at its end instead of a line for each log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the last losses at the end of the bar."""
        shown = ("forget_loss", "retain_loss")
        losses = {name: value for name, value in (logs or {}).items() if name in shown}
        if self.training_bar is not None and losses:
            self.training_bar.set_postfix(losses)


class SetEpoch(TrainerCallback):
    """Tell the data set which epoch begins, as it pairs the rows anew in each."""

    def __init__(self, dataset: PairedDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch of the data set."""
        self.dataset.set_epoch(int(state.epoch or 0))
