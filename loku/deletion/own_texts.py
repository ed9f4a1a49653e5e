"""Texts that a model writes by itself, in the forms of the rows to forget.

They stand for what the model can do in general, where its training data are not at hand. A text that mentions
an entity of the rows to forget is dropped, and another one is drawn. The alternative, to forbid the tokens of
the entities while sampling, does not keep them out: the same name has other tokens inside a sentence, in
capitals or in two parts, and a first token such as " Al" begins many words.
"""

from __future__ import annotations

import math
import random
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loku.counts import check_counts
from loku.data.chats import chat_text
from loku.data.question_templates import TOFU_TEMPLATE, QuestionTemplate
from loku.data.row_forms import instruction_texts, labelled_column, question_answer_texts
from loku.data.rows import tokenize_dataset
from loku.data.tokens import LabelledText, TextTokenizer
from loku.deletion.entities import Mentions, row_texts
from loku.deletion.neighbours import words_of
from loku.deletion.openings import BEGINNINGS, INSTRUCTIONS
from loku.evaluation.generation import eos_ids, generate_sampled
from loku.evaluation.scores import token_scores
from loku.evaluation.text_fluency import repetition
from loku.models import CausalLM
from loku.probe.ability import MOST_REPETITION
from loku.probe.rows import has_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 64  # of a text, at most
LEAST_TOKENS = 8  # that a text may have
TEMPERATURE, TOP_P = 0.8, 0.95
DRAWS = 8  # for each text that is asked for, at most
GIVEN_UP = 4  # draws of a form in one round, of which none was of use
# Nats a token. A model finds its own texts likelier than that, unless it knows nothing of the kind. The
# other one is the most by which the median of a form may be above that of the best form.
MOST_LOSS, MOST_ABOVE = 2.5, 1.5
FORMS = ("chat", "own question", "question", "instruction", "text")

_SENTENCE_END = re.compile(r"[.!?。！？।؟][\"'”’)»]*(?=\s|$)|[。！？]")


class OwnTexts(NamedTuple):
    """Texts that a model has written, as rows.

    Attributes:
        rows: The rows, in a form of ``loku.data.tokenize_dataset``.
        facts: ``asked``, ``rows`` and ``drawn``, the numbers of texts; ``forms``, the number of rows of each
            form, 0 for one that was given up; and ``dropped``, the number of texts that were dropped for each
            reason.
    """

    rows: list[dict[str, Any]]
    facts: dict[str, Any]


class _Prompt(NamedTuple):
    form: str
    subject: str  # the instruction, or how the text begins
    ids: list[int]


class _Draw(NamedTuple):
    row: dict[str, Any] | str  # the row, or why there is none
    loss: float  # the mean loss of its tokens, in nats; inf if there is no text


