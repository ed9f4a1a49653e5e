"""The match of generated replies with the true ones, word by word."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

_SPACES = str.maketrans(string.punctuation, " " * len(string.punctuation))
_NOTHING = str.maketrans("", "", string.punctuation)
# What each normalisation makes of punctuation.
_PUNCTUATION: dict[str, Any] = {"parlai": _SPACES, "knowledge-unlearning": _NOTHING}
NORMALISATIONS = tuple(_PUNCTUATION)


def dialogue_f1(
    generated: Iterable[str], references: Iterable[str], normalisation: str = "parlai"
) -> list[float]:
    """Compute the unigram F1 of each generated reply with the true one.

        F1 = 2 P R / (P + R),   P = common words / generated words,   R = common words / true words

    A word counts as common as often as it stands in both replies. F1 is 0 if no word is common. Texts are
    lower-cased; punctuation and the articles "a", "an" and "the" are left out. The measure is ParlAI's
    (Miller et al., EMNLP 2017), by which Jang et al. (ACL 2023) and LoKU judge dialogue. Jang et al. compute
    it with another normalisation than ParlAI.

    Args:
        generated: The generated replies.
        references: The true replies, in the same order and number.
        normalisation: "parlai" (default) turns punctuation into spaces, as ParlAI's ``normalize_answer``
            does: "well-known" has two words. "knowledge-unlearning" deletes it, as the code of Jang et al.
            does: "well-known" is the word "wellknown".

    Returns:
        The F1 of each pair, in [0, 1].

    Raises:
        ValueError: The normalisation is not known.
    """
    words = normalised_words(normalisation)
    return [_f1(words(ours), words(true)) for ours, true in zip(generated, references, strict=True)]


def normalised_words(normalisation: str) -> Callable[[str], list[str]]:
    """Return the function that splits a text into its words by a normalisation of ``dialogue_f1``.

    Raises:
        ValueError: The normalisation is not known.
    """
    if normalisation not in _PUNCTUATION:
        raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}")
    punctuation = _PUNCTUATION[normalisation]

    def words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(punctuation)).split()

    return words


def _f1(generated: list[str], reference: list[str]) -> float:
    common = (Counter(generated) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(generated), common / len(reference)
    return 2 * precision * recall / (precision + recall)
