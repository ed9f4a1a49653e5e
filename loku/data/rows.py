"""Rows of text and their tokens.

``tokenize_dataset`` turns a data set into a list of ``{"input_ids", "labels"}``, which
``transformers.Trainer`` and ``torch.utils.data.DataLoader`` take.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
COLUMNS = "'text', 'prompt' + 'completion', 'question' + 'answer', 'messages' or 'input_ids' (+ 'labels')"

TokenizedRow: TypeAlias = dict[str, list[int]]


class DataSet(Protocol):
    """A data set: a list of strings, a list of dicts, or a ``datasets.Dataset``."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: int, /) -> Any: ...


class BadRow(ValueError):
    """A problem of one row; ``tokenize_dataset`` adds the name of the data set and the index of the row."""


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        name: The name of its data set.
        index: The index of the row, from 0.
        problem: The reason, for the message.
    """

    def __init__(self, name: str, index: int, problem: object):
        super().__init__(f"row {index} of the {name} set: {problem}")
        self.name, self.index = name, index


def question_answer_texts(question: str, answer: str) -> tuple[str, str]:
    """Return TOFU's prompt and completion for a question and its answer."""
    return f"Question: {question}\nAnswer:", f" {answer}"


def tokenize_dataset(
    rows: DataSet,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int | None = None,
    name: str = "forget",
) -> list[TokenizedRow]:
    """Tokenise a data set.

    Each row is a string or has columns, in this order of preference:

    - ``input_ids``, with ``labels`` or with every token labelled. They are taken unchanged, except that the
      positions that an ``attention_mask`` column masks are dropped. A row may pack several documents. Then
      ``position_ids``, which begin at 0 in each document, or ``seq_lengths`` tell them apart. Documents do
      not see each other, and the first token of each is not predicted.
    - ``messages``, which the tokenizer's chat template renders. Every assistant turn is labelled if the
      template marks the turns with ``{% generation %}``. Otherwise the last message is labelled, and it must
      be the assistant's.
    - ``prompt`` and ``completion``. The completion is labelled. They are tokenised apart, so that the
      boundary is a token boundary, and concatenated.
    - ``question`` and ``answer``, in TOFU's form: ``"Question: {question}\\nAnswer:"`` is the prompt and
      ``" {answer}"`` the completion.
    - ``text``. Every token is labelled. A plain string means the same.

    The special tokens that the tokenizer puts first by default (Llama's BOS) start the row once. The
    tokenizer's EOS, if it has one, ends the completion or the text. Chat templates place their own special
    tokens. Other columns are ignored.

    Args:
        rows: The data set: a list of strings, a list of dicts, or a ``datasets.Dataset``.
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them. A cut row
            keeps its start. One warning counts the cut rows.
        name: The name of the data set in messages, "forget" by default.

    Returns:
        A row ``{"input_ids": list[int], "labels": list[int]}`` for each row, with ``position_ids`` too if it
        packs several documents. The labels are aligned with the ids as in transformers: the loss shifts them.
        -100 marks tokens that are neither learnt nor forgotten.

    Raises:
        ValueError: The data set is empty, or is not one list of rows.
        RowError: A row has no known columns, a value of the wrong type, or no label token; the first such row
            is named. The first token of a row is never predicted, so its label does not count.
    """
    if isinstance(rows, Mapping):
        raise ValueError(
            f"the {name} set is a mapping with the keys {list(rows)}; pass one list of rows or one "
            f"datasets.Dataset (of a DatasetDict, one split)"
        )
    if isinstance(rows, str) or not (hasattr(rows, "__len__") and hasattr(rows, "__iter__")):
        raise ValueError(
            f"the {name} set is a {type(rows).__name__}; pass a list of strings, a list of dicts or a "
            f"datasets.Dataset"
        )
    if len(rows) == 0:
        raise ValueError(f"the {name} set is empty; it needs at least one row")

    tokenize = RowTokenizer(tokenizer, max_length, name)
    tokenized = [tokenize(index, row) for index, row in enumerate(rows)]
    if tokenize.truncated:
        warnings.warn(
            f"{tokenize.truncated} of the {len(rows)} rows of the {name} set were cut to "
            f"max_length={max_length} tokens",
            stacklevel=2,
        )
    return tokenized


