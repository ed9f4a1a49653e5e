"""Rows of other sets that are the same as a forget row, or nearly the same.

Two rows are nearly the same if the Jaccard similarity of their shingles is at least a threshold. A row's
shingles are all pieces of 5 characters of its text in its normal form (Broder, "On the resemblance and
containment of documents", 1997). So they need no words, and a changed word costs a short row few of them.

MinHash with locality-sensitive hashing (``datasketch``) proposes the pairs. The exact similarity then
decides, so every pair that is reported is one. A pair at the threshold is proposed with a probability of at
least 0.999, and a pair above it with a greater one. A paraphrase has other characters, and is not found; nor
is a row that is a part of a much longer text.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

from loku.deletion.texts import normal_form, row_text

SHINGLE = 5  # characters; no two of TOFU's 4000 rows are as similar as 0.6
_PERMUTATIONS = 128
_RECALL = 0.999  # of a pair at the threshold
_MOST_BAND = 32
_PIECE = 10_000  # shingles that are hashed at once; each takes a KiB
TAKEN_ALONG = ("rest", "retain")  # the sets whose near duplicates can be forgotten, too


@dataclass(frozen=True)
class Duplicate:
    """A row that is the same as a forget row, or nearly the same.

    Attributes:
        set: The name of the row's set.
        index: The index of the row in its set, from 0.
        forget_index: The index of the forget row that is most similar; the first of equals.
        kind: "exact" for equal texts, "normalised" for texts that differ in case, punctuation, white space or
            Unicode form alone, "near" for a similarity of at least the threshold.
        similarity: The Jaccard similarity of the shingles of the normal forms; 1 but for "near".
    """

    set: str
    index: int
    forget_index: int
    kind: Literal["exact", "normalised", "near"]
    similarity: float


@dataclass(frozen=True)
class Separated:
    """The sets of a request, after their duplicates have been dealt with.

    Attributes:
        forget: The forget rows, with those that are taken along at the end.
        sets: The other sets by their names, without the rows that are left out.
        facts: What was found and done, as JSON has it: numbers and indices, and no text.
        left_out: The rows that were left out of "retain" and "corpus".
    """

    forget: list[Any]
    sets: dict[str, list[Any]]
    facts: dict[str, Any]
    left_out: list[Any] = field(default_factory=list)


def find_duplicates(
    forget: Sequence[Any], others: Mapping[str, Sequence[Any]], similarity: float = 0.7
) -> list[Duplicate]:
    """Find the rows of other sets that are the same as a forget row, or nearly the same.

    The texts of ``row_text`` are compared: the prompt and the answer. Other columns do not count.

    Args:
        forget: The forget rows.
        others: The other sets by their names.
        similarity: The Jaccard similarity from which two rows are nearly the same, in (0, 1]; 0.7 by default.

    Returns:
        The duplicates in the order of the sets and of their rows, one for each such row. The result depends
        on the arguments alone.

    Raises:
        ValueError: The similarity is out of its range.
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity must be > 0 and <= 1, got {similarity}")
    known = _ForgetRows(forget, similarity)
    found = []
    for name, rows in others.items():
        for index, row in enumerate(rows):
            match = known.match(row_text(row))
            if match is not None:
                found.append(Duplicate(name, index, *match))
    return found


def separate(
    forget: Sequence[Any],
    others: Mapping[str, Sequence[Any]],
    duplicates: Sequence[Duplicate],
    include: bool,
    indices: Mapping[str, Sequence[int]] | None = None,
) -> Separated:
    """Take the duplicates along with the forget rows, or leave them where they are.

    A row that is kept works against forgetting a row that it equals, and a hold-out row that the model knows
    makes the limits too high. So a row with the text of a forget row, but for case, punctuation, white space
    and Unicode form, leaves every set, whatever ``include`` is. With ``include`` the near duplicates leave
    their sets, too, and all duplicates of "rest" and "retain" are forgotten. Without it near duplicates stay,
    and the facts list them.

    Args:
        forget: The forget rows.
        others: The other sets by their names: "rest" (the rows of the forget rows' source that were not
            selected), "retain", "holdout", "corpus" or others.
        duplicates: The duplicates of ``find_duplicates`` for these sets.
        include: Whether near duplicates are taken along.
        indices: The indices of the rows of a set in its source, for the facts; a set that is not named has
            the indices 0, 1, 2, ...

    Raises:
        ValueError: No retain row is left.
    """
    found: dict[str, dict[int, Duplicate]] = {name: {} for name in others}
    for duplicate in duplicates:
        found[duplicate.set][duplicate.index] = duplicate
    left_out = {
        name: {index for index, duplicate in of_set.items() if include or duplicate.kind != "near"}
        for name, of_set in found.items()
    }
    texts = {row_text(row) for row in forget}
    along: dict[str, list[Any]] = {name: [] for name in others}
    for name in TAKEN_ALONG if include else ():
        for index in sorted(left_out.get(name, ())):
            row = others[name][index]
            if (text := row_text(row)) not in texts:
                texts.add(text)
                along[name].append(row)
    sets = {
        name: [row for index, row in enumerate(rows) if index not in left_out[name]]
        for name, rows in others.items()
    }
    if others.get("retain") and not sets["retain"]:
        raise ValueError(
            f"retain: all of its {len(others['retain'])} rows are forget rows or nearly the same; name others"
        )
    total = [*forget, *(row for rows in along.values() for row in rows)]
    facts = {
        "included": include,
        "forget_rows": {"asked": len(forget), "with_near_duplicates": len(total)},
        "sets": {
            name: _set_facts(forget, rows, found[name], len(left_out[name]), len(along[name]))
            for name, rows in others.items()
        },
        "duplicates": [_told(duplicate, indices or {}) for duplicate in duplicates],
    }
    dropped = [others[name][index] for name in ("retain", "corpus") for index in left_out.get(name, ())]
    return Separated(total, sets, facts, dropped)


