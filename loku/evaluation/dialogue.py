"""The match of generated replies with the true ones, word by word."""

import re
import string
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


def dialogue_f1(generated: Iterable[str], references: Iterable[str]) -> list[float]:
    """Compute the unigram F1 of each generated reply with the true one.

        F1 = 2 P R / (P + R),   P = common words / generated words,   R = common words / true words

    A word counts as common as often as it stands in both replies. F1 is 0 if no word is common. Texts are
    lower-cased; punctuation and the articles "a", "an" and "the" are left out. The measure is ParlAI's
    (Miller et al., EMNLP 2017), by which Jang et al. (ACL 2023) and LoKU judge dialogue.

    Args:
        generated: The generated replies.
        references: The true replies, in the same order and number.

    Returns:
        The F1 of each pair, in [0, 1].
    """
    return [_f1(_words(ours), _words(true)) for ours, true in zip(generated, references, strict=True)]


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _f1(generated: list[str], reference: list[str]) -> float:
    common = (Counter(generated) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(generated), common / len(reference)
    return 2 * precision * recall / (precision + recall)
