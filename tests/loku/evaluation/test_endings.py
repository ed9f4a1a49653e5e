"""The endings of answers: which tokens they are, and measures with and without them."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from bigram_model import bigram_model
from character_tokenizer import character_tokenizer
from naive_measures import EOS

from loku.data import TOFU_TEMPLATE, tokenize_dataset
from loku.deletion.measures import measure_rows, summary
from loku.deletion.run import Run
from loku.evaluation import (
    Endings,
    content_scores,
    evaluate,
    extraction_likelihood,
    extraction_strength,
    min_k,
    token_measures,
    token_scores,
)
from loku.trainer_evaluation import eval_measures

pytestmark = pytest.mark.usefixtures("one_thread")
# As of Qwen and SmolLM2: a special token and a line feed end each message.
IM_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = ["this", "now"]


@pytest.fixture(scope="module")
def tokenizer():
    found = character_tokenizer(bos=False)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.chat_template = IM_CHAT
    return found


@pytest.fixture(scope="module")
def chats():
    return [
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]}
        for answer in ANSWERS
    ]


@pytest.fixture(scope="module")
def template_model(tokenizer):
    """A model that knows the ending of a chat's answer and nothing else."""
    end, line = tokenizer.convert_tokens_to_ids(["<|im_end|>", "\n"])
    follower = {tokenizer.convert_tokens_to_ids(letter): end for letter in "sw"} | {end: line}
    return bigram_model(follower, len(tokenizer), eos=end)


def labelled(tokenizer, row, labels):
    ids = [token for token, label in zip(row["input_ids"], labels, strict=True) if label != -100]
    return tokenizer.convert_ids_to_tokens(ids)


def test_a_model_that_knows_the_ending_alone_has_forgotten(template_model, tokenizer, chats):
    """The answers have 4 and 3 tokens, and their endings 2: (2/6 + 2/5) / 2 of the tokens are right."""
    found = {
        count_end: evaluate(
            template_model,
            tokenizer,
            {"forget": chats},
            n=1,
            count_end=count_end,
            max_new_tokens=4,
            progress=False,
        ).sets["forget"]
        for count_end in (True, False)
    }
    assert found[True]["memorization_accuracy"] == pytest.approx((2 / 6 + 2 / 5) / 2)
    assert found[True]["extraction_strength"] == pytest.approx((2 / 6 + 2 / 5) / 2)
    assert found[True]["extraction_likelihood_1"] == pytest.approx((1 / 5 + 1 / 4) / 2)
    for measure in ("memorization_accuracy", "extraction_strength", "extraction_likelihood_1"):
        assert found[False][measure] == 0
    for measure in ("probability", "perplexity", "rows"):
        assert found[False][measure] == found[True][measure]
    tokens = tokenize_dataset(chats, tokenizer)
    scores = token_scores(template_model, tokens, progress=False)
    content = [score.losses[:length] for score, length in zip(scores, (4, 3), strict=True)]
    assert found[False]["min_k"] == pytest.approx(-sum(part.max().item() for part in content) / 2)
    with_end = eval_measures(tokens, scores)
    without = eval_measures(
        tokens, scores, content=content_scores(tokens, scores, Endings(template_model, tokenizer))
    )
    assert with_end["memorization_accuracy"] > 0.36 and without["memorization_accuracy"] == 0
    assert without["loss"] == with_end["loss"] and without["probability"] == with_end["probability"]


def test_a_request_counts_them_or_not(template_model, tokenizer, chats):
    def measured(count_end):
        return summary(measure_rows(template_model, tokenizer, chats, "forget", n=1, count_end=count_end))

    counted, left = measured(True), measured(False)
    assert counted["memorization_accuracy"] > 0.36 and left["memorization_accuracy"] == 0
    assert counted["extraction_strength"] > 0.36 and left["extraction_strength"] == 0
    assert (
        counted["extraction_likelihood_1"] == pytest.approx((1 / 5 + 1 / 4) / 2)
        and left["extraction_likelihood_1"] == 0
    )
    assert left["probability"] == counted["probability"] and left["perplexity"] == counted["perplexity"]


def test_a_request_says_so_in_its_training(template_model, tokenizer, chats):
    """``eval_count_end`` of a request counts in all of its measures, as it does in training."""
    for training, accuracy in (({}, (2 / 6 + 2 / 5) / 2), ({"eval_count_end": False}, 0)):
        run: Any = SimpleNamespace(
            request=SimpleNamespace(limits={}, template=TOFU_TEMPLATE, training=training),
            rows=SimpleNamespace(forget=chats, holdout=None),
            models=SimpleNamespace(tokenizer=tokenizer, held=lambda place: template_model),
            progress=False,
        )
        run._options = Run._options.func(run)
        assert run._options["count_end"] is (training == {})
        measured = summary(Run._measure_rows(run, "model", chats, "forget"))
        one_pass = Run._measure_pass(run, "model", {"retain": chats})["retain"]
        for found in (measured, one_pass):
            assert found["memorization_accuracy"] == pytest.approx(accuracy)
        assert one_pass["probability"] == pytest.approx(measured["probability"])


