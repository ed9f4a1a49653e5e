"""Relearning: a model is taught one half of the forgotten rows, and the other half is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loku.attacks.copies import check_one_process, merged_copy, reason_not_copied
from loku.counts import check_counts
from loku.data import (
    TOFU_TEMPLATE,
    QuestionTemplate,
    check_tokens,
    split_documents,
    token_limits,
    tokenize_dataset,
)
from loku.data.rows import DataSet
from loku.evaluation.scores import mean_answer_probability, token_scores
from loku.models import CausalLM, unwrapped
from loku.process_state import process_state_kept
from loku.robustness import relearning_curve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[Mapping[str, Any]]
MOST_RETAIN_ROWS = 32  # that are measured


def halves(count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Choose one half of some rows at random, the greater one of an odd number.

    Args:
        count: The number of rows.
        seed: The seed of the choice, 0 by default.

    Returns:
        The indices of the rows in the half, and those of the others, both in ascending order.
    """
    order = np.random.default_rng(seed).permutation(count).tolist()
    taught = (count + 1) // 2
    return sorted(order[:taught]), sorted(order[taught:])


@process_state_kept()
def relearning_attack(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    forget: DataSet,
    *,
    control_model: CausalLM | None = None,
    holdout: DataSet | None = None,
    retain: DataSet | None = None,
    original_model: CausalLM | None = None,
    steps: int = 20,
    every: int = 2,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
    max_length: int | None = None,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> dict[str, Any]:
    """Teach a model one half of the forget rows, and measure how much of the other half comes back.

    If the half that is not taught comes back, unlearning has hidden the rows and not removed them (Lynch et
    al., 2024; Hu et al., ICLR 2025, "Unlearning or obfuscating?"). Some of it comes back in any case, because
    rows of one kind teach each other. So a control is taught beside it:

    - "retrained model": ``control_model``, a model that never saw the forget rows, is taught the same rows.
    - "hold-out": without such a model, the unlearned model itself is taught one half of the hold-out rows,
      and the other half is measured. The forgotten rows should come back no faster than rows are learnt that
      the model never saw. The hold-out rows must be of the same kind.

    All weights train, by the LM loss and AdamW at a constant learning rate; see
    ``loku.robustness.relearning_curve``. An adapter is merged first.

    A copy of one model at a time is trained in float32: weights, gradients and the two moments of AdamW take
    16 bytes a parameter. The given models and the state of the process stay as they are.

    Args:
        model: The unlearned causal LM, plain or with an adapter of peft, on the device where it runs.
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``.
        forget: The forget rows. ``seed`` chooses the half that is taught.
        control_model: A model of the same tokenizer that never saw the forget rows; None (default) for none.
        holdout: Rows that the model was never trained on, for the control without such a model; None
            (default) for none.
        retain: Rows to measure beside the halves, at most 32 of them, evenly spaced; None (default) for none.
        original_model: The model before unlearning, whose probability of the half is the mark of
            ``steps_to_half``; None (default) for none.
        steps: The number of optimizer steps, 20 by default.
        every: The number of steps between measurements, 2 by default.
        learning_rate: The learning rate, 1e-4 by default.
        batch_size: The number of rows in a step, 8 by default.
        seed: The seed of the choice and of the rows' order, 0 by default.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        ``settings``; ``taught_rows`` and ``rest_rows``, the indices of the forget rows; ``unlearned`` and
        ``control``, each with its ``curve`` (the dicts of ``relearning_curve`` with the names "taught",
        "rest" and "retain") and with the mean answer probability of the rest ``before`` any step, ``after``
        the last one, and at its ``best``, with ``best_step``; ``control`` also has ``kind``, and is None if
        there is none. ``original``, the probability of the rest under the original model, or None.
        ``steps_to_half``, the first measured step at which the rest has half of it, or None.
        ``ratio_to_control``, the best of the rest over the control's best, or None. ``not_tested``, reasons
        by name.

    Raises:
        ValueError: ``steps``, ``every``, ``batch_size`` or the learning rate is not positive, or there are
            several processes.
        RowError: A row cannot be used.
    """
    check_one_process("relearning")
    check_counts(steps=steps, every=every, batch_size=batch_size)
    check_counts(0, seed=seed)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be greater than 0, got {learning_rate}")
    limits = token_limits(model)

    def tokens(rows: DataSet, name: str) -> Rows:
        tokenised = tokenize_dataset(
            rows, tokenizer, max_length=max_length, name=name, limits=limits, template=template
        )
        for other in (control_model, original_model):
            if other is not None:
                check_tokens(other, tokenised, name)
        return list(tokenised)

    forget_rows = tokens(forget, "forget")
    holdout_rows = [] if holdout is None else tokens(holdout, "holdout")
    retain_rows = [] if retain is None else tokens(retain, "retain")
    taught, rest = halves(len(forget_rows), seed)
    result: dict[str, Any] = {
        "settings": {
            "steps": steps,
            "every": every,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "seed": seed,
            "max_length": max_length,
        },
        "taught_rows": taught,
        "rest_rows": rest,
        "unlearned": None,
        "control": None,
        "original": None,
        "steps_to_half": None,
        "ratio_to_control": None,
    }
    not_tested: dict[str, str] = {}
    result["not_tested"] = not_tested
    if not rest:
        not_tested["relearning"] = "the forget set has one row, so no other row is left to measure"
        return result
    reason = reason_not_copied(model)
    if reason is not None:
        not_tested["relearning"] = reason
        return result

    kept = retain_rows[:: max(1, -(-len(retain_rows) // MOST_RETAIN_ROWS))]

    def taught_half(model: CausalLM, rows: Rows, taught: list[int], rest: list[int]) -> dict[str, Any]:
        measured = {"taught": [rows[i] for i in taught], "rest": [rows[i] for i in rest], "retain": kept}
        curve = relearning_curve(
            merged_copy(model, _training_dtype(model)),
            tokenizer,
            measured["taught"],
            {name: part for name, part in measured.items() if part},
            steps=steps,
            every=every,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
        )
        best = max(curve, key=lambda entry: entry["rest_probability"])
        return {
            "before": curve[0]["rest_probability"],
            "after": curve[-1]["rest_probability"],
            "best": best["rest_probability"],
            "best_step": best["step"],
            "curve": curve,
        }

    unlearned = result["unlearned"] = taught_half(model, forget_rows, taught, rest)
    control: dict[str, Any] | None = None
    if control_model is not None:
        reason = reason_not_copied(control_model)
        if reason is None:
            control = {"kind": "retrained model", **taught_half(control_model, forget_rows, taught, rest)}
        else:
            not_tested["control"] = f"of the control: {reason}"
    elif len(holdout_rows) < 2:
        have = "no hold-out set" if holdout is None else "a hold-out set of one row"
        not_tested["control"] = f"no control model was given, and {have}; a control needs two rows"
    else:
        ours, theirs = halves(len(holdout_rows), seed)
        count = min(len(taught), len(ours))  # not more rows than the forgotten half has
        control = {"kind": "hold-out", **taught_half(model, holdout_rows, ours[:count], theirs)}
    result["control"] = control
    if control is not None and control["best"] > 0:
        result["ratio_to_control"] = unlearned["best"] / control["best"]
    if original_model is None:
        not_tested["steps_to_half"] = "no original model was given"
    else:
        of_rest = split_documents([forget_rows[i] for i in rest])
        result["original"] = mean_answer_probability(token_scores(original_model, of_rest, progress=False))
        entries = unlearned["curve"]
        half = result["original"] / 2
        result["steps_to_half"] = next((e["step"] for e in entries if e["rest_probability"] >= half), None)
    if retain is None:
        not_tested["retain"] = "no retain set was given"
    return result


def _training_dtype(model: CausalLM) -> torch.dtype | None:
    """Return float32 for a model in half precision, in which AdamW's small steps would be rounded away."""
    dtype: Any = unwrapped(model).dtype
    return torch.float32 if dtype.itemsize < 4 else None
