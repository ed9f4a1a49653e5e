"""``loku export``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from loku.commands.report_files import read_earlier_report
from loku.counts import check_counts, check_max_length

if TYPE_CHECKING:
    from torch import Tensor

    from loku.saving.compression import Compression

_KEYS = {"adapter", "base", "data", "exact_rank", "ranks"}  # of every report


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "export",
        help="save an adapter at a smaller rank, merged into its base, or as GGUF",
        usage="loku export ADAPTER (--rank R | --merged | --gguf) --output DIR [--data NAME=SOURCE ...]\n"
        "       loku export ADAPTER --ranks [R ...] [--picture FILE] [--data NAME=SOURCE ...]",
        description="Save a LoRA adapter, of loku or of peft, at a smaller rank: in each module the best "
        "approximation of B A in the Frobenius norm. Or show what it loses at several ranks. Or save its "
        "base with the adapter merged into it, or the adapter as GGUF for llama.cpp and Ollama.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub name of the adapter")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rank", type=int, metavar="R", help="the rank of the saved adapter")
    what.add_argument(
        "--ranks",
        type=int,
        nargs="*",
        metavar="R",
        help="show the loss at these ranks, and save no adapter (default: 2, 4, ... to the exact rank)",
    )
    what.add_argument(
        "--merged",
        action="store_true",
        help="save the base with the adapter merged into it, in the dtype of the base, with its tokenizer, "
        "chat template and generation config",
    )
    what.add_argument(
        "--gguf",
        action="store_true",
        help="save the adapter as adapter.gguf, with Ollama's Modelfile and the lines that serve it",
    )
    parser.add_argument("--output", metavar="DIR", help="directory to save to")
    parser.add_argument(
        "--model", metavar="BASE", help="path or hub name of the base (default: the adapter's)"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        type=named_source,
        metavar="NAME=SOURCE",
        help="data sets, such as forget=forget.jsonl: the largest change of a logit and of an answer "
        "probability is measured on their rows",
    )
    parser.add_argument("--report", metavar="FILE", help="JSON file of the figures of every module")
    parser.add_argument("--picture", metavar="FILE", help="with --ranks: PNG file of the error by rank")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="path or hub name (default: the adapter's or base's)"
    )
    parser.add_argument(
        "--model-init-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="arguments of from_pretrained, a JSON object",
    )
    parser.add_argument("--max-length", type=int, help="tokens at which texts are cut")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at once (default: 16)")
    add_template_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    accept_underscores(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the command with its parsed options."""
    _check_options(options)
    sources = dict(options.data)
    if len(sources) < len(options.data):
        raise ValueError(f"two data sets have one name: {[name for name, _ in options.data]}")
    check_local("ADAPTER", options.adapter)
    for name in ("model", "tokenizer"):
        if getattr(options, name):
            check_local(f"--{name}", getattr(options, name))
    read = [options.adapter, options.model, options.tokenizer, *sources.values()]
    _check_files(options.report, options.picture, read)

    import transformers

    from loku.adapter_folders import find_adapter
    from loku.data import read_rows
    from loku.saving.destinations import check_destination
    from loku.trust import find_file

    if options.quiet:
        transformers.logging.disable_progress_bar()
    adapter = find_adapter(options.adapter, options.model_init_kwargs)
    if adapter is None:
        if find_file(options.adapter, "config.json", {}):
            raise ValueError(f"{options.adapter} is a model, not an adapter: there is nothing to export")
        raise ValueError(
            f"{options.adapter} is neither the folder of an adapter nor the name of one on the hub: it has "
            "no adapter_config.json"
        )
    if options.output is not None:
        places = {"adapter": options.adapter, "model": options.model, "tokenizer": options.tokenizer}
        if options.gguf:
            _check_empty(options.output, **places)
        else:
            check_destination(options.output, "merged" if options.merged else "portable", **places)
    sets = {name: read_rows(source) for name, source in sources.items()}
    if options.merged:
        _export_merged(adapter, options)
    elif options.gguf:
        _export_gguf(adapter, options)
    else:
        _export_ranks(adapter, sets, sources, options)


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is read."""
    saves = options.ranks is None
    if saves and not options.output:
        raise ValueError("there is no --output, the directory to save to")
    if not saves and options.output:
        raise ValueError("--ranks saves no adapter, so it takes no --output: pass --rank R")
    if options.picture and saves:
        raise ValueError("--picture draws the error of several ranks: pass --ranks")
    for name in ("merged", "gguf"):
        if getattr(options, name) and (options.data or options.report):
            raise ValueError(f"--{name} loses nothing but a rounding, so it takes no --data and no --report")
    for rank in [options.rank] if options.rank is not None else options.ranks or []:
        check_counts(rank=rank)
    check_counts(**{"--batch-size": options.batch_size})
    check_max_length(options.max_length, "--max-length")
    template_of(options)
    if options.question_template is not None and not options.data:
        raise ValueError("--question-template is for the rows of --data, and there are none")


def _check_files(report: str | None, picture: str | None, read: Iterable[str | None]) -> None:
    """Refuse a report or a picture that would be written over a file which is no earlier one of its kind."""
    from loku.saving.destinations import check_writable

    inputs = {Path(name).resolve() for name in read if name}
    earlier = None if report is None else read_earlier_report(report, _KEYS)
    for option, name in (("--report", report), ("--picture", picture)):
        if name is None:
            continue
        file = Path(name)
        if file.resolve() in inputs or (file.exists() and not file.is_file()):
            raise ValueError(f"{option} {name} is read, or is no file; pass another file")
        if option == "--picture" and file.suffix.lower() != ".png":
            raise ValueError(f"--picture {name} must be a .png file")
        if file.exists() and not _is_ours(file, option, earlier):
            raise ValueError(
                f"{option} {name} would overwrite a file which is not of an earlier report, or was changed "
                "since. Nothing was written; move it away, or pass another file"
            )
        check_writable(file.parent)


def _is_ours(file: Path, option: str, earlier: Mapping[str, Any] | None) -> bool:
    from loku.file_digests import file_digest

    if earlier is None:
        return False
    return option == "--report" or earlier.get("picture_sha256") == file_digest(file)


def _load(adapter: str, options: argparse.Namespace) -> tuple[Any, str]:
    """The base with the adapter on it, unmerged, and the place of the base."""
    from loku.adapter_folders import load_on_base, put_adapter, read_adapter_config
    from loku.models import load_model

    arguments = {"dtype": "auto", **options.model_init_kwargs}
    if options.model is None:
        try:
            return load_on_base(adapter, arguments)
        except ValueError as error:
            raise ValueError(f"{error}. Or name the base: --model BASE") from error
    config = read_adapter_config(adapter, use_safetensors=arguments.get("use_safetensors") is not False)
    base: Any = load_model(options.model, arguments)
    return put_adapter(base, adapter, options.model, config), options.model


def _tokenizer(adapter: str, base: str | None, model: Any, options: argparse.Namespace) -> Any:
    """The tokenizer that is asked for, else the one beside the adapter, else that of the base or None."""
    from loku.adapters import MERGED_ADAPTER, unwrapped
    from loku.trust import find_file, load_tokenizer, trusts_code

    place = options.tokenizer
    if place is None and find_file(adapter, "tokenizer_config.json", {}):
        place = adapter
    if place is None and base is not None:
        merged: Any = getattr(unwrapped(model), MERGED_ADAPTER, None)
        place = base if merged is None else merged["tokenizer"]
    if place is None:
        return None
    return load_tokenizer(place, trust_remote_code=trusts_code(options.model_init_kwargs))


def _export_merged(adapter: str, options: argparse.Namespace) -> None:
    from loku.saving.destinations import check_room
    from loku.saving.kinds import check_save, save_bytes
    from loku.saving.models import save_merged_model

    model, base = _load(adapter, options)
    check_save(model, "merged")
    check_room(options.output, save_bytes(model, "merged"))
    # Without one of its own, the save takes the tokenizer of the base.
    tokenizer = _tokenizer(adapter, None, model, options)
    save_merged_model(model, options.output, tokenizer=tokenizer)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"{base} with {adapter} merged into it ({dtype}), saved to {options.output}")


def _check_empty(output: str, **places: str | None) -> None:
    """Refuse a directory that holds something, or that is read."""
    from loku.saving.destinations import check_writable, refuse_overlap

    refuse_overlap(output, **places)
    directory = Path(output)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"--output {output} is there already, and not empty; pass another directory")
    check_writable(directory)


def _export_gguf(adapter: str, options: argparse.Namespace) -> None:
    from loku.adapter_folders import read_adapter_config
    from loku.serving.gguf_adapter import check_gguf_adapter
    from loku.serving.lines import write_serving_files

    base = options.model or read_adapter_config(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not name its base: pass --model BASE")
    check_gguf_adapter(adapter, base)
    written = write_serving_files(options.output, "gguf", adapter, base=base)
    print(f"written: {', '.join(map(str, written))}")


def _export_ranks(
    adapter: str, sets: Mapping[str, Any], sources: Mapping[str, str], options: argparse.Namespace
) -> None:
    from loku.adapter_folders import read_adapter
    from loku.evaluation import format_table, write_report
    from loku.file_digests import file_digest
    from loku.saving.compression import compressed_adapter, errors_by_rank
    from loku.trust import loading

    safetensors = options.model_init_kwargs.get("use_safetensors") is not False
    config, state = read_adapter(adapter, use_safetensors=safetensors)
    _check_plain(adapter, config)
    model, base, names, tokenizer = None, options.model or config.base_model_name_or_path, {}, None
    if sets or options.model is not None:
        model, base = _load(adapter, options)
        names = _parameter_names(model)
    if sets:
        tokenizer = _tokenizer(adapter, base, model, options)
    with loading(adapter):  # its config may have any pattern
        ranks = [options.rank] if options.ranks is None else options.ranks
        ranks = ranks or _even_ranks(config, state, names)
        losses = errors_by_rank(config, state, ranks, parameter_names=names)
    lines, new = [], None
    for rank, lost in zip(ranks, losses, strict=True):
        module, error = lost.worst
        line = {**lost.facts(), "worst_module": module, "worst_relative_error": error, "sets": {}}
        if sets or options.rank is not None:
            new = compressed_adapter(config, state, rank, parameter_names=names)
        if sets and new is not None:
            line["sets"] = _measured(model, new[0], new[1], tokenizer, sets, sources, options)
        lines.append(line)
    print(f"{adapter}: exact rank {losses[0].exact_rank}, base {base}")
    print(format_table({f"rank {line['rank']}": _column(line) for line in lines}))
    if options.rank is not None and new is not None:
        _write(adapter, base, *new, options)
    report = {
        "adapter": adapter,
        "base": base,
        "data": dict(sources),
        "exact_rank": losses[0].exact_rank,
        "ranks": lines,
    }
    if options.picture:
        from loku.evaluation.report import plot_rank_errors

        plot_rank_errors(options.picture, lines)
        report["picture_sha256"] = file_digest(Path(options.picture))
    if options.report:
        write_report(options.report, report)
    written = [name for name in (options.output, options.report, options.picture) if name]
    print(f"written: {', '.join(written)}" if written else "nothing was written (--report, --picture)")


def _check_plain(adapter: str, config: Any) -> None:
    """Refuse an adapter that is no LoRA adapter, or that is not for an untouched base."""
    from peft import PeftType

    from loku.adapters import REFERENCE_ADAPTER

    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{adapter} is a {config.peft_type} adapter; only one of LoRA has a smaller rank")
    if (Path(adapter).with_name(REFERENCE_ADAPTER) / "adapter_config.json").is_file():
        raise ValueError(
            f"{adapter} is the adapter of a residual save, which fits the residual base alone: export it "
            "with --merged, or save the portable adapter (loku.save_portable_adapter) and export that"
        )


def _parameter_names(model: Any) -> dict[str, str]:
    from loku.adapters import adapter_layers

    layers = adapter_layers(model, "default")
    return {name: layer.parameter_name for name, layer in layers.items() if hasattr(layer, "parameter_name")}


def _even_ranks(config: Any, state: Mapping[str, Tensor], names: Mapping[str, str]) -> list[int]:
    """2, 4, ... and the exact rank."""
    from loku.saving.compression import adapter_modules

    exact = max(module.A.shape[1] for module in adapter_modules(config, state, names).values())
    return [*range(2, exact, 2), exact]


def _measured(
    model: Any,
    config: Any,
    state: Mapping[str, Tensor],
    tokenizer: Any,
    sets: Mapping[str, Any],
    sources: Mapping[str, str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    from loku.data import row_places
    from loku.evaluation.answer_changes import answer_changes

    with row_places(sources):
        return answer_changes(
            model,
            config,
            state,
            tokenizer,
            sets,
            batch_size=options.batch_size,
            max_length=options.max_length,
            progress=not options.quiet,
            template=template_of(options),
        )


def _column(line: Mapping[str, Any]) -> dict[str, Any]:
    """The column of a rank in the table."""
    column = {"relative error": line["relative_error"], "largest of a module": line["worst_relative_error"]}
    for name, figures in line["sets"].items():
        for measure, value in figures.items():
            column[f"{name}: {measure.replace('_', ' ')}"] = value
    return column


def _write(
    adapter: str,
    base: str | None,
    config: Any,
    state: dict[str, Tensor],
    lost: Compression,
    options: argparse.Namespace,
) -> None:
    from loku.saving.adapter_files import write_adapter
    from loku.saving.compression import loss_facts
    from loku.saving.destinations import check_room, destination

    check_room(options.output, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    tokenizer = _tokenizer(adapter, None, None, options)
    config.base_model_name_or_path = config.base_model_name_or_path or base
    facts: Any = loss_facts(lost)
    sources = {"adapter": options.adapter, "model": base}
    with destination(options.output, "portable", sources=sources, **facts) as directory:
        write_adapter(None, config, state, directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    if lost.rank >= lost.exact_rank:
        print(
            f"its rank is {lost.exact_rank}, which is not above {lost.rank}: it stays exact",
            file=sys.stderr,
        )
