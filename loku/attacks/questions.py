"""The question of a row, which attacks replace: by a paraphrase, or by the same behind a preamble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loku.data.chats import chat_of
from loku.data.row_errors import BadRow, RowError
from loku.data.row_forms import columns_of, labelled_column
from loku.data.values import as_list, check_text, is_missing, without_missing

PARAPHRASES = ("paraphrased_question", "paraphrased_questions")  # the columns
_QUESTIONS = {"answer": "question", "completion": "prompt", "output": "instruction"}


def question_of(row: Any) -> str | None:
    """Return the question of a row: its question, prompt or instruction, or the last message of the user.

    A message after the last one of the assistant does not count.

    Args:
        row: The row, which ``loku.data.tokenize_dataset`` takes.

    Returns:
        The question; None for a text, for tokens, and for a chat without a message of the user.
    """
    labelled = labelled_column(row)
    if labelled == "messages":
        messages, index = _last_user(row)
        return None if index is None else messages[index]["content"]
    return None if labelled not in _QUESTIONS else row[_QUESTIONS[labelled]]


def with_question(row: Mapping[str, Any], question: str) -> dict[str, Any]:
    """Return a row with another question.

    Args:
        row: A row for which ``question_of`` has a question.
        question: The other question.
    """
    labelled = labelled_column(row)
    columns = columns_of(row)
    if labelled != "messages":
        return {**columns, _QUESTIONS[str(labelled)]: question}
    messages, index = _last_user(row)
    assert index is not None
    messages = [*messages[:index], {**messages[index], "content": question}, *messages[index + 1 :]]
    begin = chat_of(without_missing(columns)).begin
    if begin is None:  # also for ShareGPT's messages, which chat_of turns to the usual form
        return {**columns, "messages": messages}
    return {**columns, "prompt": messages[:begin], "completion": messages[begin:]}


def _last_user(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int | None]:
    """Return the messages of a chat, and the index of the user's last one before the asked answer."""
    messages, begin = chat_of(without_missing(columns_of(row)))
    # A chat may go on after its last answer, and what comes then is no part of the prompt.
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    end = max(answers, default=0) if begin is None else begin
    users = [i for i, message in enumerate(messages[:end]) if message["role"] == "user"]
    return messages, users[-1] if users else None


def paraphrases_of(row: Any, name: str, index: int) -> list[str]:
    """Return the paraphrased questions of a row, [] if it has none.

    Args:
        row: The row. A text in ``paraphrased_question`` and a list of texts in ``paraphrased_questions``
            count.
        name: The name of the data set in messages.
        index: The index of the row in messages.

    Raises:
        RowError: A column has a value of another type, or a blank text.
    """
    if not isinstance(row, Mapping):
        return []
    found: list[str] = []
    try:
        for column in PARAPHRASES:
            value = row.get(column)
            if is_missing(value):
                continue
            texts = [value] if isinstance(value, str) else as_list(value)
            if texts is None:
                raise BadRow(f"'{column}' is a {type(value).__name__}; it must be a text or a list of texts")
            found += [check_text(text, column) for text in texts]
    except BadRow as error:
        raise RowError(name, index, error) from error
    return list(dict.fromkeys(found))
