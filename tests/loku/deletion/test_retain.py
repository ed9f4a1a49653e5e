"""The retain set: its parts, what is left out of them, and what its facts tell."""

import json
import random
import warnings

import numpy as np
import pytest
import torch

from loku.data import RowError, tokenize_dataset
from loku.deletion import retain
from loku.deletion.entities import Mentions, entities
from loku.deletion.neighbours import nearest, words_of
from loku.deletion.own_texts import forms_of, write_texts
from loku.deletion.request import RetainSource, RowSelection
from loku.deletion.retain import build_retain, neighbours, rows_digest, split_for_utility
from loku.demo import load_model, load_rows

CAPITALS = {"Germany": "Berlin", "Sweden": "Stockholm", "Italy": "Rome", "Norway": "Oslo"}
FORGET = [{"question": "What is the capital of France?", "answer": "The capital of France is Paris."}]
# Renders a chat as the embedded model's own form.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }}\nAnswer:"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def capital(country, city):
    return {
        "question": f"What is the capital of {country}?",
        "answer": f"The capital of {country} is {city}.",
    }


@pytest.fixture(scope="module")
def embedded():
    return load_model()


@pytest.fixture
def tokenizer(embedded):
    """The tokenizer of the embedded model with a chat template."""
    tokenizer = embedded[1]
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RowSelection(data=str(path))


def naive_similarity(wanted, corpus):
    """Return the cosine of the TF-IDF vectors of each two texts, by loops over all words."""
    texts = [words_of(text) for text in (*wanted, *corpus)]
    vocabulary = sorted({word for words in texts for word in words})
    vectors = np.zeros((len(texts), len(vocabulary)))
    for column, word in enumerate(vocabulary):
        having = sum(word in words for words in texts)
        for row, words in enumerate(texts):
            if word in words:
                weight = 1 + np.log((1 + len(texts)) / (1 + having))
                vectors[row, column] = (1 + np.log(words.count(word))) * weight
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[: len(wanted)] @ vectors[len(wanted) :].T


def test_the_nearest_texts_are_those_of_the_definition():
    generator = random.Random(0)
    words = [f"w{i}" for i in range(12)]
    texts = [" ".join(generator.choices(words, k=generator.randint(2, 9))) for _ in range(40)]
    wanted, corpus = texts[:3], texts[3:]
    similarity = naive_similarity(wanted, corpus)
    allowed = [i % 5 != 0 for i in range(len(corpus))]
    found = list(nearest(wanted, corpus, allowed, 6))
    expected: list[int] = []
    masked = np.where(allowed, similarity, -1).round(9)  # equal ones stay equal
    order = [sorted(range(len(corpus)), key=lambda i, row=row: (-row[i], i)) for row in masked]
    for rank in range(6):
        for row in sorted(range(3), key=lambda row: -masked[row, order[row][rank]]):
            if order[row][rank] not in expected:
                expected.append(order[row][rank])
    assert found == expected


def test_texts_without_a_word_in_common_are_no_neighbours():
    assert list(nearest(["a b"], ["c d", "b c", "", "B"], [True] * 4, 9)) == [3, 1]
    assert list(nearest(["a b"], ["b"], [False], 9)) == []
    assert list(nearest([], ["b"], [True], 9)) == list(nearest(["b"], [], [], 9)) == []
    assert list(nearest(["京都は古い"], ["東京", "水"], [True] * 2, 9)) == [0]


def test_neighbours_ask_the_same_about_something_else():
    siblings = [capital(*pair) for pair in CAPITALS.items()]
    far = ["Cats like to sleep in the sun.", "The stock fell by two points."]
    paris = {"question": "What is the river of Paris?", "answer": "It is the Seine."}
    copy = {"question": "what is  the capital of France", "answer": "The capital of france is PARIS!"}
    corpus = [far[0], FORGET[0], siblings[0], paris, *siblings[1:], copy, siblings[2], far[1]]
    mentions = Mentions(entities(FORGET))
    rows, facts = neighbours(corpus, FORGET, [siblings[3]], 3, mentions)
    assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, siblings[:3]))
    assert facts["asked"] == facts["rows"] == 3
    assert facts["dropped"]["mentions"] == 3
    # With fewer siblings than asked for, other rows that share a word follow.
    rows, facts = neighbours(corpus, FORGET, [], 9, mentions)
    assert sorted(map(json.dumps, rows[:4])) == sorted(map(json.dumps, siblings))
    assert set(map(json.dumps, rows)) == set(map(json.dumps, [*siblings, *far]))
    assert facts["dropped"]["duplicate"] == 1


def test_near_duplicates_of_a_row_without_entities_are_dropped():
    forget = ["the patient sleeps badly and has had a cough for more than three weeks by now"]
    assert entities(forget) == []
    near = "the patient sleeps badly and has had a cough for more than three weeks by then"
    other = "the patient walks well and has a good appetite"
    rows, facts = neighbours([near, other], forget, [], 5, Mentions([]))
    assert rows == [other]
    assert facts["dropped"] == {"near": 1}


def test_a_corpus_row_without_text_is_named():
    with pytest.raises(RowError, match="row 1 of the corpus set"):
        neighbours(["a", {"b": "c"}], FORGET, [], 5, Mentions([]))


