"""The trainer whose checkpoints are whole, and which goes on from them exactly."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from loku.adapters import has_residual_base, stands_for_another_base
from loku.checkpoint_factors import (
    check_reference,
    initialize_from_checkpoint,
    load_trained_,
    save_factors,
    stored_factors,
)
from loku.checkpoint_files import (
    MANIFEST,
    STATE,
    Contents,
    check_best,
    check_writable,
    find_checkpoint,
    read_state,
    whole_checkpoints,
)
from loku.checkpoint_folder import CheckpointFolder
from loku.config import UnlearnConfig
from loku.data import RefusalRows
from loku.data.large_sets import DrawnRows
from loku.distributed import check_in_main_process, first_error
from loku.interrupts import uninterrupted
from loku.nan_guard import check_parameters
from loku.run_identity import model_facts, run_identity, settings_facts
from loku.saving.adapter import check_portable, loaded_from, save_portable_adapter
from loku.saving.adapter_files import standardise_configs_
from loku.saving.destinations import check_room, refuse_overlap
from loku.saving.directories import system_error

__all__ = [  # with the names that have moved to modules of their own
    "MANIFEST",
    "ResumableTrainer",
    "check_writable",
    "find_checkpoint",
    "initialize_from_checkpoint",
    "run_identity",
    "stored_factors",
    "whole_checkpoints",
]

_ADAM = ("adamw_torch", "adamw_torch_fused")


def _portable(peft_model: PeftModel) -> bool:
    """Whether ``save_pretrained`` has an adapter to write that is right on the base that it names."""
    if not stands_for_another_base(peft_model):
        return True
    try:
        check_portable(peft_model, peft_model.active_adapters[0])
    except ValueError:
        return False
    return True


class _BestCheckpoint(TrainerCallback):
    """Find the best checkpoint of a resumed run whose directory was moved: Trainer would forget it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set ``best_model_checkpoint`` again."""
        if state.best_global_step and state.best_model_checkpoint is None and args.load_best_model_at_end:
            state.best_model_checkpoint = f"{args.output_dir}/checkpoint-{state.best_global_step}"


class ResumableTrainer(Trainer):
    """A ``transformers.Trainer`` with whole checkpoints, which goes on from them exactly.

    ``args.resume_from_checkpoint`` or the argument of ``train`` chooses the checkpoint; see
    ``find_checkpoint``. A resumed run ends with the parameters of a run that was never stopped, bit for bit.
    This needs the same software, device and number of threads.

    Args:
        model: The model to train.
        args: The settings.
        forget: The tokenised forget rows. They identify a run, together with its other sets and settings.
        retain: The tokenised retain rows.
        refusals: The ``loku.data.RefusalRows`` of the run, or None (default).
        kwargs: The other arguments of ``transformers.Trainer``.

    Raises:
        OSError: ``args.output_dir`` cannot be written to.
    """

    args: UnlearnConfig
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        args: UnlearnConfig,
        forget: Sequence[Mapping[str, Any]],
        retain: Iterable[Mapping[str, Any]] | DrawnRows,
        refusals: RefusalRows | None = None,
        **kwargs: Any,
    ) -> None:
        if args.should_save:
            check_writable(str(args.output_dir))
        super().__init__(model=model, args=args, **kwargs)
        self._run = forget, retain, refusals
        if self._may_write_checkpoints():
            settings_facts(args)  # it refuses what no checkpoint can keep
        self._ended = self._reserved = False
        self._folder = CheckpointFolder(str(self.args.output_dir))
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise ValueError("FSDP 1 flattens the weights, and FILA needs matrices: set fsdp_version: 2")
        self.add_callback(_BestCheckpoint())

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return run_identity(self.args, self._model_facts, *self._run) | self._further_facts()

    @cached_property
    def _model_facts(self) -> dict[str, Any]:
        return model_facts(self.model)

    def _may_write_checkpoints(self) -> bool:
        """Whether a checkpoint may be written. Reading all weights would cost other runs time for nothing."""
        if self.args.save_strategy != "no" or self.args.enable_jit_checkpoint:
            return True
        # A callback can ask for a checkpoint at any step. Those of transformers and loku do not.
        modules = {type(callback).__module__ for callback in self.callback_handler.callbacks}
        return not {module.partition(".")[0] for module in modules} <= {"transformers", "loku"}

    def _further_facts(self) -> dict[str, Any]:
        """Facts of a subclass that two runs must share, which JSON can hold, by their names in messages."""
        return {}

    @cached_property
    def checkpoint(self) -> Path | None:
        """The checkpoint of ``args.resume_from_checkpoint``, checked, or None to begin anew.

        Raises:
            ValueError: The errors of ``find_checkpoint``, in all processes.
        """
        return self._find_checkpoint(self.args.resume_from_checkpoint)

    def _find_checkpoint(self, resume: str | os.PathLike | bool | None) -> Path | None:
        if not resume:
            return None
        _ = self._model_facts  # all processes must take them
        output_dir, contents = str(self.args.output_dir), self._contents
        return check_in_main_process(lambda: find_checkpoint(resume, output_dir, self._identity, contents))

    @property
    def _contents(self) -> Contents:
        return Contents(
            adapters=isinstance(self.model, PeftModel),
            sharded=self.is_fsdp_enabled,
            processes=self.args.world_size,
            scaler=getattr(self.accelerator, "scaler", None) is not None,
        )

    @contextmanager
    def checkpoints_reserved(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None
    ) -> Iterator[Path | None]:
        """A context in which no other run writes to ``args.output_dir``, if this run writes checkpoints.

        ``train`` enters it. Work before training that takes long belongs into it, too. All processes must
        enter it.

        Args:
            resume_from_checkpoint: The checkpoint, as for ``train``.

        Yields:
            The checkpoint to go on from, or None to begin anew.

        Raises:
            ValueError: The errors of ``find_checkpoint``. Another run writes to the directory. It holds
                something that this run would replace and that is not its own. Or the model was loaded from
                there.
            OSError: There is no room for a checkpoint.
        """
        begun = not self._reserved
        try:
            writes = self.args.save_strategy != "no" or self.args.enable_jit_checkpoint
            if begun and writes:
                self._reserve()
            if resume_from_checkpoint is None:
                checkpoint = self.checkpoint
            else:
                checkpoint = self._find_checkpoint(resume_from_checkpoint)
            if begun and self._may_write_checkpoints():
                _ = self._identity  # before training changes the weights
            if begun and writes:
                check_in_main_process(partial(self._check_folder, checkpoint))
            yield checkpoint
        finally:
            if begun:
                self._reserved = False
                if self.args.should_save:  # on each node that keeps checkpoints of its own
                    uninterrupted(self._folder.release)

    def _reserve(self) -> None:
        self._reserved = True
        check_in_main_process(self._folder.reserve)

    def _check_folder(self, checkpoint: Path | None) -> None:
        """Refuse a directory that the model was loaded from, what is in the way, and a disk without room."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # A lower bound: Adam has two states of a parameter's size, and other optimizers may have none.
        states = 2 if self.args.optim in _ADAM and not self.args.save_only_model else 0
        needed = sum(p.numel() * p.element_size() for p in parameters) * (1 + states)
        check_room(self._folder.directory, needed, "a checkpoint of this run")
        refuse_overlap(self._folder.directory, **loaded_from(self.model))
        first = 0 if checkpoint is None else read_state(checkpoint)[0]
        steps = cache(self._steps_of_an_epoch)  # made for the first checkpoint in the way, and once
        self._folder.refuse_collisions(lambda step: self._writes(step, first, steps()), self._identity)

    def _steps_of_an_epoch(self) -> int:
        return max(1, math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps))

    def _writes(self, step: int, first: int, epoch: int) -> bool:
        """Whether this run may write a checkpoint at a step.

        The run begins after step ``first``, and an epoch has ``epoch`` steps.
        """
        args = self.args
        last = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
        if not first < step <= last:
            return False
        # The best evaluation and SIGTERM may come at any step.
        if args.load_best_model_at_end or args.enable_jit_checkpoint or args.save_strategy == "best":
            return True
        every = epoch if args.save_strategy == "epoch" else args.save_steps
        return step == last or step % (every if every >= 1 else math.ceil(last * every)) == 0

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, from the checkpoint if there is one.

        Args:
            resume_from_checkpoint: The checkpoint, as for ``find_checkpoint``. None (default) stands for
                ``args.resume_from_checkpoint``.
            args: The other arguments of ``transformers.Trainer.train``.
            kwargs: The other keyword arguments of ``transformers.Trainer.train``.

        Returns:
            The ``TrainOutput`` of ``transformers.Trainer.train``.

        Raises:
            ValueError: The errors of ``checkpoints_reserved``.
            OSError: A checkpoint cannot be written. Or there was no room for one from the beginning.
            FloatingPointError: A loss or a trained parameter is NaN or Inf.
        """
        with self.checkpoints_reserved(resume_from_checkpoint) as checkpoint:
            self._ended = False
            if checkpoint is not None:
                _, self._ended = read_state(checkpoint)
            output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            if self.args.save_total_limit == 1 and self.state.best_model_checkpoint is not None:
                self._delete_oldest({Path(self.state.best_model_checkpoint).name})
        check_parameters(self.model, self.state.global_step)
        return output

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of the next step, or none if the resumed run had already ended."""
        # A resumed Trainer does not know that the run had ended. It would go on to the end of the epoch.
        if self._ended:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # FSDP has sharded the parameters before this call.
        if not isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # A model without initial factors has the untouched base: the identity of the run has its fingerprint.
        if not has_residual_base(self.model) and stored_factors(resume_from_checkpoint):
            initialize_from_checkpoint(self.model, resume_from_checkpoint, self.model.active_adapters[0])
        check_reference(self.model, resume_from_checkpoint)
        load_trained_(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        check_in_main_process(lambda: check_best(Path(best), self._identity))
        if not isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            load_trained_(self.model, best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as ``transformers.Trainer.save_model``: an adapter for the untouched base.

        Under FSDP the factors alone are gathered, one at a time. All processes must call this.

        Args:
            output_dir: The directory, ``args.output_dir`` by default.
            _internal_call: Whether a checkpoint is being written.
        """
        model: Any = self.model
        if _internal_call and isinstance(model, PeftModel) and not _portable(model):
            # The files of loku.checkpoint_factors are all that a resumed run reads.
            if self.args.should_save:
                directory = str(output_dir)
                os.makedirs(directory, exist_ok=True)
                torch.save(self.args, os.path.join(directory, TRAINING_ARGS_NAME))
            return
        if not isinstance(model, PeftModel) or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            if isinstance(model, PeftModel) and self.args.should_save:
                standardise_configs_(str(self.args.output_dir) if output_dir is None else output_dir, model)
            return
        directory = str(self.args.output_dir) if output_dir is None else output_dir
        save_portable_adapter(model, directory, model.active_adapters[0])
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(directory)
            torch.save(self.args, os.path.join(directory, TRAINING_ARGS_NAME))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # Trainer._save_checkpoint asks for the directory, writes, pushes, and deletes checkpoints by their
    # modification times. At the end of training Trainer deletes all but the best, whoever wrote them. So it
    # is told of the private directory, and pushing and deleting come after the rename.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder.private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not Path(checkpoint_folder).is_relative_to(self._folder.private):
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_parameters(self.model, self.state.global_step)
        step, name = self.state.global_step, f"checkpoint-{self.state.global_step}"
        if not self._reserved:  # a callback asks for a checkpoint in a run without a save_strategy
            self._reserve()
        if self.args.should_save:
            self._folder.clear(step)
        self.accelerator.wait_for_everyone()
        final = self._folder.directory / name

        def write_rest() -> None:
            if self.state.best_model_checkpoint == str(self._folder.private / name):
                self.state.best_model_checkpoint = str(final)
            if isinstance(self.model, PeftModel):
                save_factors(self.model, self._folder.private / name)
            if self.args.should_save:
                self.state.save_to_json(str(self._folder.private / name / STATE))
                contents = replace(self._contents, model_only=self.args.save_only_model)
                self._folder.publish(step, self._identity, contents)

        try:
            self._written(partial(super()._save_checkpoint, model, trial), final)
            self._written(write_rest, final)
        finally:
            if self.args.should_save:
                self._folder.clear(step)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        self._delete_oldest({name, Path(str(self.state.best_model_checkpoint)).name})

    @staticmethod
    def _written(write: Callable[[], None], checkpoint: Path) -> None:
        """Call a function that writes. All processes raise OSError if it fails in one."""
        failed: Exception | None = None
        try:
            write()
        except Exception as error:  # libraries in Rust raise it for a full disk, torch a RuntimeError
            failed = error
        reason = first_error(None if failed is None else str(failed) or type(failed).__name__)
        if isinstance(failed, MemoryError):
            raise failed
        if reason is not None:
            raise system_error(  # the command line tells a failed run from wrong arguments by the number
                f"{checkpoint.name} could not be written to {checkpoint.parent} ({reason}). The checkpoints "
                "before it are whole: make room, or mend what the reason names, and go on with "
                "resume_from_checkpoint=True",
                getattr(failed, "errno", None) or errno.EIO,
            ) from failed

    def _delete_oldest(self, kept: set[str]) -> None:
        limit = self.args.save_total_limit
        if self.args.should_save and limit and limit > 0:
            self._folder.delete_oldest(limit, kept, self._identity)
