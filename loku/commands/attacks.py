"""The attacks of ``loku evaluate --attack``: their options, checks, runs and tables."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loku.commands import template_of

if TYPE_CHECKING:
    from torch import device
    from transformers import PreTrainedTokenizerBase

    from loku.models import CausalLM

ATTACKS = ("extract", "mia", "relearn", "quantise")  # in the order in which they run
_NEEDED = {"mia": ("forget", "holdout"), **{name: ("forget",) for name in ATTACKS if name != "mia"}}
_USERS = {"reference_model": ("mia", "relearn"), "control_model": ("relearn",)}  # attacks, by their options
_ROUNDED = {"probability": "probability", "memorization_accuracy": "accuracy"}  # measures and their titles


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the attacks to a parser."""
    parser.add_argument(
        "--attack",
        nargs="+",
        choices=ATTACKS,
        default=[],
        metavar="ATTACK",
        help="attack the model, too: extract, mia, relearn, quantise. They need the set forget; mia needs "
        "holdout, too, and the others take it as the level of chance",
    )
    parser.add_argument(
        "--reference-model",
        metavar="PATH",
        help="path or hub name of the model before unlearning: mia compares losses with it, and relearn "
        "takes its probability as the mark",
    )
    parser.add_argument(
        "--control-model",
        metavar="PATH",
        help="path or hub name of a model that was retrained without the forget set: relearn teaches it the "
        "same rows (default: the hold-out set is the control)",
    )


def check_options(options: argparse.Namespace, sets: Collection[str], processes: int) -> None:
    """Check the options of the attacks, before a model is loaded.

    Args:
        options: The parsed options.
        sets: The names of the data sets.
        processes: The number of processes.

    Raises:
        ValueError: An attack lacks a data set, a model is for no attack that was asked for, or there are
            several processes.
    """
    for name in options.attack:
        missing = [needed for needed in _NEEDED[name] if needed not in sets]
        if missing:
            sources = " ".join(f"{needed}=FILE" for needed in missing)
            raise ValueError(f"--attack {name} needs {' and '.join(missing)} in --data: --data {sources}")
    for option, users in _USERS.items():
        if getattr(options, option) is not None and not {*users} & {*options.attack}:
            flag = f"--{option.replace('_', '-')}"
            raise ValueError(f"{flag} is for --attack {' or '.join(users)}, which was not asked for")
    if options.attack and processes > 1:
        raise ValueError(
            f"--attack runs in one process, and there are {processes}: run it without torchrun and "
            "accelerate launch"
        )


def load_others(options: argparse.Namespace) -> dict[str, CausalLM | None]:
    """Load the models beside the attacked one. They stay in the memory of the CPU until they are used.

    Args:
        options: The parsed options. The revision and the subfolder in ``--model-init-kwargs`` are those of
            MODEL alone.
    """
    from loku.models import load_model

    arguments = {
        name: value
        for name, value in options.model_init_kwargs.items()
        if name not in ("revision", "subfolder")
    }
    return {
        option: None if place is None else load_model(place, {"dtype": "auto", **arguments})
        for option, place in ((option, getattr(options, option)) for option in _USERS)
    }


