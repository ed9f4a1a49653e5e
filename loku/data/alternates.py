"""Alternates: other plausible answers to the questions of a forget set, in a column of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loku.data.question_templates import TOFU_TEMPLATE, QuestionTemplate
from loku.data.refusals import RefusalRows, with_answer
from loku.data.row_errors import BadRow, RowError
from loku.data.rows import DataSet, RowTokenizer, as_rows
from loku.data.token_limits import TokenLimits
from loku.data.tokens import TokenizedRow
from loku.data.values import as_list, check_text, is_missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALTERNATE = "alternate"  # the column, as in open-unlearning's files


def alternates_of(row: Any) -> list[str]:
    """Return the alternates of a row: its column ``alternate``, a text or a list of texts.

    Raises:
        BadRow: The row has no such column, or it holds something else, or a text is blank.
    """
    value = row.get(ALTERNATE) if isinstance(row, Mapping) else None
    if is_missing(value):
        raise BadRow(
            f"it has no column '{ALTERNATE}', a text or a list of texts; the command loku alternates lets a "
            "model write them"
        )
    texts = [value] if isinstance(value, str) else as_list(value)
    if not texts:
        raise BadRow(f"'{ALTERNATE}' must be a text or a list of texts with at least one, got {value!r}")
    return [check_text(text, f"{ALTERNATE}[{number}]") for number, text in enumerate(texts)]


class AlternateRows(RefusalRows):
    """The rows of a forget set with an alternate in the place of the answer.

    ``rows[i, j]`` is row i with its own alternate j. Rows may have different numbers of alternates.

    Args:
        rows: The forget set, as for ``loku.data.tokenize_dataset``, with the column ``alternate``.
        tokenizer: The tokenizer.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them.
        limits: The limits of a model, from ``loku.data.token_limits``; None (default) sets none.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Raises:
        RowError: A row has no alternate or no prompt, or an alternate cannot be tokenised within
            ``max_length`` and the limits; the first such row is named.
    """

    def __init__(
        self,
        rows: DataSet,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        limits: TokenLimits | None = None,
        template: QuestionTemplate = TOFU_TEMPLATE,
    ):
        self.rows = as_rows(rows, "forget")
        self.tokenizer, self.max_length = tokenizer, max_length
        self._tokenize = RowTokenizer(tokenizer, max_length, "forget", limits, template=template)
        self.alternates: list[list[str]] = []
        for index in range(len(self.rows)):
            try:
                self.alternates.append(alternates_of(self.rows[index]))
            except BadRow as error:
                raise RowError("forget", index, str(error)) from None
            for number in range(len(self.alternates[index])):
                self[index, number]
        self.refusals = [text for texts in self.alternates for text in texts]  # they identify a run

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Draw an alternate for each row: the indices (rows,), int64."""
        return generator.integers([len(texts) for texts in self.alternates])

    def __getitem__(self, key: tuple[int, int]) -> TokenizedRow:
        index, number = key
        try:
            row = with_answer(self.rows[index], self.alternates[index][number])
        except BadRow as error:
            raise RowError("forget", index, f"{error}. Alternates need question/answer rows") from None
        return self._tokenize(index, row)
