"""The names and numbers that distinguish the rows to forget, and the texts that mention one of them.

No language model finds them: capital letters, digits and what questions and answers share do. That is good
enough to keep a text out, not to prove that a text tells nothing about a person. The limits:

- A name that is written without a capital letter is found only as a short answer. So is one that is a common
  word, such as Will or May, by itself.
- A sentence that begins with a rare word gives that word as a name. German nouns count as names, too.
- A number of fewer than four digits, such as a house number, counts only as a short answer.
- Scripts without capital letters give their numbers, their short answers, and what a question and its answer
  share: words of three letters, or three characters in a row where a script has no spaces.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from loku.data.chats import chat_of
from loku.data.row_errors import BadRow, RowError
from loku.data.row_forms import columns_of, labelled_column

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORT_ANSWER = 4  # words at most: the whole answer distinguishes the row
LEAST_DIGITS = 4  # of a number
LEAST_LETTERS = 3  # of a single word of a name, and of what a question and its answer share
QUESTION, ANSWER = 1, 2  # how much an occurrence counts

_WORD = re.compile(r"[^\W_]+")
_ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+|(?:https?://|www\.)[^\s\"'<>)]+")
_NUMBER = re.compile(r"\d(?:[\d.,:/-]*\d)?")
# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]+"
)
_OPENING = " \t\"'“”‘’«»([*#-–—•"  # may stand between the end of a sentence and the next word
_ENDS = ".!?:;…\n。！？।؟"  # a sentence begins after one
# What may join two words of one name. A full stop follows initials and short titles alone.
_JOINTS = (" ", "-", "'", "’", "\xa0")
_PARTICLES = frozenset(
    "of the de da di do dos das del della der den des du van von bin ibn al el la le y".split()
)
# Words with a capital letter that are no names: those that begin sentences and questions.
_COMMON = frozenset(
    """a about above according additionally after all also although am among an and another any are as at
    based because been before being below besides both but by can certainly could despite did do does during
    each either even every few finally first for from furthermore given had has have he hence her here hers
    hi hello him his how however i if in indeed into is it its just last lastly later least let like many may
    maybe me might more moreover most much must my name neither never next no none nor not now of often oh on
    once one only or other our over perhaps please several shall she should similarly since so some sometimes
    soon still such sure than thank thanks that the their them then there therefore these they this those
    though through throughout thus to today together too two under unfortunately unlike until up upon us very
    was we well were what whatever when where whereas whether which while who whom whose why will with within
    without would yes yet you your yours""".split()
)


def row_texts(row: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[str, str]:
    """Return what a row asks and what it answers, as texts.

    Args:
        row: The row, in any form of ``loku.data.tokenize_dataset``.
        tokenizer: The tokenizer, which decodes rows of ``input_ids``; None (default) refuses them.

    Returns:
        The question, or the prompt, or the messages that are not the assistant's; and the answer. The
        question is "" for a text.

    Raises:
        BadRow: The row has no known columns, or ``input_ids`` and no tokenizer.
    """
    columns = columns_of(row)
    labelled = labelled_column(columns)
    if labelled == "messages":
        messages = chat_of(columns).messages
        texts = [(m["role"] == "assistant", str(m.get("content") or "")) for m in messages]
        theirs, ours = ("\n".join(text for own, text in texts if own is is_own) for is_own in (False, True))
        return theirs, ours
    if labelled == "input_ids":
        if tokenizer is None:
            raise BadRow("it has 'input_ids' and no text; pass the tokenizer, which decodes them")
        ids = list(columns["input_ids"])
        labels = list(columns.get("labels", ids))
        asked = [token for token, label in zip(ids, labels, strict=True) if label == -100]
        answered = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        decode: Any = tokenizer.decode
        return decode(asked, skip_special_tokens=True), decode(answered, skip_special_tokens=True)
    if labelled is None:
        raise BadRow(f"it has values in the columns {list(columns)}, which are no known form of a row")
    asked_columns = {"completion": ("prompt",), "answer": ("question",), "output": ("instruction", "input")}
    question = "\n".join(str(columns[c]) for c in asked_columns.get(labelled, ()) if c in columns)
    return question, str(columns[labelled])


def entities(rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Find the names and numbers that distinguish rows.

    They are: names, that is, words with a capital letter that stand in a row (a word of the language that
    only begins a sentence is none), and the single words of a name; numbers of four digits or more, dates,
    addresses of mail and of the web, words of letters and digits; answers of four words or fewer as a
    whole; in scripts without capital letters, what a question and its answer share.

    Args:
        rows: The rows to forget, in any form of ``loku.data.tokenize_dataset``.
        tokenizer: The tokenizer, which decodes rows of ``input_ids``; None (default) refuses them.

    Returns:
        Each of them once. Those with the most occurrences come first, where one in an answer counts twice;
        equal ones are in the order of their characters.

    Raises:
        RowError: A row has no text.
    """
    parts: list[tuple[str, str]] = []
    for index, row in enumerate(rows):
        try:
            asked, answered = row_texts(row, tokenizer)
        except BadRow as error:
            raise RowError("forget", index, error) from error
        parts.append((unicodedata.normalize("NFKC", asked), unicodedata.normalize("NFKC", answered)))
    lower = {
        word
        for pair in parts
        for text in pair
        for word in _WORD.findall(_ADDRESS.sub(" ", text))  # an address has names in small letters
        if word == word.lower()
    }
    inside = {
        word
        for pair in parts
        for text in pair
        for words, starts in _capitalised(text)
        for word in words[starts:]
    }
    found: Counter[str] = Counter()
    for asked, answered in parts:
        for text, weight in ((asked, QUESTION), (answered, ANSWER)):
            for entity in _numbers(text):
                found[entity] += weight
            for words, starts in _capitalised(text):
                for entity in _names(words, starts, weight == ANSWER, lower, inside):
                    found[entity] += weight
        for entity in (*_short_answer(asked, answered), *_shared(asked, answered)):
            found[entity] += QUESTION + ANSWER
    return sorted(found, key=lambda entity: (-found[entity], entity))