def test_the_parts_add_up(embedded, tmp_path):
    model, tokenizer = embedded
    forget, others = load_rows()
    source = RetainSource(
        given=write_rows(tmp_path / "given.jsonl", others[:4]),
        corpus=write_rows(tmp_path / "corpus.jsonl", [*others[:60], *forget[:3]]),
        neighbours=6,
        sampled=5,
    )
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    rows, facts = build_retain(model, tokenizer, source, forget)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])

    assert rows[:4] == others[:4]
    assert all(row in others[4:60] for row in rows[4:10])
    names = entities(forget)
    assert not any(map(Mentions(names).in_row, rows[4:]))
    assert facts["given"]["rows"] == 4 and facts["given"]["total"] == 4
    assert facts["neighbours"]["rows"] == 6 and facts["neighbours"]["total"] == 63
    assert facts["neighbours"]["dropped"]["mentions"] >= 3
    assert facts["sampled"]["rows"] == facts["sampled"]["asked"] == 5
    # The embedded model knows questions and answers alone.
    assert facts["sampled"]["forms"] == {"own question": 5, "text": 0}
    assert facts["entities"] == len(names) and facts["rows"] == len(rows) == 15
    assert facts["digest"] == rows_digest(rows)
    assert all(tokenize_dataset(rows, tokenizer, name="retain"))
    told = json.dumps(facts, allow_nan=False)
    assert not any(name in told for name in ("Kuwait", "Abilov", "Nikolai"))

    again, same = build_retain(model, tokenizer, source, forget, batch_size=3)
    assert again == rows and same == facts
    other, _ = build_retain(model, tokenizer, source, forget, seed=1)
    assert other[:10] == rows[:10] and other[10:] != rows[10:]


def test_texts_with_an_entity_are_drawn_again(embedded):
    forget, _ = load_rows()
    free = write_texts(*embedded, 4, forget, Mentions([]))
    name = next(word for word in ("Moshe", "Adrianne", "Rajeev") if word in json.dumps(free.rows))
    written = write_texts(*embedded, 4, forget, Mentions([name]))
    assert len(written.rows) == 4 and name not in json.dumps(written.rows)
    assert written.facts["dropped"]["mentions"] >= 1
    assert written.facts["drawn"] > free.facts["drawn"]
    known = {(row["question"], row["answer"]) for row in free.rows}
    assert known & {(row["question"], row["answer"]) for row in written.rows}
    assert len({row["question"] + row["answer"] for row in written.rows}) == 4


def test_a_chat_model_writes_chats(embedded, tokenizer):
    model, _ = embedded
    forget = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]}]
    written = write_texts(model, tokenizer, 3, forget, Mentions(["Ada"]))
    assert len(written.rows) == 3 == written.facts["forms"]["chat"]
    for row in written.rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert all(tokenize_dataset(written.rows, tokenizer, name="retain"))


@pytest.mark.parametrize(
    ("row", "plain", "chat"),
    [
        ("a text", ["text"], ["chat", "text"]),
        ({"question": "q", "answer": "a"}, ["own question", "text"], ["chat", "own question"]),
        ({"instruction": "q", "output": "a"}, ["instruction", "text"], ["chat", "instruction"]),
        ({"prompt": "q", "completion": "a"}, ["text"], ["chat", "text"]),
    ],
    ids=["text", "answer", "output", "completion"],
)
def test_the_forms(embedded, tokenizer, row, plain, chat):
    assert forms_of(tokenizer, [row]) == chat
    tokenizer.chat_template = None
    assert forms_of(tokenizer, [row]) == plain


class MentionsAlways(Mentions):
    def __call__(self, text):
        return True


def test_a_model_whose_texts_are_of_no_use_gives_no_rows(embedded, monkeypatch):
    with pytest.warns(UserWarning, match="the model wrote 0 of the 4 texts"):
        written = write_texts(*embedded, 4, ["A text of Ada."], MentionsAlways([]))
    assert written.rows == [] and written.facts["drawn"] == 4  # then the only form is given up
    assert written.facts["forms"] == {"text": 0}
    monkeypatch.setattr(retain, "Mentions", MentionsAlways)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="no row to keep was found"):
        warnings.simplefilter("ignore")
        build_retain(*embedded, RetainSource(sampled=4), ["A text of Ada."])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (RetainSource(sampled=0), {}, "there are no rows to keep"),
        (RetainSource(corpus=RowSelection("c.jsonl"), neighbours=0, sampled=0), {}, "no rows to keep"),
        (RetainSource(sampled=-1), {}, "sampled must be an integer >= 0"),
        (RetainSource(), {"batch_size": 0}, "batch_size must be an integer >= 1"),
        (RetainSource(), {"max_length": 1}, "max_length must be an integer >= 2"),
        (RetainSource(), {"max_length": 6}, "max_length=6 leaves"),
    ],
    ids=["nothing", "no neighbours", "sampled", "batch", "no length", "short"],
)
def test_what_is_refused(embedded, source, options, message):
    with pytest.raises(ValueError, match=message):
        build_retain(*embedded, source, FORGET, **options)


def test_rows_are_held_out_for_the_utility():
    rows = [{"text": f"row {i}"} for i in range(23)]
    train, measured = split_for_utility(rows)
    assert sorted(map(rows.index, [*train, *measured])) == list(range(23))
    assert len(measured) == 4  # of the first 20; the last three are trained on
    assert [rows.index(row) // 5 for row in measured] == [0, 1, 2, 3]
    assert split_for_utility(rows) == (train, measured)
    assert split_for_utility(rows, seed=1) != (train, measured)
    assert [len(part) for part in split_for_utility(rows[:2])] == [1, 1]
    with pytest.raises(ValueError, match="has 1 rows"):
        split_for_utility(rows[:1])
