"""Texts as tokenised rows whose every token is labelled: the first tokens of each, or pieces of all."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from loku.data import token_limits
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, list[int]]
JOINT = "\n\n"  # between two texts, as in open-unlearning


def first_tokens(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None, name: str
) -> list[Row]:
    """Return the first tokens of each text, with the special tokens that the tokenizer adds by default.

    No EOS is added, so the measures are those of the text alone. A text of fewer than two tokens is left out,
    because its first token is never predicted.

    Args:
        texts: The texts.
        tokenizer: The tokenizer.
        max_length: The greatest number of tokens of a row; None for all.
        name: The name of the set in messages.

    Raises:
        ValueError: No text has two tokens.
    """
    rows = [_labelled(_ids(tokenizer, text)[:max_length]) for text in texts]
    rows = [row for row in rows if len(row["input_ids"]) > 1]
    if not rows:
        raise ValueError(f"no text of the set {name} has two tokens")
    return rows


def pieces(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Row]:
    """Cut texts, joined by a blank line, into rows of ``length`` tokens; the last row may be shorter.

    Each row begins with the BOS that the tokenizer puts before a text, if it does.

    Args:
        texts: The texts.
        tokenizer: The tokenizer.
        length: The number of tokens of a row, with its BOS, >= 2.
    """
    ids = _ids(tokenizer, JOINT.join(texts), add_special_tokens=False)
    begin = _ids(tokenizer, "")[:1]
    if begin != [tokenizer.bos_token_id]:
        begin = []
    size = length - len(begin)
    rows = [_labelled(begin + ids[start : start + size]) for start in range(0, len(ids), size)]
    return [row for row in rows if len(row["input_ids"]) > 1]


def measured_rows(
    texts: Sequence[str],
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    name: str,
) -> list[Row]:
    """Return the ``first_tokens`` of texts that a model is measured on, as many as its context has.

    One warning counts the texts that the context cuts and ``max_length`` does not.
    """
    context = token_limits(model).context
    most = min((bound for bound in (max_length, context) if bound is not None), default=None)
    rows = first_tokens(texts, tokenizer, max_length, name)
    if most is None or most == max_length:
        return rows
    cut = sum(len(row["input_ids"]) > most for row in rows)
    if cut:
        warnings.warn(
            f"{cut} of the {len(rows)} texts of the set {name} are longer than the model's context of {most} "
            "tokens: their first tokens are measured",
            stacklevel=2,
        )
    return [_labelled(row["input_ids"][:most]) for row in rows]


def _labelled(ids: list[int]) -> Row:
    return {"input_ids": list(ids), "labels": list(ids)}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    ids: Any = tokenizer(text, verbose=False, **options)["input_ids"]  # no warning of long texts
    return list(ids)
