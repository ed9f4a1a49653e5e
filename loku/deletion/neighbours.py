"""The rows of a corpus that are nearest to the rows to forget, by TF-IDF and the cosine."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np

# A character of a script without spaces is a word of its own.
_WORDS = re.compile(
    "[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+"
)
_BLOCK = 2**24  # similarities that are in memory at a time


def words_of(text: str) -> list[str]:
    """Return the words of a text, in any case: runs of letters and digits."""
    return _WORDS.findall(text.casefold())


def nearest(
    wanted: Sequence[str], corpus: Sequence[str], allowed: Sequence[bool], most: int
) -> Iterator[int]:
    """Yield the texts of a corpus that are nearest to some texts, the nearest to each first.

    A text is the vector of its words with the weights (1 + log(occurrences)) (1 + log((1 + n) / (1 + df)))
    (Salton and Buckley, 1988), for n texts of which df have the word. Its distance is the cosine.

    Args:
        wanted: The texts whose neighbours are wanted.
        corpus: The texts of the corpus.
        allowed: Whether each text of the corpus may be a neighbour.
        most: The greatest number of neighbours of each wanted text, >= 1.

    Yields:
        The index in the corpus of the nearest neighbour of each wanted text, the most similar of them first;
        then those of the second neighbours, and so on. No index comes twice. A text that shares no word is no
        neighbour. Equal similarities come in the order of the corpus.
    """
    if not wanted or not corpus:
        return
    vectors = _vectors([*wanted, *corpus])
    ours, theirs = vectors[: len(wanted)], vectors[len(wanted) :].T.tocsr()
    barred = ~np.asarray(allowed, dtype=bool)
    most = min(most, len(corpus))
    ranked = np.empty((len(wanted), most), dtype=np.int64)
    similarity = np.empty((len(wanted), most), dtype=np.float64)
    rows = max(1, _BLOCK // len(corpus))
    for begin in range(0, len(wanted), rows):
        block = (ours[begin : begin + rows] @ theirs).toarray()
        block[:, barred] = 0.0
        order = np.argsort(-block, axis=1, kind="stable")[:, :most]
        ranked[begin : begin + rows] = order
        similarity[begin : begin + rows] = np.take_along_axis(block, order, axis=1)
    seen: set[int] = set()
    for rank in range(most):
        for row in np.argsort(-similarity[:, rank], kind="stable").tolist():
            index = int(ranked[row, rank])
            if similarity[row, rank] > 0 and index not in seen:
                seen.add(index)
                yield index


def _vectors(texts: Sequence[str]) -> Any:
    """Return the unit vectors of some texts, a sparse float64 matrix (texts, words)."""
    from scipy.sparse import csr_matrix

    counter = count()
    vocabulary: dict[str, int] = {}
    columns, ends = array("q"), array("q", [0])
    for text in texts:
        for word in words_of(text):
            column = vocabulary.get(word)
            if column is None:
                column = vocabulary[word] = next(counter)
            columns.append(column)
        ends.append(len(columns))
    shape = len(texts), max(1, len(vocabulary))
    data = np.ones(len(columns), dtype=np.float64)
    matrix = csr_matrix((data, np.frombuffer(columns, np.int64), np.frombuffer(ends, np.int64)), shape)
    matrix.sum_duplicates()
    frequency = np.bincount(matrix.indices, minlength=shape[1])
    weights = 1 + np.log((1 + shape[0]) / (1 + frequency))
    matrix.data = (1 + np.log(matrix.data)) * weights[matrix.indices]
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1), dtype=np.float64).ravel())
    matrix.data /= np.repeat(np.where(lengths > 0, lengths, 1.0), np.diff(matrix.indptr))
    return matrix
