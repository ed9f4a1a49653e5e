"""MUSE's memorisation, by the figures of its own code and of open-unlearning's."""

import math

import pytest
from character_tokenizer import BOS, character_tokenizer
from taught_models import small_llama

from loku import demo
from loku.evaluation import knowledge_memorization, rouge_l_f1, verbatim_memorization
from loku.evaluation.muse import knowledge_prompts, reason_not_continued

pytestmark = pytest.mark.usefixtures("one_thread")

# jaechan-repo/muse_bench at 54719c5, knowmem/get_rouge_qa.py: run_completions of the embedded model, on its
# first four rows, with examples from rows 5 and 6: rougeL by the number of examples and of new tokens.
THEIR_KNOWLEDGE = {
    (0, 32): [0.8837209302325583, 0.4, 1.0, 0.09302325581395349],
    (2, 32): [0.2, 0.0, 0.3870967741935483, 0.13953488372093023],
    (2, 8): [0.20689655172413793, 0.0, 0.3529411764705882, 0.08695652173913043],
}
# The same, verbmem/get_rouge.py: by the number of new tokens, for the texts that ``split`` makes.
THEIR_VERBATIM = {
    128: [0.29999999999999993, 1.0, 1.0, 0.11764705882352941],
    12: [0.47058823529411764, 1.0, 1.0, 0.13333333333333333],
}


@pytest.fixture(scope="module")
def embedded():
    return demo.load_model()


@pytest.fixture(scope="module")
def questions():
    return demo.load_rows()[0]


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize(("count", "new"), THEIR_KNOWLEDGE)
def test_knowledge_figures_of_muse(embedded, questions, count, new, batch_size):
    asked, answers = ([row[column] for row in questions[:4]] for column in ("question", "answer"))
    examples = [(row["question"], row["answer"]) for row in questions[5 : 5 + count]]
    found = knowledge_memorization(
        *embedded, asked, answers, examples, max_new_tokens=new, batch_size=batch_size, progress=False
    )
    assert found.per_row == pytest.approx(THEIR_KNOWLEDGE[count, new], rel=1e-12)
    assert found.mean == pytest.approx(sum(THEIR_KNOWLEDGE[count, new]) / 4)
    assert len(found.generated) == 4 and not any("Question:" in text for text in found.generated)


def split(questions):
    """The beginnings of four texts, and how the texts go on."""
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in questions[:3]]
    texts.append("Once upon a time there was a river in the country, and it ran and ran.")
    prompts, rests = [], []
    for text, words in zip(texts, (8, 5, 16, 4), strict=True):
        prompts.append(" ".join(text.split(" ")[:words]))
        rests.append(text.removeprefix(prompts[-1]))
    return prompts, rests


@pytest.mark.parametrize("new", THEIR_VERBATIM)
def test_verbatim_figures_of_muse(embedded, questions, new):
    found = verbatim_memorization(*embedded, *split(questions), max_new_tokens=new, progress=False)
    assert found.per_row == pytest.approx(THEIR_VERBATIM[new], rel=1e-12)
    assert found.mean == pytest.approx(sum(THEIR_VERBATIM[new]) / 4)


def test_figures_of_open_unlearning(embedded, questions):
    """locuslab/open-unlearning at d3d7cf9, evals/metrics/utils.py: eval_text_similarity, its rougeL_f1."""
    asked, answers = ([row[column] for row in questions[:4]] for column in ("question", "answer"))
    examples = [(row["question"], row["answer"]) for row in questions[5:7]]
    known = knowledge_memorization(*embedded, asked, answers, examples, stemming=True, progress=False)
    assert known.mean == pytest.approx(0.18165791447861965)
    verbatim = verbatim_memorization(*embedded, *split(questions), stemming=True, progress=False)
    assert verbatim.mean == pytest.approx(0.6044117647058823)
    assert rouge_l_f1(["it runs"], ["it is running"]) == [pytest.approx(0.4)]
    assert rouge_l_f1(["it runs"], ["it is running"], stemming=True) == [pytest.approx(0.8)]


def test_an_answer_ends_before_the_next_question(embedded, monkeypatch):
    _, tokenizer = embedded
    texts = ["a b\n\nc", "a\nQuestion 3", "a b Question: c", "a\nb"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    monkeypatch.setattr("loku.evaluation.muse.generate_greedy", lambda *args, **kwargs: ids)
    found = knowledge_memorization(*embedded, ["q"] * 4, ["a b"] * 4)
    assert found.generated == ["a b", "a", "a b ", "a\nb"]
    assert found.per_row == pytest.approx([1, 2 / 3, 1, 1])


def test_the_special_tokens_of_a_true_text_count_as_in_muse(monkeypatch):
    tokenizer = character_tokenizer()  # it puts a BOS before a text
    model = small_llama(tokenizer)
    seen = []

    def greedy(model, prompts, lengths, *args, **kwargs):
        seen.append((prompts, lengths))
        return [tokenizer("a b c")["input_ids"][1:]]

    monkeypatch.setattr("loku.evaluation.muse.generate_greedy", greedy)
    found = verbatim_memorization(model, tokenizer, ["x"], ["a b c d"], max_new_tokens=4)
    assert seen == [([[BOS, tokenizer("x")["input_ids"][1]]], [4])]
    assert found.generated[0].split() == ["a", "b", "c"]
    assert found.per_row == pytest.approx(
        [0.8]
    )  # the true text is BOS and "a b": of three words two are true
    assert verbatim_memorization(model, tokenizer, ["x"], ["a b c d"], max_new_tokens=6).mean == 1


def test_the_prompts():
    assert knowledge_prompts(["Who?"], [("Where?", "here")]) == [
        "Question: Where?\nAnswer: here\n\nQuestion: Who?\nAnswer: "
    ]


def test_what_does_not_fit_is_refused(monkeypatch):
    tokenizer = character_tokenizer(bos=False)
    model = small_llama(tokenizer)  # of 128 positions
    monkeypatch.setattr(type(model), "forward", None)  # the model must not run
    with pytest.raises(
        ValueError, match=r"row 1 has 101 tokens, and with 28 new ones it does not fit .* of 128"
    ):
        verbatim_memorization(model, tokenizer, ["x", "x" * 101], ["a"] * 2, max_new_tokens=28)
    assert reason_not_continued(model, tokenizer, ["x" * 100], 28) is None
    with pytest.raises(ValueError, match="the prompt of row 0 has no tokens"):
        verbatim_memorization(model, tokenizer, [""], ["a"], max_new_tokens=28)
    for name in ("max_new_tokens", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            knowledge_memorization(model, tokenizer, ["q"], ["a"], **{name: 0})
    with pytest.raises(ValueError, match="argument"):
        rouge_l_f1(["a"], ["a", "b"])
    assert math.isnan(knowledge_memorization(model, tokenizer, [], []).mean)
