"""The rows that a request asks for are found, and what is not found is said."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loku.deletion import selection as module
from loku.deletion.request import RowSelection
from loku.deletion.selection import check_holdout, select_rows
from loku.deletion.texts import folded, normal_form, row_text

ROWS = [
    {"id": 1, "question": "Who is Jane O’Brien?", "answer": "A baker in Cork.", "year": 1956},
    {"id": 2, "question": "Who is Jürgen Groß?", "answer": "A smith.", "year": 1957.0},
    {"id": 2, "question": "Who is Ann?", "answer": "The annual\nreport says nothing.", "year": None},
    {
        "id": "4",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am Zoë."}],
    },
    {
        "id": "05",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Do you know Jane\u00adO'Brien?"}]}
        ],
    },
    {
        "id": 6.0,
        "conversations": [{"from": "human", "value": "user"}, {"from": "gpt", "value": "Al\u2011Kuwaiti"}],
    },
]


@pytest.fixture
def select(tmp_path):
    """A function that selects rows of ``ROWS``, or of other rows, and returns their indices."""

    def select_indices(rows=ROWS, suffix=".jsonl", **query):
        path = tmp_path / f"rows{suffix}"
        lines = rows if suffix != ".jsonl" else map(json.dumps, rows)
        path.write_text("\n".join(lines), encoding="utf-8")
        return select_rows(RowSelection(str(path), **query), "forget")

    return select_indices


def test_a_selection_without_a_query_is_the_whole(select, tmp_path):
    selected = select()
    assert selected.rows == ROWS
    assert (selected.indices, selected.total) == ([*range(6)], 6)
    assert (selected.rest, selected.rest_indices) == ([], [])
    assert selected.source == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("query", "indices"),
    [
        ({"ids": ("1", "4")}, [0, 3]),
        ({"ids": (1, 4)}, [0, 3]),
        ({"ids": ("2",)}, [1, 2]),
        ({"ids": ("05",)}, [4]),
        ({"ids": ("6",)}, [5]),
        ({"ids": ("1957",), "id_column": "year"}, [1]),
        ({"contains": "jane o'brien"}, [0]),
        ({"contains": "O'BRIEN"}, [0, 4]),
        ({"contains": "JÜRGEN GROSS"}, [1]),
        ({"contains": unicodedata.normalize("NFD", "Jürgen")}, [1]),
        ({"contains": "annual report"}, [2]),
        ({"contains": "ann"}, [2]),
        ({"contains": "zoë"}, [3]),
        ({"contains": "al-kuwaiti"}, [5]),
        ({"contains": "baker", "columns": ("answer",)}, [0]),
        ({"contains": "1956", "columns": ("answer", "year")}, [0]),
        ({"contains": "1957", "columns": ("year",)}, [1]),
        ({"matches": r"\bAnn\b"}, [2]),
        ({"matches": "(?i)who IS j"}, [0, 1]),
        ({"matches": "Who", "contains": "smith"}, [1]),
        ({"ids": ("2",), "contains": "annual"}, [2]),
    ],
    ids=str,
)
def test_a_query_finds_its_rows(select, query, indices):
    selected = select(**query)
    assert selected.indices == indices
    assert selected.rows == [ROWS[index] for index in indices]
    assert selected.rest_indices == [index for index in range(6) if index not in indices]
    assert selected.rest == [ROWS[index] for index in selected.rest_indices]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            {"contains": "Nobody"},
            "none of the 6 rows of .* has 'Nobody'; it has the columns id, question, answer, ",
        ),
        ({"contains": "baker", "columns": ("question",)}, "has 'baker' in question; it has the columns"),
        ({"contains": "assistant"}, "none of the 6 rows"),  # a role is no text
        ({"contains": "1956"}, "none of the 6 rows"),  # numbers are searched in named columns alone
        ({"contains": "\u200b"}, "contains is blank or has invisible characters alone"),
        ({"matches": "^x$"}, r"has a match of '\^x\$'"),
        ({"ids": ("1",), "matches": "smith"}, "has one of the 1 ids in id and a match of 'smith'"),
        ({"ids": ("1", "8", "9")}, "2 of 3 ids are not in the column 'id' of .*: 8, 9$"),
        ({"ids": ("5", "01")}, "2 of 2 ids are not in the column 'id' of .*: 5, 01$"),
        ({"ids": tuple(map(str, range(10, 23)))}, "13 of 13 ids .*: 10, 11, .*, 19 and 3 more"),
        (
            {"ids": ("1",), "id_column": "number"},
            "has the column 'number' of id_column; it has the columns id",
        ),
        (
            {"contains": "a", "columns": ("answers",)},
            "the column 'answers' of columns; .*did you mean answer",
        ),
    ],
    ids=str,
)
def test_what_is_not_found_is_named(select, query, message):
    with pytest.raises(ValueError, match=f"^forget: .*{message}"):
        select(**query)


def test_texts_have_no_columns(select):
    texts = ["Jane is a baker.", "Ann is a smith."]
    assert select(texts, ".txt", contains="ann").indices == [1]
    with pytest.raises(ValueError, match="has the column 'id' of id_column; it has texts without columns"):
        select(texts, ".txt", ids=("1",))


def test_ids_of_a_table_are_the_same_as_those_of_json(select):
    selected = select(["id,text", "7,Jane", "08,Ann"], ".csv", ids=(7, "08"))
    assert [row["text"] for row in selected.rows] == ["Jane", "Ann"]


def test_a_search_without_end_is_stopped_and_named(select, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.05)
    rows = [{"text": "short"}, {"text": "a" * 40 + "!"}]
    with pytest.raises(
        ValueError, match=r"took more than 0.05 s in .*rows.jsonl, line 2, row 1; write it without"
    ):
        select(rows, matches=r"^(a|aa)+$")


def test_a_holdout_row_that_the_model_knows_is_refused():
    holdout = ["unknown", {"question": "Q", "answer": "A", "id": 3}, "b"]
    check_holdout(holdout, forget=["a"], retain=[{"question": "Q", "answer": "B"}])
    with pytest.raises(
        ValueError, match=r"holdout: 1 of its 3 rows are also in forget: row 2 is row 1 of forget"
    ):
        check_holdout(holdout, forget=["a", "b"])
    with pytest.raises(
        ValueError, match="holdout: 1 of its 3 rows are also in retain: row 1 is row 0 of retain"
    ):
        check_holdout(holdout, forget=["a"], retain=[{"question": "Q", "answer": "A"}])


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("a text", "a text"),
        ({"text": "a", "id": "b"}, "a"),
        ({"question": "Q", "answer": "A", "perturbed_answer": ["B"]}, "Q\nA"),
        ({"prompt": "P", "completion": "C"}, "P\nC"),
        ({"instruction": "I", "input": None, "output": "O"}, "I\nO"),
        ({"messages": [{"role": "user", "content": "M"}, {"role": "assistant", "content": "N"}]}, "M\nN"),
        ({"conversations": [{"from": "human", "value": "M"}, {"from": "gpt", "value": "N"}]}, "M\nN"),
        (
            {
                "prompt": [{"role": "user", "content": "M"}],
                "completion": [{"role": "assistant", "content": "N"}],
            },
            "M\nN",
        ),
        ({"input_ids": [1, 2, 3]}, "1 2 3"),
        ({"body": "a", "title": "b", "year": 1}, "a\nb"),
        (None, ""),
    ],
    ids=str,
)
def test_the_text_of_a_row_is_what_is_learnt(row, text):
    assert row_text(row) == text


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  Who  IS\tJane—O’Brien?\n", "who is jane o brien"),
        ("Ｊａｎｅ, 2+2=4 (C++)", "jane 2+2=4 c++"),
        ("हिन्दी में।", "हिन्दी में"),  # vowel signs are marks, and stay
        ("co\u00adoperate\u200b", "cooperate"),
        ("...", ""),
        ("STRASSE", normal_form("Straße")),
    ],
    ids=str,
)
def test_the_normal_form_has_no_case_and_no_punctuation(text, form):
    assert normal_form(text) == form


@given(text=st.text())
def test_a_form_of_a_form_is_itself(text):
    """So a text that differs in them alone has the same form."""
    assert folded(folded(text)) == folded(text)
    assert normal_form(folded(text)) == normal_form(text)
    assert normal_form(normal_form(text)) == normal_form(text)
