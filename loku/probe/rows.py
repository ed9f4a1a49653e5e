"""The rows of the probe, and their tokens for a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loku.data.chats import chat_text
from loku.data.row_errors import BadRow
from loku.data.row_forms import question_answer_texts
from loku.data.tokens import IGNORE_INDEX, LabelledText, TextTokenizer
from loku.deletion.entities import Mentions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = Path(__file__).with_name("rows.jsonl")
KINDS = ("arithmetic", "capitals", "completions", "fluency", "openings")


class ProbeTokens(NamedTuple):
    """The tokens of a row of the probe.

    Attributes:
        scored: The row ``{"input_ids", "labels"}`` whose answer or sentence is labelled; None for an opening,
            which has no true answer.
        prompt: The ids that the model continues; [] for a sentence.
    """

    scored: dict[str, list[int]] | None
    prompt: list[int]


def probe_rows(exclude_entities: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of the probe.

    Each has a ``kind``:

    - "arithmetic" and "capitals": ``question``, ``answer``, the ``begin`` of a sentence that the answer ends,
      and, for some, further right answers in ``accept``;
    - "completions": ``prompt``, whose next word is ``answer``;
    - "fluency": ``text``, a sentence;
    - "openings": ``question`` for a chat model and ``prompt`` for another. Both ask for a text.

    Args:
        exclude_entities: Names and numbers, such as ``loku.deletion.entities.entities`` returns. A row that
            mentions one is left out. None by default.
    """
    with open(ROWS, encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    mentions = Mentions(exclude_entities)
    return [row for row in rows if not any(map(mentions, _texts(row)))]


def _texts(row: dict[str, Any]) -> list[str]:
    texts = [value for name, value in row.items() if name not in ("kind", "accept")]
    return [*texts, *row.get("accept", ())]


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer renders messages."""
    return bool(getattr(tokenizer, "chat_template", None))


def probe_tokens(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[ProbeTokens]:
    """Tokenise rows of the probe.

    Questions and the openings of a chat model are rendered by the chat template of the tokenizer. Without one
    questions have loku's form, ``"Question: {question}\\nAnswer:"``. Completions, sentences and the openings
    of other models are plain texts. The labels are those of the answer itself: neither the begin of its
    sentence nor an end of the text counts.

    Args:
        rows: The rows, from ``probe_rows``.
        tokenizer: The tokenizer.

    Raises:
        BadRow: The chat template cannot render a question and its answer.
    """
    tokenize = TextTokenizer(tokenizer)
    special = set(tokenizer.all_special_ids)

    def tokens(labelled: LabelledText) -> dict[str, list[int]]:
        row, _ = tokenize(labelled)
        labels = [IGNORE_INDEX if label in special else label for label in row["labels"]]
        return {"input_ids": row["input_ids"], "labels": labels}

    def prompt(text: str, with_special: bool) -> list[int]:
        ids = tokenize(LabelledText(text, special=with_special))[0]["input_ids"]
        while with_special and ids[-1] in special:  # the end of the text
            ids = ids[:-1]
        return ids

    tokenized = []
    for row in rows:
        if row["kind"] == "fluency":
            tokenized.append(ProbeTokens(tokens(LabelledText(row["text"], ((0, len(row["text"])),))), []))
            continue
        if row["kind"] == "completions":
            begun, asked, with_special = row["prompt"], row["prompt"], True
        elif row["kind"] == "openings" and not has_chat_template(tokenizer):
            begun, asked, with_special = row["prompt"], row["prompt"], True
        else:
            begun, asked, with_special = _question_texts(row, tokenizer)
        scored = None
        if "answer" in row:
            text = f"{begun} {row['answer']}"
            scored = tokens(LabelledText(text, ((len(begun), len(text)),), with_special))
        tokenized.append(ProbeTokens(scored, prompt(asked, with_special)))
    return tokenized


def _question_texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, bool]:
    """Return the text up to the answer, the prompt, and whether special tokens go around them."""
    begin = row.get("begin", row["question"])  # an opening needs any text in the place of the answer
    if not has_chat_template(tokenizer):
        asked, answer = question_answer_texts(row["question"], begin)
        return asked + answer, asked, True
    messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": begin}]
    # A model that may think aloud first answers at once; other templates do not read the option.
    options = {"enable_thinking": False}
    rendered = chat_text({"messages": messages, "chat_template_kwargs": options}, tokenizer)
    first = (rendered.spans or ((0, 0),))[0][0]
    at = rendered.text.find(begin, first)
    if at < 0:
        raise BadRow(f"the chat template does not render the answer {begin!r} as it is")
    return rendered.text[: at + len(begin)], rendered.text[:first], False
