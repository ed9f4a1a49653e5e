"""The measures of a request's sets, its limits, and whether the model knows the rows."""

import json
import math
import random

import pytest
import torch
from tiny_models import tiny_model
from unseen_rows import UNSEEN

from loku.deletion.measures import known, limits_of, measure_rows, measure_sets, summary
from loku.demo import load_model, load_rows
from loku.evaluation import evaluate
from loku.evaluation.extraction import extracted_tokens
from loku.evaluation.scores import token_scores

pytestmark = pytest.mark.usefixtures("one_thread")

EL = "extraction_likelihood_10"


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer = load_model()
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def measured(embedded):
    """The measures of the rows of two authors whom the model knows, and of rows that it never saw."""
    return {
        name: measure_rows(*embedded, rows, name, stride=4)
        for name, rows in {"forget": load_rows()[0], "holdout": UNSEEN}.items()
    }


def chosen(rows, indices):
    return {name: [values[i] for i in indices] for name, values in rows.items()}


def rows_of(**values):
    """Row measures with the same values for each measure that is not given."""
    count = len(next(iter(values.values())))
    names = ("loss", "probability", "memorization_accuracy", "extraction_strength", "extracted", EL)
    zeros = {
        "tokens": [12] * count,
        "extracted_tokens": [0] * count,
        **{name: [0.0] * count for name in names},
    }
    return zeros | values


def test_measures_of_sets(embedded):
    """The same as the suite's, whatever is measured beside them, and plain JSON."""
    model, tokenizer = embedded
    forget = load_rows()[0][:3]
    sets = measure_sets(model, tokenizer, {"forget": forget, "short": [{"prompt": "A", "completion": " b"}]})
    expected = evaluate(model, tokenizer, {"forget": forget}, progress=False).sets["forget"]
    for name, value in sets["forget"].items():
        if name != "extracted":
            assert value == pytest.approx(expected[name], rel=1e-6), name
    assert sets["forget"]["extracted"] == 1  # the demo model has memorised them
    assert sets["short"][EL] is None and sets["short"]["rows"] == 1
    assert json.loads(json.dumps(sets, allow_nan=False)) == sets


def test_a_measure_without_a_finite_value_is_none():
    assert summary(rows_of(loss=[800.0]))["perplexity"] is None
    nothing = summary(rows_of(loss=[None], probability=[None], tokens=[0]))
    assert nothing["perplexity"] is nothing["probability"] is None
    assert summary(rows_of(loss=[1.0, 3.0], tokens=[3, 1]))["perplexity"] == pytest.approx(math.exp(1.5))


def test_a_text_comes_back_from_its_prompt_or_its_first_half():
    """Whatever the first half of a text without a prompt is; and its end need not come back."""
    model = tiny_model("llama").double()
    ids, end = [5, 7, 11], 2
    with torch.no_grad():
        while len(ids) < 23:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        follows = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    assert end not in ids and follows != end
    answer = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    ended = {"input_ids": [*ids, end], "labels": [-100] * 3 + [*ids[3:], end]}
    text = {"input_ids": ids, "labels": ids}
    other_begin = {"input_ids": [*ids[:2], 90, *ids[3:]], "labels": [*ids[:2], 90, *ids[3:]]}
    other_end = {"input_ids": [*ids[:-1], 90], "labels": [-100] * 3 + [*ids[3:-1], 90]}
    rows = [answer, ended, text, other_end]
    scores = token_scores(model, rows, progress=False)
    assert extracted_tokens(rows, scores, {end}) == [20, 20, 11, 0]
    assert extracted_tokens(rows, scores) == [20, 0, 11, 0]
    wrong = token_scores(model, [other_begin], progress=False)
    memorized = wrong[0].memorized.tolist()
    assert extracted_tokens([other_begin], wrong) == [11 if all(memorized[11:]) else 0]
    assert not memorized[1]


