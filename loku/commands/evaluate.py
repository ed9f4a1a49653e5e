"""``loku evaluate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.commands import (
    CommandParser,
    Commands,
    accept_underscores,
    add_template_options,
    check_local,
    json_object,
    named_source,
    template_of,
)
from loku.commands.attacks import add_options, attack_tables, check_options, load_others, run_attacks
from loku.commands.report_files import check_report_files, read_earlier_report, write_report_files
from loku.counts import check_counts, check_max_length

EL_DEFINITIONS = ("paper", "knowledge-unlearning")  # loku.evaluation.extraction has them, and imports torch
_SETTINGS = (  # that the report has
    *("ngram", "stride", "count_end", "el_definition"),
    *("max_length", "max_new_tokens", "stop_strings", "batch_size", "question_template", "answer_template"),
)
_OPTIONAL = ("knowledge_examples", "classifier", "classifier_class")  # options of measures that are asked for


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the knowledge left in a model",
        description="Measure a causal LM on data sets: probability, perplexity, ROUGE-L, truth ratio, forget "
        "quality, model utility, Extraction Likelihood, Memorisation Accuracy, extraction strength, Min-K% "
        "membership inference, PrivLeak, MUSE's memorisation, fluency, dialogue F1 and the last word, as far "
        "as the sets allow. Prints a table, and writes a JSON report with a log of TOFU or open-unlearning, "
        "and a picture beside it. Runs under torchrun and accelerate launch. --attack attacks the model, "
        "too, in one process.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="path or hub name of a causal LM, or the folder of an adapter, which names its base",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        type=named_source,
        metavar="NAME=SOURCE",
        help="data sets. NAME: forget, retain, real_authors, world_facts, holdout, or any other. SOURCE: a "
        "file (.jsonl, .json, .csv, .tsv, .txt, .parquet, also .gz), a folder that datasets saved, or "
        "NAME[:CONFIG[:SPLIT]] on the hub",
    )
    parser.add_argument("--out", default="report.json", metavar="FILE", help="report (default: report.json)")
    parser.add_argument("--adapter", metavar="PATH", help="folder of a peft adapter for the model")
    parser.add_argument("--tokenizer", metavar="PATH", help="path or hub name (default: the model's)")
    parser.add_argument(
        "--model-init-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="arguments of from_pretrained, a JSON object",
    )
    parser.add_argument(
        "--reference-log",
        metavar="FILE",
        help="log of a model that never saw the forget set: TOFU's (values by index, or lists) or "
        "open-unlearning's",
    )
    parser.add_argument(
        "--log-format",
        choices=("tofu", "open-unlearning"),
        default="tofu",
        help="form of the log beside the report (default: tofu)",
    )
    parser.add_argument(
        "--reference-report",
        metavar="FILE",
        help="report of loku evaluate for that model and the same sets: adds relative differences, and its "
        "AUC to PrivLeak (default: PrivLeak takes 0.5)",
    )
    parser.add_argument(
        "--knowledge-examples",
        metavar="SOURCE",
        help="questions with answers that come before each question: adds MUSE's knowledge memorisation to "
        "the sets of questions",
    )
    parser.add_argument(
        "--classifier",
        metavar="PATH",
        help="path or hub name of a text classifier: adds the mean probability of one class of the "
        "generated texts",
    )
    parser.add_argument(
        "--classifier-class",
        type=int,
        default=0,
        metavar="N",
        help="the class whose probability counts, from 0; take the one of good texts (default: 0)",
    )
    parser.add_argument("--ngram", type=int, default=10, help="n of Extraction Likelihood (default: 10)")
    parser.add_argument(
        "--stride",
        type=int,
        default=1,
        help="tokens between its prefixes; more is coarser and faster (default: 1)",
    )
    parser.add_argument(
        "--el-definition",
        choices=EL_DEFINITIONS,
        default="paper",
        help="Extraction Likelihood as in the paper (default), or as in the code of Jang et al.",
    )
    parser.add_argument(
        "--no-count-end",
        dest="count_end",
        action="store_false",
        help="leave the endings of answers (EOS, special tokens of a chat template) out of Memorisation "
        "Accuracy, extraction strength, Extraction Likelihood and Min-K%%",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="tokens of a generated answer at most (default: 16 more than the longest true answer has)",
    )
    parser.add_argument(
        "--stop-strings",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="texts before the first of which a generated answer ends, such as $'\\nQuestion:' in bash",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help="tokens at which texts are cut; a question with its answer that is longer is refused",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="rows at once (default: 16)")
    parser.add_argument(
        "--reasoning",
        action="store_true",
        help="measure the nine reasoning sets too, by lm-evaluation-harness, which downloads them; needs "
        "pip install 'loku-kernels[lm-eval]'",
    )
    add_template_options(parser)
    add_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    accept_underscores(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the command with its parsed options."""
    sources = dict(options.data)
    others_read = (options.reference_log, options.reference_report, options.knowledge_examples)
    read = [*sources.values(), *(name or "" for name in others_read)]
    with_summary = options.log_format == "open-unlearning"
    check_report_files(options.out, read, with_summary)
    counts = {
        f"--{name}": getattr(options, name.replace("-", "_")) for name in ("ngram", "stride", "batch-size")
    }
    check_counts(**counts)
    check_counts(0, **{"--classifier-class": options.classifier_class})
    check_max_length(options.max_length, "--max-length")
    if options.max_new_tokens is not None:
        check_counts(**{"--max-new-tokens": options.max_new_tokens})
    if "" in options.stop_strings:
        raise ValueError("--stop-strings has an empty text, before which every answer would end")
    if options.classifier is None and options.classifier_class:
        raise ValueError("--classifier-class is for --classifier, which was not given")
    template = template_of(options)

    from datetime import timedelta

    import torch
    from accelerate import PartialState

    from loku.data import read_rows, row_places
    from loku.evaluation import evaluate, load_classifier, reasoning_accuracies
    from loku.evaluation.log_forms import read_log
    from loku.evaluation.open_unlearning import open_unlearning_log, open_unlearning_summary
    from loku.evaluation.tofu_logs import check_forget_section
    from loku.trust import load_tokenizer, trusts_code

    # One process may generate for much longer than another, so the timeout is long.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    if len(sources) < len(options.data):
        raise ValueError(f"two data sets have one name: {[name for name, _ in options.data]}")
    check_options(options, sources, state.num_processes)
    data = {name: read_rows(source) for name, source in sources.items()}
    reference = None
    if options.reference_log is not None:
        reference = read_log(options.reference_log)
        check_forget_section(reference, options.reference_log)
    retained = None
    if options.reference_report is not None:
        retained = _read_report(options.reference_report, {**_settings(options), **_asked_for(options)})
    examples = options.knowledge_examples
    if examples is not None:
        examples = list(read_rows(examples))
    check_local("MODEL", options.model)
    for name in ("adapter", "tokenizer", "classifier"):
        if getattr(options, name):
            check_local(f"--{name}", getattr(options, name))
    model, base, adapter = _load(options.model, options.adapter, options.model_init_kwargs)
    if options.adapter is None and adapter is not None and state.is_main_process:
        print(f"{adapter} is an adapter; its base is {base}", file=sys.stderr)
    tokenizer = load_tokenizer(
        options.tokenizer or _tokenizer_place(model, base, adapter),
        trust_remote_code=trusts_code(options.model_init_kwargs),
    )
    classifier = None
    if options.classifier is not None:
        classifier = load_classifier(options.classifier, options.classifier_class)
        classifier.model.to(state.device)
    others = load_others(options)  # what cannot be loaded is known before the measures, which take long
    model.to(state.device).eval()
    reasoning = None
    if options.reasoning and state.is_main_process:
        reasoning = reasoning_accuracies(model, tokenizer, batch_size=options.batch_size)
    with row_places(sources):
        result = evaluate(
            model,
            tokenizer,
            data,
            reference_log=reference,
            reference_report=retained,
            knowledge_examples=examples,
            classifier=classifier,
            n=options.ngram,
            stride=options.stride,
            count_end=options.count_end,
            el_definition=options.el_definition,
            max_length=options.max_length,
            max_new_tokens=options.max_new_tokens,
            stop_strings=options.stop_strings,
            batch_size=options.batch_size,
            progress=not options.quiet,
            template=template,
        )
    if state.is_main_process:
        report: dict[str, Any] = {
            "model": base,
            "adapter": adapter,
            "data": sources,
            "reference_log": options.reference_log,
            "reference_report": options.reference_report,
            **_asked_for(options),
            "settings": _settings(options),
            "sets": result.sets,
            "whole": result.whole,
            "not_available": result.not_available,
            "relative_differences": result.relative_differences,
            "digests": result.digests,
            "reasoning": reasoning,
            "reference_model": options.reference_model,
            "control_model": options.control_model,
            "attacks": {},
        }
        try:
            with row_places(sources):
                for name, found in run_attacks(options, model, tokenizer, data, others, state.device):
                    report["attacks"][name] = found
        finally:  # a failed attack does not lose what was measured before it
            print(_evaluation_table(report))
            # What has come while the model was measured stays, too.
            check_report_files(options.out, read, with_summary)
            log: Mapping[str, Any] = result.log
            summary = None
            if with_summary:
                log = open_unlearning_log(result.log, reference, result.rows.get("forget"))
                summary = open_unlearning_summary(log)
            written = write_report_files(options.out, report, log, summary)
            print(f"\nwritten: {', '.join(map(str, written))}")
    state.destroy_process_group()


