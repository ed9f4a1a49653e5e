"""Runs that ``test_distributed.py`` compares.

It calls the functions in one process, and torchrun starts this file in two.
"""

import json
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import loku
from loku.data import collate
from loku.directory_lock import DirectoryLock
from loku.distributed import is_sharded
from loku.fila import row_scales as row_scales_module


def rows(count, seed):
    """Make rows of different lengths, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 97, (4 + 3 * (i % 4),), generator=generator).tolist() for i in range(count)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


FORGET, RETAIN = rows(7, 0), rows(9, 1)


def config(folder, **options):
    defaults = {
        "output_dir": str(folder / "trainer"),
        "max_steps": 4,
        "learning_rate": 0.5,
        "optim": "sgd",  # its steps are as close as the gradients; Adam's have one size, even for noise
        "lora_rank": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return loku.UnlearnConfig(**{**defaults, **options})


def row_scales(cache_dir=None):
    """Measure row scales on 4 and on 5 batches of 2 rows, of which the last has one row."""
    peft_model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["v_proj", "down_proj"]))
    loaders = (
        DataLoader(part, batch_size=2, collate_fn=lambda r: collate(r, 0)) for part in (FORGET, RETAIN)
    )
    settings = loku.FilaConfig(fisher_cache_dir=cache_dir)
    return loku.get_fila_state_dict(peft_model, *loaders, config=settings, progress=False)


def sharded_row_scales():
    """Measure row scales of a model; FSDP2 shards its weights if there are several processes."""
    model = tiny_model("llama").requires_grad_(False)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "mlp" in name}
    if dist.is_initialized():
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert modules["model.layers.0.mlp.up_proj"].weight.to_local().shape == (24, 32)
    batches = ([collate(part[i : i + 2], 0) for i in range(0, len(part), 2)] for part in (FORGET, RETAIN))
    return row_scales_module.fisher_row_scales(model, modules, *batches, progress=False)


def unlearned(folder, name, measuring=(), *, portable_alone=False, **options):
    """Train an adapter, save it as ``folder/name`` and in every other way, and return a report.

    The report holds the log, the histories of the callbacks ``measuring``, and whether weights are sharded.
    """
    settings = config(folder, **options)
    result = loku.unlearn(tiny_model("llama"), FORGET, RETAIN, config=settings, callbacks=list(measuring))
    result.save(folder / name)
    if not portable_alone:
        for kind in ("residual", "merged"):
            result.save(folder / f"{name}-{kind}", kind)
        main = not dist.is_initialized() or dist.get_rank() == 0
        result.model.save_pretrained(folder / f"{name}-peft", is_main_process=main)
    return {
        "measured": [callback.history for callback in measuring if hasattr(callback, "history")],
        "log": [entry for entry in result.history if "forget_loss" in entry],
        "evaluations": [entry for entry in result.history if "eval_forget_loss" in entry],
        "sharded": any(is_sharded(parameter) for parameter in result.model.parameters()),
    }


METHODS = {
    "undial": {},
    "rmu": {"layer": 0},  # the layers after it have no gradient of their own
    "pdu": {"dual_warmup_epochs": 0, "dual_step_size": 0.1},
}


def logs_of_methods(folder, **options):
    """Train by methods that need more than the triplets, and return their logs."""
    options |= {"init": "default", "max_steps": 3, "learning_rate": 1e-2, "portable_alone": True}
    return {
        method: unlearned(folder, method, method=method, method_args=arguments, **options)["log"]
        for method, arguments in METHODS.items()
    }


def measuring():
    """Make callbacks that never stop: the first measures seven rows, the second nine."""
    never = {"holdout_extraction_likelihood_2": -1.0, "holdout_memorization_accuracy": -1.0}
    extraction = loku.ExtractionStopping(FORGET, RETAIN, n=2, every=2, thresholds=never)
    return extraction, loku.UtilityFloorStopping(RETAIN, floor=1e-9, every=2)


@contextmanager
def fsdp_on_the_cpu():
    """Let accelerate shard on the CPU, where it would take DDP; the rest of it needs no accelerator."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init_with_fsdp
    try:
        yield
    finally:
        AcceleratorState.__init__ = init


