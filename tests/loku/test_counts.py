"""A count that cannot be one is refused by its name, before a model runs."""

import pytest
import torch

import loku
from loku import cli, evaluation
from loku.counts import check_counts, check_max_length
from loku.robustness import relearning_curve

ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
MODEL = torch.nn.Linear(1, 1)  # it cannot run
GREATER = r"must be an integer >= 1, got"


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2", None, float("nan")])
def test_what_is_no_count(value):
    with pytest.raises(ValueError, match=f"batch_size {GREATER} {value!r}"):
        check_counts(n=1, batch_size=value)
    if value is not None:
        with pytest.raises(
            ValueError, match=f"max_length must be an integer >= 2, got {value!r}; .*first token"
        ):
            check_max_length(value)


def test_what_is_a_count():
    check_counts(n=1, stride=torch.arange(3).numpy()[2])
    check_counts(0, n=0)
    check_max_length(None)
    check_max_length(2)
    with pytest.raises(ValueError, match="max_length must be an integer >= 2, got 1"):
        check_max_length(1)


@pytest.mark.parametrize("name", ["batch_size", "n", "stride"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_of_measures(name, value):
    wrong, message = {name: value}, f"{name} {GREATER} {value}"
    with pytest.raises(ValueError, match=message):
        evaluation.extraction_likelihood(MODEL, ROWS, **wrong)
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(MODEL, None, {"forget": ROWS}, **wrong)
    with pytest.raises(ValueError, match=message):
        loku.ExtractionStopping(ROWS, ROWS, **wrong)
    if name == "batch_size":
        calls = [
            lambda: evaluation.token_scores(MODEL, ROWS, **wrong),
            lambda: evaluation.generate_greedy(MODEL, [[1]], [2], **wrong),
            lambda: evaluation.greedy_answers(MODEL, ROWS, [], 3, **wrong),
            lambda: evaluation.answer_losses(MODEL, None, ["a"], ["b"], **wrong),
            lambda: evaluation.evaluate_tofu_rows(MODEL, None, ROWS, **wrong),
            lambda: evaluation.reasoning_accuracies(MODEL, None, **wrong),
            lambda: loku.ProbabilityGauge({"forget": ROWS}, **wrong),
            lambda: relearning_curve(MODEL, None, ROWS, {}, **wrong),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.parametrize("length", [0, 1, -3, True])
def test_max_length_of_an_evaluation(length):
    """Questions with their answers are never cut, so their tokenisation does not look at it."""
    with pytest.raises(ValueError, match=f"max_length must be an integer >= 2, got {length}"):
        evaluation.evaluate(MODEL, None, {"forget": [{"question": "a", "answer": "b"}]}, max_length=length)


def test_further_counts():
    with pytest.raises(ValueError, match=f"max_new_tokens {GREATER} -1"):
        evaluation.greedy_answers(MODEL, ROWS, [], -1)
    with pytest.raises(ValueError, match=f"max_new_tokens {GREATER} 0"):
        evaluation.evaluate_tofu_rows(MODEL, None, ROWS, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"share of Min-K% must be in \(0, 1\], got 2"):
        evaluation.evaluate(MODEL, None, {"forget": ROWS}, min_k_share=2)
    with pytest.raises(ValueError, match=f"limit {GREATER} 0"):
        evaluation.reasoning_accuracies(MODEL, None, limit=0)
    with pytest.raises(ValueError, match="num_fewshot must be an integer >= 0, got -1"):
        evaluation.reasoning_accuracies(MODEL, None, num_fewshot=-1)
    with pytest.raises(ValueError, match=f"steps {GREATER} 0"):  # the trainer would run three epochs
        relearning_curve(MODEL, None, ROWS, {}, steps=0)


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("--max-length", "1", 2), ("--ngram", "0", 1), ("--stride", "-1", 1), ("--batch-size", "0", 1)],
)
def test_counts_of_the_command(option, value, least, capsys):
    assert cli.main(["evaluate", "model", "--data", "x=none.jsonl", f"{option}={value}"]) == 2
    assert f"{option} must be an integer >= {least}, got {value}" in capsys.readouterr().err
