"""``loku unlearn``."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from loku.commands import CommandParser, Commands, check_local, named_source
from loku.commands.settings import add_fields, joined, read_yaml

if TYPE_CHECKING:
    from loku.config import UnlearnConfig
    from loku.saving.compression import Compression
    from loku.unlearning import UnlearnResult

PLACES = ("model", "forget", "retain", "output", "tokenizer")
# The fields of transformers.TrainingArguments that the help shows.
COMMON = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "bf16",
    "tf32",
    "gradient_checkpointing",
    "use_cpu",
    "seed",
    "logging_steps",
    "save_strategy",
    "resume_from_checkpoint",
    "report_to",
)
KEY_SETTINGS = (
    "method",
    "tuning",
    "init",
    "lora_rank",
    "lora_alpha",
    "target_modules",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "seed",
)
COMPARED_ROWS = 64  # of each set, with the exact and the smaller adapter
LORA_SETTINGS = ("init", "lora_rank", "lora_alpha", "target_modules")


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "unlearn",
        help="make a model forget one data set and keep another",
        usage="loku unlearn --model PATH --forget FILE --retain FILE --output DIR [--config FILE] "
        "[--NAME VALUE ...]",
        description="Make a causal LM forget one data set and keep another, and save the adapter (with "
        "--tuning full the model). Runs under torchrun (torchrun --nproc-per-node 2 -m loku unlearn ...) and "
        "accelerate launch.",
        epilog="Every field of transformers.TrainingArguments is an option in the same way: --NAME VALUE, "
        "with - or _ in names. A file given by --config holds the same names, and model, forget, retain, "
        "output and tokenizer; the command line takes precedence over it. The file writes a list of one name "
        "as [NAME].",
    )
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", metavar="PATH", help="path or hub name of a causal LM")
    source = (
        "a file (.jsonl, .json, .csv, .tsv, .txt, .parquet, also .gz), a folder that datasets saved, or "
        "NAME[:CONFIG[:SPLIT]] on the hub"
    )
    group.add_argument("--forget", metavar="FILE", help=f"the rows to forget: {source}")
    group.add_argument("--retain", metavar="FILE", help="the rows to keep, in the same forms")
    group.add_argument(
        "--output", metavar="DIR", help="directory to save to; checkpoints too, without --output_dir"
    )
    group.add_argument(
        "--save",
        choices=("portable", "residual", "merged"),
        default="portable",
        help="portable: an adapter for the untouched model (default); residual: the residual base, and the "
        "adapter for it; merged: a model without an adapter",
    )
    group.add_argument(
        "--eval_dataset",
        "--eval-dataset",
        nargs="+",
        type=named_source,
        metavar="NAME=SOURCE",
        help="data sets to measure when --eval_strategy says so, in the same forms (default: the forget and "
        "the retain set)",
    )
    group.add_argument(
        "--export_rank",
        type=int,
        metavar="RANK",
        help="save the portable adapter at this rank, the best approximation of the exact one, whose rank is "
        "up to twice lora_rank (default: the exact adapter)",
    )
    group.add_argument("--export-rank", type=int, dest="export_rank", help=argparse.SUPPRESS)
    group.add_argument("--tokenizer", metavar="PATH", help="path or hub name (default: the model's)")
    group.add_argument("--config", metavar="FILE", help="YAML file of settings, a `name: value` on each line")
    group.add_argument("--quiet", action="store_true", help="no progress bars: --disable_tqdm")
    parser.set_defaults(run=run)

    def add_settings() -> None:
        from loku.config import UnlearnConfig

        fields = add_fields(parser, UnlearnConfig, "unlearning", "training", COMMON)
        parser.set_defaults(fields=fields)

    parser.add_later = add_settings
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the command with its parsed options."""
    settings = read_yaml(options.config, options.fields, PLACES) if options.config else {}
    settings.update(joined(options.fields, options))
    if settings.get("method") == "list":
        from loku.objectives import described_methods

        print(described_methods())
        return
    places = {name: getattr(options, name) or settings.pop(name, None) for name in PLACES}
    for name in PLACES:
        settings.pop(name, None)
    missing = [f"--{name}" for name in PLACES[:-1] if not places[name]]
    if missing:
        options.parser.print_usage(sys.stderr)
        checkpoints = "; --output_dir is the directory of checkpoints" if "output_dir" in settings else ""
        raise ValueError(
            f"there is no {', '.join(missing)}, neither as an option nor in a --config file"
            f"{checkpoints if missing == ['--output'] else ''}"
        )
    # By default transformers shows progress bars only if it shows warnings too.
    settings["disable_tqdm"] = settings.get("disable_tqdm", False) or options.quiet
    for name in ("model", "tokenizer"):
        if places[name]:
            check_local(f"--{name}", places[name])
    output = Path(places["output"])

    import transformers
    from accelerate import PartialState

    from loku import UnlearnConfig
    from loku.data.files import read_rows
    from loku.distributed import check_in_main_process

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if options.quiet:
        transformers.logging.disable_progress_bar()
    config = UnlearnConfig(**{"output_dir": str(output), **settings})
    if config.num_train_epochs == 0 and config.max_steps < 0 and options.save != "residual":
        raise ValueError(
            "num_train_epochs 0 trains nothing, so nothing would be unlearned; with --save residual it saves "
            "the initialised adapter"
        )
    eval_sets = dict(options.eval_dataset or ())
    if len(eval_sets) < len(options.eval_dataset or ()):
        raise ValueError(f"two data sets have one name: {[name for name, _ in options.eval_dataset]}")
    if eval_sets and config.eval_strategy == "no" and not config.eval_on_start:
        raise ValueError(
            "--eval_dataset has no effect without evaluation: set --eval_strategy epoch or steps"
        )
    kind = "merged" if config.tuning == "full" else options.save
    _check_rank(options.export_rank, config, options.save)
    check_in_main_process(lambda: _check_places(places, config, kind))
    forget, retain = (read_rows(places[name]) for name in ("forget", "retain"))
    summary = _unlearn(places, config, forget, retain, settings, options.save, eval_sets, options.export_rank)
    if config.process_index == 0:
        print(summary)
    PartialState().destroy_process_group()


