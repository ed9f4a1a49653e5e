"""The share of a text that can be extracted from a model: greedy answers and Extraction Likelihood.

Both follow Cha et al. (ICLR 2025), Eqs. 4 and 5, after Jang et al. (ACL 2023). ``loku.evaluation.scores``
defines rows and answers, and has Eq. 6.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loku.counts import check_counts
from loku.data import TOFU_TEMPLATE, QuestionTemplate
from loku.distributed import from_main_process, has_shards, is_main_process, reshard_, spread
from loku.evaluation.generation import eos_ids, generate_greedy, until_eos
from loku.evaluation.scores import TokenScores, mean_over_rows, token_scores
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


EL_DEFINITIONS = ("paper", "knowledge-unlearning")


class ExtractionLikelihood(NamedTuple):
    """The Extraction Likelihood of some rows.

    Attributes:
        mean: The mean over the rows that are long enough, in [0, 1]; NaN if there are none.
        per_row: The value of each row, in [0, 1]; None for a row that is too short.
        n: The length of the n-grams, in tokens.
        stride: The distance between two prefixes that are continued, in tokens.
        definition: "paper" or "knowledge-unlearning", as for ``extraction_likelihood``.
    """

    mean: float
    per_row: list[float | None]
    n: int
    stride: int
    definition: str = "paper"


def greedy_answers(
    model: CausalLM,
    rows: Iterable[Mapping[str, Any]],
    scores: Iterable[TokenScores],
    max_new_tokens: int | list[int],
    batch_size: int = 16,
    eos_token_id: Collection[int] | None = None,
    progress: bool = True,
    description: str = "generating",
) -> list[list[int]]:
    """Continue the prompts of some rows greedily.

    A greedy continuation follows the true answer as long as the true token is the most likely one. So only
    the tokens after the first deviation are generated.

    Args:
        model: The causal LM, on the device where it runs.
        rows: The tokenised rows, with one labelled span each.
        scores: The ``token_scores`` of the rows.
        max_new_tokens: The greatest number of tokens of an answer, >= 1; one for all rows, or one for each.
        batch_size: The number of prompts in a batch, 16 by default.
        eos_token_id: The ids at which an answer ends; None (default) stands for the model's own.
        progress: Whether to show a progress bar, True by default.
        description: The title of the progress bar, "generating" by default.

    Returns:
        The ids of each answer.

    Raises:
        ValueError: ``max_new_tokens`` or ``batch_size`` is less than 1.
    """
    counts = list(max_new_tokens) if isinstance(max_new_tokens, list) else [max_new_tokens]
    for count in counts:
        check_counts(max_new_tokens=count)
    check_counts(batch_size=batch_size)
    eos = eos_ids(model) if eos_token_id is None else eos_token_id
    prompts: list[list[int]] = []
    known: list[list[int]] = []
    for row, score in zip(rows, scores, strict=True):
        ids, positions = row["input_ids"], score.positions.tolist()
        leaves = (~score.memorized).nonzero()
        if len(leaves):
            leave = int(leaves[0])
            known.append([*ids[positions[0] : positions[leave]], int(score.predicted[leave])])
        else:
            known.append(ids[positions[0] : positions[-1] + 1])
        prompts.append(ids[: positions[0]])
    most = counts if isinstance(max_new_tokens, list) else counts * len(known)
    lengths = [
        0 if begun[-1] in eos else max(0, count - len(begun))
        for begun, count in zip(known, most, strict=True)
    ]
    rests = generate_greedy(
        model,
        [prompt + begun for prompt, begun in zip(prompts, known, strict=True)],
        lengths,
        batch_size,
        eos,
        progress,
        description,
    )
    return [(begun + rest)[:count] for begun, rest, count in zip(known, rests, most, strict=True)]


def generated_texts(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    scores: Iterable[TokenScores],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: bool = True,
    description: str = "generating",
    template: QuestionTemplate = TOFU_TEMPLATE,
    stop_strings: Sequence[str] = (),
) -> list[str]:
    """Return the ``greedy_answers`` of some rows as texts.

    An answer ends at one of its ``end_ids``, which is left out of the text. It takes the other arguments of
    ``greedy_answers`` too.

    Args:
        tokenizer: The tokenizer, which decodes the answers.
        template: The template of the rows' questions, which may end an answer by a token of its own; TOFU's
            by default.
        stop_strings: Texts that end an answer, as ``stop_strings`` of ``transformers.GenerationConfig``. The
            text ends before the first of them. None by default.

    Raises:
        ValueError: ``stop_strings`` is no list of texts, or one of them is empty.
    """
    check_stop_strings(stop_strings)
    eos = end_ids(model, tokenizer, template)
    answers = greedy_answers(model, rows, scores, max_new_tokens, batch_size, eos, progress, description)
    decode: Any = tokenizer.decode
    contents = [ids[:-1] if ids and ids[-1] in eos else ids for ids in answers]
    return [until_stop(decode(ids, skip_special_tokens=True), stop_strings) for ids in contents]


def check_stop_strings(stop_strings: Sequence[str]) -> None:
    """Check the texts that end a generated answer.

    Raises:
        ValueError: They are no list of texts, or one of them is empty.
    """
    listed = not isinstance(stop_strings, str) and isinstance(stop_strings, Sequence)
    if not listed or not all(isinstance(stop, str) and stop for stop in stop_strings):
        raise ValueError(f"stop_strings must be a list of texts that are not empty, got {stop_strings!r}")


def until_stop(text: str, stop_strings: Iterable[str]) -> str:
    """Return the text before the first of some strings in it; the whole text if it has none of them."""
    ends = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def end_ids(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase | None, template: QuestionTemplate = TOFU_TEMPLATE
) -> set[int]:
    """Return the ids at which an answer ends: the EOS of the model, the tokenizer's, and the template's.

    Args:
        model: The causal LM.
        tokenizer: The tokenizer, or None.
        template: The template of questions; TOFU's by default, which has no end of its own.
    """
    if tokenizer is None:
        return {*eos_ids(model)}
    of_tokenizer = tokenizer.eos_token_id
    ends = {*eos_ids(model), *([] if of_tokenizer is None else [of_tokenizer])}
    return ends | template.end_ids(tokenizer)


def extracted_tokens(
    rows: Iterable[Mapping[str, Any]], scores: Iterable[TokenScores], ends: Collection[int] = ()
) -> list[int]:
    """Count the tokens of each row that greedy decoding brings back, all of them or none.

    Of a row with a prompt they are the answer, which follows the prompt. A text without a prompt is split:
    its second half follows its first. A row with one token before its first labelled token is such a text,
    because the token may be a BOS. Greedy decoding gives a text if and only if each of its tokens is the most
    likely token given the true tokens before it, so no text is generated.

    Args:
        rows: The tokenised rows.
        scores: The ``token_scores`` of the rows.
        ends: The ids that end a text (``end_ids``); none by default. Such a token need not come back at the
            end of a row.

    Returns:
        For each row the number of tokens that come back word by word, or 0 if a token differs.
    """
    counts = []
    for row, score in zip(rows, scores, strict=True):
        positions, memorized = score.positions.tolist(), score.memorized
        if positions and row["input_ids"][positions[-1]] in ends:
            memorized = memorized[:-1]
        if positions and positions[0] == 1:
            memorized = memorized[len(memorized) // 2 :]
        counts.append(len(memorized) if bool(memorized.all()) else 0)
    return counts


def extraction_likelihood(
    model: CausalLM,
    rows: Sequence[Mapping[str, Any]],
    n: int = 10,
    stride: int = 1,
    batch_size: int = 16,
    progress: bool = True,
    scores: Sequence[TokenScores] | None = None,
    definition: str = "paper",
) -> ExtractionLikelihood:
    """Compute Extraction Likelihood, Eqs. 4 and 5, averaged over rows.

        EL_n(x) = sum over t of OVERLAP_n(f(x_<t), x_>=t) / (T - n)

    T is the number of answer tokens. t runs over the first T - n of them. f is the greedy continuation, which
    ends at EOS or at the answer's length. OVERLAP_n is the share of the generated n-grams that occur in the
    true rest of the answer; it is 0 if fewer than n tokens are generated. Rows with T <= n have no such t and
    are left out.

    The code of Jang et al. (``validation_el`` of knowledge-unlearning) counts otherwise, and the definition
    "knowledge-unlearning" is its:

        EL_n(x) = sum over t of OVERLAP_n(f(x_<t), x_>=t) / (T - n + 1)

    t runs over the first T - n + 1 answer tokens, so the last prefix leaves exactly n tokens. OVERLAP_n is
    the number of the generated n-grams that occur in the true rest, divided by the number of n-grams of the
    true rest. So a continuation that ends early counts less. Rows with T < n are left out.

    A greedy continuation follows the true answer as long as the true token is the most likely one. So one
    teacher-forced pass shows the token at which the continuation of each prefix leaves the truth. Prefixes
    that leave it at the same token share the rest. A fully memorised text needs no generation.

    Args:
        model: The causal LM, on the device where it runs.
        rows: The tokenised rows, each with one document.
        n: The length of the n-grams, in tokens, >= 1; 10 by default.
        stride: The distance between two values of t, in tokens, >= 1; 1 by default. With a larger stride EL_n
            is the mean of OVERLAP_n over these t.
        batch_size: The number of rows in a batch, 16 by default.
        progress: Whether to show progress bars, True by default.
        scores: The ``token_scores`` of the rows; None (default) computes them.
        definition: "paper" (default) or "knowledge-unlearning", as above.

    Raises:
        ValueError: ``n``, ``stride`` or ``batch_size`` is less than 1, the definition is not known, or a row
            packs several documents.
    """
    check_counts(n=n, stride=stride, batch_size=batch_size)
    check_definition(definition)
    if any("position_ids" in row for row in rows):
        raise ValueError("packed rows have several texts; pass each as a row (loku.data.split_documents)")
    if scores is None:
        scores = token_scores(model, rows, batch_size, progress, f"EL{n} (tokens)")
    eos = eos_ids(model)
    prompts: list[tuple[list[int], list[int]]] = []
    lengths: list[int] = []
    row_prefixes = []
    for row, score in zip(rows, scores, strict=True):
        ids = list(row["input_ids"])
        positions = score.positions.tolist()
        start, end = (positions[0], positions[-1] + 1) if positions else (0, 0)
        predicted = dict(zip(positions, score.predicted.tolist(), strict=True))
        # A position inside the answer without a label has no score, so a continuation branches there too.
        leaves = [t for t in range(start, end) if predicted.get(t) != ids[t]]
        branch_of: dict[int, int] = {}
        prefixes: list[tuple[int, int, int | None]] = []
        for t in range(start, end - n + (definition == "knowledge-unlearning"), stride):
            leave = next((m for m in leaves if m >= t), end)
            if leave < end and leave not in branch_of:
                branch_of[leave] = len(prompts)
                first = [predicted[leave]] if leave in predicted else []
                stopped = bool(first) and first[0] in eos
                prompts.append((ids[:leave], first))
                lengths.append(0 if stopped else end - leave - len(first))
            prefixes.append((t, leave, branch_of.get(leave)))
        row_prefixes.append((ids, end, prefixes))

    branches = generate_greedy(
        model, [a + b for a, b in prompts], lengths, batch_size, eos, progress, f"EL{n} (continuations)"
    )
    per_row: list[float | None] = []
    for ids, end, prefixes in row_prefixes:
        overlaps = []
        for t, leave, branch in prefixes:
            rest = [] if branch is None else prompts[branch][1] + branches[branch]
            overlaps.append(_overlap(until_eos(ids[t:leave] + rest, eos), ids[t:end], n, definition))
        per_row.append(sum(overlaps) / len(overlaps) if overlaps else None)
    return ExtractionLikelihood(mean_over_rows(per_row), per_row, n, stride, definition)


def check_definition(definition: str) -> None:
    """Check the definition of ``extraction_likelihood``.

    Raises:
        ValueError: It is not known.
    """
    if definition not in EL_DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(EL_DEFINITIONS)}, got {definition!r}")


def spread_extraction_likelihood(
    model: CausalLM,
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[TokenScores],
    n: int = 10,
    stride: int = 1,
    batch_size: int = 16,
    progress: bool = True,
    definition: str = "paper",
) -> float:
    """Compute the mean of ``extraction_likelihood`` with the rows shared out among the processes.

    All processes must call this, with all rows and the ``token_scores`` of all rows. It takes the arguments
    of ``extraction_likelihood``. Only the main process shows progress. With sharded weights (FSDP2) every
    process generates for all rows, because the number of forwards depends on the tokens.
    """
    check_counts(n=n, stride=stride, batch_size=batch_size)  # in every process, also in one without rows
    check_definition(definition)
    progress = progress and is_main_process()

    def per_row(rows: Sequence[Mapping[str, Any]], scores: Sequence[TokenScores]) -> list[float | None]:
        found = extraction_likelihood(model, rows, n, stride, batch_size, progress, scores, definition)
        return found.per_row

    if has_shards(model):
        values = per_row(rows, scores)
        reshard_(model)
        return mean_over_rows(from_main_process(values))
    return mean_over_rows(spread(per_row, rows, scores))


def _overlap(generated: Sequence[int], truth: Sequence[int], n: int, definition: str) -> float:
    true = _ngrams(truth, n)
    known = set(true)
    found = [gram in known for gram in _ngrams(generated, n)]
    count = len(found) if definition == "paper" else len(true)
    return sum(found) / count if count else 0.0


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
