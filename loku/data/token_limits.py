"""The limits of a model: the length of its context, and the ids that its embeddings have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from loku.data.row_errors import BadRow, RowError
from loku.data.tokens import IGNORE_INDEX
from loku.models import unwrapped

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")


class TokenLimits(NamedTuple):
    """The limits of a model, from ``token_limits``. None stands for a limit that the model does not have.

    Attributes:
        context: The greatest number of tokens of a document.
        inputs: The number of rows of the input embedding.
        outputs: The number of rows of the output embedding.
    """

    context: int | None
    inputs: int | None
    outputs: int | None

    def check(self, row: Mapping[str, Any], told: str | None = None) -> None:
        """Check a tokenised row.

        Args:
            row: The row.
            told: Its number of tokens in messages. By default they are counted.

        Raises:
            BadRow: The row is longer than the context, or an id or a label is beyond its embedding.
        """
        length = max(row["position_ids"]) + 1 if "position_ids" in row else len(row["input_ids"])
        if self.context is not None and length > self.context:
            raise BadRow(
                f"it has {told or length} tokens, and the model's context has {self.context}; cut the rows "
                f"by max_length={self.context} (--max-length {self.context}), or split or drop the row"
            )
        greatest = max(row["input_ids"], default=0)
        if self.inputs is not None and greatest >= self.inputs:
            raise BadRow(
                f"it has the token id {greatest}, and the model's input embedding has {self.inputs} rows; "
                "pass the model's own tokenizer, or, if tokens were added to it, call "
                "model.resize_token_embeddings(len(tokenizer)) first"
            )
        greatest = max(row["labels"], default=IGNORE_INDEX)
        if self.outputs is not None and greatest >= self.outputs:
            raise BadRow(
                f"it has the label {greatest}, and the model's output embedding has {self.outputs} rows; a "
                f"label is a token id of the model, or {IGNORE_INDEX}"
            )


def token_limits(model: nn.Module) -> TokenLimits:
    """Return the limits of a causal LM.

    The context is ``max_position_embeddings`` of the text config (``n_positions``, ``max_seq_len``), times
    the factor by which RoPE is stretched, as vLLM computes it. Mamba, Bloom and others have no limit.

    Args:
        model: The causal LM, in its wrappers or without them.
    """
    model = unwrapped(model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return TokenLimits(
        _context(config),
        _embedding_rows(model, "get_input_embeddings", "num_embeddings"),
        _embedding_rows(model, "get_output_embeddings", "out_features"),
    )


def check_tokens(model: nn.Module, rows: Iterable[Mapping[str, Any]], name: str) -> None:
    """Check that a model can take some tokenised rows.

    Args:
        model: The causal LM.
        rows: The tokenised rows, from ``loku.data.tokenize_dataset``.
        name: The name of the data set in messages.

    Raises:
        RowError: A row is longer than the model's context, or an id or a label is beyond its embedding. The
            first such row is named.
    """
    limits = token_limits(model)
    for index, row in enumerate(rows):
        try:
            limits.check(row)
        except BadRow as error:
            raise RowError(name, index, error) from None


def _context(config: Any) -> int | None:
    if getattr(config, "alibi", False):  # Falcon's; its biases have no greatest distance
        return None
    values = (getattr(config, field, None) for field in CONTEXT_FIELDS)
    context = next((value for value in values if isinstance(value, int) and value > 0), None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if context is None or not isinstance(rope, Mapping):
        return context
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if not isinstance(factor, (int, float)):
        return context
    if kind in ("linear", "dynamic"):
        return int(context * factor)
    if kind == "yarn":
        return max(context, int(factor * (rope.get("original_max_position_embeddings") or context)))
    return context  # Llama 3's and LongRoPE's contexts are the stretched ones


def _embedding_rows(model: nn.Module, getter: str, field: str) -> int | None:
    try:
        embedding = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    base: Any = getattr(embedding, "get_base_layer", None)  # under an adapter of peft
    rows = getattr(embedding if base is None else base(), field, None)
    return rows if isinstance(rows, int) else None
