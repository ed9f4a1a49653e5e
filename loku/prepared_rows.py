"""The tokenised rows of a run."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from loku.config import UnlearnConfig
from loku.data import (
    LazyRows,
    RefusalRows,
    StreamedRows,
    has_input_ids,
    infer_tokenizer,
    load_refusals,
    retain_rows,
    tokenize_dataset,
)
from loku.data.large_sets import DrawnRows
from loku.models import CausalLM
from loku.objectives import OBJECTIVES


class PreparedRows(NamedTuple):
    """The tokenised rows of a run, by ``prepare_rows``.

    Args:
        forget: The forget rows, dicts with ``input_ids`` and ``labels``.
        retain: The retain rows, in the same form; ``LazyRows`` or ``StreamedRows`` if they are not held in
            memory.
        refusals: The forget rows with refusals, or None if the method needs none.
        tokenizer: The tokenizer, or None if every row was tokenised and none was passed.
    """

    forget: list[dict[str, list[int]]]
    retain: list[dict[str, list[int]]] | LazyRows | StreamedRows
    refusals: RefusalRows | None
    tokenizer: PreTrainedTokenizerBase | None


def prepare_rows(
    model: CausalLM,
    forget: Any,
    retain: Any,
    config: UnlearnConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    refusals: RefusalRows | None = None,
) -> PreparedRows:
    """Tokenise the rows of a run, once.

    Args:
        model: The causal LM. A tokenizer is looked for beside it if one is needed and none is given.
        forget: The forget set, as for ``loku.unlearn``. Or the ``PreparedRows`` of an earlier call, which are
            returned as they are.
        retain: The retain set, as for ``loku.unlearn``.
        config: The settings; ``method``, ``max_length`` and ``refusals`` count.
        tokenizer: The tokenizer, by default the one saved beside the model.
        refusals: The rows with refusals. By default they are made of the forget set if the method needs them.

    Returns:
        The rows, which ``UnlearnTrainer`` takes as its ``forget``.

    Raises:
        ValueError: A set is empty, a row is unusable, no tokenizer is found, or refusals cannot be made.
    """
    if isinstance(forget, PreparedRows):
        return forget
    if tokenizer is None and not all(
        isinstance(rows, DrawnRows) or has_input_ids(rows) for rows in (forget, retain)
    ):
        tokenizer = infer_tokenizer(model)
    if refusals is None and "refusal" in OBJECTIVES[config.method].rows:
        if has_input_ids(forget):
            raise ValueError(
                f"method {config.method!r} trains on refusals; pass a loku.data.RefusalRows, or a forget set "
                "that is not tokenised"
            )
        assert tokenizer is not None  # rows without tokens have asked for one above
        refusals = RefusalRows(
            forget, load_refusals(config.refusals), tokenizer, max_length=config.max_length
        )
    forget = tokenize_dataset(forget, tokenizer, max_length=config.max_length)
    retain = retain_rows(retain, tokenizer, max_length=config.max_length, forget=forget)
    return PreparedRows(forget, retain, refusals, tokenizer)
