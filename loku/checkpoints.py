"""Checkpoints that are whole or absent. Each names its run, and the run goes on from it exactly.

``transformers.Trainer`` writes a checkpoint file by file under its final name, and takes any directory of
that name for a checkpoint. Here a checkpoint is written in ``.unfinished``. It gets a manifest with the sizes
and digests of its files, and is renamed when it is whole. A run goes on only from an unaltered checkpoint of
the same base model, data and settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer

from loku.adapters import REFERENCE_ADAPTER, reference_factors
from loku.config import UnlearnConfig
from loku.data import RefusalRows
from loku.data.large_sets import DrawnRows
from loku.distributed import from_main_process, is_main_process
from loku.fila.initialize import initialize_from_factors
from loku.fingerprints import ordered_rows_fingerprint, sampled_weights_fingerprint, texts_fingerprint
from loku.nan_guard import check_parameters
from loku.saving.directories import replace_directory
from loku.saving.residual_base import factors_as_they_are

MANIFEST = "loku_checkpoint.json"
_UNFINISHED = ".unfinished"
_STATE = "trainer_state.json"
_FORMAT = 3  # raised with each change of the facts that identify a run


def run_identity(
    args: UnlearnConfig,
    fingerprint: str | None,
    forget: Iterable[Mapping[str, Any]],
    retain: Iterable[Mapping[str, Any]] | DrawnRows,
    refusals: RefusalRows | None = None,
) -> dict[str, Any]:
    """The facts that two runs must share for one to go on from the other's checkpoint.

    Args:
        args: The settings; their ``deciding_settings`` count.
        fingerprint: The ``sampled_weights_fingerprint`` of the base model, or None in a process that writes
            no checkpoints.
        forget: The tokenised forget rows.
        retain: The tokenised retain rows. Only the first 100 rows count of a set that is not held in memory.
        refusals: The refusals that the run trains on, or None.

    Returns:
        The facts, which JSON can hold, by their names in messages.
    """
    identity = {
        "checkpoint format": _FORMAT,
        "base model": fingerprint,
        "forget set": ordered_rows_fingerprint(forget),
        "retain set": ordered_rows_fingerprint(retain.first() if isinstance(retain, DrawnRows) else retain),
        "refusals": None if refusals is None else texts_fingerprint(refusals.refusals),
        **args.deciding_settings(),
    }
    return json.loads(json.dumps(identity, default=str))  # the form that is read back


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_manifest(directory: Path, identity: dict[str, Any]) -> None:
    files = {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    manifest = {"run": identity, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} is not a whole checkpoint of loku ({MANIFEST}: {error}); pass another"
        ) from error


def _check_files(checkpoint: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            reason = "is missing"
        elif file.stat().st_size != expected["bytes"]:
            reason = f"has {file.stat().st_size} bytes of {expected['bytes']}"
        elif _sha256(file) != expected["sha256"]:
            reason = "was altered: its SHA-256 is not that of what was written"
        else:
            continue
        raise ValueError(
            f"{checkpoint}: {name} {reason}. Nothing was loaded; restore the file, or delete this checkpoint "
            "to go on from an earlier one"
        )


def _differences(identity: dict[str, Any], other: dict[str, Any]) -> str:
    parts = []
    for name in {**other, **identity}:
        ours, theirs = identity.get(name), other.get(name)
        if ours != theirs:
            is_digest = name in ("base model", "forget set", "retain set", "refusals")
            parts.append(
                f"another {name}" if is_digest else f"{name}={theirs!r}, where this run has {ours!r}"
            )
    return "; ".join(parts)


def whole_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a directory that have a manifest, in the order of their steps.

    A warning names each of the others.

    Args:
        output_dir: The directory. It need not exist.
    """
    found = []
    directory = Path(output_dir)
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    for entry in entries:
        step = re.fullmatch(r"checkpoint-(\d+)", entry.name)
        if step and (entry / MANIFEST).is_file():
            found.append((int(step[1]), entry))
        elif (step or entry.name == _UNFINISHED) and entry.is_dir():
            warnings.warn(
                f"{entry} is ignored: it is not a whole checkpoint (it has no {MANIFEST}, which comes last)",
                stacklevel=2,
            )
    return [entry for _, entry in sorted(found)]


def find_checkpoint(
    resume: str | os.PathLike | bool | None, output_dir: str | os.PathLike, identity: dict[str, Any]
) -> Path | None:
    """Find the checkpoint to go on from: whole, unaltered and of this run.

    Args:
        resume: True for the newest checkpoint of this run in ``output_dir``, the path of a checkpoint, or
            None or False to begin anew. The texts "true" and "false" mean the same.
        output_dir: The directory of checkpoints.
        identity: The ``run_identity`` of this run.

    Returns:
        The checkpoint, or None to begin anew. It is None with True if ``output_dir`` holds no checkpoint: a
        run that was stopped before its first checkpoint begins anew.

    Raises:
        ValueError: The checkpoint is not whole, was altered, or is of another run. True finds only
            checkpoints of other runs. The message names the differences.
    """
    if resume is None or str(resume).lower() == "false":
        return None
    if str(resume).lower() == "true":  # or the text, from a command line
        candidates = whole_checkpoints(output_dir)
    else:
        candidates = [Path(str(resume))]
    reason = None
    for checkpoint in reversed(candidates):
        manifest = _read_manifest(checkpoint)
        difference = _differences(identity, manifest["run"])
        if not difference:
            _check_files(checkpoint, manifest["files"])
            return checkpoint
        reason = reason or (
            f"{checkpoint} is of another run: {difference}. Nothing was changed; pass the model, data and "
            "settings that it was made with, or another output_dir"
        )
    if reason:
        raise ValueError(reason)
    return None