def _set_facts(
    forget: Sequence[Any], rows: Sequence[Any], found: Mapping[int, Duplicate], left_out: int, along: int
) -> dict[str, int]:
    texts = {row_text(row) for row in rows}
    kinds = [duplicate.kind for duplicate in found.values()]
    return {
        "rows": len(rows),
        **{kind: kinds.count(kind) for kind in ("exact", "normalised", "near")},
        "forget_rows_that_occur": sum(row_text(row) in texts for row in forget),
        "left_out": left_out,
        "taken_along": along,
    }


def _told(duplicate: Duplicate, indices: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    told = asdict(duplicate)
    if duplicate.set in indices:
        told["index"] = indices[duplicate.set][duplicate.index]
    told["similarity"] = round(duplicate.similarity, 4)
    return told


class _ForgetRows:
    """The forget rows, in the forms by which a row is looked up among them."""

    def __init__(self, rows: Sequence[Any], similarity: float):
        from datasketch import MinHash, MinHashLSH  # it imports scipy

        self.similarity = similarity
        texts = [row_text(row) for row in rows]
        self.exact: dict[str, int] = {}
        self.normalised: dict[str, int] = {}  # in the order of the rows
        for index, text in enumerate(texts):
            if text.strip():
                self.exact.setdefault(text, index)
            if form := normal_form(text):
                self.normalised.setdefault(form, index)
        self.forms = [*self.normalised]
        self.shingles = lru_cache(maxsize=10_000)(lambda number: shingles(self.forms[number]))
        self.empty = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=_hash)
        self.index = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(similarity))
        sizes = []
        for number, form in enumerate(self.forms):
            pieces = shingles(form)
            sizes.append(len(pieces))
            self.index.insert(number, self._sketch(pieces))
        # A Jaccard similarity is at most the ratio of the sizes.
        self.least, self.most = min(sizes, default=1) * similarity, max(sizes, default=0) / similarity

    def match(self, text: str) -> tuple[int, Literal["exact", "normalised", "near"], float] | None:
        """Return the index of the forget row most like a text, the kind and the similarity; None for none."""
        if text in self.exact:
            return self.exact[text], "exact", 1.0
        form = normal_form(text)
        if form in self.normalised:
            return self.normalised[form], "normalised", 1.0
        if not form or len(form) < self.least:
            return None
        pieces = shingles(form)
        if not self.least <= len(pieces) <= self.most:
            return None
        best: tuple[float, int] | None = None
        for number in self.index.query(self._sketch(pieces)):
            candidate = jaccard(pieces, self.shingles(number))
            if candidate >= self.similarity and (best is None or (candidate, -number) > (best[0], -best[1])):
                best = candidate, number
        if best is None:
            return None
        return self.normalised[self.forms[best[1]]], "near", best[0]

    def _sketch(self, pieces: frozenset[str]) -> Any:
        sketch = self.empty.copy()
        for some in _cut(sorted(pieces) if len(pieces) > _PIECE else [*pieces]):
            sketch.update_batch(some)
        return sketch


def _cut(pieces: list[str]) -> Iterator[list[str]]:
    return (pieces[begin : begin + _PIECE] for begin in range(0, len(pieces), _PIECE))


def _hash(piece: str) -> int:
    return zlib.crc32(piece.encode("utf-8", "surrogatepass"))


def shingles(form: str) -> frozenset[str]:
    """Return all pieces of ``SHINGLE`` characters of a text; a shorter text is its only piece."""
    return frozenset(form[begin : begin + SHINGLE] for begin in range(max(1, len(form) - SHINGLE + 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the share of the elements of two sets, not both empty, that are in both."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def bands(similarity: float) -> tuple[int, int]:
    """Return the number of bands and of rows of a band, for locality-sensitive hashing.

    A pair of the Jaccard similarity s is proposed with the probability 1 - (1 - s^rows)^bands. The rows are
    as many as leave 0.999 at the threshold; more rows propose fewer other pairs.
    """
    for rows in range(_MOST_BAND, 1, -1):
        number = _PERMUTATIONS // rows
        if 1 - (1 - similarity**rows) ** number >= _RECALL:
            return number, rows
    return _PERMUTATIONS, 1
