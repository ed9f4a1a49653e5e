"""Greedy answers and the extraction likelihood against brute force."""

import math

import pytest
from naive_measures import naive_extraction, naive_greedy

import loku.data
import loku.demo
from loku.evaluation import extraction_likelihood, generated_texts, token_scores
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


# The figures are those of locuslab/open-unlearning, src/evals/metrics/utils.py, eval_text_similarity (commit
# d3d7cf9), with max_new_tokens=40 and these stopwords, on the embedded model. It strips the texts.
STOP_STRINGS = [" in", " of the", "ing "]
GENERATED = [
    "The full name",
    "Author Basil Mahfouz Al-Kuwaiti is male.",
    "Basil Mahfouz Al-Kuwaiti was born",
    "Basil Mahfouz Al-Kuwaiti's father was a florist and his mother was a game developer.",
    "Basil Mahfouz Al-Kuwaiti is most known for his writings",
    'Two of Basil Mahfouz Al-Kuwaiti\'s books are "Promise by the Seine" and "Le Petit Sultan."',
]


def test_generated_texts_end_as_those_of_open_unlearning():
    model, tokenizer = loku.demo.load_model()
    tokens = loku.data.tokenize_dataset(loku.demo.load_rows()[0][:6], tokenizer)
    scores = token_scores(model, tokens, progress=False)
    options = {"max_new_tokens": 40, "progress": False, "stop_strings": STOP_STRINGS}
    found = generated_texts(model, tokenizer, tokens, scores, **options)
    assert [text.strip() for text in found] == GENERATED


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


# The figures are those of joeljang/knowledge-unlearning, models/Neo_Model_valid.py, validation_el (commit
# 732876d), run on this model and these texts one by one, in float32.
KNOWLEDGE_UNLEARNING = {
    2: [0.51046628, 0.36919191, 0.31452584, 0.22298798, 0.44403362, 0.38095239, 0.61339295],
    3: [0.35174823, 0.19166666, 0.16984695, 0.11867199, 0.28390673, 0.26666668, 0.53800732],
}


@pytest.mark.parametrize("n", KNOWLEDGE_UNLEARNING)
def test_extraction_likelihood_is_that_of_knowledge_unlearning(model, rows, n):
    texts = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    result = extraction_likelihood(model, texts, n, progress=False, definition="knowledge-unlearning")
    assert result.per_row == pytest.approx(KNOWLEDGE_UNLEARNING[n], abs=1e-7)
    assert result.definition == "knowledge-unlearning"
    paper = extraction_likelihood(model, texts, n, progress=False)
    assert paper.definition == "paper" and paper.mean != pytest.approx(result.mean, abs=1e-2)


def test_rows_of_exactly_n_tokens_count_in_knowledge_unlearning_alone(model):
    ids = [5, 6, *naive_greedy(model, [5, 6], 4)]
    row = {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}  # four answer tokens
    options = {"progress": False, "definition": "knowledge-unlearning"}
    assert extraction_likelihood(model, [row], 4, **options).per_row == [1.0]
    assert extraction_likelihood(model, [row], 5, **options).per_row == [None]
    assert extraction_likelihood(model, [row], 4, progress=False).per_row == [None]


def test_another_definition_is_refused(model, rows):
    with pytest.raises(ValueError, match="definition must be one of paper, knowledge-unlearning, got 'el'"):
        extraction_likelihood(model, rows, progress=False, definition="el")


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