class Poison(TrainerCallback):
    """Makes a base weight of process 1 infinite before the second step."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 1 and dist.get_rank() == 1:
            weight = model.get_base_model().get_submodule("model.layers.1.mlp.up_proj").base_layer.weight
            weight.data[3, 2] = torch.inf


class Fails(TrainerCallback):
    """Fails in process 0 alone, as on a full disk, when the first checkpoint is written."""

    def on_step_end(self, args, state, control, **kwargs):
        from loku import checkpoint_folder

        def full(*args):
            raise OSError("disk full")

        if dist.get_rank() == 0:
            checkpoint_folder.write_manifest = full


def error_of(function):
    """The error of each process, as text."""
    try:
        function()
    except (ValueError, FloatingPointError, OSError) as error:
        return gathered(f"{type(error).__name__}: {error}")
    return gathered("none")


def locked(folder, saves):
    """A run in a directory where another one writes: the main process alone sees the lock."""
    lock = DirectoryLock(folder)
    if dist.get_rank() == 0:
        folder.mkdir()
        lock.acquire()
    try:
        return error_of(lambda: unlearned(folder.parent, "locked", **{**saves, "output_dir": str(folder)}))
    finally:
        lock.release()


def errors(folder):
    """Runs that fail in one process."""
    dispatch = {"dispatch_batches": True, "split_batches": False}
    saves = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(folder / "failing")}
    return {
        "nan": error_of(lambda: unlearned(folder, "nan", [Poison()], per_device_train_batch_size=2)),
        "locked": locked(folder / "taken", saves),
        "disk": error_of(lambda: unlearned(folder, "disk", [Fails()], **saves)),
        "dispatch": error_of(lambda: unlearned(folder, "dispatch", accelerator_config=dispatch)),
    }


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def same_everywhere(tensors):
    first, *others = gathered(tensors)
    return all(torch.equal(other[name], first[name]) for other in others for name in first)


def main(folder):
    torch.set_num_threads(1)
    config(folder)  # sets torch.distributed up
    report = {"processes": gathered(dist.get_rank())}

    scales = row_scales()
    report["row scales are the same"] = same_everywhere(scales)
    cache = folder / "cache"
    row_scales(str(cache))
    row_scales_module.negative_log_likelihood = None  # a second run measures nothing
    try:
        cached = row_scales(str(cache))
        report["cached"] = gathered(all(torch.equal(cached[name], scales[name]) for name in scales))
    finally:
        from loku.head import negative_log_likelihood

        row_scales_module.negative_log_likelihood = negative_log_likelihood

    sharded = sharded_row_scales()
    report["ddp_methods"] = gathered(logs_of_methods(folder / "ddp_methods", per_device_train_batch_size=2))
    report["ddp"] = unlearned(folder, "ddp", measuring(), per_device_train_batch_size=2)
    with fsdp_on_the_cpu():
        options = {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        }
        options["per_device_train_batch_size"] = 2
        report["fsdp2_methods"] = gathered(logs_of_methods(folder / "fsdp2_methods", **options))
        report["fsdp2"] = unlearned(folder, "fsdp2", measuring(), **options)
        options |= {"output_dir": str(folder / "fsdp2_run"), "optim": "adamw_torch", "learning_rate": 1e-2}
        options |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        options["portable_alone"] = True
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "forget_loss"}
        options["greater_is_better"] = False  # the last step is the best
        report["fsdp2_whole"] = unlearned(folder, "fsdp2_whole", measuring(), **options)
        options["resume_from_checkpoint"] = str(folder / "fsdp2_run" / "checkpoint-2")
        report["fsdp2_resumed"] = unlearned(folder, "fsdp2_resumed", measuring(), **options)
    report["errors"] = errors(folder)
    if dist.get_rank() == 0:
        save_file(scales, folder / "scales.safetensors")
        save_file(sharded, folder / "sharded_scales.safetensors")
        (folder / "report.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    main(Path(sys.argv[1]))
