"""Refusals: texts that take the place of the answers of a forget set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loku.data.rows import (
    BadRow,
    DataSet,
    RowError,
    TokenizedRow,
    cut_row,
    labelled_column,
    leading_special,
    tokenize_row,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOFU_REFUSALS = Path(__file__).parents[1] / "embedded" / "idontknow.txt"  # TOFU's file, unchanged


def load_refusals(refusals: Iterable[str] | str | os.PathLike | None = None) -> list[str]:
    """Return a list of refusals.

    Args:
        refusals: The refusals; or the path of a file with one on each line, where empty lines are passed
            over; or None (default) for TOFU's 100.

    Raises:
        ValueError: There is no refusal, or one is not a text.
    """
    if refusals is None:
        refusals = TOFU_REFUSALS
    if isinstance(refusals, (str, os.PathLike)):
        lines = Path(refusals).read_text(encoding="utf-8").splitlines()
        refusals = [line.strip() for line in lines if line.strip()]
    refusals = list(refusals)
    if not refusals:
        raise ValueError("there are no refusals; pass at least one, or None for TOFU's")
    for refusal in refusals:
        if not (isinstance(refusal, str) and refusal.strip()):
            raise ValueError(f"a refusal must be a non-empty string, got {refusal!r}")
    return refusals


class RefusalRows:
    """The rows of a forget set with a refusal in the place of the answer.

    ``rows[i, j]`` is row i with refusal j, tokenised when it is asked for, as ``loku.data.tokenize_dataset``
    tokenises the row itself.

    Args:
        rows: The forget set, as for ``loku.data.tokenize_dataset``.
        refusals: The refusals, at least one.
        tokenizer: The tokenizer.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them.

    Raises:
        RowError: A row has no prompt; the first such row is named. Plain texts and bare ``input_ids`` have no
            prompt. ``messages`` have one if the last message, and no other, is the assistant's.
    """

    def __init__(
        self,
        rows: DataSet,
        refusals: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
    ):
        for index, row in enumerate(rows):
            try:
                _with_answer(row, refusals[0])
            except BadRow as error:
                problem = f'{error}. Methods that train on refusals ("dpo", "idk") need question/answer rows'
                raise RowError("forget", index, problem) from None
        self.rows, self.refusals, self.tokenizer, self.max_length = rows, refusals, tokenizer, max_length
        self._leading = leading_special(tokenizer)

    def __getitem__(self, key: tuple[int, int]) -> TokenizedRow:
        index, refusal = key
        row = _with_answer(self.rows[index], self.refusals[refusal])
        return cut_row(tokenize_row(row, self.tokenizer, self._leading), self.max_length)


def _with_answer(row: Any, answer: str) -> dict[str, Any]:
    """Return the row with another answer, in a form that ``tokenize_dataset`` takes."""
    labelled = labelled_column(row)
    if labelled == "input_ids":
        raise BadRow("it has 'input_ids', so where its answer begins and ends is not known")
    if labelled == "messages":
        *before, last = row["messages"]
        if last["role"] != "assistant" or any(message["role"] == "assistant" for message in before):
            raise BadRow("the assistant must have one of its 'messages', the last")
        return {"messages": [*before, {**last, "content": answer}]}
    if labelled == "completion":
        completion = row["completion"]
        space = completion[: len(completion) - len(completion.lstrip())]
        return {"prompt": row["prompt"], "completion": space + answer}
    if labelled == "answer":
        return {"question": row["question"], "answer": answer}
    raise BadRow("it is a plain text, without a prompt that could be answered otherwise")
