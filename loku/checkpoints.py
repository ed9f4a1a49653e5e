"""The trainer whose checkpoints are whole, and which goes on from them exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
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
    UNFINISHED,
    check_writable,
    find_checkpoint,
    whole_checkpoints,
    write_manifest,
)
from loku.config import UnlearnConfig
from loku.data import RefusalRows
from loku.data.large_sets import DrawnRows
from loku.distributed import first_error, from_main_process, is_main_process
from loku.nan_guard import check_parameters
from loku.run_identity import model_facts, run_identity, settings_facts
from loku.saving.adapter import check_portable, save_portable_adapter
from loku.saving.directories import flush_tree, replace_directory

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

_STATE = "trainer_state.json"


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
        self._writing = self._ended = False
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
        answer: Path | ValueError | None = None
        if is_main_process():  # it answers for all
            try:
                answer = find_checkpoint(resume, str(self.args.output_dir), self._identity)
            except ValueError as error:
                answer = error
        answer = from_main_process(answer)
        if isinstance(answer, ValueError):
            raise answer
        return answer

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
            ValueError: The errors of ``find_checkpoint``.
            FloatingPointError: A loss or a trained parameter is NaN or Inf.
        """
        if self._may_write_checkpoints():
            _ = self._identity  # before training changes the weights
        if resume_from_checkpoint is None:
            checkpoint = self.checkpoint
        else:
            checkpoint = self._find_checkpoint(resume_from_checkpoint)
        self._ended = False
        if checkpoint is not None:
            state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
            control = state["stateful_callbacks"].get("TrainerControl", {}).get("args", {})
            self._ended = control.get("should_training_stop", False)
        output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
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
        if not os.path.isfile(os.path.join(best, MANIFEST)):
            raise OSError(f"load_best_model_at_end: the best checkpoint, {best}, is gone")
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
            return
        directory = str(self.args.output_dir) if output_dir is None else output_dir
        save_portable_adapter(model, directory, model.active_adapters[0])
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(directory)
            torch.save(self.args, os.path.join(directory, TRAINING_ARGS_NAME))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # Trainer._save_checkpoint asks for the directory, writes, pushes, and deletes checkpoints beyond
    # save_total_limit. During the call the directory is ``.unfinished``. Pushing and deleting come after the
    # rename.

    def _get_output_dir(self, trial: Any) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, UNFINISHED) if self._writing else directory

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_parameters(self.model, self.state.global_step)
        directory = Path(self._get_output_dir(trial))
        unfinished, name = directory / UNFINISHED, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
        self.accelerator.wait_for_everyone()
        self._writing = True

        def write_rest() -> None:
            if self.state.best_model_checkpoint == str(unfinished / name):
                self.state.best_model_checkpoint = str(directory / name)
            if isinstance(self.model, PeftModel):
                save_factors(self.model, unfinished / name)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / name / _STATE))
                write_manifest(unfinished / name, self._identity)
                flush_tree(unfinished / name)
                replace_directory(unfinished / name, directory / name)

        try:
            self._written(partial(super()._save_checkpoint, model, trial), directory / name)
            self._written(write_rest, directory / name)
        finally:
            self._writing = False
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(directory / name))
        if self.args.should_save:
            self._delete_oldest(directory)

    @staticmethod
    def _written(write: Callable[[], None], checkpoint: Path) -> None:
        """Call a function that writes. All processes raise OSError if it fails in one."""
        failed: Exception | None = None
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise the last two
            failed = error
        reason = first_error(None if failed is None else str(failed))
        if reason is not None:
            raise OSError(
                f"{checkpoint.name} could not be written to {checkpoint.parent} ({reason}). The checkpoints "
                "before it are whole: make room and go on with resume_from_checkpoint=True"
            ) from failed

    def _delete_oldest(self, directory: Path) -> None:
        """Delete the oldest checkpoints beyond ``save_total_limit``, but not the newest and the best."""
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        checkpoints = [entry for entry in directory.glob("checkpoint-*") if (entry / MANIFEST).is_file()]
        checkpoints.sort(key=lambda entry: (entry / MANIFEST).stat().st_mtime_ns)
        kept = {str(checkpoints[-1]), self.state.best_model_checkpoint}
        deletable = [entry for entry in checkpoints if str(entry) not in kept]
        for entry in deletable[: max(0, len(checkpoints) - limit)]:
            (entry / MANIFEST).unlink()  # first, so that no half-deleted checkpoint looks whole
            shutil.rmtree(entry, ignore_errors=True)
