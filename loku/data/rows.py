"""Data sets in, token batches out.

A data set is a list of strings, a list of dicts or a ``datasets.Dataset``. ``tokenize_dataset`` turns
it into a list of ``{"input_ids", "labels"}``, which is what ``transformers.Trainer`` and
``torch.utils.data.DataLoader`` take; ``collate`` pads a few of those into tensors.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

IGNORE_INDEX = -100
COLUMNS = "'text', 'prompt' + 'completion', 'question' + 'answer', 'messages' or 'input_ids' (+ 'labels')"


class BadRow(ValueError):
    """What is wrong with one row; ``tokenize_dataset`` adds the data set's name and the row's index."""


class RowError(ValueError):
    """A row that cannot be used: row ``index``, from 0, of the data set ``name``."""

    def __init__(self, name, index, problem):
        super().__init__(f"row {index} of the {name} set: {problem}")
        self.name, self.index = name, index


def question_answer_texts(question, answer):
    """TOFU's prompt and completion for a question and its answer."""
    return f"Question: {question}\nAnswer:", f" {answer}"


def tokenize_dataset(rows, tokenizer, *, max_length=None, name="forget"):
    """Tokenise a data set into a list of ``{"input_ids": list[int], "labels": list[int]}``.

    ``labels`` are aligned with ``input_ids`` as in transformers (whoever computes a loss shifts them);
    -100 marks what is not learnt or forgotten. Each row is a string or has, in this order of preference:

    - ``input_ids``, with ``labels`` or with every token labelled. Taken as they are, except that
      positions which an ``attention_mask`` column masks are dropped. Several documents in one row are told
      apart by ``position_ids``, which begin again at 0 with each, or by their ``seq_lengths``: they do not
      see each other, and the first token of each is not predicted. The result then has ``position_ids``.
    - ``messages``: the tokenizer's chat template. Every assistant turn is labelled if the template marks
      them with ``{% generation %}``, otherwise the last message, which must be the assistant's.
    - ``prompt`` and ``completion``: the completion is labelled. They are tokenised apart, so that the
      boundary is a token boundary, and concatenated.
    - ``question`` and ``answer``: TOFU's form, ``"Question: {question}\\nAnswer:"`` and ``" {answer}"``.
    - ``text``: every token is labelled. A plain string means the same.

    What the tokenizer puts first by default (Llama's BOS) starts the row once; its EOS, if it has one,
    ends the completion or text. Chat templates place their own. Other columns are ignored.

    Rows longer than ``max_length`` tokens keep their start, and one warning counts them. ``name`` is what
    messages call the data set. ``tokenizer`` may be None if every row has ``input_ids``.

    Raises ``ValueError`` for an empty data set, and ``RowError``, a ``ValueError`` that names the first bad
    row, for a row without known columns, a value of the wrong type and a row with no label token left. The
    first token of a row is never predicted, so its label does not count.
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
    """Called with the index of a row and the row, tokenises it as ``tokenize_dataset`` says.

    Raises ``RowError``, naming ``name`` and the index. ``truncated`` counts the rows that were cut.
    """

    def __init__(self, tokenizer, max_length, name):
        self.tokenizer, self.max_length, self.name = tokenizer, max_length, name
        self.truncated = 0
        self._leading = [] if tokenizer is None else leading_special(tokenizer)

    def __call__(self, index, row):
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


def cut_row(columns, max_length):
    return {name: values[:max_length] for name, values in columns.items()}


def documents(row):
    """The documents of a tokenised row, as rows: the row itself, unless it has ``position_ids``."""
    if "position_ids" not in row:
        return [row]
    bounds = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    parts = [slice(*bound) for bound in zip(bounds, [*bounds[1:], None], strict=True)]
    split = [{name: row[name][part] for name in ("input_ids", "labels")} for part in parts]
    return [part for part in split if any(label != IGNORE_INDEX for label in part["labels"])]


def split_documents(rows):
    """The documents of tokenised rows, as rows."""
    return [document for row in rows for document in documents(row)]


def has_input_ids(rows):
    """Whether a data set is tokenised already, by its first row."""
    first = next(iter(rows), None) if hasattr(rows, "__iter__") else None
    return isinstance(first, Mapping) and "input_ids" in first


def duplicate_rows(forget, retain):
    """(retain index, forget index) of each tokenised retain row whose tokens are those of a forget row."""
    known = {}
    for index, row in enumerate(forget):
        known.setdefault(tuple(row["input_ids"]), index)
    found = ((index, known.get(tuple(row["input_ids"]))) for index, row in enumerate(retain))
    return [(index, same) for index, same in found if same is not None]


def infer_tokenizer(model):
    """The tokenizer that was saved beside ``model``: from the folder or the hub name it was loaded from.

    Raises ``ValueError`` if the model does not know where it came from or no tokenizer is there.
    """
    from transformers import AutoTokenizer

    name = getattr(model.config, "_name_or_path", "")
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


def tokenize_row(row, tokenizer, leading):
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise BadRow(f"it is a {type(row).__name__}; a row is a string or a dict with {COLUMNS}")
    # datasets.Dataset fills the columns that a row lacks with None.
    row = {column: value for column, value in row.items() if value is not None}
    if "input_ids" in row:
        return _given_tokens(row)
    if tokenizer is None:
        raise BadRow("a tokenizer is needed unless every row has 'input_ids'; pass tokenizer=")
    if "messages" in row:
        return _tokenize_messages(row["messages"], tokenizer)
    if "prompt" in row and "completion" in row:
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
    elif "question" in row and "answer" in row:
        prompt, completion = question_answer_texts(_text(row, "question"), _text(row, "answer"))
    elif "text" in row:
        prompt, completion = None, _text(row, "text")
    else:
        raise BadRow(f"it has values in the columns {list(row)}; it needs {COLUMNS}")

    completion = _encode(tokenizer, completion)
    eos = tokenizer.eos_token_id
    # An empty completion gets no EOS, so that it is reported instead of teaching (or unlearning) to stop.
    if completion and eos is not None and completion[-1] != eos:
        completion.append(eos)
    if prompt is None:
        ids = _prepend(leading, completion)
        return {"input_ids": ids, "labels": list(ids)}
    return _prompted(_prepend(leading, _encode(tokenizer, prompt)), completion)


def _prompted(prompt, completion):
    return {"input_ids": prompt + completion, "labels": [IGNORE_INDEX] * len(prompt) + completion}


def _text(row, column):
    if not isinstance(row[column], str):
        raise BadRow(f"'{column}' is a {type(row[column]).__name__}; it must be a string")
    return row[column]


def _encode(tokenizer, text):
    # verbose=False: no warning about model_max_length, since max_length has its own.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_special(tokenizer):
    """What the tokenizer puts before a text by default: [BOS] for Llama, nothing for GPT-2."""
    plain, full = _encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def _prepend(leading, ids):
    return ids if ids[: len(leading)] == leading else leading + ids


def _given_tokens(row):
    def integers(key):
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


def _end_documents(columns):
    """Check ``position_ids``, and leave them out where they say nothing; no document predicts the next."""
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


def _tokenize_messages(messages, tokenizer):
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRow("'messages' must be a non-empty list of {'role': ..., 'content': ...}")
    for message in messages:
        fields = [message.get("role"), message.get("content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise BadRow("every message must be a dict whose 'role' and 'content' are strings")
    try:
        template = tokenizer.get_chat_template()
    except (AttributeError, ValueError) as error:
        raise BadRow(
            "it has 'messages', but the tokenizer has no chat template; set tokenizer.chat_template or "
            "write the row as 'prompt' + 'completion'"
        ) from error

    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = list(encoded["input_ids"])
        mask = encoded["assistant_masks"]
        labels = [t if assistant else IGNORE_INDEX for t, assistant in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "labels": labels}

    if messages[-1]["role"] != "assistant":
        raise BadRow(f"its last message has the role {messages[-1]['role']!r}; it must be 'assistant'")
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise BadRow(
            "the chat template renders the last message so that it does not continue the messages before "
            "it; write the row as 'prompt' + 'completion'"
        )
    return _prompted(_encode(tokenizer, prompt), _encode(tokenizer, whole[len(prompt) :]))
