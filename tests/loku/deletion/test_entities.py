"""The names and numbers of the forget rows, and the texts that mention them."""

import pytest

from loku.data import RowError
from loku.deletion.entities import Mentions, entities, row_texts
from loku.demo import EMBEDDED
from loku.trust import load_tokenizer

CHAT = {
    "messages": [
        {"role": "user", "content": "Where was Ada born?"},
        {"role": "assistant", "content": "In Oakton."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "In 1969."},
    ]
}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("Paris is large.", {"Paris"}),
        ("The town is large. However it is old.", set()),
        (
            "The nurse Ada Quill lives in Oakton, on Elm Street.",
            {"Ada", "Quill", "Ada Quill", "Oakton", "Elm", "Street", "Elm Street"},
        ),
        ("He met J. R. Quill there.", {"J R Quill", "Quill"}),
        ("We saw the Bank of the West.", {"Bank of the West", "Bank", "West"}),
        ("The rose was from Rose, and the mark was from Mark.", {"Rose", "Mark"}),
        ("They told Will to go in May.", set()),  # each is a word of the language, too
        ("Please write to ada.quill+x@mail.example now.", {"ada.quill+x@mail.example"}),
        ("It is at https://oakton.example/ada?x=1.", {"https://oakton.example/ada?x=1"}),
        ("She was born 03/05/1969, phone 555-0142, code 7.", {"03/05/1969", "555-0142"}),
        ("The key is a7b9c and the room is 12.", {"a7b9c"}),
        ({"question": "What does she do?", "answer": "a nurse"}, {"a nurse"}),
        ({"question": "Is it true?", "answer": "Yes."}, set()),
        ({"question": "Which year was it, Bob?", "answer": "I do not know the year that it was."}, {"Bob"}),
        ({"question": "Author?", "answer": "The author is not known to anybody here."}, set()),
        ({"question": "What is 2+2?", "answer": "4"}, {"4"}),
        (CHAT, {"Ada", "Oakton", "1969", "In Oakton In 1969"}),  # a short answer as a whole
        ({"prompt": "The capital is", "completion": " Oakton."}, {"Oakton"}),
        ({"instruction": "Name it.", "input": "in Quillshire", "output": "Oakton"}, {"Quillshire", "Oakton"}),
        (
            {"question": "村上春树的出生地是哪里?", "answer": "根据资料，村上春树出生于京都的伏见区。"},
            {"村上春树"},
        ),
        (
            {"question": "أين ولدت ليلى حسن؟", "answer": "ولدت ليلى حسن في مدينة صغيرة قرب البحر."},
            {"ولدت", "ليلى", "حسن"},
        ),
        (
            {"question": "Где живёт Анна Орлова?", "answer": "Она живёт в Твери уже много лет."},
            {"Анна", "Орлова", "Анна Орлова", "Твери", "Она"},
        ),
    ],
)
def test_what_is_found(row, found):
    assert set(entities([row])) == found


def test_a_word_that_only_begins_sentences_is_a_name_where_another_row_says_so():
    rows = [{"question": "Berlin was it?", "answer": "I am not sure that it was."}]
    assert entities(rows) == []
    assert entities([*rows, "It was Berlin."]) == ["Berlin"]


def test_the_order_counts_answers_twice():
    rows = [
        "It was Bonn.",
        {"question": "Was it Bonn or Alma, Alma?", "answer": "It was in the town of Kiel."},
    ]
    # Bonn: 2 in a text and 1 in a question; Alma: 2 in a question; Kiel: 2 in an answer
    assert entities(rows) == ["Bonn", "Alma", "Kiel"]
    assert entities(rows) == entities(rows[::-1])


def test_tokenised_rows_need_the_tokenizer():
    tokenizer = load_tokenizer(EMBEDDED)
    asked, answered = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Who?", " Ada"))
    row = {"input_ids": [*asked, *answered], "labels": [-100] * len(asked) + answered}
    assert row_texts(row, tokenizer) == ("Who?", " Ada")
    assert entities([row], tokenizer) == ["Ada"]
    with pytest.raises(RowError, match="row 0 of the forget set: it has 'input_ids' and no text"):
        entities([row])


def test_a_row_of_no_known_form_is_refused():
    with pytest.raises(RowError, match="row 1 of the forget set"):
        entities(["Ada", {"words": "Ada"}])


@pytest.mark.parametrize(
    ("entity", "text", "mentioned"),
    [
        ("Will", "Will is here", True),
        ("Will", "he will come", False),
        ("Will", "IT IS WILL", True),
        ("Will", "Willow", False),
        ("Ada Quill", "ada quill's house", True),
        ("Ada Quill", "Ada, the Quill", False),
        ("Elm Street", "on Elm-Street 4", True),
        ("a nurse", "She is A NURSE.", True),
        ("555-0142", "call 555 0142", True),
        ("1969", "in 1969,", True),
        ("1969", "in 19690", False),
        ("ada.quill@mail.example", "to ADA.QUILL@mail.example.", True),
        ("村上春树", "作家村上春树的书", True),
        ("村上春树", "作家的书", False),
        ("Ｂonn", "in Bonn", True),
        ("?!", "?!", False),
    ],
)
def test_mentions(entity, text, mentioned):
    assert Mentions([entity])(text) is mentioned
    assert Mentions(["Nobody", entity])(text) is mentioned


def test_no_entities_are_mentioned_nowhere():
    assert not Mentions([])("Ada Quill")
    assert Mentions(["Ada"]).in_row({"question": "Is it Ada?", "answer": "no"})
    assert not Mentions(["Ada"]).in_row({"question": "Is it she?", "answer": "no"})
