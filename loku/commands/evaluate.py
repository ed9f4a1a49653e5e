"""``loku evaluate``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.commands import CommandParser, Commands


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the knowledge left in a model",
        description="Measure a causal LM on data sets: probability, perplexity, ROUGE-L, truth ratio, forget "
        "quality, model utility, Extraction Likelihood, Memorisation Accuracy, extraction strength, Min-K% "
        "membership inference and dialogue F1, as far as the sets allow. Prints a table, and writes a JSON "
        "report with TOFU's log and a picture beside it. Runs under torchrun and accelerate launch.",
    )
    parser.add_argument("model", metavar="MODEL", help="path or hub name of a causal LM")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        type=_named_source,
        metavar="NAME=SOURCE",
        help="data sets. NAME: forget, retain, real_authors, world_facts, holdout, or any other. SOURCE: a "
        ".jsonl or .json file of rows, a .txt file with a text on each line, or NAME[:CONFIG[:SPLIT]] on the "
        "hub",
    )
    parser.add_argument("--out", default="report.json", metavar="FILE", help="report (default: report.json)")
    parser.add_argument("--adapter", metavar="PATH", help="path of a peft adapter for the model")
    parser.add_argument("--tokenizer", metavar="PATH", help="path or hub name (default: the model's)")
    parser.add_argument(
        "--reference-log", metavar="FILE", help="TOFU log of a model that never saw the forget set"
    )
    parser.add_argument("--ngram", type=int, default=10, help="n of Extraction Likelihood (default: 10)")
    parser.add_argument(
        "--stride",
        type=int,
        default=1,
        help="tokens between its prefixes; more is coarser and faster (default: 1)",
    )
    parser.add_argument("--max-length", type=int, help="tokens at which texts are cut")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at once (default: 16)")
    parser.add_argument(
        "--reasoning",
        action="store_true",
        help="measure the nine reasoning sets too, by lm-evaluation-harness, which downloads them; needs "
        "pip install 'loku-kernels[lm-eval]'",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the command with its parsed options."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loku.data.files import read_rows
    from loku.evaluation import evaluate, plot_measures, reasoning_accuracies, write_report

    # One process may generate for much longer than another, so the timeout is long.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    data = {name: read_rows(source) for name, source in options.data}
    if len(data) < len(options.data):
        raise ValueError(f"two data sets have one name: {[name for name, _ in options.data]}")
    reference = None
    if options.reference_log is not None:
        reference = json.loads(Path(options.reference_log).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", use_safetensors=True)
    if options.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, options.adapter)
    model.to(state.device).eval()
    reasoning = None
    if options.reasoning and state.is_main_process:
        reasoning = reasoning_accuracies(model, tokenizer, batch_size=options.batch_size)
    result = evaluate(
        model,
        tokenizer,
        data,
        reference_log=reference,
        n=options.ngram,
        stride=options.stride,
        max_length=options.max_length,
        batch_size=options.batch_size,
        progress=not options.quiet,
    )
    if state.is_main_process:
        report = {
            "model": options.model,
            "adapter": options.adapter,
            "data": dict(options.data),
            "reference_log": options.reference_log,
            "settings": {
                key: getattr(options, key) for key in ("ngram", "stride", "max_length", "batch_size")
            },
            "sets": result.sets,
            "whole": result.whole,
            "not_available": result.not_available,
            "reasoning": reasoning,
        }
        print(_evaluation_table(report))
        out = Path(options.out)
        write_report(out, report)
        written = [out]
        if result.log:
            written.append(out.with_name(f"{out.stem}_log.json"))
            write_report(written[-1], result.log)
        written.append(out.with_suffix(".png"))
        plot_measures(written[-1], result.sets)
        print(f"\nwritten: {', '.join(map(str, written))}")
    state.destroy_process_group()


def _evaluation_table(report: Mapping[str, Any]) -> str:
    from loku.evaluation import format_table

    tables = [format_table(report["sets"]), format_table({"all sets": report["whole"]})]
    if report["reasoning"] is not None:
        tables.append(format_table({"accuracy": report["reasoning"]}))
    lines = [f"{name} is not available: {reason}" for name, reason in report["not_available"].items()]
    return "\n\n".join([*tables, "\n".join(lines)]).rstrip()


def _named_source(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SOURCE, such as forget=forget.jsonl")
    return name, source
