"""How well a model answers, completes and writes, beside what it is to forget."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from loku.counts import check_counts
from loku.evaluation.generation import eos_ids, generate_greedy
from loku.evaluation.scores import TokenScores, mean_answer_probability, token_scores
from loku.evaluation.text_fluency import repetition
from loku.fingerprints import texts_fingerprint
from loku.models import CausalLM
from loku.probe.rows import KINDS, ProbeTokens, has_chat_template, probe_rows, probe_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a greedy text, at most. An answer may be a sentence; a completion is the next word or two.
NEW_TOKENS = {"arithmetic": 24, "capitals": 24, "completions": 6, "openings": 64}
LEAST_TOKENS = 8  # of an opening's text that is not degenerate
MOST_REPETITION = 0.5  # of an opening's text that is not degenerate

# What the original model must reach, so that a kind is judged. Less is chance, or a few lucky rows.
LEAST_SCORE = 0.15  # the mean of accuracy and probability; a digit among ten is guessed with 0.1
LEAST_QUALITY = 0.6  # of the openings
MOST_BITS_PER_BYTE = 2.0  # of the sentences: a model that counts letters in a row of three has more

# A sign and a fraction belong to a number: 4 is in neither -4 nor 3.4, but in 4.0.
_WORD = re.compile(r"(?:(?<!\w)[-\u2212](?=\d))?[^\W_]+(?:(?<=\d)(?!\.0+\b)[.,]\d+)*")


def measure_probe(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    exclude: Iterable[str] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the general ability of a model by the probe, ``loku.probe.probe_rows``.

    Questions are asked in the chat template of the tokenizer, if it has one. Texts are greedy, so the result
    depends on the weights alone.

    Args:
        model: The causal LM, on the device where it runs.
        tokenizer: The tokenizer.
        batch_size: The number of rows in a batch, 16 by default.
        exclude: Names and numbers, such as ``loku.deletion.entities.entities`` returns. Rows that mention one
            are left out. None by default.
        progress: Whether to show progress bars, False by default.

    Returns:
        A dict for each kind of rows, with ``rows`` and ``left_out``, their numbers, and the measures, which
        are None if no row is left:

        - "arithmetic", "capitals", "completions": ``probability``, the mean over rows of the answer's
          exp(-mean token loss) after the begin of its sentence, and ``accuracy``, the share of rows whose
          greedy text has the answer, as whole words in any case;
        - "fluency": ``loss``, the mean loss of a token in nats, ``perplexity``, its exp, and
          ``bits_per_byte``, which compares models with different tokenizers;
        - "openings": ``repetition``, the mean share of a greedy text's 4-grams of tokens that occurred
          before in it, ``degenerate``, the share of texts that have fewer than 8 tokens or a repetition above
          a half, and ``quality``, the mean over texts of 1 - repetition, 0 for a degenerate text.

        Beside them ``form`` is "chat" or "plain", and ``digest`` is that of the rows. A loss that is too
        large for a number is None.

    Raises:
        ValueError: ``batch_size`` is less than 1, or the chat template cannot render a question.
        FloatingPointError: A loss is NaN.
    """
    check_counts(batch_size=batch_size)
    rows, all_rows = probe_rows(exclude), probe_rows()
    tokens = probe_tokens(rows, tokenizer)
    scored = {at: row.scored for at, row in enumerate(tokens) if row.scored is not None}
    losses = token_scores(model, list(scored.values()), batch_size, progress, "probe")
    scores = dict(zip(scored, losses, strict=True))
    texts = _greedy(model, tokenizer, rows, tokens, batch_size, progress)
    result: dict[str, Any] = {}
    for kind in KINDS:
        chosen = [at for at, row in enumerate(rows) if row["kind"] == kind]
        measured: dict[str, float | None]
        if kind == "fluency":
            lengths = [len(rows[at]["text"].encode()) for at in chosen]
            measured = _fluency([scores[at] for at in chosen], lengths)
        elif kind == "openings":
            measured = _openings([texts[at] for at in chosen])
        else:
            measured = _answers(
                [rows[at] for at in chosen],
                [scores[at] for at in chosen],
                [_decoded(tokenizer, texts[at]) for at in chosen],
            )
        total = sum(row["kind"] == kind for row in all_rows)
        result[kind] = {"rows": len(chosen), "left_out": total - len(chosen), **measured}
    result["form"] = "chat" if has_chat_template(tokenizer) else "plain"
    result["digest"] = texts_fingerprint(json.dumps(row, sort_keys=True) for row in rows)
    return result


