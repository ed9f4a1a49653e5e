"""The accuracy of the last word, against its definition and the two codes that have it."""

import pytest
import torch
from character_tokenizer import character_tokenizer

from loku import demo
from loku.data import tokenize_dataset
from loku.evaluation import TokenScores, evaluate, last_words, token_scores

pytestmark = pytest.mark.usefixtures("one_thread")
# The figures are those of joeljang/knowledge-unlearning, models/Neo_Model_valid.py, lambada_evaluation
# (commit 732876d), run on the embedded model and each of these texts with input_length=256.
# Those below are of lm-eval 0.4.13, HFLM.loglikelihood, whose second value is the accuracy of lambada_openai.
KNOWLEDGE_UNLEARNING = [1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0]
LM_EVAL = [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0]


@pytest.fixture(scope="module")
def parts():
    """The embedded model, and texts that it knows, with another sign or another word at the end of some."""
    model, tokenizer = demo.load_model()
    forget, retain = demo.load_rows()
    rows = [*forget[:8], *retain[:4]]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    for index, text in enumerate(texts):
        if index % 3 == 0:
            texts[index] = text[:-1] + "!"
        elif index % 3 == 2:
            texts[index] = text.rpartition(" ")[0] + " river."
    return model, tokenizer, [*texts, "I think that she is a", "He was born in the city of Paris"]


def test_it_is_that_of_both_codes(parts):
    model, tokenizer, texts = parts
    rows = tokenize_dataset(texts, tokenizer)
    found = last_words(texts, tokenizer, rows, token_scores(model, rows, progress=False))
    assert found.normalised == [bool(value) for value in KNOWLEDGE_UNLEARNING]
    assert found.exact == [bool(value) for value in LM_EVAL]


def test_it_is_that_of_its_definition(parts):
    """All tokens of the word are the greedy ones after the text before it, as in lm-evaluation-harness."""
    model, tokenizer, texts = parts
    rows = tokenize_dataset(texts, tokenizer)
    found = last_words(texts, tokenizer, rows, token_scores(model, rows, progress=False))
    for text, exact in zip(texts, found.exact, strict=True):
        before, _, word = text.rpartition(" ")
        context, whole = tokenizer(before)["input_ids"], tokenizer(f"{before} {word}")["input_ids"]
        with torch.no_grad():
            greedy = model(torch.tensor([whole])).logits[0].argmax(-1).tolist()
        assert exact == (greedy[len(context) - 1 : -1] == whole[len(context) :])


def scored(tokenizer, texts, right, max_length=None):
    """The last words of texts whose tokens are predicted if ``right(token)`` says so."""
    rows = tokenize_dataset(texts, tokenizer, max_length=max_length)
    scores = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        known = torch.tensor([right(token) for token in ids[1:].tolist()])
        losses = torch.zeros(len(ids) - 1, dtype=torch.float64)
        scores.append(TokenScores(losses, known, ids[1:] + ~known, torch.arange(1, len(ids))))
    return last_words(texts, tokenizer, rows, scores)


def test_special_tokens_are_no_part_of_a_word():
    tokenizer = character_tokenizer()  # it puts <s> before a text, and </s> after it
    texts = ["one two", "one three"]
    assert scored(tokenizer, texts, lambda token: token > 1).exact == [True, True]
    t = tokenizer.convert_tokens_to_ids("w")
    assert scored(tokenizer, texts, lambda token: token != t).exact == [False, True]
    space = tokenizer.convert_tokens_to_ids(" ")
    assert scored(tokenizer, texts, lambda token: token != space).exact == [False, False]  # it belongs to it


def test_texts_without_a_last_word_do_not_count():
    tokenizer = character_tokenizer()
    found = scored(tokenizer, ["word", "two words ", " first", "a b"], lambda token: True)
    assert found.exact == found.normalised == [None, None, None, True]
    assert found.measures() == {"last_word_accuracy": 1.0, "last_word_accuracy_normalised": 1.0}
    assert scored(tokenizer, ["word"], lambda token: True).measures() == {}
    with pytest.warns(UserWarning, match="were cut"):
        cut = scored(tokenizer, ["some words that are cut", "a b"], lambda token: True, max_length=6)
    assert cut.exact == [None, True]


def test_sets_of_texts_have_the_measure(parts):
    model, tokenizer, texts = parts
    sets = {
        "text": texts,
        "column": [{"text": text} for text in texts],
        "mixed": [texts[0], {"input_ids": [5, 6]}],
    }
    found = evaluate(model, tokenizer, sets, progress=False).sets
    for name in ("text", "column"):
        assert found[name]["last_word_accuracy"] == pytest.approx(4 / 14)
        assert found[name]["last_word_accuracy_normalised"] == pytest.approx(8 / 14)
    assert "last_word_accuracy" not in found["mixed"]
