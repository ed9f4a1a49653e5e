"""``loku benchmark``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.commands import CommandParser, Commands, accept_underscores, check_local, json_object
from loku.commands.settings import add_fields, joined, read_yaml
from loku.commands.unlearn import COMMON
from loku.counts import check_counts

NAMES = ("tofu", "muse", "wmdp", "rwku", "tdec")
# option -> the benchmarks that it is for
_SPECIAL = {
    "finetune": ("tofu",),
    "retain_log": ("tofu",),
    "retain": ("rwku", "tdec"),
    "corpus": ("rwku",),
    "thresholds": ("tdec",),
    "holdout": ("tdec",),
    "reasoning": ("tdec",),
}
_PARAMETERS = ("retain", "corpus", "thresholds", "holdout", "reasoning")  # of a benchmark's class
_PLACES = ("model", "tokenizer")


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "benchmark",
        help="run a benchmark: unlearn by several settings, and measure in its own columns",
        usage="loku benchmark {tofu,muse,wmdp,rwku,tdec} --model PATH [--data FOLDER] [--out DIR] "
        "[--NAME VALUE ...]",
        description="Measure a model by a benchmark, unlearn it by each of some settings, and measure it "
        "again. Writes results.json and table.md into a folder. What is finished there is not run again. A "
        "setting with several values is a grid: --method ihl npo --learning-rate 1e-4 2e-4 makes four runs.",
        epilog="Every field of transformers.TrainingArguments is an option in the same way.",
    )
    group = parser.add_argument_group("benchmark")
    group.add_argument("benchmark", choices=NAMES, help="the benchmark")
    group.add_argument("--model", metavar="PATH", help="path or hub name of the model that forgets")
    group.add_argument("--tokenizer", metavar="PATH", help="path or hub name (default: the model's)")
    group.add_argument(
        "--data",
        metavar="FOLDER",
        help="folder with the benchmark's sets under the names of the hub (default: the hub itself)",
    )
    group.add_argument(
        "--split",
        nargs="+",
        default=[],
        metavar="NAME",
        help="splits: tofu forget01, forget05, forget10; muse News, Books, News-scal1 to News-sust4; wmdp "
        "cyber, bio; rwku names of people; tdec names of files",
    )
    group.add_argument(
        "--out",
        default="loku-benchmark",
        metavar="DIR",
        help="folder of the results (default: loku-benchmark)",
    )
    group.add_argument(
        "--retain-model", metavar="PATH", help="a model that never saw what is forgotten; it is measured, too"
    )
    group.add_argument(
        "--retain-log", metavar="FILE", help="tofu: the log of such a model in place of the model"
    )
    group.add_argument(
        "--finetune",
        nargs="?",
        const={},
        type=json_object,
        metavar="JSON",
        help="tofu: --model is a base; fine-tune it with and without the forget set first. JSON has fields "
        "of TrainingArguments that differ from TOFU's",
    )
    group.add_argument(
        "--retain", metavar="FILE", help="rwku, tdec: texts to keep in place of the usual ones"
    )
    group.add_argument("--corpus", metavar="CONFIG", help="rwku: the set of texts to forget")
    group.add_argument(
        "--thresholds",
        nargs=2,
        type=float,
        metavar=("EL", "MA"),
        help="tdec: stop at these values of EL10 and MA, in [0, 1]",
    )
    group.add_argument("--holdout", metavar="FILE", help="tdec: stop at the values of these unseen texts")
    group.add_argument(
        "--reasoning",
        action="store_const",
        const=True,
        help="tdec: measure the nine reasoning sets, by lm-evaluation-harness",
    )
    group.add_argument(
        "--measure-only", action="store_true", help="measure the model, and unlearn by no setting"
    )
    group.add_argument(
        "--limit", type=int, metavar="ROWS", help="measure the first rows of each set alone, for a quick look"
    )
    group.add_argument(
        "--batch-size", type=int, default=16, help="rows that are measured at once (default: 16)"
    )
    group.add_argument(
        "--leaderboard", action="store_true", help="print the rows of open-unlearning's leaderboard, in HTML"
    )
    group.add_argument("--config", metavar="FILE", help="YAML file of settings, a `name: value` on each line")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)

    def add_settings() -> None:
        from loku.config import UnlearnConfig

        shown = tuple(name for name in COMMON if name != "resume_from_checkpoint")
        fields = add_fields(parser, UnlearnConfig, "unlearning", "training", shown, grid=True)
        parser.set_defaults(fields=fields)
        accept_underscores(parser)

    parser.add_later = add_settings
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the command with its parsed options."""
    settings = read_yaml(options.config, options.fields, _PLACES) if options.config else {}
    settings.update(joined(options.fields, options))
    places: dict[str, Any] = {name: getattr(options, name) or settings.get(name) for name in _PLACES}
    for name in _PLACES:
        settings.pop(name, None)
    _check_options(options, settings, places["model"])
    for name in _PLACES:
        if places[name]:
            check_local(f"--{name}", places[name])
    if options.retain_model:
        check_local("--retain-model", options.retain_model)

    import transformers

    from loku.benchmarks import BENCHMARKS, Measuring, Plan, Results, Source, combinations, run_benchmark
    from loku.benchmarks.run import MEASURED_SETTINGS, run_configs
    from loku.benchmarks.table import leaderboard_rows
    from loku.evaluation.log_forms import read_log
    from loku.trust import load_tokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    benchmark = BENCHMARKS[options.benchmark](**_parameters(options))
    if options.leaderboard and not benchmark.leaderboard:
        raise ValueError(f"open-unlearning's leaderboard has no table of {benchmark.name}")
    benchmark.check()
    source = Source(options.data)
    tokenizer = load_tokenizer(places["tokenizer"], trust_remote_code=False) if places["tokenizer"] else None
    own = [name for name in settings if name not in MEASURED_SETTINGS]
    if options.measure_only and own:
        raise ValueError(f"--measure-only unlearns by no setting, and there is --{own[0]}")
    lists = [name for name, field in options.fields.items() if field.many]
    runs = combinations(settings, lists)
    configs = run_configs(benchmark, runs)
    Results(options.out, benchmark)  # files of another origin are known before a model is trained
    model, retain_model = places["model"], options.retain_model
    if options.finetune is not None:
        model, retain_model = _finetuned(options, benchmark, source, model, tokenizer, configs[0])
    plan = Plan(
        benchmark,
        model,
        [] if options.measure_only else runs,
        splits=options.split,
        tokenizer=tokenizer,
        retain_model=retain_model,
        reference=read_log(options.retain_log) if options.retain_log else None,
        measuring=Measuring(options.batch_size, options.limit, not options.quiet, configs[0]),
    )

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        run_benchmark(plan, options.out, source, report)
    finally:  # what is finished is shown, also if other runs failed
        entries = Results(options.out, benchmark).entries
        if entries:
            print(Results(options.out, benchmark).table())
            if options.leaderboard:
                print(leaderboard_rows(benchmark, entries))
            print(f"written: {Path(options.out) / 'results.json'} {Path(options.out) / 'table.md'}")


