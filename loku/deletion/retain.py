"""The rows to keep, for users who have none or too few."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loku.counts import check_counts, check_max_length
from loku.data.question_templates import TOFU_TEMPLATE, QuestionTemplate
from loku.data.row_errors import BadRow, RowError
from loku.deletion.entities import Mentions, entities, row_texts
from loku.deletion.neighbours import nearest, words_of
from loku.deletion.own_texts import write_texts
from loku.deletion.request import RetainSource
from loku.fingerprints import texts_fingerprint
from loku.models import CausalLM
from loku.process_state import random_states_kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEAR = 0.7  # Jaccard similarity from which a neighbour is a near duplicate
MEASURED = 5  # one of so many rows measures the utility


def build_retain(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    source: RetainSource,
    forget_rows: Sequence[Any],
    *,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> tuple[list[Any], dict[str, Any]]:
    """Build a retain set.

    Its parts follow each other:

    1. the user's own rows, as they are;
    2. the neighbours: the rows of the corpus that are nearest to the forget rows (``nearest``). A row that
       mentions an entity of a forget row (``entities``), that occurs in the forget rows or earlier in the
       retain set, or that is a near duplicate of a forget row without entities, is none. A near duplicate
       without the entities of its forget row is one: it asks the same about something else.
    3. texts that the model writes itself (``write_texts``), none of which mentions such an entity.

    Args:
        model: The original causal LM, on the device where it runs.
        tokenizer: The tokenizer.
        source: Where the rows come from.
        forget_rows: The rows to forget.
        seed: The seed of the model's texts, 0 by default. The random generators of the process are left
            alone.
        batch_size: The number of texts in a batch, 16 by default.
        max_length: The greatest number of tokens of a text that the model writes; None (default) sets none.
        progress: Whether to show progress bars, False by default.
        template: The template of the questions to forget; TOFU's by default.

    Returns:
        The rows, in forms of ``loku.data.tokenize_dataset``, and the facts: ``rows``, their number, their
        ``digest``, the ``seed``, the number of ``entities``, and those of the parts ``given``, ``neighbours``
        and ``sampled``. They hold no text.

    Raises:
        ValueError: The source names no rows, no row is left, or a number is out of range.
        RowError: A forget row or a row of the corpus has no text.
    """
    check_counts(batch_size=batch_size)
    check_counts(0, neighbours=source.neighbours, sampled=source.sampled, seed=seed)
    check_max_length(max_length)
    wants_neighbours = source.corpus is not None and source.neighbours > 0
    if source.given is None and not wants_neighbours and not source.sampled:
        raise ValueError(
            "there are no rows to keep, and without them unlearning spoils the whole model: give retain "
            "rows, a corpus whose neighbours are kept, or let the model write texts (sampled: 32)"
        )
    with random_states_kept():  # reading data may load libraries that draw numbers
        return _built(
            model,
            tokenizer,
            source,
            forget_rows,
            seed,
            batch_size,
            max_length,
            progress,
            template,
            wants_neighbours,
        )


def _built(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    source: RetainSource,
    forget_rows: Sequence[Any],
    seed: int,
    batch_size: int,
    max_length: int | None,
    progress: bool,
    template: QuestionTemplate,
    wants_neighbours: bool,
) -> tuple[list[Any], dict[str, Any]]:
    mentions = Mentions(names := entities(forget_rows, tokenizer))
    facts: dict[str, Any] = {"seed": seed, "entities": len(names)}
    rows: list[Any] = []
    if source.given is not None:
        from loku.deletion.selection import select_rows

        given = select_rows(source.given, "retain")
        rows += given.rows
        facts["given"] = {"rows": len(given.rows), "total": given.total, "source": given.source}
    if wants_neighbours and source.corpus is not None:
        from loku.deletion.selection import select_rows

        corpus = select_rows(source.corpus, "corpus")
        found, counts = neighbours(corpus.rows, forget_rows, rows, source.neighbours, mentions, tokenizer)
        rows += found
        facts["neighbours"] = {**counts, "total": corpus.total, "source": corpus.source}
    if source.sampled:
        written = write_texts(
            model,
            tokenizer,
            source.sampled,
            forget_rows,
            mentions,
            seed=seed,
            batch_size=batch_size,
            max_length=max_length,
            progress=progress,
            template=template,
        )
        rows += written.rows
        facts["sampled"] = written.facts
    if not rows:
        raise ValueError(
            "no row to keep was found: the query of the retain rows or of the corpus finds none, and the "
            "model wrote no text of use; give retain rows of your own"
        )
    facts["rows"] = len(rows)
    facts["digest"] = rows_digest(rows)
    return rows, facts


def neighbours(
    corpus: Sequence[Any],
    forget_rows: Sequence[Any],
    others: Sequence[Any],
    count: int,
    mentions: Mentions,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """Choose the rows of a corpus that are nearest to the forget rows, as ``build_retain`` describes.

    Args:
        corpus: The rows of the corpus.
        forget_rows: The rows to forget.
        others: Rows that are in the retain set already.
        count: The number of rows, at most.
        mentions: Tells whether a text mentions an entity of the forget rows.
        tokenizer: The tokenizer, which decodes rows of ``input_ids``; None (default) refuses them.

    Returns:
        The rows, and their facts: ``asked``, ``rows``, and ``dropped``, the numbers of rows of the corpus
        that have ``mentions`` of an entity, and of nearest rows that are a ``duplicate`` or ``near``.
    """
    from loku.deletion.duplicates import find_duplicates

    forget_texts = _texts(forget_rows, "forget", tokenizer)
    texts = _texts(corpus, "corpus", tokenizer)
    allowed = [not mentions(text) for text in texts]
    dropped = Counter(mentions=allowed.count(False))
    named = [mentions(text) for text in forget_texts]
    seen = {tuple(words_of(text)) for text in (*forget_texts, *_texts(others, "retain", tokenizer))}
    chosen: list[int] = []
    candidates = nearest(forget_texts, texts, allowed, 2 * count + 64)
    while len(chosen) < count:
        block: list[int] = []
        for index in candidates:
            key = tuple(words_of(texts[index]))
            if key in seen:
                dropped["duplicate"] += 1
                continue
            seen.add(key)
            block.append(index)
            if len(block) == count - len(chosen):
                break
        if not block:
            break
        rows = {"corpus": [corpus[index] for index in block]}
        # A duplicate of a row with entities has none of them, so it differs in what is to be forgotten.
        near = {
            duplicate.index
            for duplicate in find_duplicates(forget_rows, rows, NEAR)
            if duplicate.kind != "near" or not named[duplicate.forget_index]
        }
        dropped["near"] += len(near)
        chosen += [index for at, index in enumerate(block) if at not in near]
    facts = {"asked": count, "rows": len(chosen), "dropped": dict(sorted((+dropped).items()))}
    return [corpus[index] for index in chosen], facts


def _texts(rows: Sequence[Any], name: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    texts = []
    for index, row in enumerate(rows):
        try:
            texts.append("\n".join(row_texts(row, tokenizer)).strip())
        except BadRow as error:
            raise RowError(name, index, error) from error
    return texts


def rows_digest(rows: Sequence[Any]) -> str:
    """Return the digest of rows, in their order; what JSON cannot hold counts as its ``str``."""
    return texts_fingerprint(json.dumps(row, sort_keys=True, default=str) for row in rows)


def split_for_utility(rows: Sequence[Any], seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Hold rows out that measure the utility and are not trained on.

    One of each five rows in a row is held out, drawn by the seed, so each part of the retain set has its
    share. Of two to four rows one is held out.

    Args:
        rows: The retain set, of at least two rows.
        seed: The seed, 0 by default.

    Returns:
        The rows to train on, and the rows to measure, both in their order.

    Raises:
        ValueError: There are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(
            f"the retain set has {len(rows)} rows, and measuring the utility needs one that is not trained "
            "on: give at least two"
        )
    generator = random.Random(seed)
    blocks = [range(begin, min(begin + MEASURED, len(rows))) for begin in range(0, len(rows), MEASURED)]
    if len(blocks) > 1 and len(blocks[-1]) < MEASURED:
        blocks.pop()  # a part of a block would be measured more often than trained on
    measured = {generator.choice(block) for block in blocks}
    train = [row for index, row in enumerate(rows) if index not in measured]
    return train, [rows[index] for index in sorted(measured)]