class RowTokenizer:
    """A function of the index of a row and the row, which tokenises it as ``tokenize_dataset`` does.

    ``truncated`` is the number of rows that have been cut.

    Args:
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``.
        max_length: The number of tokens at which rows are cut; None does not cut them.
        name: The name of the data set in messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, name: str):
        self.tokenizer, self.max_length, self.name = tokenizer, max_length, name
        self.truncated = 0
        self._leading = [] if tokenizer is None else leading_special(tokenizer)

    def __call__(self, index: int, row: Any) -> TokenizedRow:
        """Tokenise a row; ``RowError`` names its index and the data set."""
        try:
            columns = tokenize_row(row, self.tokenizer, self._leading)
            length = len(columns["input_ids"])
            columns = cut_row(columns, self.max_length)
            left = len(columns["input_ids"])
            if all(label == IGNORE_INDEX for label in columns["labels"][1:]):
                raise BadRow(
                    f"no label token is left of its {length} tokens after cutting it to max_length="
                    f"{self.max_length}; raise max_length or drop the row"
                    if length > left
                    else "there is no label token after its first token; give it a longer text, a "
                    "non-empty completion or labels that are not all -100, or drop the row"
                )
        except BadRow as error:
            raise RowError(self.name, index, error) from error.__cause__
        self.truncated += length > left
        return columns


def cut_row(columns: TokenizedRow, max_length: int | None) -> TokenizedRow:
    """Return the first ``max_length`` tokens of a tokenised row, or all with None."""
    return {name: values[:max_length] for name, values in columns.items()}


def documents(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the labelled documents of a tokenised row, as rows.

    A row without ``position_ids`` is its only document.
    """
    if "position_ids" not in row:
        return [row]
    bounds = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    parts = [slice(*bound) for bound in zip(bounds, [*bounds[1:], None], strict=True)]
    split = [{name: row[name][part] for name in ("input_ids", "labels")} for part in parts]
    return [part for part in split if any(label != IGNORE_INDEX for label in part["labels"])]


def split_documents(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the labelled documents of tokenised rows, as rows."""
    return [document for row in rows for document in documents(row)]


def has_input_ids(rows: Any) -> bool:
    """Whether the first row of a data set has ``input_ids``, that is, the set is tokenised already."""
    first = next(iter(rows), None) if hasattr(rows, "__iter__") else None
    return isinstance(first, Mapping) and "input_ids" in first


def duplicate_rows(
    forget: Iterable[Mapping[str, Any]], retain: Iterable[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """Find the retain rows whose tokens equal the tokens of a forget row.

    Args:
        forget: The tokenised forget rows.
        retain: The tokenised retain rows.

    Returns:
        A pair (index of the retain row, index of the first such forget row) for each of them.
    """
    known: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(forget):
        known.setdefault(tuple(row["input_ids"]), index)
    found = ((index, known.get(tuple(row["input_ids"]))) for index, row in enumerate(retain))
    return [(index, same) for index, same in found if same is not None]


def infer_tokenizer(model: nn.Module) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved beside a model.

    Args:
        model: A causal LM, whose config names the folder or the hub name that it was loaded from.

    Raises:
        ValueError: The config names no such place, or no tokenizer is there.
    """
    from transformers import AutoTokenizer

    merged: Any = getattr(model, "_loku_merged_adapter", None)  # its tokenizer may lie beside the adapter
    name = getattr(model.config, "_name_or_path", "") if merged is None else merged["tokenizer"]
    if not name:
        raise ValueError("this model does not say where it was loaded from; pass its tokenizer as tokenizer=")
    local = Path(name).is_dir()
    if not local and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"{name!r}, where this model was loaded from, is not there; pass tokenizer=")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, ...
        raise ValueError(f"no tokenizer could be loaded from {name!r}; pass tokenizer= ({error})") from error
    # For some models AutoTokenizer makes an empty one where no tokenizer was saved.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(f"the tokenizer in {name!r} has only special tokens; pass tokenizer=")
    return tokenizer


def labelled_column(row: Any) -> str | None:
    """Return the column of a row that its labels come from, by the preferences of ``tokenize_dataset``.

    Returns:
        "input_ids", "messages", "completion", "answer" or "text", which a string counts as; None if the row
        has no known columns. A column whose value is None counts as missing.
    """
    if isinstance(row, str):
        return "text"
    if not isinstance(row, Mapping):
        return None
    forms = (("input_ids",), ("messages",), ("prompt", "completion"), ("question", "answer"), ("text",))
    return next((form[-1] for form in forms if all(row.get(name) is not None for name in form)), None)


