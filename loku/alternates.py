"""Alternates for AltPO: a model writes other plausible answers to the questions of a forget set.

The model is asked, in its chat template if it has one, for another answer whose facts differ. A sample
depends on the seed, the row and the number of the draw alone. An answer that is empty or is the true one is
drawn again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loku.counts import check_counts
from loku.data.alternates import ALTERNATE
from loku.data.chats import chat_text
from loku.data.row_errors import BadRow, RowError
from loku.data.rows import DataSet, as_rows
from loku.data.token_limits import token_limits
from loku.data.tokens import LabelledText, TextTokenizer
from loku.data.values import check_text
from loku.evaluation.generation import eos_ids, generate_sampled
from loku.models import CausalLM
from loku.probe.rows import has_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = (
    "Question: {question}\nAnswer: {answer}\n"
    "Write another answer to this question. It must sound plausible and agree with the question, but each "
    "fact that the answer above gives must be replaced by a different one.\n"
)
BEGINNING = "Another answer:"  # of what the model writes
# An answer ends before what begins a further example. "FAQ:" and "the IQ: 130" begin none.
ENDS = re.compile(rf"Question:|(?<![A-Za-z])Q:|{BEGINNING}")
DRAWS = 8  # of an alternate, at most


def make_alternates(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: DataSet,
    count: int = 5,
    *,
    seed: int = 0,
    prompt: str = PROMPT,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 200,
    batch_size: int = 16,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Let a model write alternates to the answers of rows, by sampling (AltPO, Mekala et al., 2025).

    Args:
        model: The causal LM, on the device where it runs: that which is to be unlearned.
        tokenizer: The tokenizer.
        rows: The rows, with ``question`` and ``answer``.
        count: The number of alternates of a row, 5 by default as in the paper.
        seed: The seed of the samples, >= 0; 0 by default.
        prompt: The prompt, a text with ``{question}`` and ``{answer}``. The model's answer then begins with
            ``BEGINNING``, which is not a part of the alternate.
        temperature: The number by which the logits are divided, > 0; 1 by default.
        top_p: The probability of the nucleus, in (0, 1]; 1 by default.
        max_new_tokens: The greatest number of tokens of an alternate, 200 by default.
        batch_size: The number of prompts in a batch, 16 by default.
        progress: Whether to show a progress bar, True by default.

    Returns:
        The rows, with the list of their alternates in the column ``alternate``.

    Raises:
        ValueError: A number is out of its range, or the prompt lacks a field. Or the model wrote nothing but
            the true answer in ``DRAWS`` draws for an alternate.
        RowError: A row has no question or no answer, or its prompt fills the context of the model.
    """
    check_counts(count=count, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_counts(0, seed=seed)
    for field in ("{question}", "{answer}"):
        if field not in prompt:
            raise ValueError(f"the prompt of alternates needs {field}, got {prompt!r}")
    rows = as_rows(rows, "forget")
    writer, context = _Writer(tokenizer, prompt), token_limits(model).context or math.inf
    prompts, answers = [], []
    for index in range(len(rows)):
        try:
            ids, answer = writer.prompt(rows[index])
        except BadRow as error:
            raise RowError("forget", index, f"{error}. Alternates need question/answer rows") from None
        if len(ids) >= context:
            problem = f"its prompt has {len(ids)} tokens, and the context of the model is {context}"
            raise RowError("forget", index, problem)
        prompts.append(ids)
        answers.append(answer)
    found: list[list[str | None]] = [[None] * count for _ in prompts]
    eos = {*eos_ids(model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    for draw in range(DRAWS):
        missing = [(i, j) for i, texts in enumerate(found) for j, text in enumerate(texts) if text is None]
        if not missing:
            break
        generated = generate_sampled(
            model,
            [prompts[i] for i, _ in missing],
            [max_new_tokens] * len(missing),
            [(seed, i, j, draw) for i, j in missing],
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            eos_token_id=eos,
            progress=progress,
            description="alternates",
        )
        for (i, j), ids in zip(missing, generated, strict=True):
            text = writer.alternate(ids)
            if text and _words(text) != _words(answers[i]):
                found[i][j] = text
    for index, texts in enumerate(found):
        if None in texts:
            raise ValueError(
                f"row {index}: in {DRAWS} draws the model wrote nothing but the true answer "
                f"{answers[index]!r}; raise the temperature, or give another prompt"
            )
    return [
        {**row, ALTERNATE: texts}
        for row, texts in zip((rows[i] for i in range(len(rows))), found, strict=True)
    ]


def _words(text: str) -> list[str]:
    return text.casefold().split()


class _Writer:
    """Makes the prompts, and reads what a model has written after them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str):
        self.tokenizer, self.text = tokenizer, prompt
        self.chat = has_chat_template(tokenizer)
        self._tokenize = TextTokenizer(tokenizer)

    def prompt(self, row: Any) -> tuple[Sequence[int], str]:
        """Return the ids of a row's prompt, and its answer."""
        if not isinstance(row, Mapping):
            raise BadRow(f"it is a {type(row).__name__}, without 'question' and 'answer'")
        question, answer = (check_text(row.get(column), column) for column in ("question", "answer"))
        # Both at once: a question may have "{answer}" in it.
        parts = [part.replace("{question}", question) for part in self.text.split("{answer}")]
        text = answer.join(parts)
        if not self.chat:
            return self._ids(text + BEGINNING), answer
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": BEGINNING}]
        rendered = chat_text({"messages": turns}, self.tokenizer)
        begin = rendered.spans[0][0] if rendered.spans else 0
        end = rendered.text.index(BEGINNING, begin) + len(BEGINNING)
        return self._ids(rendered.text[:end], special=False), answer

    def _ids(self, text: str, special: bool = True) -> list[int]:
        ids = self._tokenize(LabelledText(text, special=special))[0]["input_ids"]
        while special and ids[-1] in self.tokenizer.all_special_ids:  # the end of the text
            ids = ids[:-1]
        return ids

    def alternate(self, ids: Sequence[int]) -> str:
        """Return the alternate in the ids that a model has written; "" if there is none."""
        decode: Any = self.tokenizer.decode  # of one text
        text: str = decode(ids, skip_special_tokens=True)
        return ENDS.split(text, maxsplit=1)[0].strip()
