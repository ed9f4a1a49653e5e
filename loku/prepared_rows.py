"""The tokenised rows of a run."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from loku.config import UnlearnConfig
from loku.data import (
    AlternateRows,
    LazyRows,
    RefusalRows,
    StreamedRows,
    as_rows,
    check_template_used,
    has_input_ids,
    infer_tokenizer,
    load_refusals,
    read_rows,
    retain_rows,
    row_places,
    token_limits,
    tokenize_dataset,
)
from loku.data.large_sets import DrawnRows
from loku.models import CausalLM
from loku.nan_guard import check_weights
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


def _text_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase | None:
    """Return a tokenizer, or the tokenizer in the processor of a model that also takes images."""
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = getattr(tokenizer, "tokenizer", None)
    if isinstance(tokenizer, (str, os.PathLike)):
        raise ValueError(
            f"tokenizer is the {type(tokenizer).__name__} {str(tokenizer)!r}; pass "
            "AutoTokenizer.from_pretrained(...) of it"
        )
    return tokenizer


def prepare_rows(
    model: CausalLM,
    forget: Any,
    retain: Any,
    config: UnlearnConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    refusals: RefusalRows | None = None,
) -> PreparedRows:
    """Tokenise the rows of a run, once, and check that the model can take them: its weights, too.

    Args:
        model: The causal LM, which sets the limits of the rows (``loku.data.token_limits``). A tokenizer is
            looked for beside it if one is needed and none is given.
        forget: The forget set, as for ``loku.unlearn``, or the path of its file. Or the ``PreparedRows`` of
            an earlier call, which are returned as they are.
        retain: The retain set, as for ``loku.unlearn``, or the path of its file.
        config: The settings; ``method``, ``max_length``, ``refusals`` and the template count.
        tokenizer: The tokenizer, by default the one saved beside the model.
        refusals: The rows with refusals. By default they are made of the forget set if the method needs them.

    Returns:
        The rows, which ``UnlearnTrainer`` takes as its ``forget``.

    Raises:
        ValueError: A set is empty, the tokenizer is a path or is not found, or refusals cannot be made or
            are not used.
        RowError: A row is unusable, is longer than the model's context, or has a token that the model lacks.
            The message names the set, the row and, for a file, the line. A retain row that is not held in
            memory is checked when it is drawn.
        FloatingPointError: A weight of the model is NaN or Inf.
        OSError: A file cannot be read.
    """
    if isinstance(forget, PreparedRows):
        return forget
    check_weights(model)
    tokenizer = _text_tokenizer(tokenizer)
    given = {"forget": forget, "retain": retain}
    sources = {name: rows for name, rows in given.items() if isinstance(rows, (str, os.PathLike))}
    forget, retain = (read_rows(rows) if name in sources else rows for name, rows in given.items())
    forget = as_rows(forget, "forget")
    retain = retain if isinstance(retain, DrawnRows) else as_rows(retain, "retain")
    if tokenizer is None and not all(
        isinstance(rows, DrawnRows) or has_input_ids(rows) for rows in (forget, retain)
    ):
        tokenizer = infer_tokenizer(model)
    objective = OBJECTIVES[config.method]
    needs_refusals = refusals is None and "refusal" in objective.rows
    if needs_refusals and has_input_ids(forget):
        wanted = (
            "alternates; pass a loku.data.AlternateRows"
            if objective.alternates
            else ("refusals; pass a loku.data.RefusalRows")
        )
        raise ValueError(
            f"method {config.method!r} trains on {wanted}, or a forget set that is not tokenised"
        )
    if objective.alternates and config.refusals is not None:
        raise ValueError(
            f"method {config.method!r} trains on the rows' own alternates, so it takes no refusals: leave "
            'them out, or train by "dpo"'
        )
    if "refusal" not in objective.rows and config.refusals is not None:
        raise ValueError(
            f"method {config.method!r} trains on no refusals: leave refusals out, or train by "
            '"dpo", "dpo_kl" or "idk"'
        )
    length, limits = config.max_length, token_limits(model)
    template = config.template()
    check_template_used(
        template, {"forget": forget, **({} if isinstance(retain, DrawnRows) else {"retain": retain})}
    )
    with row_places(sources):
        tokenized = tokenize_dataset(forget, tokenizer, max_length=length, limits=limits, template=template)
        if needs_refusals:
            assert tokenizer is not None  # rows without tokens have asked for one above
            if objective.alternates:
                refusals = AlternateRows(
                    forget, tokenizer, max_length=length, limits=limits, template=template
                )
            else:
                texts = load_refusals(config.refusals)
                refusals = RefusalRows(
                    forget, texts, tokenizer, max_length=length, limits=limits, template=template
                )
        kept = retain_rows(
            retain,
            tokenizer,
            max_length=length,
            forget=tokenized,
            limits=limits,
            source=sources.get("retain"),
            template=template,
        )
    return PreparedRows(tokenized, kept, refusals, tokenizer)
