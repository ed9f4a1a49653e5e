"""The accuracy of the last word of a text, as LAMBADA measures it (Paperno et al., ACL 2016)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loku.data import IGNORE_INDEX
from loku.data.tokens import LabelledText, TextTokenizer
from loku.evaluation.dialogue import normalised_words
from loku.evaluation.scores import TokenScores, mean_over_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LastWords(NamedTuple):
    """Which last words of some texts a model predicts.

    Attributes:
        exact: For each text whether every token of its last word is the most likely one, given the true
            tokens before it: ``acc`` of lm-evaluation-harness's ``lambada_openai``. None for a text without
            a last word.
        normalised: The same, but a word also counts if the most likely tokens are the same text after the
            normalisation of ``loku.evaluation.dialogue_f1``, "knowledge-unlearning": the accuracy of Jang et
            al. (ACL 2023).
    """

    exact: list[bool | None]
    normalised: list[bool | None]

    def measures(self) -> dict[str, float]:
        """Return ``last_word_accuracy`` and ``last_word_accuracy_normalised``, in [0, 1].

        They are means over the texts that have a last word. The dict is empty if there are none.
        """
        if all(value is None for value in self.exact):
            return {}
        return {
            "last_word_accuracy": mean_over_rows(self.exact),
            "last_word_accuracy_normalised": mean_over_rows(self.normalised),
        }


def last_words(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    scores: Iterable[TokenScores],
) -> LastWords:
    """Find the last words that a model predicts.

    The last word is what follows the last space of the text, with that space. A text without a space, or
    with one at its end, has no last word. A text that was cut has none either.

    Args:
        texts: The texts.
        tokenizer: The tokenizer.
        rows: The texts, tokenised by ``loku.data.tokenize_dataset``.
        scores: The ``token_scores`` of the rows.
    """
    tokenize = TextTokenizer(tokenizer)
    words = normalised_words("knowledge-unlearning")

    def decoded_words(ids: list[int]) -> list[str]:
        decode: Any = tokenizer.decode
        return words(decode(ids, skip_special_tokens=True))

    exact: list[bool | None] = []
    normalised: list[bool | None] = []
    for text, row, score in zip(texts, rows, scores, strict=True):
        positions = _positions(text, row["input_ids"], tokenize)
        at = [i for i, position in enumerate(score.positions.tolist()) if position in positions]
        if not at or len(at) < len(positions):
            exact.append(None)
            normalised.append(None)
            continue
        same = bool(score.memorized[at].all())
        true = [row["input_ids"][position] for position in positions]
        exact.append(same)
        normalised.append(same or decoded_words(score.predicted[at].tolist()) == decoded_words(true))
    return LastWords(exact, normalised)


def _positions(text: str, ids: Sequence[int], tokenize: TextTokenizer) -> range:
    """Return the positions of the tokens of the last word in the ids of a row; an empty range for none."""
    before, _, word = text.rpartition(" ")
    if not before or not word:
        return range(0)
    part, _ = tokenize(LabelledText(text, ((len(before), len(text)),), special=False))
    of_text, count = part["input_ids"], sum(label != IGNORE_INDEX for label in part["labels"])
    for begin in range(len(ids) - len(of_text) + 1):  # special tokens may stand around the text
        end = begin + len(of_text)
        if list(ids[begin:end]) == of_text:
            return range(end - count, end)
    return range(0)
