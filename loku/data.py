"""Data sets in, token batches out.

A data set is a list of strings, a list of dicts or a ``datasets.Dataset``. ``tokenize_dataset`` turns
it into a list of ``{"input_ids", "labels"}``, which is what ``transformers.Trainer`` and
``torch.utils.data.DataLoader`` take; ``collate`` pads a few of those into tensors.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

IGNORE_INDEX = -100
TOFU_REFUSALS = Path(__file__).parent / "embedded" / "idontknow.txt"  # TOFU's file, as it is
COLUMNS = "'text', 'prompt' + 'completion', 'question' + 'answer', 'messages' or 'input_ids' (+ 'labels')"


class _BadRow(ValueError):
    """What is wrong with one row; ``tokenize_dataset`` adds the data set's name and the row's index."""


class RowError(ValueError):
    """A row that cannot be used: row ``index``, from 0, of the data set ``name``."""

    def __init__(self, name, index, problem):
        super().__init__(f"row {index} of the {name} set: {problem}")
        self.name, self.index = name, index


def question_answer_texts(question, answer):
    """TOFU's prompt and completion for a question and its answer."""
    return f"Question: {question}\nAnswer:", f" {answer}"


def padding_id(tokenizer):
    """The id to pad with. Any will do: padding is masked out of the attention and out of the labels."""
    candidates = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(token for token in candidates if token is not None)


