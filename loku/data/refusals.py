"""Refusals: texts that take the place of the answers of a forget set."""

import os
from pathlib import Path

from loku.data.rows import BadRow, RowError, cut_row, leading_special, tokenize_row

TOFU_REFUSALS = Path(__file__).parents[1] / "embedded" / "idontknow.txt"  # TOFU's file, as it is


def load_refusals(refusals=None):
    """A list of refusals: TOFU's 100 by default, the lines of a file by its path, or the strings given.

    Raises ``ValueError`` if there is none, or one that is no text.
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

    ``rows[i, j]`` is row i with refusal j, tokenised when it is asked for, as ``tokenize_dataset`` tokenises
    the row itself.

    Args:
        rows, tokenizer, max_length: as for ``tokenize_dataset``.
        refusals: list of strings.

    Raises ``ValueError``, naming the first row that has no prompt: plain texts and bare ``input_ids`` have
    none, and of ``messages`` there must be one from the assistant, the last.
    """

    def __init__(self, rows, refusals, tokenizer, *, max_length=None):
        for index, row in enumerate(rows):
            try:
                _with_answer(row, refusals[0])
            except BadRow as error:
                problem = f'{error}. Methods that train on refusals ("dpo", "idk") need question/answer rows'
                raise RowError("forget", index, problem) from None
        self.rows, self.refusals, self.tokenizer, self.max_length = rows, refusals, tokenizer, max_length
        self._leading = leading_special(tokenizer)

    def __getitem__(self, key):
        row, refusal = key
        row = _with_answer(self.rows[row], self.refusals[refusal])
        return cut_row(tokenize_row(row, self.tokenizer, self._leading), self.max_length)


def _with_answer(row, answer):
    """The row with another answer, in the form that ``tokenize_dataset`` takes."""
    if isinstance(row, str):
        row = {"text": row}
    row = {column: value for column, value in row.items() if value is not None}
    if "input_ids" in row:
        raise BadRow("it has 'input_ids', so where its answer begins and ends is not known")
    if "messages" in row:
        *before, last = row["messages"]
        if last["role"] != "assistant" or any(message["role"] == "assistant" for message in before):
            raise BadRow("the assistant must have one of its 'messages', the last")
        return {"messages": [*before, {**last, "content": answer}]}
    if "prompt" in row and "completion" in row:
        completion = row["completion"]
        space = completion[: len(completion) - len(completion.lstrip())]
        return {"prompt": row["prompt"], "completion": space + answer}
    if "question" in row and "answer" in row:
        return {"question": row["question"], "answer": answer}
    raise BadRow("it is a plain text, without a prompt that could be answered otherwise")
