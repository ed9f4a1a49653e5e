"""The endings of answers: the tokens that a template or the tokenizer puts after what an answer says.

Measures count the ending as a part of the answer by default. A short answer in a chat template may be one
third ending. A model that knows the template alone then has a Memorisation Accuracy of a third, and never
looks as if it had forgotten. ``content_scores`` leaves the endings out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from loku.data import IGNORE_INDEX, TOFU_TEMPLATE, QuestionTemplate
from loku.evaluation.extraction import end_ids
from loku.evaluation.scores import TokenScores
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Endings:
    """A function of a tokenised row that returns its labels without those of the endings of its answers.

    An ending begins with a special token: an EOS of the model or the tokenizer, or another special token of
    the tokenizer, such as ``<|im_end|>``. Special tokens and white space may follow it. White space before
    the first special token belongs to the answer. So ``"me\\n<|im_end|>\\n</s>"`` ends with the last three
    tokens. Ordinary words that a template puts after an answer belong to the answer.

    A row may have several labelled parts, such as the turns of a chat. Each loses its own ending.

    Args:
        model: The causal LM.
        tokenizer: The tokenizer; None if there is none. Then the EOS of the model alone is known.
        template: The template of questions, whose chat template may end an answer by another token; TOFU's by
            default.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase | None,
        template: QuestionTemplate = TOFU_TEMPLATE,
    ):
        self.tokenizer = tokenizer
        self.special = set(end_ids(model, tokenizer, template))
        if tokenizer is not None:
            added = getattr(tokenizer, "added_tokens_decoder", {})
            self.special |= {index for index, token in added.items() if token.special}
            self.special |= set(tokenizer.all_special_ids)
        self._spaces: dict[int, bool] = {}

    def __call__(self, row: Mapping[str, Any]) -> list[int]:
        """Return the labels of a row, with -100 for the endings."""
        labels: list[int] = []
        labelled = groupby(
            zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORE_INDEX
        )
        for counts, pairs in labelled:
            part = list(pairs)
            left = self._begin([token for token, _ in part]) if counts else 0
            labels += [label for _, label in part[:left]] + [IGNORE_INDEX] * (len(part) - left)
        return labels

    def _begin(self, ids: Sequence[int]) -> int:
        """Return the index at which the ending of some tokens begins; their number if they have none."""
        begin = len(ids)
        for index in reversed(range(len(ids))):
            if ids[index] in self.special:
                begin = index
            elif not self._is_space(ids[index]):
                break
        return begin

    def _is_space(self, token: int) -> bool:
        if self.tokenizer is None:
            return False
        if token not in self._spaces:
            decode: Any = self.tokenizer.decode
            self._spaces[token] = not decode([token]).strip()
        return self._spaces[token]


def content_rows(rows: Iterable[Mapping[str, Any]], endings: Endings) -> list[Mapping[str, Any]]:
    """Return tokenised rows without the labels of the endings of their answers."""
    return [{**row, "labels": endings(row)} for row in rows]


def content_scores(
    rows: Iterable[Mapping[str, Any]], scores: Iterable[TokenScores], endings: Endings
) -> list[TokenScores]:
    """Leave the endings of answers out of scores.

    Args:
        rows: The tokenised rows.
        scores: The ``token_scores`` of the rows.
        endings: The endings of the model and the tokenizer.

    Returns:
        The scores of each row without those of its endings. A row that has nothing else has no scores left.
    """
    found = []
    for row, score in zip(rows, scores, strict=True):
        content = torch.tensor(endings(row), dtype=torch.int64)[score.positions] != IGNORE_INDEX
        found.append(TokenScores(*(values[content] for values in score)))
    return found
