"""MUSE's memorisation of texts and of knowledge (Shi et al., ICLR 2025), by ROUGE-L of greedy texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from loku.counts import check_counts
from loku.data import token_limits
from loku.distributed import spread
from loku.evaluation.generation import generate_greedy
from loku.evaluation.rouge import rouge_scores
from loku.evaluation.scores import mean_over_rows
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWLEDGE_TOKENS = 32  # new tokens of an answer
VERBATIM_TOKENS = 128  # new tokens of a continuation, and tokens of the true one
STOPS = ("\n\n", "\nQuestion", "Question:")  # an answer ends before the first of them


class Memorization(NamedTuple):
    """The memorisation of some rows.

    Attributes:
        mean: The mean over rows, in [0, 1]; NaN if there are none.
        per_row: The ROUGE-L F1 of each row, in [0, 1].
        generated: The generated text of each row.
    """

    mean: float
    per_row: list[float]
    generated: list[str]


def knowledge_memorization(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    examples: Iterable[tuple[str, str]] = (),
    *,
    max_new_tokens: int = KNOWLEDGE_TOKENS,
    stemming: bool = False,
    batch_size: int = 16,
    progress: bool = True,
    description: str = "knowledge memorisation",
) -> Memorization:
    r"""Compute MUSE's knowledge memorisation: the mean ROUGE-L F1 of greedy answers with the true ones.

    The prompt of a question is that of MUSE, with the examples before it::

        "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples) + f"Question: {question}\nAnswer: "

    A generated answer ends before a blank line, a line that begins with "Question", or "Question:".

    Args:
        model: The causal LM, on the device where it runs.
        tokenizer: The tokenizer.
        questions: The N questions.
        answers: The N true answers.
        examples: Questions with their answers, none by default. MUSE's benchmark has ten for each set, the
            splits ``*_qa_icl``.
        max_new_tokens: The greatest number of tokens of an answer, >= 1; 32 by default, as MUSE's.
        stemming: Whether ROUGE compares the stems of words. MUSE's own code does not (False, the default);
            open-unlearning does.
        batch_size: The number of prompts in a batch, 16 by default.
        progress: Whether to show a progress bar, True by default.
        description: The title of the progress bar.

    Returns:
        The mean, which is low for a forgotten and high for a retained set, with the figure and the text of
        each row.

    Raises:
        ValueError: There are more or fewer answers than questions, ``max_new_tokens`` or ``batch_size`` is
            less than 1, or a prompt and the new tokens do not fit into the model's context.
        FloatingPointError: The logits of an answer have a NaN.
    """
    prompts = knowledge_prompts(questions, examples)
    texts = _continued(model, tokenizer, prompts, max_new_tokens, batch_size, progress, description)
    generated = [_before(text, STOPS) for text in texts]
    return _memorization(generated, answers, stemming)


def verbatim_memorization(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    max_new_tokens: int = VERBATIM_TOKENS,
    stemming: bool = False,
    batch_size: int = 16,
    progress: bool = True,
    description: str = "verbatim memorisation",
) -> Memorization:
    """Compute MUSE's verbatim memorisation: the mean ROUGE-L F1 of greedy continuations with the true ones.

    A true continuation is cut to its first ``max_new_tokens`` tokens, as ``tokenizer(continuation)`` has
    them: the special tokens that the tokenizer puts before a text count, as in MUSE's own code. MUSE's set
    ``verbmem`` has the prompts in its column ``prompt`` and the continuations in ``gt``.

    Args:
        model: The causal LM, on the device where it runs.
        tokenizer: The tokenizer.
        prompts: The N beginnings of texts.
        continuations: The N texts that follow them.
        max_new_tokens: The greatest number of tokens of a continuation, >= 1; 128 by default, as MUSE's.
        stemming: Whether ROUGE compares the stems of words. MUSE's own code does not (False, the default);
            open-unlearning does.
        batch_size: The number of prompts in a batch, 16 by default.
        progress: Whether to show a progress bar, True by default.
        description: The title of the progress bar.

    Returns:
        The mean, which is low for a forgotten set, with the figure and the text of each row.

    Raises:
        ValueError: There are more or fewer continuations than prompts, ``max_new_tokens`` or ``batch_size``
            is less than 1, a prompt has no tokens, or a prompt and the new tokens do not fit into the model's
            context.
        FloatingPointError: The logits of a continuation have a NaN.
    """
    generated = _continued(model, tokenizer, prompts, max_new_tokens, batch_size, progress, description)
    true = [_decoded(tokenizer, _ids(tokenizer, text)[:max_new_tokens]) for text in continuations]
    return _memorization(generated, true, stemming)


def spread_knowledge(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    examples: Sequence[tuple[str, str]],
    batch_size: int,
    progress: bool,
    name: str,
) -> float:
    """Compute the mean of ``knowledge_memorization`` with the rows shared out among the processes.

    All processes must call this, with all rows.
    """

    measure = partial(
        knowledge_memorization,
        model,
        tokenizer,
        examples=examples,
        batch_size=batch_size,
        progress=progress,
        description=f"{name}: knowledge",
    )
    return _spread(measure, [(row["question"], row["answer"]) for row in rows])


def spread_verbatim(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    batch_size: int,
    progress: bool,
    name: str,
) -> float:
    """Compute the mean of ``verbatim_memorization`` with the rows shared out among the processes.

    All processes must call this, with all rows.
    """

    measure = partial(
        verbatim_memorization,
        model,
        tokenizer,
        batch_size=batch_size,
        progress=progress,
        description=f"{name}: verbatim",
    )
    return _spread(measure, [(row["prompt"], row["completion"]) for row in rows])


def _spread(measure: Callable[[list[str], list[str]], Memorization], pairs: list[tuple[str, str]]) -> float:
    def per_row(given: list[str], true: list[str]) -> list[float]:
        return measure(given, true).per_row

    figures: list[float] = spread(per_row, *map(list, zip(*pairs, strict=True)))
    return mean_over_rows(figures)


def knowledge_prompts(questions: Iterable[str], examples: Iterable[tuple[str, str]] = ()) -> list[str]:
    """Return the prompts of ``knowledge_memorization``.

    Args:
        questions: The questions.
        examples: Questions with their answers, which come before each question; none by default.
    """
    shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples)
    return [f"{shots}Question: {question}\nAnswer: " for question in questions]


def rouge_l_f1(generated: Iterable[str], references: Iterable[str], stemming: bool = False) -> list[float]:
    """Compute the ROUGE-L F1 of each generated text with the true one.

    The words of texts in other scripts than the Latin are those of ``loku.evaluation.rouge``.

    Args:
        generated: The generated texts.
        references: The true texts, in the same order and number.
        stemming: Whether the stems of words are compared, False by default.

    Returns:
        The F1 of each pair, in [0, 1].
    """
    scores = rouge_scores(generated, references, ["rougeL"], stemming)
    return [score["rougeL"].fmeasure for score in scores]


def reason_not_continued(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], max_new_tokens: int
) -> str | None:
    """Return the reason why the model cannot continue some prompts; None if it can.

    Args:
        model: The causal LM.
        tokenizer: The tokenizer.
        prompts: The prompts.
        max_new_tokens: The number of new tokens.
    """
    return _reason(model, [_ids(tokenizer, prompt) for prompt in prompts], max_new_tokens)


def _reason(model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> str | None:
    context = token_limits(model).context
    for index, prompt in enumerate(prompts):
        if not prompt:
            return f"the prompt of row {index} has no tokens"
        if context is not None and len(prompt) + max_new_tokens > context:
            return (
                f"the prompt of row {index} has {len(prompt)} tokens, and with {max_new_tokens} new ones it "
                f"does not fit into the model's context of {context}"
            )
    return None


def _continued(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
    description: str,
) -> list[str]:
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    reason = _reason(model, ids, max_new_tokens)
    if reason is not None:  # a shorter text would look forgotten
        raise ValueError(f"{description}: {reason}; shorten it, or take fewer examples or new tokens")
    lengths = [max_new_tokens] * len(ids)
    answers = generate_greedy(model, ids, lengths, batch_size, progress=progress, description=description)
    return [_decoded(tokenizer, answer) for answer in answers]


def _memorization(generated: list[str], true: Sequence[str], stemming: bool) -> Memorization:
    per_row = rouge_l_f1(generated, true, stemming)
    return Memorization(mean_over_rows(per_row), per_row, generated)


def _before(text: str, stops: Iterable[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: Any = tokenizer(text, verbose=False)["input_ids"]
    return list(ids)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    decode: Any = tokenizer.decode
    return decode(list(ids), skip_special_tokens=True)