def stored_factors(checkpoint: str | os.PathLike) -> dict[str, tuple[Tensor, Tensor]]:
    """The initial factors in a checkpoint.

    Args:
        checkpoint: The directory of the checkpoint.

    Returns:
        B (d, rank) and A (rank, k) by module name in the base model, as from
        ``loku.adapters.reference_factors``. The dict is empty without FILA.
    """
    file = Path(checkpoint) / REFERENCE_ADAPTER / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return {}
    tensors = load_file(file)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): (
            tensors[f"{name}.lora_B.weight"],
            tensors[f"{name}.lora_A.weight"],
        )
        for name in names
    }


def initialize_from_checkpoint(
    peft_model: PeftModel, checkpoint: str | os.PathLike, adapter_name: str = "default"
) -> None:
    """Initialise an adapter by FILA with the initial factors of a checkpoint (``initialize_from_factors``).

    Nothing is measured or decomposed. ``UnlearnTrainer.train(resume_from_checkpoint=checkpoint)`` then loads
    the trained factors.

    Args:
        peft_model: The model with the adapter, on the untouched base.
        checkpoint: The directory of the checkpoint.
        adapter_name: The name of the adapter, "default" by default.

    Raises:
        ValueError: FILA cannot initialise the adapter, or the factors are of other modules or shapes.
    """
    initialize_from_factors(peft_model, stored_factors(checkpoint), adapter_name)


def _check_factors(model: Any, checkpoint: Path) -> None:
    """Raise ValueError unless the model was initialised by the initial factors of the checkpoint."""
    held = reference_factors(model) if isinstance(model, PeftModel) else {}
    stored = stored_factors(checkpoint)
    same = held.keys() == stored.keys() and all(
        torch.equal(ours.cpu(), theirs)
        for name in held
        for ours, theirs in zip(held[name], stored[name], strict=True)
    )
    if not same:
        raise ValueError(
            f"{checkpoint} has other initial factors than this model, so its adapter does not fit this "
            "residual base; initialise it by loku.initialize_from_checkpoint(peft_model, checkpoint) first"
        )


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Make a directory if it does not exist, and check that it can be written to.

    Args:
        directory: The directory of checkpoints.

    Raises:
        OSError: It cannot be made or written to.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".writable"):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {os.fspath(directory)!r} cannot be written to ({error}); nothing was started: pass "
            "another output_dir"
        ) from error


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
        forget: Iterable[Mapping[str, Any]],
        retain: Iterable[Mapping[str, Any]] | DrawnRows,
        refusals: RefusalRows | None = None,
        **kwargs: Any,
    ) -> None:
        if args.should_save:
            check_writable(str(args.output_dir))
        super().__init__(model=model, args=args, **kwargs)
        self._run = forget, retain, refusals
        # The fingerprint is taken before training changes the weights.
        self._base_model = sampled_weights_fingerprint(model) if args.should_save else None
        self._writing = self._ended = False

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return run_identity(self.args, self._base_model, *self._run)

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
        # FSDP and DeepSpeed have sharded the parameters before this call.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        checkpoint = Path(resume_from_checkpoint)
        _check_factors(self.model, checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # peft writes the adapter "default" into the checkpoint itself and each other adapter into a folder of
        # its own. FILA's initial factors are such an adapter. Before transformers 5.23 Trainer then loads the
        # folders alone.
        model = self.model if model is None else model
        stored = (checkpoint / SAFETENSORS_WEIGHTS_NAME).is_file()
        if stored and isinstance(model, PeftModel) and "default" in model.peft_config:
            trained = "default" in model.active_adapters
            model.load_adapter(resume_from_checkpoint, "default", is_trainable=trained)

    # Trainer._save_checkpoint asks for the directory, writes, pushes, and deletes checkpoints beyond
    # save_total_limit. During the call the directory is ``.unfinished``. Pushing and deleting come after the
    # rename.

    def _get_output_dir(self, trial: Any) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, _UNFINISHED) if self._writing else directory

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_parameters(self.model, self.state.global_step)
        directory = Path(self._get_output_dir(trial))
        unfinished, name = directory / _UNFINISHED, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
        self.accelerator.wait_for_everyone()
        self._writing = True
        try:
            with factors_as_they_are(self.model):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(unfinished / name):
                self.state.best_model_checkpoint = str(directory / name)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / name / _STATE))
                _write_manifest(unfinished / name, self._identity)
                replace_directory(unfinished / name, directory / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise the last two
            raise OSError(
                f"{name} could not be written to {directory} ({error}). The checkpoints before it are whole: "
                "make room and go on with resume_from_checkpoint=True"
            ) from error
        finally:
            self._writing = False
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(directory / name))
        if self.args.should_save:
            self._delete_oldest(directory)

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