def _greedy(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    tokens: Sequence[ProbeTokens],
    batch_size: int,
    progress: bool,
) -> dict[int, list[int]]:
    """Return the ids of the greedy text of each row that has a prompt, without the end of the sequence."""
    continued = [at for at, row in enumerate(tokens) if row.prompt]
    eos = {*eos_ids(model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    generated = generate_greedy(
        model,
        [tokens[at].prompt for at in continued],
        [NEW_TOKENS[rows[at]["kind"]] for at in continued],
        batch_size,
        eos,
        progress,
        "probe (texts)",
    )
    return {
        at: [token for token in ids if token not in eos] for at, ids in zip(continued, generated, strict=True)
    }


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    decode: Any = tokenizer.decode
    return decode(ids, skip_special_tokens=True)


def has_answer(text: str, row: Mapping[str, Any]) -> bool:
    """Whether a text has the answer of a row of the probe, as whole words in any case.

    A model without a chat template goes on to the next question, so its first line alone counts.

    Args:
        text: The text.
        row: The row, from ``probe_rows``.
    """
    first = text.strip().split("\nQuestion:")[0]
    words = f" {_words(first)} "
    return any(f" {_words(answer)} " in words for answer in (row["answer"], *row.get("accept", ())))


def _words(text: str) -> str:
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _answers(
    rows: Sequence[Mapping[str, Any]], scores: Sequence[TokenScores], texts: Sequence[str]
) -> dict[str, float | None]:
    if not rows:
        return {"probability": None, "accuracy": None}
    right = [has_answer(text, row) for row, text in zip(rows, texts, strict=True)]
    return {"probability": mean_answer_probability(scores), "accuracy": sum(right) / len(right)}


def _fluency(scores: Sequence[TokenScores], lengths: Sequence[int]) -> dict[str, float | None]:
    if not scores:
        return {"loss": None, "perplexity": None, "bits_per_byte": None}
    losses = torch.cat([score.losses for score in scores])
    loss, total = losses.mean().item(), losses.sum().item()
    return {
        "loss": _finite(loss),
        "perplexity": _finite(losses.mean().exp().item()),
        "bits_per_byte": _finite(total / math.log(2) / sum(lengths)),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _openings(texts: Sequence[list[int]]) -> dict[str, float | None]:
    if not texts:
        return {"repetition": None, "degenerate": None, "quality": None}
    repeated = [repetition(text) for text in texts]
    bad = [
        len(text) < LEAST_TOKENS or share > MOST_REPETITION
        for text, share in zip(texts, repeated, strict=True)
    ]
    qualities = [0.0 if is_bad else 1 - share for is_bad, share in zip(bad, repeated, strict=True)]
    return {
        "repetition": sum(repeated) / len(texts),
        "degenerate": sum(bad) / len(texts),
        "quality": sum(qualities) / len(texts),
    }


def relative_ability(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the general ability of a model before and after a change, such as unlearning.

    A share of 1 means that nothing is lost; what is gained does not count. The share of questions is that of
    the mean of accuracy and probability: the accuracy alone moves in steps of a row. The share of fluency is
    the ratio of the perplexities, the original's over the changed one's. The share of openings is that of
    their quality.

    What the original model cannot do either is not judged: questions of which that mean is less than 0.15,
    openings of a quality less than 0.6, sentences of more than 2 bits for a byte.

    Args:
        before: The ``measure_probe`` of the original model.
        after: That of the changed model, with the same ``exclude``.

    Returns:
        ``shares``, for each kind a number in [0, 1], or None if it is not judged; ``mean`` and ``least``, the
        mean and the smallest of them, and the ``least_kind``, all None if no kind is judged; and
        ``not_judged``, for each such kind the reason.

    Raises:
        ValueError: The two were measured on other rows, or in another form.
    """
    for name in ("digest", "form"):
        if before[name] != after[name]:
            raise ValueError(
                f"the probes before and after differ in their {name} ({before[name]} and {after[name]}); "
                "measure both models with the same tokenizer and the same exclude="
            )
    shares: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for kind in KINDS:
        then, now = before[kind], after[kind]
        shares[kind] = _share(kind, then, now)
        if shares[kind] is None:
            reasons[kind] = (
                "all its rows mention what is to be forgotten"
                if not then["rows"]
                else "the original model cannot do it either"
            )
    judged = {kind: share for kind, share in shares.items() if share is not None}
    least_kind = min(judged, key=judged.__getitem__, default=None)
    return {
        "shares": shares,
        "mean": sum(judged.values()) / len(judged) if judged else None,
        "least": None if least_kind is None else judged[least_kind],
        "least_kind": least_kind,
        "not_judged": reasons,
    }


def _share(kind: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> float | None:
    if kind == "fluency":
        if then["bits_per_byte"] is None or then["bits_per_byte"] > MOST_BITS_PER_BYTE:
            return None
        # A loss beyond every number leaves nothing.
        return 0.0 if now["loss"] is None else min(1.0, math.exp(then["loss"] - now["loss"]))
    if kind == "openings":
        then_score, now_score, least = then["quality"], now["quality"], LEAST_QUALITY
    else:
        then_score, now_score, least = _score(then), _score(now), LEAST_SCORE
    if then_score is None or then_score < least:
        return None
    return min(1.0, now_score / then_score)


def _score(measured: Mapping[str, Any]) -> Any:
    if measured["accuracy"] is None:
        return None
    return (measured["accuracy"] + measured["probability"]) / 2
