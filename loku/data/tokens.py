"""Texts to tokens: a text is tokenised as a whole, and its labelled characters become labelled tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from loku.data.row_errors import BadRow
from loku.data.values import check_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
LABEL_MASKS = ("completion_mask", "assistant_masks")  # TRL's: 1 marks a labelled token

# A text is enormous if it has more than so many characters for each token that is of use, and so many more.
# Others are tokenised whole: that costs little.
MOST_CHARACTERS = 16
MARGIN_CHARACTERS = 2**16
MARGIN_TOKENS = 256  # what follows a token beyond so many tokens does not change it

TokenizedRow: TypeAlias = dict[str, list[int]]


class LabelledText(NamedTuple):
    """A text and the parts of it that are labelled.

    Attributes:
        text: The whole text, as the model sees it.
        spans: The labelled parts, (first character, character after the last), in their order; None labels
            the whole text.
        special: Whether the tokenizer's special tokens begin and end the text. A text that a chat template
            has rendered contains its own.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    special: bool = True


class TextTokenizer:
    """A function of a ``LabelledText`` that returns its tokens.

    The ids are those of ``tokenizer(text)``, with the tokenizer's EOS, if it has one, at the end. A token is
    labelled if it has at least one labelled character. So a token that lies across the end of the prompt
    belongs to the completion, and every character of the completion is predicted. Some added
    tokens, such as Phi-3's ``<|assistant|>``, take the spaces after them along. They stay with the prompt in
    which they begin.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._leading, self._trailing = special_ends(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._taking_spaces = {index for index, token in added.items() if token.rstrip}

    def __call__(self, labelled: LabelledText, most: int | None = None) -> tuple[TokenizedRow, bool]:
        """Tokenise a text.

        Args:
            labelled: The text.
            most: The greatest number of tokens that are of use; None (default) sets none. Of an enormous text
                that has more, only the start is tokenised.

        Returns:
            The row, and whether it is the whole of it. Otherwise it has more than ``most`` tokens, the first
            ones of the whole.

        Raises:
            BadRow: The text has a lone surrogate. Or the tokenizer is a slow one, which gives no offsets, and
                the tokens of the text before a labelled part are not the first tokens of the whole text.
        """
        check_unicode(labelled.text)
        text, encoded = labelled.text, None
        if most is not None and len(text) > MOST_CHARACTERS * most + MARGIN_CHARACTERS:
            text, encoded = self._start(text, most)
        whole = len(text) == len(labelled.text)
        if encoded is None:
            encoded = _encoded(self.tokenizer, text)
        ids: list[int] = list(encoded["input_ids"])
        if labelled.spans is None:
            labels = list(ids)
        else:
            labels = [IGNORE_INDEX] * len(ids)
            offsets = _offsets(encoded)
            for begin, end in labelled.spans:
                if begin >= len(text):
                    continue
                span = begin, min(end, len(text))
                if offsets is None:
                    first, last = self._tokens_by_prefixes(ids, text, span)
                else:
                    first, last = _tokens_of(offsets, *span)
                    if first < last and offsets[first][0] < span[0] and ids[first] in self._taking_spaces:
                        first += 1
                labels[first:last] = ids[first:last]
        if not whole and most is not None:
            ids, labels = ids[: most + 1], labels[: most + 1]
        row = {"input_ids": ids, "labels": labels}
        return (self._with_special(row, labelled.spans is None, whole) if labelled.special else row), whole

    def _start(self, text: str, most: int) -> tuple[str, Any]:
        """Find a start of a text whose first ``most`` + 1 tokens are those of the whole text.

        What follows a token may change it, but only what follows soon. So two starts of different lengths
        that have many more tokens, and have the first ones in common, show these tokens. Some tokenizers
        group the digits of a number from its end, or pair what repeats. So the lengths leave different
        remainders by 2 and by 3. If starts go on to differ, the whole text is tokenised.

        Returns:
            The start and its encoding; the whole text if no shorter start is enough.
        """
        length = (MOST_CHARACTERS * most + MARGIN_CHARACTERS) // 2
        known: tuple[list[int], Any] | None = None
        while length < len(text):
            encoded = _encoded(self.tokenizer, text[:length])
            ids = list(encoded["input_ids"])
            if len(ids) >= most + 1 + MARGIN_TOKENS:
                offsets = _offsets(encoded)
                found = ids[: most + 1], None if offsets is None else offsets[: most + 1]
                if found == known:
                    return text[:length], encoded
                known = found
            length += length // 6 * 6 + 1
        return text, _encoded(self.tokenizer, text)

    def _with_special(self, row: TokenizedRow, labelled: bool, ends: bool) -> TokenizedRow:
        """Put the special tokens around a row, unless its text has them already.

        Args:
            row: The row.
            labelled: Whether the special tokens before the text are labelled.
            ends: Whether the row has the end of the text.
        """
        ids, labels = row["input_ids"], row["labels"]
        leading = [] if ids[: len(self._leading)] == self._leading else self._leading
        trailing = [] if not ends or ids[-len(self._trailing) :] == self._trailing else list(self._trailing)
        eos = self.tokenizer.eos_token_id
        if ends and eos is not None and [*ids, *trailing][-1:] != [eos]:
            trailing.append(eos)
        return {
            "input_ids": [*leading, *ids, *trailing],
            "labels": [*(leading if labelled else [IGNORE_INDEX] * len(leading)), *labels, *trailing],
        }

    def _tokens_by_prefixes(self, ids: list[int], text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Find the tokens of a part by tokenising the text before it, and the text up to its end."""
        bounds = []
        for end in span:
            prefix = ids if end == len(text) else _encode(self.tokenizer, text[:end])
            if ids[: len(prefix)] != prefix:
                raise BadRow(
                    "this tokenizer gives no offsets, and the tokens of the prompt are not the first tokens "
                    "of the whole row, so it is not known where the completion begins. Move the space that "
                    "ends the prompt to the completion, or pass a fast tokenizer"
                )
            bounds.append(len(prefix))
        return bounds[0], bounds[1]