def run_attacks(
    options: argparse.Namespace,
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Any],
    others: Mapping[str, Any],
    target: device,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the attacks that were asked for, in the order of ``ATTACKS``.

    Args:
        options: The parsed options.
        model: The attacked model.
        tokenizer: Its tokenizer.
        data: The rows of each data set.
        others: The models of ``load_others``.
        target: The device of the attacked model.

    Yields:
        The name of each attack and its result.
    """
    from loku import attacks

    template = template_of(options)
    more: dict[str, Any] = {
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "template": template,
    }
    show = not options.quiet
    forget: Any = data.get("forget")  # check_options has seen to the sets that an attack needs
    holdout: Any = data.get("holdout")
    reference, control = (
        None if other is None else other.to(target).eval() for other in map(others.get, _USERS)
    )
    for name in (name for name in ATTACKS if name in options.attack):
        if name == "extract":
            result = attacks.extraction_attack(model, tokenizer, forget, holdout, progress=show, **more)
        elif name == "mia":
            result = attacks.membership_attack(
                model,
                tokenizer,
                forget,
                holdout,
                reference,
                count_end=options.count_end,
                progress=show,
                **more,
            )
        elif name == "relearn":
            result = attacks.relearning_attack(
                model,
                tokenizer,
                forget,
                control_model=control,
                holdout=holdout,
                retain=data.get("retain"),
                original_model=reference,
                max_length=options.max_length,
                template=template,
            )
        else:
            result = attacks.quantisation_attack(model, tokenizer, data, progress=show, **more)
        yield name, result


def attack_tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results of attacks as tables, each under a line that says what its figures are.

    Args:
        results: The results by the names of the attacks.
    """
    tables = {
        "extract": _extraction_table,
        "mia": _membership_table,
        "relearn": _relearning_table,
        "quantise": _quantisation_table,
    }
    parts = []
    for name, result in results.items():
        left_out = [f"{part} was not tested: {why}" for part, why in _reasons(result["not_tested"])]
        parts.append("\n".join([*tables[name](result), *left_out]))
    return "\n\n".join(parts)


def _extraction_table(result: Mapping[str, Any]) -> list[str]:
    from loku.evaluation import format_table

    shown = {"whole": "whole", "nearly": "nearly", "rouge_l_recall": "ROUGE-L"}
    columns = {
        f"{name}: {title}": {way: figures.get(figure) for way, figures in ways.items()}
        for name, ways in result["sets"].items()
        for figure, title in shown.items()
    }
    return [
        "extract: the share of rows whose answer comes back word by word (whole) and by half of its words "
        "(nearly)",
        format_table(columns),
    ]


def _membership_table(result: Mapping[str, Any]) -> list[str]:
    from loku.evaluation import format_table

    shown = {
        "auc": "AUC",
        "auc_low": "from",
        "auc_high": "to",
        "tpr_at_1_percent_fpr": "TPR at 1% FPR",
        "tpr_at_5_percent_fpr": "TPR at 5% FPR",
    }
    columns = {
        title: {score: figures[figure] for score, figures in result["scores"].items()}
        for figure, title in shown.items()
    }
    return ["mia: forget rows told from hold-out rows; an AUC of 0.5 is chance", format_table(columns)]


def _relearning_table(result: Mapping[str, Any]) -> list[str]:
    from loku.evaluation import format_table

    if result["unlearned"] is None:
        return ["relearn"]
    columns: dict[str, dict[str, Any]] = {}
    for name in ("unlearned", "control"):
        for entry in (result[name] or {"curve": []})["curve"]:
            step = f"step {entry['step']}"
            for key, value in entry.items():
                if key.endswith("_probability"):
                    title = f"{name}: {key.removesuffix('_probability')}"
                    columns.setdefault(title, {})[step] = value
    lines = ["relearn: answer probability while one half of the rows is taught", format_table(columns)]
    control = result["control"]
    if control is not None:
        lines.append(f"the control is the {control['kind']}")
    if result["original"] is not None:
        steps = result["steps_to_half"]
        reached = "is not reached" if steps is None else f"is reached at step {steps}"
        lines.append(f"half of the original model's {result['original']:.3g} on the rest {reached}")
    return lines


def _quantisation_table(result: Mapping[str, Any]) -> list[str]:
    from loku.evaluation import format_table

    roundings = result["roundings"]
    columns = {
        f"{name}: {title}": {rounding: sets[name][measure] for rounding, sets in roundings.items()}
        for name in roundings["not rounded"]
        for measure, title in _ROUNDED.items()
    }
    return [
        "quantise: answer probability and memorisation accuracy after the weights were rounded",
        format_table(columns),
    ]


def _reasons(reasons: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names and the reasons of what was not tested, at any depth."""
    for name, reason in reasons.items():
        if isinstance(reason, Mapping):
            yield from _reasons(reason, f"{before}{name}: ")
        else:
            yield f"{before}{name}", reason
