"""The forms of rows: the columns of a row become a text whose completion is labelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loku.data.chats import chat_text, is_chat, template_options
from loku.data.question_templates import TOFU_TEMPLATE, QuestionTemplate
from loku.data.row_errors import BadRow
from loku.data.tokens import LabelledText
from loku.data.values import as_list, check_text, is_missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = (
    "'text', 'prompt' + 'completion', 'question' + 'answer', 'instruction' + 'output', 'messages', "
    "'conversations' or 'input_ids' (+ 'labels')"
)
_FORMS = (
    ("input_ids",),
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("text",),
)


def question_answer_texts(question: str, answer: str) -> tuple[str, str]:
    """Return TOFU's prompt and completion for a question and its answer: the texts of ``TOFU_TEMPLATE``."""
    return TOFU_TEMPLATE.texts(question, answer)


def instruction_texts(instruction: str, context: str, output: str) -> tuple[str, str]:
    """Return Alpaca's prompt and completion (Taori et al., 2023), those of the column ``text`` of its data.

    Args:
        instruction: The instruction.
        context: The input of the instruction, "" if it has none.
        output: The answer.
    """
    task = "Below is an instruction that describes a task"
    if context:
        task += ", paired with an input that provides further context"
    given = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"{task}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{given}### Response:\n"
    ), output


def labelled_column(row: Any) -> str | None:
    """Return the column of a row that its labels come from, by the preferences of ``tokenize_dataset``.

    Returns:
        "input_ids", "messages", "completion", "answer", "output" or "text", which a string counts as; None if
        the row has no known columns. A column whose value is missing (None, NaN) does not count.
        "messages" stands for every row that a chat template renders: for ``conversations``, and for
        ``prompt`` and ``completion`` that are lists of messages.
    """
    if isinstance(row, str):
        return "text"
    if not isinstance(row, Mapping):
        return None
    for form in _FORMS:
        if all(not is_missing(row.get(column)) for column in form):
            conversational = (
                form[-1] == "completion" and is_chat(row["prompt"]) and is_chat(row["completion"])
            )
            return "messages" if form == ("conversations",) or conversational else form[-1]
    return None


def columns_of(row: Any) -> dict[str, Any]:
    """Return the columns of a row that have a value.

    Raises:
        BadRow: The row is no string and no mapping.
    """
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, Mapping):
        kind = "missing value" if is_missing(row) else type(row).__name__
        raise BadRow(f"it is a {kind}; a row is a string or a dict with {COLUMNS}")
    return {column: value for column, value in row.items() if not is_missing(value)}


def labelled_text(
    columns: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> LabelledText:
    """Return the text of a row, with its completion labelled.

    Args:
        columns: The columns of the row, from ``columns_of``.
        tokenizer: The tokenizer, whose chat template renders messages.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Raises:
        BadRow: The row has no known columns, or a value of the wrong type.
    """
    labelled = labelled_column(columns)
    if labelled == "messages":
        return chat_text(columns, tokenizer)
    if labelled == "text":
        return LabelledText(check_text(columns["text"], "text"))
    if labelled == "completion":
        for column in ("prompt", "completion"):
            if not isinstance(columns[column], str):
                raise BadRow(
                    f"'{column}' is a {type(columns[column]).__name__}; 'prompt' and 'completion' must "
                    "both be strings, or both lists of messages"
                )
        prompt, completion = columns["prompt"], check_text(columns["completion"], "completion")
    elif labelled == "answer":
        question, answer = (
            check_text(columns["question"], "question"),
            check_text(columns["answer"], "answer"),
        )
        options = template_options(columns) if template.is_chat else {}
        return template.labelled_text(question, answer, tokenizer, **options)
    elif labelled == "output":
        context = columns.get("input", "")
        if not isinstance(context, str):
            raise BadRow(f"'input' is a {type(context).__name__}; it must be a string")
        prompt, completion = instruction_texts(
            check_text(columns["instruction"], "instruction"),
            context if context.strip() else "",
            check_text(columns["output"], "output"),
        )
    else:
        raise BadRow(f"it has values in the columns {list(columns)}; it needs {COLUMNS}")
    text = prompt + completion
    return LabelledText(text, ((len(prompt), len(text)),))


def wrong_answers(row: Mapping[str, Any]) -> list[str]:
    """Return the wrong answers of a row, TOFU's ``perturbed_answer``; [] if it has none.

    Raises:
        BadRow: The column is no list of texts, or a text is blank.
    """
    value = row.get("perturbed_answer")
    if is_missing(value):
        return []
    answers = as_list(value)
    if answers is None:
        raise BadRow(f"'perturbed_answer' is a {type(value).__name__}; it must be a list of strings")
    return [check_text(answer, f"perturbed_answer[{i}]") for i, answer in enumerate(answers)]


def paraphrased_answer(row: Mapping[str, Any]) -> str:
    """Return the ``paraphrased_answer`` of a row, or its ``answer`` if it has none.

    Raises:
        BadRow: The answer is no text, or is blank.
    """
    value = row.get("paraphrased_answer")
    if is_missing(value):
        return check_text(row["answer"], "answer")
    return check_text(value, "paraphrased_answer")
