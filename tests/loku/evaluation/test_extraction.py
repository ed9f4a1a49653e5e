"""Greedy answers and the extraction likelihood against brute force."""

import math

import pytest
from naive_measures import naive_extraction, naive_greedy

import loku.data
from loku.evaluation import extraction_likelihood, token_scores
from loku.evaluation.extraction import greedy_answers


def test_greedy_answers_have_at_most_so_many_tokens(model):
    ids = [5, 6, *naive_greedy(model, [5, 6], 20)]
    memorized = {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
    scores = token_scores(model, [memorized], progress=False)
    for length in (1, 5, 20):
        (answer,) = greedy_answers(model, [memorized], scores, length, progress=False)
        assert answer == ids[2 : 2 + length]
    answers = greedy_answers(model, [memorized] * 3, scores * 3, [1, 20, 5], progress=False)
    assert answers == [ids[2:3], ids[2:], ids[2:7]]


def test_packed_rows_have_no_extraction_likelihood(model):
    packed = {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6], "position_ids": [0, 1, 0, 1]}
    with pytest.raises(ValueError, match="split_documents"):
        extraction_likelihood(model, [packed], n=1, progress=False)
    rows = [{name: ids[part] for name, ids in packed.items()} for part in (slice(2), slice(2, 4))]
    assert loku.data.split_documents([packed, rows[0]]) == [
        {name: row[name] for name in ("input_ids", "labels")} if "position_ids" in row else row
        for row in (*rows, rows[0])
    ]


@pytest.mark.parametrize(("n", "stride"), [(2, 1), (3, 1), (3, 4), (10, 1)])
def test_extraction_likelihood_is_the_brute_force_one(model, rows, n, stride):
    expected = [naive_extraction(model, row, n, stride) for row in rows]
    result = extraction_likelihood(model, rows, n, stride, batch_size=4, progress=False)
    assert result.per_row == expected
    scores = token_scores(model, rows, progress=False)
    assert extraction_likelihood(model, rows, n, stride, progress=False, scores=scores) == result
    known = [value for value in expected if value is not None]
    assert result.mean == pytest.approx(sum(known) / len(known))
    assert (result.n, result.stride) == (n, stride)
    if n < 10:
        assert 0.02 < result.mean < 0.98  # neither nothing nor everything is extracted, so the test can fail


def test_extraction_likelihood_of_a_memorized_text_is_one(model):
    ids = [5, 6, *naive_greedy(model, [5, 6], 20)]
    memorized = {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
    result = extraction_likelihood(model, [memorized], n=4, progress=False)
    assert result.mean == 1.0
    short = {"input_ids": ids[:5], "labels": ids[:5]}
    result = extraction_likelihood(model, [memorized, short], n=4, progress=False)
    assert result.per_row == [1.0, None]
    assert result.mean == 1.0
    assert math.isnan(extraction_likelihood(model, [short], n=4, progress=False).mean)