def _check_options(options: argparse.Namespace, settings: Mapping[str, Any], model: str | None) -> None:
    """Refuse options that do not belong together, before a file is read."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # before the settings join the processes
        raise ValueError("a benchmark runs in one process: run it without torchrun and accelerate launch")
    if not model:
        options.parser.print_usage(sys.stderr)
        raise ValueError("there is no --model, neither as an option nor in a --config file")
    for name, benchmarks in _SPECIAL.items():
        if getattr(options, name) is not None and options.benchmark not in benchmarks:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for {' and '.join(benchmarks)}, and not for {options.benchmark}")
    retain = [
        f"--{name.replace('_', '-')}"
        for name in ("retain_model", "retain_log", "finetune")
        if getattr(options, name) is not None
    ]
    if len(retain) > 1:
        raise ValueError(f"{' and '.join(retain)} each give the retain-only model: pass one of them")
    if options.retain_log and len(options.split) > 1:
        raise ValueError("--retain-log is the log of one split; run each split by itself into one --out")
    if len(set(options.split)) < len(options.split):
        raise ValueError(f"a split is named twice: {' '.join(options.split)}")
    check_counts(**{"--batch-size": options.batch_size})
    if options.limit is not None:
        check_counts(**{"--limit": options.limit})


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of the benchmark's class that the options give."""
    given = {name: getattr(options, name) for name in _PARAMETERS}
    found = {name: value for name, value in given.items() if value is not None}
    if "thresholds" in found:
        found["thresholds"] = tuple(found["thresholds"])
    return found


def _finetuned(
    options: argparse.Namespace,
    benchmark: Any,
    source: Any,
    model: str,
    tokenizer: Any,
    config: Any,
) -> tuple[str, dict[str, str]]:
    """Fine-tune the base, and return the place of the model, and those of the retain-only models."""
    from loku.benchmarks.finetuning import finetuned_models

    splits = options.split or [benchmark.default_split]
    full, retain = finetuned_models(
        model,
        source,
        splits,
        Path(options.out) / "models",
        config,
        options.finetune,
        tokenizer,
        progress=not options.quiet,
    )
    return str(full), {split: str(place) for split, place in retain.items()}