def _load(
    place: str, adapter: str | None, model_init_kwargs: Mapping[str, Any]
) -> tuple[Any, str, str | None]:
    """Load a model, with its adapter if there is one.

    An adapter is not merged, because the sum would be rounded to the dtype of the base.

    Returns:
        The model, the place of its base, and the place of the adapter or None.

    Raises:
        ValueError: MODEL is an adapter whose base cannot be loaded, or there is an ``--adapter`` too.
    """
    from loku.adapter_folders import find_adapter, load_on_base, put_adapter, read_adapter_config
    from loku.models import load_model

    arguments = {"dtype": "auto", **model_init_kwargs}
    own = find_adapter(place, arguments)
    if adapter is None:
        if own is None:
            return load_model(place, arguments), place, None
        try:
            model, base = load_on_base(own, arguments)
        except ValueError as error:
            raise ValueError(f"{error}. Or name the base: loku evaluate BASE --adapter {own}") from error
        return model, base, own
    if own is not None:
        raise ValueError(
            f"{place} is an adapter, and there is an --adapter too; MODEL must be the base of {adapter}: "
            f"loku evaluate BASE --adapter {adapter}"
        )
    safetensors = arguments.get("use_safetensors") is not False
    config = read_adapter_config(adapter, use_safetensors=safetensors)
    base_model: Any = load_model(place, arguments)
    return put_adapter(base_model, adapter, place, config), place, adapter


