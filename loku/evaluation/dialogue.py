"""How well generated replies match the true ones, word by word."""

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


def dialogue_f1(generated, references):
    """Unigram F1 of each generated reply with the true one: a list of floats in [0, 1].

        2 P R / (P + R),   P, R = common words / words of the generated, of the true reply

    Common words count as often as they stand in both; 0 if there are none. Texts are lower-cased, their
    punctuation and the articles "a", "an" and "the" are left out. It is ParlAI's measure (Miller et al.,
    EMNLP 2017), by which Jang et al. (ACL 2023) and LoKU judge dialogue.
    """
    return [_f1(_words(ours), _words(true)) for ours, true in zip(generated, references, strict=True)]


def _words(text):
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _f1(generated, reference):
    common = (Counter(generated) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(generated), common / len(reference)
    return 2 * precision * recall / (precision + recall)
