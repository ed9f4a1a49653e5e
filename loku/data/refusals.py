"""Refusals: texts that take the place of the answers of a forget set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loku.data.chats import chat_of
from loku.data.files import read_text
from loku.data.question_templates import TOFU_TEMPLATE, QuestionTemplate
from loku.data.row_errors import BadRow, RowError
from loku.data.row_forms import columns_of, labelled_column
from loku.data.rows import DataSet, RowTokenizer, as_rows
from loku.data.token_limits import TokenLimits
from loku.data.tokens import TokenizedRow
from loku.data.values import check_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOFU_REFUSALS = Path(__file__).parents[1] / "embedded" / "idontknow.txt"  # TOFU's file, unchanged


def load_refusals(refusals: Iterable[str] | str | os.PathLike | None = None) -> list[str]:
    """Return a list of refusals.

    Args:
        refusals: The refusals; or the path of a file with one on each line, where empty lines are passed
            over; or None (default) for TOFU's 100.

    Raises:
        ValueError: There is no refusal, one is not a text, or the file is not UTF-8.
        OSError: The file cannot be read.
    """
    if refusals is None:
        refusals = TOFU_REFUSALS
    if isinstance(refusals, (str, os.PathLike)):
        lines = read_text(Path(refusals)).split("\n")  # other separators are text
        refusals = [line.strip() for line in lines if line.strip()]
    return check_refusals(refusals)


def check_refusals(refusals: Any) -> list[str]:
    """Return some refusals as a list.

    Raises:
        ValueError: They are no list of texts, or none is there.
    """
    if isinstance(refusals, (str, bytes, Mapping)) or not isinstance(refusals, Iterable):
        raise ValueError(f"the refusals are a {type(refusals).__name__}; pass a list of strings")
    refusals = list(refusals)
    if not refusals:
        raise ValueError("there are no refusals; pass at least one, or None for TOFU's")
    for refusal in refusals:
        if not (isinstance(refusal, str) and refusal.strip()):
            raise ValueError(f"a refusal must be a non-empty string, got {refusal!r}")
        try:
            check_unicode(refusal)
        except BadRow as error:
            raise ValueError(f"the refusal {refusal!a} cannot be used: {error}") from None
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
        limits: The limits of a model, from ``loku.data.token_limits``; None (default) sets none.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Raises:
        ValueError: The refusals are no list of texts.
        RowError: A row has no prompt, or its prompt and the longest refusal cannot be tokenised within
            ``max_length`` and the limits; the first such row is named. Plain texts and bare ``input_ids``
            have no prompt. ``messages`` have one if the last message, and no other, is the assistant's.
    """

    def __init__(
        self,
        rows: DataSet,
        refusals: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        limits: TokenLimits | None = None,
        template: QuestionTemplate = TOFU_TEMPLATE,
    ):
        self.rows, self.refusals = as_rows(rows, "forget"), check_refusals(refusals)
        self.tokenizer, self.max_length = tokenizer, max_length
        self._tokenize = RowTokenizer(tokenizer, max_length, "forget", limits, template=template)
        longest = max(range(len(self.refusals)), key=lambda i: len(self.refusals[i]))
        for index in range(len(self.rows)):
            self[index, longest]

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Draw a refusal for each row: the indices (rows,), int64."""
        return generator.integers(len(self.refusals), size=len(self.rows))

    def __getitem__(self, key: tuple[int, int]) -> TokenizedRow:
        index, refusal = key
        try:
            row = with_answer(self.rows[index], self.refusals[refusal])
        except BadRow as error:
            problem = f'{error}. Methods that train on refusals ("dpo", "idk") need question/answer rows'
            raise RowError("forget", index, problem) from None
        return self._tokenize(index, row)


def with_answer(row: Any, answer: str) -> dict[str, Any]:
    """Return the row with another answer, in a form that ``tokenize_dataset`` takes.

    Args:
        row: The row.
        answer: The answer.

    Raises:
        BadRow: The row has no prompt, or the place of its answer is not known.
    """
    columns = columns_of(row)
    labelled = labelled_column(columns)
    if labelled == "input_ids":
        raise BadRow("it has 'input_ids', so where its answer begins and ends is not known")
    if labelled == "messages":
        *before, last = chat_of(columns).messages
        if last["role"] != "assistant" or any(message["role"] == "assistant" for message in before):
            raise BadRow("the assistant must have one of its 'messages', the last")
        others = {key: value for key, value in columns.items() if key in ("tools", "chat_template_kwargs")}
        return {**others, "messages": [*before, {"role": "assistant", "content": answer}]}
    if labelled == "completion":
        completion = columns["completion"]
        space = (
            completion[: len(completion) - len(completion.lstrip())] if isinstance(completion, str) else ""
        )
        return {**columns, "completion": space + answer}
    if labelled in ("answer", "output"):
        return {**columns, labelled: answer}
    if labelled == "text":
        raise BadRow("it is a plain text, without a prompt that could be answered otherwise")
    return columns  # its tokeniser says what is missing
