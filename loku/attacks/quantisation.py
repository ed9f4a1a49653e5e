"""Quantisation as an attack: rounded weights may know again what unlearning had hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from loku.attacks.copies import check_one_process, merged_copy, plain_figures, reason_not_copied
from loku.counts import check_counts
from loku.data import TOFU_TEMPLATE, QuestionTemplate, split_documents, token_limits, tokenize_dataset
from loku.data.rows import DataSet
from loku.evaluation.scores import token_measures, token_scores
from loku.models import CausalLM
from loku.robustness import round_weights_

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP_SIZE = 64  # inputs that share a scale


def quantisation_attack(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    sets: Mapping[str, DataSet],
    bits: Sequence[int] = (8, 4),
    group_size: int | None = GROUP_SIZE,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> dict[str, Any]:
    """Round the weights of a model to a few bits, and measure what it knows then.

    An unlearned model differs little from the original one. If the difference is less than a step of the
    rounding, the rounded model is the rounded original (Zhang et al., ICLR 2025, "Catastrophic failure of LLM
    unlearning via quantization"). ``loku.robustness.round_weights_`` defines the rounding. An adapter is
    merged first, as it is before a model is quantised.

    The memory of a copy of the model is needed, in the dtype of the model. The given model stays as it is.

    Args:
        model: The unlearned causal LM, plain or with an adapter of peft, on the device where it runs.
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``.
        sets: The sets to measure, ``{name: rows}``, such as the forget, the retain and the hold-out set.
        bits: The numbers of bits, >= 2 each; 8 and 4 by default.
        group_size: The number of inputs of an output channel that share a scale, 64 by default; None gives
            each output channel one scale.
        batch_size: The number of rows in a batch, 16 by default.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them.
        progress: Whether to show progress bars, False by default.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        ``settings``; ``roundings``, the ``token_measures`` of each set by the name of the rounding: "not
        rounded" for the model as it is given, "merged" too if it has an adapter, and "8 bits" and so on; and
        ``not_tested``, the reasons by the names of the roundings that were not tested.

    Raises:
        ValueError: A number of bits is less than 2, ``group_size`` or ``batch_size`` is less than 1, there is
            no set, or there are several processes.
        RowError: A row cannot be used.
        FloatingPointError: A loss is NaN.
    """
    check_one_process("the attack by quantisation")
    check_counts(2, **{f"bits[{i}]": count for i, count in enumerate(bits)})
    check_counts(batch_size=batch_size, **({} if group_size is None else {"group_size": group_size}))
    if not sets:
        raise ValueError("there is no set to measure; pass sets={'forget': rows}")
    limits = token_limits(model)
    tokens = {
        name: split_documents(
            tokenize_dataset(
                rows, tokenizer, max_length=max_length, name=name, limits=limits, template=template
            )
        )
        for name, rows in sets.items()
    }

    def measured(model: CausalLM, title: str) -> dict[str, dict[str, float | None]]:
        return {
            name: plain_figures(
                token_measures(token_scores(model, rows, batch_size, progress, f"{name}, {title}"))
            )
            for name, rows in tokens.items()
        }

    roundings = {"not rounded": measured(model, "not rounded")}
    not_tested: dict[str, str] = {}
    reason = reason_not_copied(model)
    if isinstance(model, PeftModel) and reason is None:
        roundings["merged"] = measured(merged_copy(model), "merged")
    for count in bits:
        title = f"{count} bits"
        if reason is None:
            rounded = merged_copy(model)
            try:
                round_weights_(rounded, count, group_size)
            except ValueError as error:  # a kind of layer whose storage is not known
                not_tested[title] = str(error)
            else:
                roundings[title] = measured(rounded, title)
            del rounded  # before the next copy
        else:
            not_tested[title] = reason
    return {
        "settings": {"bits": list(bits), "group_size": group_size, "max_length": max_length},
        "roundings": roundings,
        "not_tested": not_tested,
    }