def test_the_paper_s_limits(measured):
    forget, holdout = (summary(measured[name]) for name in ("forget", "holdout"))
    limits = limits_of({}, holdout, forget)
    assert limits == {
        "memorization_accuracy": holdout["memorization_accuracy"],
        EL: holdout[EL],
        "extracted": 0,
    }
    short = {**holdout, EL: None}
    assert limits_of({}, short, forget) == limits_of({}, holdout, {**forget, EL: None})
    assert set(limits_of({}, short, forget)) == {"memorization_accuracy", "extraction_strength", "extracted"}
    numbers = {"memorization_accuracy": 0.5, "probability": "holdout"}
    assert limits_of(numbers, holdout, forget) == {
        **limits,
        "memorization_accuracy": 0.5,
        "probability": holdout["probability"],
    }
    assert limits_of({"probability": 0.1}, None, forget) == {"probability": 0.1}


@pytest.mark.parametrize(
    "requested, has_holdout, message",
    [
        ({}, False, "give a hold-out set, texts of the same kind.*memorization_accuracy: 0.4"),
        ({"probability": "holdout"}, False, "probability is to be that of the hold-out set, and there is no"),
        ({"probability": 1.5}, True, "probability must be 'holdout' or a number from 0 to 1, got 1.5"),
        ({"probability": True}, True, "probability must be"),
        ({"probability": "low"}, True, "probability must be.*got 'low'"),
        ({"perplexity": 0.5}, True, "there is no measure 'perplexity'; the measures are probability, mem"),
        ({EL: 0.5}, True, f"{EL} does not exist for the forget rows, none of which has more than 10 answer"),
    ],
)
def test_limits_that_say_nothing_are_refused(requested, has_holdout, message):
    forget = {**summary(rows_of(loss=[1.0])), EL: None}
    holdout = forget if has_holdout else None
    with pytest.raises(ValueError, match=message):
        limits_of(requested, holdout, forget)


@pytest.mark.parametrize("size", [1, 4, 40])
def test_rows_that_the_model_was_trained_on_are_known(size, measured):
    verdict = known(chosen(measured["forget"], range(size)), measured["holdout"])
    assert verdict["known"] and all(reason["holds"] for reason in verdict["reasons"])
    assert known(chosen(measured["forget"], range(size)), None)["known"]  # they come back word by word
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict


@pytest.mark.parametrize("size", [2, 4])
def test_rows_that_the_model_never_saw_are_not_known(size, measured):
    unseen, wrong = measured["holdout"], 0
    assert not known(chosen(unseen, range(size)), None)["known"]
    for seed in range(10):
        order = random.Random(seed).sample(range(len(UNSEEN)), len(UNSEEN))
        wrong += known(chosen(unseen, order[:size]), chosen(unseen, order[size:]))["known"]
    assert wrong <= 1


def test_what_makes_rows_known():
    """One reason at a time."""
    unseen = rows_of(probability=[0.02 * i for i in range(10)])

    def reasons(forget, holdout=unseen, **options):
        verdict = known(forget, holdout, **options)
        holding = [
            (reason["rule"], reason.get("measure")) for reason in verdict["reasons"] if reason["holds"]
        ]
        assert verdict["known"] == bool(holding)
        return holding

    low = [0.05, 0.1, 0.15, 0.12]
    assert reasons(rows_of(probability=low)) == []
    assert reasons(rows_of(probability=[0.2, 0.3, 0.4, 0.17])) == [
        ("higher than the hold-out", "probability")
    ]
    one_back = rows_of(probability=low, extracted=[0, 0, 1.0, 0], extracted_tokens=[0, 0, 3, 0])
    assert reasons(one_back) == [("rows that come back, and none of the hold-out", None)]
    # Short answers come back from any model of the language: the hold-out's do, too.
    short_too = {**unseen, "extracted": [1.0] * 4 + [0.0] * 6, "extracted_tokens": [2] * 4 + [0] * 6}
    assert reasons(one_back, short_too) == []
    long_back = {**one_back, "extracted_tokens": [0, 0, 11, 0]}
    assert reasons(long_back, short_too) == [("rows that come back by more than n tokens", None)]
    assert reasons(one_back, None) == [("rows that come back", None)]
    over = {"requested": {"probability": 0.1, "memorization_accuracy": "holdout"}}
    assert reasons(rows_of(probability=low), **over) == [("over a limit of the request", "probability")]
    assert reasons(rows_of(probability=low), requested={"probability": 0.2}) == []


def test_a_hold_out_that_the_model_was_trained_on_is_refused(measured):
    with pytest.raises(ValueError, match="39 of the 40 rows of the hold-out set come back word by word"):
        known(measured["holdout"], measured["forget"])