def _tokens_of(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """Return (first token, token after the last) of a part of the text.

    Some tokenizers leave white space out of the offsets of a token, so a token may have no characters.
    """
    first = next((i for i, (_, stop) in enumerate(offsets) if stop > begin), len(offsets))
    after = (i for i in range(first, len(offsets)) if offsets[i][0] >= end and offsets[i][1] > end)
    return first, next(after, len(offsets))


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text by default.

    They are [BOS] and [] for Llama, [] and [] for GPT-2, and [CLS] and [SEP] for BERT.
    """
    for probe in ("a", "1", ".", "的"):  # a tokenizer may lack some characters
        plain, full = _encode(tokenizer, probe), list(tokenizer(probe)["input_ids"])
        for begin in range(len(full)) if plain else ():
            if full[begin : begin + len(plain)] == plain:
                return full[:begin], full[begin + len(plain) :]
    return [], []


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    # verbose=False: no warning about model_max_length, since max_length has its own.
    return tokenizer(text, add_special_tokens=False, verbose=False)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(_encoded(tokenizer, text)["input_ids"])


def _offsets(encoded: Any) -> list[tuple[int, int]] | None:
    """Return the first character and the one after the last of each token; None from a slow tokenizer."""
    encodings: Any = getattr(encoded, "encodings", None)
    return None if encodings is None else encodings[0].offsets


def given_tokens(row: Mapping[str, Any]) -> TokenizedRow:
    """Return the tokens of a row with ``input_ids``, as ``loku.data.tokenize_dataset`` describes.

    Args:
        row: The row, without missing values.

    Raises:
        BadRow: A column is no flat list of integers of the right length and range.
    """
    ids = _integers(row, "input_ids")
    columns = {"input_ids": ids, "labels": list(ids)}
    for key in ("labels", "position_ids", "attention_mask", *LABEL_MASKS):
        if key in row:
            columns[key] = _integers(row, key)
    for key, values in columns.items():
        if len(values) != len(ids):
            raise BadRow(f"it has {len(ids)} input_ids but '{key}' has {len(values)} entries")
    if "position_ids" not in row and "seq_lengths" in row:
        lengths = _integers(row, "seq_lengths")
        if min(lengths, default=0) < 0:
            raise BadRow(f"'seq_lengths' has {min(lengths)}; the length of a document is 0 or greater")
        if sum(lengths) != len(ids):  # before they are counted out: one may be greater than any memory
            raise BadRow(f"it has {len(ids)} input_ids but 'seq_lengths' has {sum(lengths)} entries")
        columns["position_ids"] = [i for length in lengths for i in range(length)]
    if any(token < 0 for token in ids):
        raise BadRow(f"'input_ids' has {min(ids)}; a token id is 0 or greater")
    for label in columns["labels"]:
        if label < 0 and label != IGNORE_INDEX:
            raise BadRow(
                f"'labels' has {label}; a label is a token id or {IGNORE_INDEX}, which marks no label"
            )
    for key in LABEL_MASKS:
        labelled = columns.pop(key, None)
        if labelled is not None:
            _check_mask(labelled, key)
            pairs = zip(columns["labels"], labelled, strict=True)
            columns["labels"] = [label if counts else IGNORE_INDEX for label, counts in pairs]
    mask = columns.pop("attention_mask", None)
    if mask is not None:
        _check_mask(mask, "attention_mask", ". 'position_ids' or 'seq_lengths' tell documents apart")
        kept = [i for i, attended in enumerate(mask) if attended]
        columns = {key: [values[i] for i in kept] for key, values in columns.items()}
    if "position_ids" in columns:
        _end_documents(columns)
    return columns


def _check_mask(mask: Sequence[int], key: str, instead: str = "") -> None:
    if not set(mask) <= {0, 1}:
        raise BadRow(f"'{key}' has {max(mask, key=abs)}; it must have 0 and 1 alone{instead}")


def _integers(row: Mapping[str, Any], key: str) -> list[int]:
    values = row[key].tolist() if hasattr(row[key], "tolist") else row[key]
    if not isinstance(values, (list, tuple)):
        raise BadRow(f"'{key}' must be a flat list of integers, one sequence a row")
    if not all(type(value) is int for value in values):
        for value in values:
            # A bool is an Integral too, and it is a token id by mistake alone. In a mask it means 0 or 1.
            if not isinstance(value, Integral) or (isinstance(value, bool) and "mask" not in key):
                raise BadRow(
                    f"'{key}' must be a flat list of integers, one sequence a row; it has a "
                    f"{type(value).__name__}"
                )
    integers = [int(value) for value in values]
    if integers and not -(2**63) <= min(integers) <= max(integers) < 2**63:
        raise BadRow(f"'{key}' has an integer of more than 64 bits")  # it may be too long to be shown
    return integers


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
