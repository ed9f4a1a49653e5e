"""Conversations: the messages of a row, rendered by the chat template of the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loku.data.row_errors import BadRow
from loku.data.tokens import LabelledText
from loku.data.values import as_list, check_text, is_missing, without_missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # the others have the names of chat templates
ROLES = ("system", "user", "assistant", "tool")


class Chat(NamedTuple):
    """The messages of a row.

    Attributes:
        messages: The messages, dicts with ``role`` and ``content`` as chat templates take them.
        begin: The index of the first message of the completion; None if the row does not tell the completion
            from the prompt.
    """

    messages: list[dict[str, Any]]
    begin: int | None = None


def is_chat(value: Any) -> bool:
    """Whether the value of a column is a list, which should be one of messages."""
    return as_list(value) is not None


def chat_of(row: Mapping[str, Any]) -> Chat:
    """Return the messages of a row.

    Args:
        row: The row, without missing values. It has ``messages``, ``conversations``, or ``prompt`` and
            ``completion`` as lists of messages.

    Raises:
        BadRow: A message is malformed.
    """
    for column in ("messages", "conversations"):
        if column in row:
            return Chat(_messages(row[column], column))
    prompt, completion = (_messages(row[column], column) for column in ("prompt", "completion"))
    return Chat([*prompt, *completion], len(prompt))


def chat_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> LabelledText:
    """Render the messages of a row, and find the labelled parts of the text.

    Args:
        row: The row, as for ``chat_of``. Its ``tools``, a list of JSON schemas or their JSON text, and its
            ``chat_template_kwargs``, a dict, are passed to the chat template.
        tokenizer: The tokenizer, whose chat template renders the messages.

    Returns:
        The text. Its labelled parts are those that the template marks by ``{% generation %}``; in a row of
        ``prompt`` and ``completion``, those of them in the completion. Without such marks the completion is
        labelled, which is the last message if the row does not say more.

    Raises:
        BadRow: A message is malformed, or the template cannot render the messages.
    """
    messages, begin = chat_of(row)
    options = template_options(row)
    try:
        template = tokenizer.get_chat_template(tools=options.get("tools"))
    except (AttributeError, ValueError) as error:
        raise BadRow(
            "it has messages, but the tokenizer has no chat template; set tokenizer.chat_template or "
            "write the row as 'prompt' + 'completion' of texts"
        ) from error
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        text, spans = _render_marked(messages, tokenizer, template, options)
        if begin:
            before = _render(messages[:begin], tokenizer, options)
            _check_begins(text, before, "the messages of the completion")
            spans = [span for span in spans if span[0] >= len(before)]
        if not spans:
            raise BadRow("the chat template marks no part of its messages; one must be the assistant's")
        _check_answers(messages[begin or 0 :])
        return LabelledText(text, tuple(spans), special=False)

    if begin is None:
        begin = len(messages) - 1
    if messages[begin]["role"] != "assistant":
        which = "last message" if begin == len(messages) - 1 else "completion's first message"
        raise BadRow(f"its {which} has the role {messages[begin]['role']!r}; it must be 'assistant'")
    if begin == 0:
        raise BadRow("there is no message before the assistant's; the model needs one to answer to")
    _check_answers(messages[begin:])
    prompt = _render(messages[:begin], tokenizer, {**options, "add_generation_prompt": True})
    text = _render(messages, tokenizer, options)
    _check_begins(text, prompt, "the last message")
    return LabelledText(text, ((len(prompt), len(text)),), special=False)


def render_chat(
    question: str, answer: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> tuple[str, str]:
    """Render a question of the user and the answer of the assistant.

    Args:
        question: The question.
        answer: The answer.
        tokenizer: The tokenizer, which has a chat template.
        options: Further arguments of the chat template.

    Returns:
        The text before the answer, which ends with the beginning of the assistant's turn; and the whole text.

    Raises:
        BadRow: The template cannot render the messages, or the whole text does not begin with the first one.
    """
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = _render(messages[:1], tokenizer, {**options, "add_generation_prompt": True})
    text = _render(messages, tokenizer, options)
    _check_begins(text, prompt, "the answer")
    return prompt, text


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    messages = as_list(value)
    if not messages:
        raise BadRow(f"'{column}' must be a non-empty list of {{'role': ..., 'content': ...}}")
    return [_message(message, column) for message in messages]


def _message(message: Any, column: str) -> dict[str, Any]:
    malformed = (
        f"every message of '{column}' must be a dict whose 'role' and 'content' are strings, or 'from' and "
        "'value' in ShareGPT's form"
    )
    if not isinstance(message, Mapping):
        raise BadRow(f"{malformed}; one is a {type(message).__name__}")
    message = without_missing(message)
    if "role" not in message and isinstance(message.get("from"), str):
        role = message.pop("from")
        message = {"role": SHAREGPT_ROLES.get(role, role), "content": message.pop("value", None), **message}
        if message["role"] not in ROLES:
            raise BadRow(
                f"a message of '{column}' is from {role!r}; it must be one of {[*SHAREGPT_ROLES, *ROLES]}"
            )
    if not isinstance(message.get("role"), str):
        raise BadRow(malformed)
    if "tool_calls" in message and message.get("content") is None:
        return message  # a call of a tool may come without a text
    content = message.get("content")
    if isinstance(content, str):
        return message
    parts = as_list(content)
    if parts is None:
        raise BadRow(f"{malformed}; one has a {type(content).__name__} as its content")
    return {**message, "content": "".join(_part(part) for part in parts)}


def _part(part: Any) -> str:
    """Return the text of a part of a message's content."""
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise BadRow(
            f"the content of a message has a part of the type {kind!r}; only parts of text can be used"
        )
    return text


def _check_answers(messages: Sequence[Mapping[str, Any]]) -> None:
    for message in messages:
        if message["role"] == "assistant" and "tool_calls" not in message:
            check_text(message["content"], "content of an assistant's message")


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the further arguments of the chat template that a row has: its ``tools`` and kwargs.

    Raises:
        BadRow: A value has another type.
    """
    options = row.get("chat_template_kwargs")
    options = {} if is_missing(options) else options
    if not isinstance(options, Mapping):
        raise BadRow(f"'chat_template_kwargs' is a {type(options).__name__}; it must be a dict")
    options = without_missing(options)
    tools = None if is_missing(row.get("tools")) else row["tools"]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"'tools' is not JSON: {error}") from error
    if tools is not None:
        schemas = as_list(tools)
        if schemas is None or not all(isinstance(schema, Mapping) for schema in schemas):
            raise BadRow("'tools' must be a list of JSON schemas, or its JSON text")
        options["tools"] = [without_missing(schema) for schema in schemas] or None
    return options


def _render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> str:
    render: Any = tokenizer.apply_chat_template
    try:
        return render(messages, tokenize=False, **options)
    except Exception as error:  # a template may raise what it likes
        raise _not_rendered(error) from error


def _render_marked(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    options: Mapping[str, Any],
) -> tuple[str, list[tuple[int, int]]]:
    """Render messages, and return the text and the parts that the template marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template
    try:
        texts, spans = render(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **options},
        )
    except Exception as error:
        raise _not_rendered(error) from error
    return texts[0], [(begin, end) for begin, end in spans[0] if begin < end]


def _not_rendered(error: Exception) -> BadRow:
    return BadRow(f"the chat template cannot render its messages ({type(error).__name__}: {error})")


def _check_begins(text: str, before: str, what: str) -> None:
    if not text.startswith(before):
        raise BadRow(
            f"the chat template renders {what} so that it does not continue the messages before "
            "it; write the row as 'prompt' + 'completion' of texts"
        )
