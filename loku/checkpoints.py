"""Checkpoints that are whole or not there, that say which run they are of, and from which it goes on exactly.

`transformers.Trainer` writes a checkpoint file by file under its final name and takes any directory of that
name for one. Here it is written in `.unfinished`, gets a manifest with the sizes and digests of its files,
and is renamed when it is whole. A run goes on only from a checkpoint that is what was written, of the same
base model, data and settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from loku.config import UnlearnConfig
from loku.data.large_sets import DrawnRows
from loku.distributed import from_main_process, is_main_process
from loku.fila.initialize import initialize_from_factors, reference_factors
from loku.fila.targets import REFERENCE_ADAPTER
from loku.fingerprints import ordered_rows_fingerprint, sampled_weights_fingerprint, texts_fingerprint
from loku.nan_guard import check_parameters

MANIFEST = "loku_checkpoint.json"
_UNFINISHED = ".unfinished"
_STATE = "trainer_state.json"


def run_identity(
    args: UnlearnConfig, fingerprint: str, forget: Any, retain: Any, refusals: Any = None
) -> dict[str, Any]:
    """The facts that two runs must share for one to go on from the other's checkpoint.

    Args:
        args: The settings; their ``deciding_settings`` count.
        fingerprint: The ``sampled_weights_fingerprint`` of the base model.
        forget: The tokenised forget rows.
        retain: The tokenised retain rows; of a set that is not held, the first ones count.
        refusals: The ``RefusalRows``, or None.

    Returns:
        The facts by the names that messages call them.
    """
    identity = {
        "base model": fingerprint,
        "forget set": ordered_rows_fingerprint(forget),
        "retain set": ordered_rows_fingerprint(retain.first() if isinstance(retain, DrawnRows) else retain),
        "refusals": None if refusals is None else texts_fingerprint(refusals.refusals),
        **args.deciding_settings(),
    }
    return json.loads(json.dumps(identity, default=str))  # as it is read back


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
    """The checkpoints of a directory that have a manifest, by their step. Others are named in a warning."""
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
    """The checkpoint to go on from, whole, unaltered and of this run; None to begin anew.

    resume: True for the newest of this run in `output_dir`, or None if it holds no checkpoint at all (a run
    that was stopped before its first begins anew); the path of a checkpoint; None or False.

    ValueError: the checkpoint is not whole, was altered, or is of another run: it says what differs. With
    True, where all are of other runs.
    """
    if resume is None or str(resume).lower() == "false":
        return None
    if str(resume).lower() == "true":  # also as it comes from a command line
        candidates = whole_checkpoints(output_dir)
    else:
        candidates = [Path(resume)]
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
    """The initial factors B, A in a checkpoint, as `loku.fila.reference_factors`; empty without FILA."""
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
    """Initialise an adapter by FILA as it was in the run that wrote a checkpoint (`initialize_from_factors`).

    Nothing is measured or decomposed. What the adapter learnt since is loaded by
    `UnlearnTrainer.train(resume_from_checkpoint=checkpoint)`.
    """
    initialize_from_factors(peft_model, stored_factors(checkpoint), adapter_name)


def _check_factors(model, checkpoint: Path) -> None:
    """ValueError unless a model was initialised by the factors that a checkpoint has."""
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


def check_writable(directory: str | os.PathLike) -> None:
    """OSError, saying what to do, if a directory cannot be made or written to."""
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
    """A ``transformers.Trainer`` whose checkpoints are whole, and that goes on from them exactly.

    ``args.resume_from_checkpoint``, or the argument of ``train``: see ``find_checkpoint``. With the same
    software, device and number of threads the resumed run ends with the parameters of one that was never
    stopped, bit for bit.

    Args:
        forget: The tokenised forget rows, which identify a run together with its other sets and settings.
        retain: The tokenised retain rows.
        refusals: The ``loku.data.RefusalRows`` of the run, or None.
        Everything else is ``transformers.Trainer``'s.
    """

    def __init__(self, model, args, forget, retain, refusals=None, **kwargs):
        if args.should_save:
            check_writable(args.output_dir)
        super().__init__(model=model, args=args, **kwargs)
        self._run = forget, retain, refusals
        self._base_model = (
            sampled_weights_fingerprint(model) if args.should_save else None
        )  # before training changes it
        self._writing = self._ended = False

    @cached_property
    def _identity(self):
        return run_identity(self.args, self._base_model, *self._run)

    @cached_property
    def checkpoint(self) -> Path | None:
        """What ``args.resume_from_checkpoint`` means, checked."""
        return self._find_checkpoint(self.args.resume_from_checkpoint)

    def _find_checkpoint(self, resume):
        if not resume:
            return None
        answer = None
        if is_main_process():  # one looks, for all
            try:
                answer = find_checkpoint(resume, self.args.output_dir, self._identity)
            except ValueError as error:
                answer = error
        answer = from_main_process(answer)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is None:
            checkpoint = self.checkpoint
        else:
            checkpoint = self._find_checkpoint(resume_from_checkpoint)
        self._ended = False
        if checkpoint is not None:
            state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
            control = state["stateful_callbacks"].get("TrainerControl", {}).get("args", {})
            self._ended = control.get("should_training_stop", False)
            checkpoint = str(checkpoint)
        output = super().train(checkpoint, *args, **kwargs)
        check_parameters(self.model, self.state.global_step)
        return output

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # Trainer forgets on resuming that a run had come to its end, and would go on to the end of the epoch.
        if self._ended:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # the parameters are in shards by now
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        checkpoint = Path(resume_from_checkpoint)
        _check_factors(self.model, checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # peft writes the adapter "default" into the checkpoint itself and each other adapter into a folder of
        # its own. FILA's initial factors are such an adapter. Before transformers 5.23 Trainer then loads the
        # folders alone.
        model = self.model if model is None else model
        has_default = isinstance(model, PeftModel) and "default" in model.peft_config
        if has_default and (checkpoint / SAFETENSORS_WEIGHTS_NAME).is_file():
            trained = "default" in model.active_adapters
            model.load_adapter(resume_from_checkpoint, "default", is_trainable=trained)

    # Trainer._save_checkpoint asks for the directory to write to, writes, pushes, and deletes what is beyond
    # save_total_limit. While it does, the directory is `.unfinished`, and the last two wait.

    def _get_output_dir(self, trial):
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, _UNFINISHED) if self._writing else directory

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        check_parameters(self.model, self.state.global_step)
        directory = Path(self._get_output_dir(trial))
        unfinished, name = directory / _UNFINISHED, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(unfinished / name):
                self.state.best_model_checkpoint = str(directory / name)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / name / _STATE))
                _write_manifest(unfinished / name, self._identity)
                if (directory / name).exists():
                    (directory / name).rename(unfinished / "previous")
                (unfinished / name).rename(directory / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
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

    def _delete_oldest(self, directory):
        """Delete what is beyond ``save_total_limit``, never the newest or the best."""
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        checkpoints = [entry for entry in directory.glob("checkpoint-*") if (entry / MANIFEST).is_file()]
        checkpoints.sort(key=lambda entry: (entry / MANIFEST).stat().st_mtime_ns)
        kept = {str(checkpoints[-1]), self.state.best_model_checkpoint}
        deletable = [entry for entry in checkpoints if str(entry) not in kept]
        for entry in deletable[: max(0, len(checkpoints) - limit)]:
            (entry / MANIFEST).unlink()  # first: half deleted it must not be taken for whole
            shutil.rmtree(entry, ignore_errors=True)