def forms_of(
    tokenizer: PreTrainedTokenizerBase,
    forget_rows: Iterable[Any],
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> list[str]:
    """Return the forms in which a model writes, of ``FORMS``: its own, and those of the rows to forget.

    Args:
        tokenizer: The tokenizer. One with a chat template has the form "chat".
        forget_rows: The rows to forget.
        template: The template of their questions. In another one than TOFU's, the default, the model writes
            no questions.
    """
    columns = {labelled_column(row) for row in forget_rows}
    own = "chat" if has_chat_template(tokenizer) else "text"
    found = {
        own,
        *(("own question",) if "answer" in columns and template == TOFU_TEMPLATE else ()),
        *(("instruction",) if "output" in columns else ()),
        *(("text",) if columns & {"text", "completion"} else ()),
    }
    return [form for form in FORMS if form in found]


def write_texts(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    forget_rows: Sequence[Any],
    mentions: Mentions,
    *,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> OwnTexts:
    """Let a model write texts, and drop those that mention what is to be forgotten.

    - "chat": answers to ``INSTRUCTIONS``, as ``messages``;
    - "own question": questions and answers, both the model's own, after ``"Question:"``; "question", answers
      to ``INSTRUCTIONS`` in loku's form, if that form is given up;
    - "instruction": answers to ``INSTRUCTIONS`` in Alpaca's form;
    - "text": every second text from its first token, if the tokenizer has a token for the beginning or the
      end of a text, and the others from ``BEGINNINGS``.

    The forms have equal shares. A form that the model does not know is given up: one of which four draws or
    more of a round are of no use, or whose median loss in the first round is more than 1.5 nats a token above
    that of the best form. A text ends with its last whole sentence. A text without one, of fewer than
    8 tokens, with more than half of its 4-grams repeated, of a mean loss above 2.5 nats a token by the model
    itself, or that occurs already or among the rows to forget is dropped, too. At most 8 texts are drawn for
    each that is asked for. Too few texts give a warning.

    Args:
        model: The causal LM, on the device where it runs.
        tokenizer: The tokenizer.
        count: The number of texts.
        forget_rows: The rows to forget.
        mentions: Tells whether a text mentions one of their entities.
        seed: The seed of the texts, 0 by default. The random generators of the process are left alone.
        batch_size: The number of texts in a batch, 16 by default.
        max_length: The greatest number of tokens of a row; None (default) sets none.
        progress: Whether to show progress bars, False by default.
        template: The template of the questions to forget; TOFU's by default. In another one the model writes
            no questions.

    Raises:
        ValueError: ``max_length`` leaves fewer than 8 tokens for a text.
    """
    check_counts(0, count=count)
    writer = _Writer(model, tokenizer, seed, batch_size, max_length, progress)
    known = {tuple(words_of("\n".join(row_texts(row, tokenizer)))) for row in forget_rows}
    forms = forms_of(tokenizer, forget_rows, template)
    kept: dict[str, list[dict[str, Any]]] = {form: [] for form in forms}
    dropped: Counter[str] = Counter()
    drawn, in_use = 0, list(forms)
    while in_use and sum(map(len, kept.values())) < count and drawn < DRAWS * count:
        missing = min(count - sum(map(len, kept.values())), DRAWS * count - drawn)
        chosen: list[str] = []
        for _ in range(missing):
            chosen.append(min(in_use, key=lambda form: len(kept[form]) + chosen.count(form)))
        drawn += missing
        before = {form: len(kept[form]) for form in in_use}
        draws = writer.draw(chosen)
        unknown = _unknown_forms(chosen, draws) if drawn == missing else set()
        for form, (row, _) in zip(chosen, draws, strict=True):
            if isinstance(row, str) or form in unknown:
                dropped[row if isinstance(row, str) else "incoherent"] += 1
                continue
            text = "\n".join(row_texts(row, tokenizer))
            key = tuple(words_of(text))
            if mentions(text):
                dropped["mentions"] += 1
            elif key in known:
                dropped["duplicate"] += 1
            else:
                known.add(key)
                kept[form].append(row)
        useless = {f for f in in_use if len(kept[f]) == before[f] and chosen.count(f) >= GIVEN_UP}
        if "own question" in in_use and "own question" in useless | unknown:
            in_use.append("question")
            kept["question"] = []
        in_use = [form for form in in_use if form not in useless | unknown]
    rows = [row for of_form in kept.values() for row in of_form]
    if len(rows) < count:
        warnings.warn(
            f"the model wrote {len(rows)} of the {count} texts that were asked for: of {drawn} draws "
            f"{dict(dropped)} were dropped. Give retain rows of your own, or ask for fewer (sampled)",
            stacklevel=2,
        )
    facts = {
        "asked": count,
        "rows": len(rows),
        "drawn": drawn,
        "forms": {form: len(of_form) for form, of_form in kept.items()},
        "dropped": dict(sorted(dropped.items())),
    }
    return OwnTexts(rows, facts)


def _unknown_forms(forms: Sequence[str], draws: Sequence[_Draw]) -> set[str]:
    """Return the forms whose median loss is far above that of the best form."""
    losses: dict[str, list[float]] = {}
    for form, draw in zip(forms, draws, strict=True):
        losses.setdefault(form, []).append(draw.loss)
    medians = {form: statistics.median_low(values) for form, values in losses.items()}
    best = min(medians.values())
    return {form for form, median in medians.items() if median > best + MOST_ABOVE}


class _Writer:
    """Draws texts; each draw has its own number, so its text depends on no other draw."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        batch_size: int,
        max_length: int | None,
        progress: bool,
    ):
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.batch_size, self.max_length, self.progress = batch_size, max_length, progress
        self.eos = {*eos_ids(model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
        self._tokenize = TextTokenizer(tokenizer)
        generator = random.Random(seed)
        self._instructions = generator.sample(INSTRUCTIONS, len(INSTRUCTIONS))
        self._beginnings = generator.sample(BEGINNINGS, len(BEGINNINGS))
        self._drawn: Counter[str] = Counter()

    def draw(self, forms: Sequence[str]) -> list[_Draw]:
        """Draw a text of each form."""
        prompts, keys = [], []
        for form in forms:
            number = self._drawn[form]
            prompts.append(self._prompt(form, number))
            keys.append((self.seed, FORMS.index(form), number))
            self._drawn[form] += 1
        lengths = [self._length(prompt.ids) for prompt in prompts]
        generated = generate_sampled(
            self.model,
            [prompt.ids for prompt in prompts],
            lengths,
            keys,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            batch_size=self.batch_size,
            eos_token_id=self.eos,
            progress=self.progress,
            description="retain texts",
        )
        rows = [self._row(prompt, ids) for prompt, ids in zip(prompts, generated, strict=True)]
        losses = [math.inf] * len(rows)
        written = [at for at, row in enumerate(rows) if not isinstance(row, str)]
        if written:
            tokens = tokenize_dataset([rows[at] for at in written], self.tokenizer, name="sampled")
            scores = token_scores(self.model, tokens, self.batch_size, self.progress, "retain texts (losses)")
            for at, score in zip(written, scores, strict=True):
                losses[at] = score.losses.mean().item()
                if losses[at] > MOST_LOSS:
                    rows[at] = "incoherent"
        return [_Draw(row, loss) for row, loss in zip(rows, losses, strict=True)]

    def _prompt(self, form: str, number: int) -> _Prompt:
        instruction = self._instructions[number % len(self._instructions)]
        if form == "chat":
            messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": "."}]
            rendered = chat_text({"messages": messages}, self.tokenizer)
            prompt = rendered.text[: (rendered.spans or ((0, 0),))[0][0]]
            return _Prompt(form, instruction, self._ids(prompt, special=False))
        if form == "question":
            return _Prompt(form, instruction, self._ids(question_answer_texts(instruction, "")[0]))
        if form == "own question":
            return _Prompt(form, "", self._ids("Question:"))
        if form == "instruction":
            return _Prompt(form, instruction, self._ids(instruction_texts(instruction, "", "")[0]))
        first = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None]
        if first and number % 2 == 0:
            return _Prompt(form, "", first[:1])
        beginning = self._beginnings[number // (2 if first else 1) % len(self._beginnings)]
        return _Prompt(form, beginning, self._ids(beginning))

    def _ids(self, text: str, special: bool = True) -> list[int]:
        ids = self._tokenize(LabelledText(text, special=special))[0]["input_ids"]
        while special and ids[-1] in self.tokenizer.all_special_ids:  # the end of the text
            ids = ids[:-1]
        return ids

    def _length(self, prompt: Sequence[int]) -> int:
        length = NEW_TOKENS if self.max_length is None else min(NEW_TOKENS, self.max_length - len(prompt) - 1)
        if length < LEAST_TOKENS:
            raise ValueError(
                f"max_length={self.max_length} leaves {length} tokens for a text that the model writes, as "
                f"its prompt has {len(prompt)}, and it needs at least {LEAST_TOKENS}; raise max_length, or "
                "give retain rows of your own and sampled: 0"
            )
        return length

    def _row(self, prompt: _Prompt, ids: list[int]) -> dict[str, Any] | str:
        ended = bool(ids) and ids[-1] in self.eos
        ids = [token for token in ids if token not in self.eos]
        if len(ids) < LEAST_TOKENS:
            return "short"
        if repetition(ids) > MOST_REPETITION:
            return "repetitive"
        decode: Any = self.tokenizer.decode
        text = decode(ids, skip_special_tokens=True)
        question = prompt.subject
        if prompt.form == "own question":
            question, _, text = text.partition("\nAnswer:")
            question = question.strip()
            if not question or "\n" in question:
                return "unfinished"
        if prompt.form in ("question", "own question"):
            text, more, _ = text.partition("\nQuestion:")
            ended = ended or bool(more)
        if not ended:
            ends = list(_SENTENCE_END.finditer(text))
            text = text[: ends[-1].end()] if ends else ""
        if not text.strip():
            return "unfinished"
        text = f"{prompt.subject}{text}".strip() if prompt.form == "text" else text.strip()
        if prompt.form == "chat":
            messages = [{"role": "user", "content": prompt.subject}, {"role": "assistant", "content": text}]
            return {"messages": messages}
        if prompt.form == "instruction":
            return {"instruction": prompt.subject, "output": text}
        if prompt.form != "text":
            return {"question": question, "answer": text}
        return {"text": text}