def _check_rank(rank: int | None, config: UnlearnConfig, kind: str) -> None:
    """Refuse a rank for a save that has none, before a row is read."""
    from loku.counts import check_counts

    if rank is None:
        return
    check_counts(**{"--export_rank": rank})
    if config.tuning == "full":
        raise ValueError("--export_rank is the rank of an adapter, and --tuning full trains none")
    if kind != "portable":
        raise ValueError(f"--export_rank is the rank of a portable adapter, and there is --save {kind}")


def _check_places(places: Mapping[str, str], config: UnlearnConfig, kind: str) -> None:
    """Refuse directories to write to that cannot be, or where something would be written over."""
    from loku.saving.destinations import (
        check_destination,
        refuse_inside_save,
        refuse_overlap,
        refuse_replaced,
    )

    read = {name: places[name] for name in ("model", "tokenizer")}
    for directory in dict.fromkeys((places["output"], str(config.output_dir))):
        refuse_overlap(directory, **read)
    refuse_replaced(places["output"], forget=places["forget"], retain=places["retain"])
    refuse_inside_save(
        places["output"], kind, output_dir=config.output_dir, fisher_cache_dir=config.fisher_cache_dir
    )
    check_destination(places["output"], kind)


def _unlearn(
    places: Mapping[str, str],
    config: UnlearnConfig,
    forget: Any,
    retain: Any,
    settings: Mapping[str, Any],
    kind: Literal["portable", "residual", "merged"],
    eval_sets: Mapping[str, str],
    rank: int | None,
) -> str:
    """Unlearn, save the result, and return the summary."""
    from loku import unlearn
    from loku.adapters import MERGED_ADAPTER, unwrapped
    from loku.data import RowError
    from loku.data.files import place_of_row
    from loku.learning_rates import default_learning_rate
    from loku.memory import forget_peak_memory, peak_device_memory, peak_memory
    from loku.saving.kinds import PlaceOfSave

    tokenizer = None
    if places["tokenizer"]:
        from loku.trust import load_tokenizer, trusts_code

        trusted = trusts_code(config.init_arguments())
        tokenizer = load_tokenizer(places["tokenizer"], trust_remote_code=trusted)
    begin = time.perf_counter()
    forget_peak_memory()
    try:
        result = unlearn(
            places["model"],
            forget,
            retain,
            config=config,
            tokenizer=tokenizer,
            callbacks=[PlaceOfSave(places["output"], kind, rank)],
            save_kind=kind,
            eval_dataset=eval_sets or None,
        )
    except RowError as error:
        if error.place is not None or error.name not in places:  # an evaluation set has its place already
            raise
        raise ValueError(f"{place_of_row(places[error.name], error.index)}: {error}") from error
    try:
        lost = result.save(places["output"], kind, rank)
    except OSError as error:
        raise _not_saved(error, config) from error
    config.learning_rate = config.learning_rate or default_learning_rate(result.model)
    seconds = time.perf_counter() - begin
    peaks = {"resident": peak_memory(), "device": peak_device_memory()}
    sizes = {"forget": len(forget), "retain": len(retain)}
    kind = "merged" if config.tuning == "full" else kind
    given = getattr(unwrapped(result.model), MERGED_ADAPTER, None)
    base = places["model"] if given is None else given["base_model_name_or_path"] or "BASE"
    summary = _summary(places, config, settings, sizes, result.history, seconds, peaks)
    if lost is not None and given is None and config.world_size == 1:
        lines = _change_lines(result, places["output"], {"forget": forget, "retain": retain}, config)
    else:
        lines = []
    lines = [summary, *_loss_lines(lost), *lines, f"saved to {places['output']}"]
    if kind == "portable":
        causal_lm: Any = unwrapped(result.model)
        lines += _vllm_lines(places["output"], base, causal_lm.config.to_dict())
    loading = _loading_lines(places["output"], kind, base)
    return "\n".join([*lines, "To load it:", *map("    {}".format, loading)])