def tokenize_dataset(rows, tokenizer, *, max_length=None, name="forget"):
    """Tokenise a data set into a list of ``{"input_ids": list[int], "labels": list[int]}``.

    ``labels`` are aligned with ``input_ids`` as in transformers (whoever computes a loss shifts them);
    -100 marks what is not learnt or forgotten. Each row is a string or has, in this order of preference:

    - ``input_ids``, with ``labels`` or with every token labelled. Taken as they are, except that
      positions which an ``attention_mask`` column masks are dropped.
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

    leading = [] if tokenizer is None else _leading_special(tokenizer)
    tokenized, truncated = [], 0
    for index, row in enumerate(rows):
        try:
            ids, labels = _tokenize_row(row, tokenizer, leading)
            length = len(ids)
            if max_length is not None and length > max_length:
                ids, labels = ids[:max_length], labels[:max_length]
                truncated += 1
            if all(label == IGNORE_INDEX for label in labels[1:]):
                raise _BadRow(
                    f"no label token is left of its {length} tokens after cutting it to max_length="
                    f"{max_length}; raise max_length or drop the row"
                    if length > len(ids)
                    else "there is no label token after its first token; give it a longer text, a "
                    "non-empty completion or labels that are not all -100, or drop the row"
                )
        except _BadRow as error:
            raise RowError(name, index, error) from error.__cause__
        tokenized.append({"input_ids": ids, "labels": labels})
    if truncated:
        warnings.warn(
            f"{truncated} of the {len(rows)} rows of the {name} set were cut to "
            f"max_length={max_length} tokens",
            stacklevel=2,
        )
    return tokenized


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
            except _BadRow as error:
                problem = f'{error}. Methods that train on refusals ("dpo", "idk") need question/answer rows'
                raise RowError("forget", index, problem) from None
        self.rows, self.refusals, self.tokenizer, self.max_length = rows, refusals, tokenizer, max_length
        self._leading = _leading_special(tokenizer)

    def __getitem__(self, key):
        row, refusal = key
        row = _with_answer(self.rows[row], self.refusals[refusal])
        ids, labels = _tokenize_row(row, self.tokenizer, self._leading)
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}


def _with_answer(row, answer):
    """The row with another answer, in the form that ``tokenize_dataset`` takes."""
    if isinstance(row, str):
        row = {"text": row}
    row = {column: value for column, value in row.items() if value is not None}
    if "input_ids" in row:
        raise _BadRow("it has 'input_ids', so where its answer begins and ends is not known")
    if "messages" in row:
        *before, last = row["messages"]
        if last["role"] != "assistant" or any(message["role"] == "assistant" for message in before):
            raise _BadRow("the assistant must have one of its 'messages', the last")
        return {"messages": [*before, {**last, "content": answer}]}
    if "prompt" in row and "completion" in row:
        completion = row["completion"]
        space = completion[: len(completion) - len(completion.lstrip())]
        return {"prompt": row["prompt"], "completion": space + answer}
    if "question" in row and "answer" in row:
        return {"question": row["question"], "answer": answer}
    raise _BadRow("it is a plain text, without a prompt that could be answered otherwise")


def collate(rows, pad_token_id):
    """Pad tokenised rows on the right.

    Returns ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape (len(rows), longest row),
    with ``pad_token_id``, 0 and -100 in the padding. ``functools.partial(collate, pad_token_id=...)`` is
    a ``data_collator`` for ``transformers.Trainer`` and a ``collate_fn`` for a ``DataLoader``.
    """

    def pad(sequences, value):
        tensors = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids": pad([row["input_ids"] for row in rows], pad_token_id),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], IGNORE_INDEX),
    }


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
        return AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, ...
        raise ValueError(f"no tokenizer could be loaded from {name!r}; pass tokenizer= ({error})") from error


def _tokenize_row(row, tokenizer, leading):
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise _BadRow(f"it is a {type(row).__name__}; a row is a string or a dict with {COLUMNS}")
    # datasets.Dataset fills the columns that a row lacks with None.
    row = {column: value for column, value in row.items() if value is not None}
    if "input_ids" in row:
        return _given_tokens(row)
    if tokenizer is None:
        raise _BadRow("a tokenizer is needed unless every row has 'input_ids'; pass tokenizer=")
    if "messages" in row:
        return _tokenize_messages(row["messages"], tokenizer)
    if "prompt" in row and "completion" in row:
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
    elif "question" in row and "answer" in row:
        prompt, completion = question_answer_texts(_text(row, "question"), _text(row, "answer"))
    elif "text" in row:
        prompt, completion = None, _text(row, "text")
    else:
        raise _BadRow(f"it has values in the columns {list(row)}; it needs {COLUMNS}")

    completion = _encode(tokenizer, completion)
    eos = tokenizer.eos_token_id
    # An empty completion gets no EOS, so that it is reported instead of teaching (or unlearning) to stop.
    if completion and eos is not None and completion[-1] != eos:
        completion.append(eos)
    if prompt is None:
        ids = _prepend(leading, completion)
        return ids, list(ids)
    prompt = _prepend(leading, _encode(tokenizer, prompt))
    return prompt + completion, [IGNORE_INDEX] * len(prompt) + completion


def _text(row, column):
    if not isinstance(row[column], str):
        raise _BadRow(f"'{column}' is a {type(row[column]).__name__}; it must be a string")
    return row[column]


def _encode(tokenizer, text):
    # verbose=False: no warning about model_max_length, since max_length has its own.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _leading_special(tokenizer):
    """What the tokenizer puts before a text by default: [BOS] for Llama, nothing for GPT-2."""
    plain, full = _encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def _prepend(leading, ids):
    return ids if ids[: len(leading)] == leading else leading + ids


def _given_tokens(row):
    def column(key):
        values = row[key].tolist() if hasattr(row[key], "tolist") else row[key]
        if not (isinstance(values, (list, tuple)) and all(isinstance(value, int) for value in values)):
            raise _BadRow(f"'{key}' must be a flat list of integers, one sequence a row")
        if len(values) != len(row["input_ids"]):
            raise _BadRow(f"it has {len(row['input_ids'])} input_ids but '{key}' has {len(values)} entries")
        return list(values)

    ids = column("input_ids")
    labels = column("labels") if "labels" in row else list(ids)
    if "attention_mask" in row:
        kept = [i for i, attended in enumerate(column("attention_mask")) if attended]
        ids, labels = [ids[i] for i in kept], [labels[i] for i in kept]
    return ids, labels


def _tokenize_messages(messages, tokenizer):
    if not isinstance(messages, (list, tuple)) or not messages:
        raise _BadRow("'messages' must be a non-empty list of {'role': ..., 'content': ...}")
    for message in messages:
        fields = [message.get("role"), message.get("content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise _BadRow("every message must be a dict whose 'role' and 'content' are strings")
    try:
        template = tokenizer.get_chat_template()
    except (AttributeError, ValueError) as error:
        raise _BadRow(
            "it has 'messages', but the tokenizer has no chat template; set tokenizer.chat_template or "
            "write the row as 'prompt' + 'completion'"
        ) from error

    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = list(encoded["input_ids"])
        mask = encoded["assistant_masks"]
        return ids, [t if assistant else IGNORE_INDEX for t, assistant in zip(ids, mask, strict=True)]

    if messages[-1]["role"] != "assistant":
        raise _BadRow(f"its last message has the role {messages[-1]['role']!r}; it must be 'assistant'")
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise _BadRow(
            "the chat template renders the last message so that it does not continue the messages before "
            "it; write the row as 'prompt' + 'completion'"
        )
    prompt_ids, completion = _encode(tokenizer, prompt), _encode(tokenizer, whole[len(prompt) :])
    return prompt_ids + completion, [IGNORE_INDEX] * len(prompt_ids) + completion