def tokenize_row(row: Any, tokenizer: PreTrainedTokenizerBase | None, leading: Sequence[int]) -> TokenizedRow:
    """Tokenise one row as ``tokenize_dataset`` does, without cutting it.

    Args:
        row: The row, a string or a mapping.
        tokenizer: The tokenizer. It may be None if the row has ``input_ids``.
        leading: The ids that begin a text, from ``leading_special``.

    Raises:
        BadRow: The row cannot be tokenised.
    """
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise BadRow(f"it is a {type(row).__name__}; a row is a string or a dict with {COLUMNS}")
    # datasets.Dataset fills the columns that a row lacks with None.
    row = {column: value for column, value in row.items() if value is not None}
    labelled = labelled_column(row)
    if labelled == "input_ids":
        return _given_tokens(row)
    if tokenizer is None:
        raise BadRow("a tokenizer is needed unless every row has 'input_ids'; pass tokenizer=")
    if labelled == "messages":
        return _tokenize_messages(row["messages"], tokenizer)
    prompt: str | None = None
    if labelled == "completion":
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
    elif labelled == "answer":
        prompt, completion = question_answer_texts(_text(row, "question"), _text(row, "answer"))
    elif labelled == "text":
        completion = _text(row, "text")
    else:
        raise BadRow(f"it has values in the columns {list(row)}; it needs {COLUMNS}")

    ids = _encode(tokenizer, completion)
    eos = tokenizer.eos_token_id
    # An empty completion gets no EOS, so that it is reported instead of teaching (or unlearning) to stop.
    if ids and eos is not None and ids[-1] != eos:
        ids.append(eos)
    if prompt is None:
        ids = _prepend(leading, ids)
        return {"input_ids": ids, "labels": list(ids)}
    return _prompted(_prepend(leading, _encode(tokenizer, prompt)), ids)


def _prompted(prompt: list[int], completion: list[int]) -> TokenizedRow:
    return {"input_ids": prompt + completion, "labels": [IGNORE_INDEX] * len(prompt) + completion}


def _text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise BadRow(f"'{column}' is a {type(row[column]).__name__}; it must be a string")
    return row[column]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: no warning about model_max_length, since max_length has its own.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_special(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer puts before a text by default: [BOS] for Llama, none for GPT-2."""
    plain, full = _encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def _prepend(leading: Sequence[int], ids: list[int]) -> list[int]:
    return ids if ids[: len(leading)] == [*leading] else [*leading, *ids]


def _given_tokens(row: Mapping[str, Any]) -> TokenizedRow:
    def integers(key: str) -> list[int]:
        values = row[key].tolist() if hasattr(row[key], "tolist") else row[key]
        if not (isinstance(values, (list, tuple)) and all(isinstance(value, int) for value in values)):
            raise BadRow(f"'{key}' must be a flat list of integers, one sequence a row")
        return list(values)

    ids = integers("input_ids")
    columns = {"input_ids": ids, "labels": list(ids)}
    for key in ("labels", "position_ids", "attention_mask"):
        if key in row:
            columns[key] = integers(key)
    if "position_ids" not in row and "seq_lengths" in row:
        columns["position_ids"] = [i for length in integers("seq_lengths") for i in range(length)]
    for key, values in columns.items():
        if len(values) != len(ids):
            source = "seq_lengths" if key == "position_ids" and key not in row else key
            raise BadRow(f"it has {len(ids)} input_ids but '{source}' has {len(values)} entries")
    mask = columns.pop("attention_mask", None)
    if mask is not None:
        kept = [i for i, attended in enumerate(mask) if attended]
        columns = {key: [values[i] for i in kept] for key, values in columns.items()}
    if "position_ids" in columns:
        _end_documents(columns)
    return columns


def _end_documents(columns: TokenizedRow) -> None:
    """Check ``position_ids`` and take the label of each document's first token away.

    The position ids of a single document are left out of the columns.
    """
    positions, labels = columns["position_ids"], columns["labels"]
    for before, position in zip([-1, *positions], positions, strict=False):
        if position not in (0, before + 1):
            raise BadRow("'position_ids' must count 0, 1, 2, ... in each document")
    if positions.count(0) > 1:
        columns["labels"] = [
            label if position else IGNORE_INDEX for label, position in zip(labels, positions, strict=True)
        ]
    else:
        del columns["position_ids"]


def _tokenize_messages(messages: Any, tokenizer: PreTrainedTokenizerBase) -> TokenizedRow:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRow("'messages' must be a non-empty list of {'role': ..., 'content': ...}")
    for message in messages:
        fields = [message.get("role"), message.get("content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise BadRow("every message must be a dict whose 'role' and 'content' are strings")
    render: Any = tokenizer.apply_chat_template
    try:
        template = tokenizer.get_chat_template()
    except (AttributeError, ValueError) as error:
        raise BadRow(
            "it has 'messages', but the tokenizer has no chat template; set tokenizer.chat_template or "
            "write the row as 'prompt' + 'completion'"
        ) from error

    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        encoded = render(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = list(encoded["input_ids"])
        mask = encoded["assistant_masks"]
        labels = [t if assistant else IGNORE_INDEX for t, assistant in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "labels": labels}

    if messages[-1]["role"] != "assistant":
        raise BadRow(f"its last message has the role {messages[-1]['role']!r}; it must be 'assistant'")
    prompt = render(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = render(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise BadRow(
            "the chat template renders the last message so that it does not continue the messages before "
            "it; write the row as 'prompt' + 'completion'"
        )
    return _prompted(_encode(tokenizer, prompt), _encode(tokenizer, whole[len(prompt) :]))
