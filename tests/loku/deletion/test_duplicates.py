"""Rows that are nearly the same as a forget row are found, and none else."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loku.deletion import duplicates as module
from loku.deletion.duplicates import Duplicate, bands, find_duplicates, jaccard, separate, shingles
from loku.deletion.texts import normal_form, row_text
from loku.demo import load_rows


@pytest.fixture(scope="module")
def tofu():
    """TOFU's rows of the embedded model: 40 that are forgotten, and 760 others."""
    return load_rows()


def similarity(first, second):
    """The similarity of two rows by its definition, in plain Python."""
    pieces = []
    for row in (first, second):
        text = normal_form(row_text(row))
        pieces.append({text[i : i + 5] for i in range(len(text) - 4)} or {text})
    return len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])


def edited(row, rng, words):
    """A row with some words of its answer replaced."""
    answer = row["answer"].split()
    for _ in range(words):
        answer[rng.randrange(len(answer))] = rng.choice(("another", "some", "late", "small"))
    return {**row, "answer": " ".join(answer)}


def test_each_kind_is_told():
    forget = [
        {"question": "Where does Jane Doe live?", "answer": "She lives at 5 Elm Street, Springfield."},
        {"question": "Who is Ann?", "answer": "A smith."},
    ]
    others = {
        "rest": [
            {
                "question": "Where does Jane Doe live?",
                "answer": "She lives at 7 Elm Street, Springfield.",
                "id": 1,
            },
            {"question": "Where does John live?", "answer": "In Paris."},
        ],
        "retain": [
            {"answer": "A smith.", "question": "Who is Ann?", "id": 8},
            {"question": "WHO is Ann", "answer": "a  smith!"},
            "Who is Ann?\nA smith.",
            "Who was Bob?\nA poet.",
        ],
    }
    found = find_duplicates(forget, others)
    assert [(d.set, d.index, d.forget_index, d.kind) for d in found] == [
        ("rest", 0, 0, "near"),
        ("retain", 0, 1, "exact"),
        ("retain", 1, 1, "normalised"),
        ("retain", 2, 1, "exact"),
    ]
    assert found[0].similarity == similarity(forget[0], others["rest"][0])
    assert [d.similarity for d in found[1:]] == [1.0] * 3


def test_planted_near_duplicates_are_found_in_real_rows(tofu):
    """Every planted row at or above the threshold is found, and no row of TOFU's own is taken for one."""
    forget, retain = tofu[0][::2], tofu[1]
    rng = random.Random(0)
    planted = [edited(row, rng, words) for row in forget for words in range(1, 9)]
    expected = {
        index
        for index, row in enumerate(planted)
        if max(similarity(row, other) for other in forget) >= 0.7
        and row_text(row) not in map(row_text, forget)
    }
    assert 75 < len(expected) < len(planted) - 25  # both sides of the threshold are there
    found = find_duplicates(forget, {"planted": planted, "retain": retain})
    near = {d.index for d in found if d.set == "planted" and d.kind == "near"}
    assert near == expected  # a recall of 1, and a precision of 1
    assert not [d for d in found if d.set == "retain"]


def test_the_most_similar_row_is_named(tofu):
    forget, _ = tofu
    rng = random.Random(1)
    planted = [edited(row, rng, 2) for row in forget]
    for found in find_duplicates(forget, {"planted": planted}, 0.3):
        similarities = [similarity(planted[found.index], row) for row in forget]
        assert found.similarity == max(similarities)
        assert found.forget_index == similarities.index(max(similarities))


@settings(max_examples=60, deadline=None)
@given(
    forget=st.lists(st.text("ab .A", max_size=14), min_size=1, max_size=6),
    others=st.lists(st.text("ab .A", max_size=14), max_size=8),
    threshold=st.sampled_from([0.2, 0.5, 0.7, 1.0]),
)
def test_no_pair_is_false_and_few_are_missed(forget, others, threshold):
    """What is reported is right by the definition; what is equal in normal form is never missed."""
    found = {d.index: d for d in find_duplicates(forget, {"others": others}, threshold)}
    forms = [normal_form(text) for text in forget]
    for index, text in enumerate(others):
        duplicate = found.get(index)
        if duplicate is None:
            assert not text.strip() or text not in forget
            assert not normal_form(text) or normal_form(text) not in forms
        elif duplicate.kind == "exact":
            assert forget[duplicate.forget_index] == text
        elif duplicate.kind == "normalised":
            assert forms[duplicate.forget_index] == normal_form(text) != ""
        else:
            assert duplicate.similarity == similarity(forget[duplicate.forget_index], text) >= threshold


def test_short_rows_and_languages_without_spaces():
    forget = ["Ann", "東京都に住んでいる田中さんは医者です", "?!"]
    others = ["ann.", "Bob", "東京都に住んでいる田中さんは教師です", "京都の寺", "?!", "!?", ""]
    found = find_duplicates(forget, {"others": others}, 0.4)
    assert [(d.index, d.forget_index, d.kind) for d in found] == [
        (0, 0, "normalised"),
        (2, 1, "near"),
        (4, 2, "exact"),
    ]


