"""ROUGE in any script: an answer that comes back is never 0, and Latin texts have the package's figures."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from loku.evaluation import rouge_l_f1, rouge_recalls
from loku.evaluation.open_unlearning import open_unlearning_log


@pytest.mark.parametrize(
    ("true", "half", "recall"),
    [
        ("\u4ed6\u51fa\u751f", "\u4ed6", 1 / 3),  # Chinese: a character is a word
        (
            "\u041e\u043d \u043f\u043e\u044d\u0442",
            "\u043e\u043d",
            1 / 2,
        ),  # Russian, whose case does not count
        ("1956 \u043f\u043e\u044d\u0442 \u043e\u043d", "1956", 1 / 3),  # a number is one word of three
    ],
)
def test_an_answer_in_another_script_is_not_forgotten(true, half, recall):
    ones, longest = rouge_recalls([true, half, ""], [true] * 3)
    assert ones == longest == pytest.approx([1.0, recall, 0.0])
    for stemming in (False, True):
        f1 = rouge_l_f1([true, half], [true] * 2, stemming)
        assert f1 == pytest.approx([1.0, 2 * recall / (1 + recall)])
    section = {
        "avg_gt_loss": {"0": 1.0},
        "generated_text": {"0": ["Question: ?\nAnswer:", true, true]},
        "rouge1_recall": {"0": 1.0},
        "rougeL_recall": {"0": 1.0},
    }
    metrics = open_unlearning_log({"eval_log_forget.json": section})
    assert metrics["forget_Q_A_ROUGE"]["value_by_index"]["0"]["rougeL_f1"] == 1.0


@pytest.mark.parametrize("stemming", [False, True])
def test_latin_texts_have_the_figures_of_the_package(stemming):
    true = ["M\u00fcller wrote books in \u4e2d\u56fd", "1956", "?", "The authors' works"]
    texts = ["Muller writes a book", "in 1956", "?", "the author works"]
    scorer = RougeScorer(["rougeL"], use_stemmer=stemming)
    expected = [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(true, texts, strict=True)]
    assert rouge_l_f1(texts, true, stemming) == expected and len(set(expected)) > 1
