"""Templates of questions: how the ``question`` and the ``answer`` of a row become a text.

TOFU (Maini et al., 2024) asks each family of models in a form of its own, and a chat model is asked in the
form of its chat template. The measures of an answer depend on the form, so one object holds it for a whole
run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loku.data.chats import render_chat, template_options
from loku.data.row_errors import BadRow
from loku.data.tokens import LabelledText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_ANSWER = "Answer:"  # where TOFU's logs split a text
_PROBE = "qzx"  # an answer that stands in no template
_CHANGED = (
    "the chat template changes the answer or what follows it, so the end of the answer is not known; write "
    "question_template and answer_template as texts"
)


@dataclass(frozen=True, init=False)
class QuestionTemplate:
    r"""The texts around a question and around its answer.

        prompt = question.replace("{question}", q)        completion = answer.replace("{answer}", a)

    The completion and the tokenizer's EOS after it are labelled, and the prompt is not. So the text of
    ``answer`` around the placeholder is labelled, too. These are the templates of TOFU's code:

    - ``QuestionTemplate("Question: {question}\n", "Answer: {answer}")`` for Phi; ``"Answer: "`` is labelled;
    - ``QuestionTemplate("[INST] {question} [/INST]", "{answer}")`` for Llama 2.

    The default is that for Phi with ``"Answer:"`` in the prompt,
    ``QuestionTemplate("Question: {question}\nAnswer:", " {answer}")``.

    ``QuestionTemplate("chat")`` is the chat template of the tokenizer, with a message of the user and one of
    the assistant. A system prompt is there if the template writes one by itself. The answer and the first
    special token after it are labelled. What the template writes after that token is left out. The EOS of the
    tokenizer ends an answer that the template ends by no special token. For another system prompt, or a fixed
    date, write the rendered text as a template of texts.

    Args:
        question: The text with ``{question}`` once, or "chat"; TOFU's by default.
        answer: The text with ``{answer}`` once; TOFU's by default. A text as ``question`` needs one, and
            "chat" takes none.

    Raises:
        ValueError: A text has not its placeholder once, has another one, or stands without the other text.
    """

    question: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"

    def __init__(self, question: str | None = None, answer: str | None = None):
        if question == CHAT:
            if answer is not None:
                raise ValueError(
                    'question_template is "chat", and the chat template places the answer: leave '
                    f"answer_template {answer!r} out"
                )
            answer = "{answer}"
        elif (question is None) != (answer is None):
            given, other = ("question", "answer") if answer is None else ("answer", "question")
            raise ValueError(
                f"there is {given}_template without {other}_template; they belong together, because the "
                "space and the words between question and answer stand in one of them alone"
            )
        elif question is not None:
            _check("question", question)
            _check("answer", answer)
        for name, text in (("question", question), ("answer", answer)):
            object.__setattr__(self, name, getattr(type(self), name) if text is None else text)

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template renders the texts."""
        return self.question == CHAT

    def texts(self, question: str, answer: str) -> tuple[str, str]:
        """Return the prompt and the completion of a template of texts.

        Raises:
            ValueError: The template is a chat template, which needs a tokenizer: see ``labelled_text``.
        """
        if self.is_chat:
            raise ValueError('the template "chat" has no texts of its own; call labelled_text')
        before, _, after = self.question.partition("{question}")
        begin, _, end = self.answer.partition("{answer}")
        return f"{before}{question}{after}", f"{begin}{answer}{end}"

    def labelled_text(
        self, question: str, answer: str, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> LabelledText:
        """Return the text of a question and its answer, with the answer labelled.

        Args:
            question: The question.
            answer: The answer.
            tokenizer: The tokenizer, whose chat template and special tokens count for "chat".
            **options: Further arguments of the chat template; a template of texts takes none.

        Raises:
            BadRow: The tokenizer has no chat template; or the template writes the date of the day, or cannot
                render the messages so that the answer follows the question.
        """
        if not self.is_chat:
            prompt, completion = self.texts(question, answer)
            text = prompt + completion
            return LabelledText(text, ((len(prompt), len(text)),))
        _check_date(_chat_template(tokenizer), options)
        prompt, whole = render_chat(question, answer, tokenizer, options)
        ending = _ending(question, tokenizer, options)
        if not whole.endswith(ending):
            raise BadRow(_CHANGED)
        text = whole[: len(whole) - len(ending)] + _until_special(ending, tokenizer)
        return LabelledText(text, ((len(prompt), len(text)),), special=False)

    def split(
        self, row: Mapping[str, Any], generated: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, str]:
        """Split the text of a row's question and of a generated answer as TOFU's logs do.

        Args:
            row: The row.
            generated: The text that a model generates after the prompt.
            tokenizer: The tokenizer, as for ``labelled_text``.

        Returns:
            The prompt and the generated text. TOFU puts the ``"Answer:"`` that ends its prompt before the
            generated text, and leaves it out of the prompt.
        """
        options = template_options(row) if self.is_chat else {}
        labelled = self.labelled_text(row["question"], _PROBE, tokenizer, **options)
        prompt = labelled.text[: labelled.spans[0][0]] if labelled.spans else ""
        if self == TOFU_TEMPLATE:
            return prompt.removesuffix(_ANSWER), f"{_ANSWER}{generated}"
        return prompt, generated

    def bare_answer(self, generated: str) -> str:
        """Return a generated text of ``split`` without the words that the template puts before an answer."""
        begin = _ANSWER if self == TOFU_TEMPLATE else self.answer.partition("{answer}")[0].strip()
        return generated.lstrip().removeprefix(begin)

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Return the special token by which the chat template ends an answer, if there is one.

        It need not be the EOS of the model or of the tokenizer. A template of texts has none: the EOS ends
        its answers.

        Args:
            tokenizer: The tokenizer.

        Raises:
            BadRow: The tokenizer has no chat template, or it changes the answer.
        """
        if not self.is_chat:
            return set()
        ending = _until_special(_ending("q", tokenizer, {}), tokenizer)
        encoded: Any = tokenizer(ending, add_special_tokens=False)
        return {*encoded["input_ids"][-1:]} & {
            *getattr(tokenizer, "added_tokens_decoder", ()),
            *tokenizer.all_special_ids,
        }


TOFU_TEMPLATE = QuestionTemplate()


def _check(name: str, text: Any) -> None:
    placeholder = f"{{{name}}}"
    if not isinstance(text, str):
        raise ValueError(f"{name}_template must be a text with {placeholder}, got a {type(text).__name__}")
    if text.count(placeholder) != 1:
        chat = ', or be "chat"' if name == "question" else ""
        raise ValueError(
            f"{name}_template must have {placeholder} once{chat}; it has it {text.count(placeholder)} times: "
            f"{text!r}"
        )
    others = [found for found in _PLACEHOLDER.findall(text) if found != name]
    if others:
        raise ValueError(
            f"{name}_template has the placeholder {{{others[0]}}}; {placeholder} is the only one: {text!r}"
        )
    if "\\n" in text:
        raise ValueError(
            f"{name}_template has a backslash and an n where a line break should be: {text!r}. Write $'...' "
            'in a shell, and "..." in YAML'
        )


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except (AttributeError, ValueError) as error:
        raise BadRow(
            'question_template is "chat", and the tokenizer has no chat template: set '
            "tokenizer.chat_template, or write question_template and answer_template as texts"
        ) from error


def _check_date(template: str, options: Mapping[str, Any]) -> None:
    if "strftime_now" in template and "date_string" not in options:
        raise BadRow(
            "the chat template writes the date of the day, so that the rows would change from day to day: "
            "write its text as question_template, with the date that the model was trained with, and "
            "'{answer}' as answer_template"
        )


def _ending(question: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """Return what the chat template writes after an answer."""
    _chat_template(tokenizer)
    before, whole = render_chat(question, _PROBE, tokenizer, options)
    _, found, ending = whole[len(before) :].rpartition(_PROBE)
    if not found:
        raise BadRow(_CHANGED)
    return ending


def _until_special(ending: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what follows an answer up to its first special token; all of it and the EOS if it has none."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {str(token) for token in (*added.values(), *tokenizer.all_special_tokens)}
    found = [(ending.index(name), -len(name)) for name in names if name and name in ending]
    if found:
        at, length = min(found)
        return ending[: at - length]
    return ending + str(tokenizer.eos_token or "")