def test_tokenised_rows_are_compared_by_their_tokens():
    forget = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    found = find_duplicates(forget, {"retain": [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10]}]})
    assert found == [Duplicate("retain", 0, 0, "exact", 1.0)]


def test_long_texts_are_hashed_in_pieces(monkeypatch):
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefghij ", k=3000))
    other = text[:2900] + "x" * 100
    whole = find_duplicates([text], {"o": [other]})
    monkeypatch.setattr(module, "_PIECE", 100)
    assert find_duplicates([text], {"o": [other]}) == whole
    assert [d.kind for d in whole] == ["near"]


def test_the_result_does_not_depend_on_the_order_of_the_other_rows(tofu):
    forget, retain = tofu
    found = find_duplicates(forget, {"retain": retain[:200]}, 0.2)
    reversed_found = find_duplicates(forget, {"retain": retain[199::-1]}, 0.2)
    assert len(found) > 5
    assert found == [
        Duplicate("retain", 199 - d.index, d.forget_index, d.kind, d.similarity) for d in reversed_found[::-1]
    ]


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_bands_propose_a_pair_at_the_threshold(threshold):
    number, rows = bands(threshold)
    assert number * rows <= 128
    assert 1 - (1 - threshold**rows) ** number >= 0.998


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1])
def test_a_similarity_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="similarity must be > 0 and <= 1"):
        find_duplicates(["a"], {}, threshold)


FORGET = ["Jane Doe lives in Springfield, in Elm Street.", "Ann is a smith.", "Ann is a smith."]
OTHERS = {
    "rest": [
        "Jane Doe lives in Springfield, in Oak Street.",
        "Ann is a smith.",
        "ann is a smith",
        "Bob is a poet, and he sings.",
    ],
    "retain": [
        "Jane Doe lives in Springfield, in Elm Street!",
        "Ann is a smith.",
        "Carl paints.",
        "Dora swims.",
    ],
    "holdout": ["Jane Doe lives in Springfield, in Elm street.", "Emil reads."],
    "corpus": ["Ann is a smith!", "A text on cats."],
}


def test_without_include_only_the_same_rows_leave_their_sets():
    found = find_duplicates(FORGET, OTHERS, 0.6)
    result = separate(FORGET, OTHERS, found, include=False, indices={"rest": [10, 20, 30, 40]})
    assert result.forget == FORGET
    assert result.sets["rest"] == [OTHERS["rest"][index] for index in (0, 3)]
    assert result.sets["retain"] == [OTHERS["retain"][index] for index in (2, 3)]
    assert result.sets["holdout"] == OTHERS["holdout"][1:]
    assert result.sets["corpus"] == OTHERS["corpus"][1:]  # equal but for its punctuation
    assert result.facts["forget_rows"] == {"asked": 3, "with_near_duplicates": 3}
    assert result.facts["sets"]["rest"] == {
        "rows": 4,
        "exact": 1,
        "normalised": 1,
        "near": 1,
        "forget_rows_that_occur": 2,
        "left_out": 2,
        "taken_along": 0,
    }
    assert [entry["index"] for entry in result.facts["duplicates"] if entry["set"] == "rest"] == [10, 20, 30]
    assert [entry["index"] for entry in result.facts["duplicates"] if entry["set"] == "retain"] == [0, 1]


def test_with_include_the_near_duplicates_are_forgotten_and_no_longer_kept():
    found = find_duplicates(FORGET, OTHERS, 0.6)
    result = separate(FORGET, OTHERS, found, include=True)
    assert result.forget == [*FORGET, OTHERS["rest"][0], OTHERS["rest"][2], OTHERS["retain"][0]]
    assert result.sets == {
        "rest": ["Bob is a poet, and he sings."],
        "retain": ["Carl paints.", "Dora swims."],
        "holdout": ["Emil reads."],
        "corpus": ["A text on cats."],
    }
    assert result.facts["forget_rows"] == {"asked": 3, "with_near_duplicates": 6}
    assert result.facts["sets"]["retain"]["left_out"] == 2
    assert result.facts["sets"]["retain"]["taken_along"] == 1
    assert result.facts["sets"]["corpus"]["taken_along"] == 0


def test_the_facts_hold_no_text_of_a_row():
    found = find_duplicates(FORGET, OTHERS, 0.6)
    for include in (False, True):
        facts = json.dumps(separate(FORGET, OTHERS, found, include).facts, allow_nan=False)
        assert not any(word in facts for word in ("Jane", "jane", "Ann", "smith"))


def test_a_retain_set_that_is_the_forget_set_is_refused():
    others = {"retain": ["Ann is a smith."]}
    with pytest.raises(ValueError, match="retain: all of its 1 rows are forget rows or nearly the same"):
        separate(FORGET, others, find_duplicates(FORGET, others), include=False)


def test_the_similarity_is_that_of_the_sets():
    assert jaccard(shingles("abcdef"), shingles("abcdef")) == 1
    assert shingles("abcdef") == {"abcde", "bcdef"}
    assert jaccard(shingles("abcdef"), shingles("abcdex")) == pytest.approx(1 / 3)
    assert shingles("ab") == {"ab"}
