"""How much of a text can be drawn out of a model: greedy generation and Extraction Likelihood.

Cha et al. (ICLR 2025), Eqs. 4 and 5, after Jang et al. (ACL 2023). For rows, answers and Eq. 6 see
``loku.evaluation.scores``.
"""

import math
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from loku.distributed import is_main_process, spread
from loku.evaluation.scores import token_scores
from loku.models import evaluating, model_device


class ExtractionLikelihood(NamedTuple):
    """``mean`` is NaN if no row is long enough; ``per_row`` has None for those that are not."""

    mean: float
    per_row: list
    n: int
    stride: int


def generate_greedy(
    model, prompts, max_new_tokens, batch_size=16, eos_token_id=None, progress=True, description="generating"
):
    """Greedy continuations of token lists.

    ``prompts``: list of non-empty lists of ids. ``max_new_tokens``: one int a prompt. Returns a list of
    lists of new ids, each cut after the first ``eos_token_id`` (an int, a list, or None: the model's own)
    or at its length, or where the model's context ends. Left-padded batches with the KV cache; prompts that
    want similar lengths go together.
    """
    from transformers import GenerationConfig

    if eos_token_id is None:
        eos_token_id = _eos_ids(model)
    eos = [eos_token_id] if isinstance(eos_token_id, int) else sorted(eos_token_id)
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    lengths = [
        min(length, context - len(prompt)) for prompt, length in zip(prompts, max_new_tokens, strict=True)
    ]
    batches = _generation_batches([len(prompt) for prompt in prompts], lengths, batch_size, context)
    generated = [[] for _ in prompts]
    device = model_device(model)
    with evaluating(model):
        for chosen in tqdm(batches, desc=description, disable=not progress, leave=False):
            width = max(len(prompts[i]) for i in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            # What is left out is filled in from the model's own generation config, where chat models keep
            # sampling and repetition penalties: spell out plain greedy decoding.
            config = GenerationConfig(
                max_new_tokens=lengths[chosen[0]],
                do_sample=False,
                num_beams=1,
                temperature=1.0,
                top_p=1.0,
                top_k=50,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                min_new_tokens=0,
                eos_token_id=eos or None,
                pad_token_id=eos[0] if eos else 0,
            )
            output = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            for index, tokens in zip(chosen, output[:, width:].tolist(), strict=True):
                generated[index] = _until_eos(tokens[: lengths[index]], eos)
    return generated


def _generation_batches(widths, lengths, batch_size, context):
    """Indices of the prompts that want tokens, in batches whose first wants most, and of which each, as wide
    as the widest and as long as the longest, fits into the context."""
    order = [i for i, length in enumerate(lengths) if length > 0]
    batches, width = [], 0
    for index in sorted(order, key=lambda i: (-lengths[i], -widths[i])):
        width = max(width, widths[index])
        if not batches or len(batches[-1]) == batch_size or width + lengths[batches[-1][0]] > context:
            batches.append([])
            width = widths[index]
        batches[-1].append(index)
    return batches


def greedy_answers(
    model,
    rows,
    scores,
    max_new_tokens,
    batch_size=16,
    eos_token_id=None,
    progress=True,
    description="generating",
):
    """Greedy continuations of the rows' prompts, at most ``max_new_tokens`` (an int) each: lists of ids.

    ``rows`` have one labelled span each, and ``scores`` are their ``token_scores``: a greedy continuation
    follows the true answer as far as the most likely tokens do, so only what comes after is generated.
    """
    eos = _eos_ids(model) if eos_token_id is None else eos_token_id
    prompts, known = [], []
    for row, score in zip(rows, scores, strict=True):
        ids, positions = row["input_ids"], score.positions.tolist()
        leaves = (~score.memorized).nonzero()
        if len(leaves):
            leave = int(leaves[0])
            known.append([*ids[positions[0] : positions[leave]], int(score.predicted[leave])])
        else:
            known.append(ids[positions[0] : positions[-1] + 1])
        prompts.append(ids[: positions[0]])
    lengths = [0 if begun[-1] in eos else max(0, max_new_tokens - len(begun)) for begun in known]
    rests = generate_greedy(
        model,
        [prompt + begun for prompt, begun in zip(prompts, known, strict=True)],
        lengths,
        batch_size,
        eos,
        progress,
        description,
    )
    return [(begun + rest)[:max_new_tokens] for begun, rest in zip(known, rests, strict=True)]


def generated_texts(
    model,
    tokenizer,
    rows,
    scores,
    max_new_tokens,
    batch_size=16,
    progress=True,
    description="generating",
):
    """``greedy_answers`` as text; they end at the model's or the tokenizer's EOS, which is left out."""
    eos = {*_eos_ids(model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    answers = greedy_answers(model, rows, scores, max_new_tokens, batch_size, eos, progress, description)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def extraction_likelihood(model, rows, n=10, stride=1, batch_size=16, progress=True, scores=None):
    """Extraction Likelihood, Eqs. 4 and 5, averaged over rows. Returns ``ExtractionLikelihood``.

        EL_n(x) = sum over t of OVERLAP_n(f(x_<t), x_>=t) / (T - n)

    T is the number of answer tokens, t runs over the T - n first of them (or every ``stride``-th, then the
    mean of those is taken), f is the greedy continuation, which ends at EOS or at the answer's length,
    and OVERLAP_n is the share of the generated n-grams that occur in the true rest of the answer (0 if
    fewer than n tokens are generated). Rows with T <= n have no such t: they are left out.

    A greedy continuation follows the truth as far as the model's most likely tokens do, so one
    teacher-forced pass tells where each leaves it, and prefixes that leave at the same place share the
    rest. A text that is fully memorised needs no generation at all. ``scores``: the rows' ``token_scores``,
    if they are known already.
    """
    if n < 1 or stride < 1:
        raise ValueError(f"n and stride must be at least 1, got n={n} and stride={stride}")
    if any("position_ids" in row for row in rows):
        raise ValueError("packed rows have several texts; pass each as a row (loku.data.split_documents)")
    if scores is None:
        scores = token_scores(model, rows, batch_size, progress, f"EL{n} (tokens)")
    eos = _eos_ids(model)
    prompts, lengths, row_prefixes = [], [], []
    for row, score in zip(rows, scores, strict=True):
        ids = list(row["input_ids"])
        positions = score.positions.tolist()
        start, end = (positions[0], positions[-1] + 1) if positions else (0, 0)
        predicted = dict(zip(positions, score.predicted.tolist(), strict=True))
        # A position inside the answer that has no label was not scored: a continuation branches there too.
        leaves = [t for t in range(start, end) if predicted.get(t) != ids[t]]
        branch_of, prefixes = {}, []
        for t in range(start, end - n, stride):
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
    per_row = []
    for ids, end, prefixes in row_prefixes:
        overlaps = []
        for t, leave, branch in prefixes:
            rest = [] if branch is None else prompts[branch][1] + branches[branch]
            overlaps.append(_overlap(_until_eos(ids[t:leave] + rest, eos), ids[t:end], n))
        per_row.append(sum(overlaps) / len(overlaps) if overlaps else None)
    return ExtractionLikelihood(mean_over_rows(per_row), per_row, n, stride)


def spread_extraction_likelihood(model, rows, scores, n=10, stride=1, batch_size=16, progress=True):
    """The mean of ``extraction_likelihood`` over rows that are shared out among processes.

    ``scores`` are the ``token_scores`` of all rows.
    """
    progress = progress and is_main_process()

    def per_row(rows, scores):
        return extraction_likelihood(model, rows, n, stride, batch_size, progress, scores).per_row

    return mean_over_rows(spread(per_row, rows, scores))


def mean_over_rows(per_row):
    """Mean of the values that are not None; NaN if there are none."""
    known = [value for value in per_row if value is not None]
    return sum(known) / len(known) if known else math.nan


def _overlap(generated, truth, n):
    known = set(_ngrams(truth, n))
    found = [gram in known for gram in _ngrams(generated, n)]
    return sum(found) / len(found) if found else 0.0


def _ngrams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _until_eos(tokens, eos):
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]


def _eos_ids(model):
    """The model's end-of-sequence ids, as a sorted list (chat models have several)."""
    sources = (getattr(model, "generation_config", None), model.config)
    eos = next((e for s in sources if (e := getattr(s, "eos_token_id", None)) is not None), [])
    return [eos] if isinstance(eos, int) else sorted(eos)