def _not_saved(error: OSError, config: UnlearnConfig) -> OSError:
    """The error of a save that failed, and how the command is repeated."""
    from loku.saving.directories import system_error

    again = "repeat the command"
    if getattr(config.save_strategy, "value", config.save_strategy) != "no":
        again += (
            " with --resume_from_checkpoint true, which goes on from the last checkpoint in "
            f"{config.output_dir}"
        )
    return system_error(f"{error}. The trained model is lost: {again}", error.errno or errno.EIO)


def _summary(
    places: Mapping[str, str],
    config: UnlearnConfig,
    settings: Mapping[str, Any],
    sizes: Mapping[str, int],
    history: Sequence[Mapping[str, Any]],
    seconds: float,
    peaks: Mapping[str, int | None],
) -> str:
    from loku.evaluation import format_table

    names = [
        name
        for name in dict.fromkeys([*KEY_SETTINGS, *settings])
        if (config.tuning == "lora" or name not in LORA_SETTINGS)
        and name not in ("output_dir", "disable_tqdm")
    ]
    logged = [entry for entry in history if "forget_loss" in entry]
    columns = {}
    if logged:
        measured = [name for name in logged[0] if name.endswith(("_loss", "_probability"))]
        for title, entry in (("first", logged[0]), ("last", logged[-1])):
            columns[f"{title} (step {entry['step']})"] = {name: entry[name] for name in measured}
    done = "unlearned" if config.num_train_epochs or config.max_steps > 0 else "initialised, and not trained,"
    memory = [f"{size / 2**20:.0f} MiB {name}" for name, size in peaks.items() if size is not None]
    processes = f" in each of {config.world_size} processes" if config.world_size > 1 else ""
    sets = ", ".join(f"{sizes[name]} rows of {places[name]}" for name in ("forget", "retain"))
    return "\n".join(
        [
            f"{done} {places['model']}: {sets}",
            *_wrapped("settings", [f"{name} {_shown(getattr(config, name))}" for name in names]),
            "",
            format_table(columns) if columns else "no loss was logged: see --logging_strategy",
            "",
            f"{seconds:.0f} s, peak memory {', '.join(memory)}{processes}",
            *_speed(logged),
        ]
    )


