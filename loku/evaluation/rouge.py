"""ROUGE of generated texts with the true ones, in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Scripts without spaces: one character is a word. Thai to Khmer, then those of East Asia.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
# The vowels of Hindi or Arabic are marks, which \w leaves out.
_MARKS = "".join(chr(code) for code in range(0x10000) if unicodedata.category(chr(code)).startswith("M"))
_WORD = re.compile(rf"[{_UNSPACED}]|(?:[^\W_{_UNSPACED}][{_MARKS}]*)+")


class Words:
    """The tokenizer of ``RougeScorer`` for texts in any script: ``words``."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return words(text)


def words(text: str) -> list[str]:
    """Return the words of a text, in small letters.

    A word is a run of letters, their marks and digits of any script. In a script without spaces, a word is a
    character.

    Args:
        text: The text.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def rouge_scores(
    generated: Iterable[str], references: Iterable[str], kinds: Sequence[str], stemming: bool
) -> list[Mapping[str, Any]]:
    """Compute ROUGE by the package ``rouge_score``, which the sources of the measures use.

    Its words are runs of the letters a to z and digits. A perfect answer in another script has none, and
    would score 0, as if it were forgotten. So the words of a pair are those of ``words`` if most letters of
    the true text are not of the Latin alphabet.

    Args:
        generated: The generated texts.
        references: The true texts, in the same order and number.
        kinds: The kinds of ROUGE, such as ``["rouge1", "rougeL"]``.
        stemming: Whether the stems of words are compared; only English has them.

    Returns:
        For each pair ``{kind: score}``; a score has ``precision``, ``recall`` and ``fmeasure``, in [0, 1].
    """
    from rouge_score.rouge_scorer import RougeScorer

    latin = RougeScorer(list(kinds), use_stemmer=stemming)
    other = RougeScorer(list(kinds), tokenizer=Words())
    return [
        (latin if _is_latin(true) else other).score(true, text)
        for true, text in zip(references, generated, strict=True)
    ]


def _is_latin(text: str) -> bool:
    """Whether at least half of the letters of a text are Latin; digits and marks do not count."""
    letters = [character for character in text if character.isalpha()]
    latin = sum(character.isascii() or "LATIN" in unicodedata.name(character, "") for character in letters)
    return 2 * latin >= len(letters)