def _tokenizer_place(model: Any, base: str, adapter: str | None) -> str:
    """Return the adapter's folder if a tokenizer was saved there, else the place of the base's tokenizer."""
    from loku.adapters import MERGED_ADAPTER
    from loku.models import unwrapped

    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        return adapter
    merged: Any = getattr(unwrapped(model), MERGED_ADAPTER, None)
    return base if merged is None else merged["tokenizer"]


def _evaluation_table(report: Mapping[str, Any]) -> str:
    from loku.evaluation import format_table

    tables = [format_table(report["sets"]), format_table({"all sets": report["whole"]})]
    if report["relative_differences"]:
        differences = format_table(report["relative_differences"])
        tables.append(f"relative differences from {report['reference_report']}, in percent\n{differences}")
    if report["reasoning"] is not None:
        tables.append(format_table({"accuracy": report["reasoning"]}))
    lines = [f"{name} is not available: {reason}" for name, reason in report["not_available"].items()]
    parts = [*tables, "\n".join(lines), attack_tables(report["attacks"])]
    return "\n\n".join(part for part in parts if part)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the measures, as the report has them."""
    return {key: getattr(options, key) for key in _SETTINGS}


def _asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the measures take that were asked for; None where one was not."""
    found = {key: getattr(options, key) for key in _OPTIONAL}
    return {**found, "classifier_class": None} if options.classifier is None else found


def _read_report(path: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read a report of this command for the model that never saw the forget set.

    Args:
        path: The path of the report.
        settings: The settings here. Those of the report must be the same, but for the batch size.

    Raises:
        ValueError: It is no report, or it has other settings.
    """
    report = read_earlier_report(path, {"model", "settings", "sets", "whole", "digests"})
    if report is None or not isinstance(report["settings"], dict):
        raise ValueError(
            f"--reference-report {path} is no report of this version of loku evaluate; make one: "
            f"loku evaluate TWIN --out {path}"
        )
    theirs = {**report, **report["settings"]}
    for key, ours in settings.items():
        optional = key in _OPTIONAL and None in (ours, theirs.get(key))  # the measure is not compared
        if key != "batch_size" and theirs.get(key) != ours and not optional:
            raise ValueError(
                f"--reference-report {path} was made with {key} {theirs.get(key)}, and here it is {ours}; "
                "evaluate both models with the same settings"
            )
    return report