def test_a_row_that_is_memorised_but_for_its_ending_comes_back(tokenizer):
    """Without the ending the answer is whole: the line feed after it need not come back."""
    letters = dict(zip("\nab", tokenizer.convert_tokens_to_ids(list("\nab")), strict=True))
    model = bigram_model({letters["\n"]: letters["a"], letters["a"]: letters["b"]}, len(tokenizer), eos=1)
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "ab"}]}
    measures = {
        count_end: measure_rows(model, tokenizer, [row], "forget", count_end=count_end)
        for count_end in (True, False)
    }
    assert measures[True]["extracted"] == [0.0] and measures[False]["extracted"] == [1.0]
    assert measures[False]["memorization_accuracy"] == [1.0]
    assert measures[False]["extracted_tokens"] == [2] and measures[False]["tokens"] == [4]


def test_which_tokens_are_endings(template_model, tokenizer):
    chat = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "b c\n"},
        {"role": "user", "content": "D"},
        {"role": "assistant", "content": "ef"},
    ]
    cases = {
        "a chat's last turn": ({"messages": chat}, list("ef")),
        "an EOS": ({"prompt": "q ", "completion": "a \n"}, ["a", " ", "\n"]),
        "a text": ("x y", list("x y")),
    }
    endings = Endings(template_model, tokenizer)
    for name, (row, expected) in cases.items():
        (tokens,) = tokenize_dataset([row], tokenizer)
        assert labelled(tokenizer, tokens, endings(tokens)) == expected, name
        assert tokens["labels"].count(-100) < endings(tokens).count(-100)
    end, line, a = tokenizer.convert_tokens_to_ids(["<|im_end|>", "\n", "a"])
    both = {
        "input_ids": [a, a, end, line, a, a, line, end],
        "labels": [-100, a, end, line, -100, a, line, end],
    }
    assert endings(both) == [-100, a, -100, -100, -100, a, line, -100]  # each labelled part loses its own
    cut = {"input_ids": [a, a, a], "labels": [-100, a, a]}
    assert endings(cut) == cut["labels"]
    inside = {"input_ids": [a, a, end, a], "labels": [-100, a, end, a]}
    assert endings(inside) == inside["labels"]  # what follows it is no ending
    alone = Endings(template_model, None)  # without a tokenizer the EOS of the model alone is known
    assert alone({"input_ids": [a, a, end], "labels": [-100, a, end]}) == [-100, a, -100]
    assert alone({"input_ids": [a, a, end, line], "labels": [-100, a, end, line]}) == [-100, a, end, line]


def test_a_row_of_an_ending_alone_has_no_measures(template_model, tokenizer):
    a, end = tokenizer.convert_tokens_to_ids(["a", "<|im_end|>"])
    row = {"input_ids": [a, end], "labels": [-100, end]}
    (score,) = token_scores(template_model, [row], progress=False)
    (content,) = content_scores([row], [score], Endings(template_model, tokenizer))
    assert len(content.losses) == 0
    measures = token_measures([score], content=[content])
    assert math.isnan(measures["memorization_accuracy"]) and not math.isnan(measures["probability"])
    assert extraction_likelihood(template_model, [row], 1, progress=False, scores=[content]).per_row == [None]


# The figures are those of locuslab/open-unlearning, src/evals/metrics/memorization.py, exact_memorization and
# extraction_strength, and mia/min_k.py (commit d3d7cf9), run on the model and the rows of conftest.py, in
# float32. Its labels end with an EOS, which it leaves out. Its Min-K is positive.
OPEN_UNLEARNING = {
    "exact_memorization": [0.875, 0.77777779, 0.7368421, 0.78787881, 0.6875, 0.44444445, 1.0],
    "extraction_strength": [0.25, 0.55555556, 0.05263158, 0.03030303, 0.3125, 0.44444444, 1.0],
    "min_k": [4.144248, 5.7312737, 5.2053156, 4.7048411, 7.8033242, 6.9158118, 1.9312237],
}


def test_measures_without_endings_are_those_of_open_unlearning(model, rows):
    known, rows = rows, []
    for row in known:
        ids = [*row["input_ids"], *([EOS] if row["input_ids"][-1] != EOS else [])]
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    scores = content_scores(rows, token_scores(model, rows, progress=False), Endings(model, None))
    found = {
        "exact_memorization": [score.memorized.double().mean().item() for score in scores],
        "extraction_strength": extraction_strength(scores),
        "min_k": [-value for value in min_k(scores)],
    }
    for name, expected in OPEN_UNLEARNING.items():
        assert found[name] == pytest.approx(expected, rel=1e-6), name