def _speed(logged: Sequence[Mapping[str, Any]]) -> list[str]:
    """The speed of the steps and the precision that the run chose by itself, in words."""
    if not logged:
        return []
    facts = [f"{median(entry['tokens_per_second'] for entry in logged):.0f} tokens a second"]
    shares = [entry["model_flop_utilization"] for entry in logged if "model_flop_utilization" in entry]
    if shares:
        facts.append(f"{median(shares):.1%} of the peak in model FLOPs")
    lines = ["training: " + ", ".join(facts)]
    if any("tf32" in entry for entry in logged):
        lines.append(
            "training multiplied float32 in TF32, the card's faster form (--tf32 false switches it off)"
        )
    return lines


def _shown(value: Any) -> Any:
    return getattr(value, "value", value)  # the value of an enumeration's member


def _wrapped(title: str, items: Sequence[str], width: int = 100) -> list[str]:
    lines = [f"{title}: "]
    for position, item in enumerate(items):
        item += ", " if position < len(items) - 1 else ""
        if len(lines[-1]) + len(item.rstrip()) > width:
            lines.append(" " * (len(title) + 2))
        lines[-1] += item
    return [line.rstrip() for line in lines]


def _loading_lines(output: str, kind: str, base: str) -> list[str]:
    if kind == "merged":
        return [
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({output!r})",
        ]
    base, adapter = (base, output) if kind == "portable" else (f"{output}/base", f"{output}/adapter")
    return [
        "from peft import PeftModel; from transformers import AutoModelForCausalLM",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})",
    ]


def _loss_lines(lost: Compression | None) -> list[str]:
    """What the rank of ``--export_rank`` lost."""
    if lost is None:
        return []
    if lost.rank >= lost.exact_rank:
        return [
            f"the adapter is exact: its rank is {lost.exact_rank}, and --export_rank {lost.rank} is not below"
        ]
    name, error = lost.worst
    return [
        f"adapter of rank {lost.rank} in the place of the exact one of rank {lost.exact_rank}: relative "
        f"error {lost.relative_error:.3g} (Frobenius norm), at most {error:.3g}, in {name}"
    ]


def _change_lines(
    result: UnlearnResult, output: str, sets: Mapping[str, Any], config: UnlearnConfig
) -> list[str]:
    """How the saved adapter changes the answers of the model in memory, on the first rows of each set."""
    from loku.adapter_folders import read_adapter
    from loku.evaluation.answer_changes import answer_changes

    model: Any = result.model
    first = {name: list(islice(rows, COMPARED_ROWS)) for name, rows in sets.items()}
    options: dict[str, Any] = {"max_length": config.max_length, "batch_size": 4, "progress": False}
    options["template"] = config.template()
    changes = answer_changes(model, *read_adapter(output), result.tokenizer, first, **options)
    return [
        f"    {name}: a logit changes by {figures['largest_logit_change']:.3g} at most, and the mean answer "
        f"probability from {figures['exact_probability']:.3f} to {figures['probability']:.3f} "
        f"(the first {figures['rows']} rows)"
        for name, figures in changes.items()
    ]


def _vllm_lines(output: str, base: str, model_config: Mapping[str, Any]) -> list[str]:
    """The line by which vLLM serves an adapter, or why it cannot."""
    from peft.utils import CONFIG_NAME

    from loku.serving import check_target, serving_lines
    from loku.serving.rules import served_rank

    config = json.loads((Path(output) / CONFIG_NAME).read_text(encoding="utf-8"))
    problems = check_target("vllm", config, model_config)
    if problems:
        return [f"vLLM cannot serve it: {problems[0]}"]
    line, *_ = serving_lines("vllm", output, base=base, rank=served_rank(config))
    return ["To serve it with vLLM:", f"    {line}"]