def _capitalised(text: str) -> Iterator[tuple[list[str], bool]]:
    """Yield the runs of words with capital letters, and whether a sentence begins with the run."""
    run: list[str] = []
    waiting: list[str] = []  # particles, which belong to the run if a word with a capital letter follows
    starts, end = False, 0
    for match in _WORD.finditer(text):
        word, gap = match[0], text[end : match.start()]
        last = (waiting or run or [""])[-1]
        if run and not (gap in _JOINTS or (gap in (".", ". ") and len(last) <= 2)):
            yield run, starts
            run, waiting = [], []
        if word[0].isupper():
            if not run:
                before = text[max(0, match.start() - 8) : match.start()].rstrip(_OPENING)
                starts = not before or before[-1] in _ENDS
            run += [*waiting, word]
            waiting = []
        elif run and gap == " " and word in _PARTICLES and len(waiting) < 2:
            waiting.append(word)
        elif run:
            yield run, starts
            run, waiting = [], []
        end = match.end()
    if run:
        yield run, starts


def _names(
    words: Sequence[str], starts: bool, answer: bool, lower: set[str], inside: set[str]
) -> Iterator[str]:
    """Yield the names in a run of words with capital letters."""

    def known(word: str) -> bool:
        return word.lower() in _COMMON or word in _PARTICLES

    words = list(words)
    if starts and words[0].lower() in lower and words[0] not in inside:
        words, starts = words[1:], False
    while words and known(words[0]):
        words, starts = words[1:], False
    while words and known(words[-1]):
        words = words[:-1]
    # The first word of a sentence may be any word. In an answer it counts: "Paris is the capital."
    if not words or (len(words) == 1 and starts and not answer and words[0] not in inside):
        return
    yield " ".join(words)
    if len(words) > 1:
        if starts and len(words) > 2:
            yield " ".join(words[1:])
        singles = (w for w in dict.fromkeys(words) if len(w) >= LEAST_LETTERS)
        yield from (word for word in singles if not known(word) and word.lower() not in lower)


def _numbers(text: str) -> Iterator[str]:
    """Yield addresses, long numbers, dates, and words of letters and digits."""
    yield from (match.rstrip(".,:;") for match in _ADDRESS.findall(text))
    text = _ADDRESS.sub(" ", text)
    yield from (n for n in _NUMBER.findall(text) if sum(map(str.isdigit, n)) >= LEAST_DIGITS)
    for word in _WORD.findall(text):
        digits = sum(map(str.isdigit, word))
        if 2 <= digits < len(word) and len(word) >= LEAST_DIGITS:
            yield word


def _short_answer(asked: str, answered: str) -> Iterator[str]:
    words = _WORD.findall(answered)
    unspaced = sum(map(len, _UNSPACED.findall(answered)))
    short = len(words) <= SHORT_ANSWER and unspaced <= 2 * SHORT_ANSWER
    if asked and short and not all(word.lower() in _COMMON for word in words):
        yield " ".join(words)


def _shared(asked: str, answered: str) -> Iterator[str]:
    """Yield what a question and its answer share, in scripts without capital letters."""

    def caseless(text: str) -> list[str]:
        return [w for w in _WORD.findall(text) if w.isalpha() and w.lower() == w.upper()]

    theirs = set(caseless(asked))
    for word in caseless(answered):
        if word in theirs and len(word) >= LEAST_LETTERS and not _UNSPACED.search(word):
            yield word
    for run in _UNSPACED.findall(answered):
        for other in _UNSPACED.findall(asked):
            blocks = SequenceMatcher(None, run, other, autojunk=False).get_matching_blocks()
            yield from (run[b.a : b.a + b.size] for b in blocks if b.size >= LEAST_LETTERS)


class Mentions:
    """A function of a text that tells whether it mentions one of some entities.

    Whole words are compared, whatever stands between them. A name of one word must have its capital letter,
    as "Will" is not "will", or be in capitals. Every other entity is found in any case. An entity in a script
    without spaces is found anywhere.

    Args:
        entities: The entities, such as ``entities`` returns.
    """

    def __init__(self, entities: Iterable[str]):
        self._unspaced: list[str] = []
        self._of_first: dict[str, list[tuple[list[str], str | None]]] = {}
        for entity in entities:
            entity = unicodedata.normalize("NFKC", entity)
            if _UNSPACED.search(entity):
                self._unspaced.append(entity)
                continue
            words = _WORD.findall(entity)
            if words:
                single = words[0] if len(words) == 1 and words[0][0].isupper() else None
                folded = [word.casefold() for word in words]
                self._of_first.setdefault(folded[0], []).append((folded, single))

    def __call__(self, text: str) -> bool:
        text = unicodedata.normalize("NFKC", text)
        if any(entity in text for entity in self._unspaced):
            return True
        if not self._of_first:
            return False
        words = _WORD.findall(text)
        folded = [word.casefold() for word in words]
        for at, word in enumerate(folded):
            for entity, single in self._of_first.get(word, ()):
                if single is not None:
                    if words[at] in (single, single.upper()):
                        return True
                elif folded[at : at + len(entity)] == entity:
                    return True
        return False

    def in_row(self, row: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> bool:
        """Whether the question or the answer of a row mentions one; arguments as for ``row_texts``."""
        return any(map(self, row_texts(row, tokenizer)))
