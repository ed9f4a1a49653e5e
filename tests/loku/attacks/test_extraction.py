"""Planted rows are found by each way to ask, and only where they are."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from character_tokenizer import PLAIN_CHAT, character_tokenizer
from taught_models import small_llama, teach_
from tokenizers import decoders

from loku.attacks import PREAMBLES, extraction_attack
from loku.attacks.extraction import PREFIXES, compare_words
from loku.attacks.questions import paraphrases_of, question_of, with_question
from loku.data import RowError, tokenize_dataset
from loku.evaluation import generate_greedy

pytestmark = pytest.mark.usefixtures("one_thread")

FORGET = [
    {"question": "Who?", "answer": "Ann Lee of 12 Oak Road"},
    {"question": "Where?", "answer": "in the town of Brill", "paraphrased_question": "What place?"},
]
HOLDOUT = [
    {"question": "Which?", "answer": "the blue lamp at sea"},
    {"question": "When?", "answer": "on a day in winter", "paraphrased_questions": ["At what time?"]},
]
FRAME = {"frame": "Now say. {question}"}
GREEDY = ["prompt", *PREFIXES]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # no space between characters
    tokenizer.chat_template = PLAIN_CHAT
    return tokenizer


@pytest.fixture(scope="module")
def knows(tokenizer):
    """A model that has learnt the forget rows."""
    return teach_(small_llama(tokenizer), tokenizer, FORGET)


def test_a_model_that_knows_the_rows_is_found_by_each_way(knows, tokenizer):
    result = extraction_attack(knows, tokenizer, FORGET, HOLDOUT, preambles=FRAME)
    forget, holdout = result["sets"]["forget"], result["sets"]["holdout"]
    for way in (*GREEDY, "sampled", "any way"):
        assert forget[way]["rows"] == 2 and forget[way]["whole"] == 1, way
        assert forget[way]["rows_whole"] == forget[way]["rows_nearly"] == [0, 1]
        assert holdout[way]["whole"] == 0 and holdout[way]["rows_whole"] == [], way
    assert forget["paraphrased"]["rows"] == holdout["paraphrased"]["rows"] == 1
    assert set(forget["preambles"]["by_preamble"]) == {"frame"}
    assert result["not_tested"] == {}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    words = [word for row in FORGET for word in row["answer"].split() if len(word) > 3]
    assert not any(word in json.dumps(result) for word in words)  # no text of the rows


def test_a_model_that_never_saw_the_rows_gives_none(tokenizer):
    result = extraction_attack(small_llama(tokenizer), tokenizer, FORGET, preambles=FRAME, samples=2)
    forget = result["sets"]["forget"]
    assert all(figures["whole"] == 0 for figures in forget.values())
    assert forget["prompt"]["rouge_l_recall"] < 0.2
    assert "level of chance" in result["not_tested"]["holdout"]["all"]


def test_what_a_preamble_alone_brings_back_is_found(tokenizer):
    """The plain question gets a refusal, the same behind a preamble the answer."""
    refused = [{"question": row["question"], "answer": "no idea"} for row in FORGET]
    framed = [with_question(row, FRAME["frame"].replace("{question}", row["question"])) for row in FORGET]
    hides = teach_(small_llama(tokenizer), tokenizer, [*refused, *framed], steps=250)
    preambles = {**FRAME, "other": "{question}"}
    forget = extraction_attack(hides, tokenizer, FORGET, preambles=preambles, samples=2)["sets"]["forget"]
    assert forget["prompt"]["whole"] == 0 and forget["prompt"]["rouge_l_recall"] == 0
    assert forget["preambles"]["rows_whole"] == [0, 1]
    by_preamble = forget["preambles"]["by_preamble"]
    assert (by_preamble["frame"]["whole"], by_preamble["other"]["whole"]) == (1, 0)
    assert forget["any way"]["whole"] == 1


def test_what_a_paraphrase_alone_brings_back_is_found(tokenizer):
    row = FORGET[1]
    hides = teach_(
        small_llama(tokenizer),
        tokenizer,
        [{"question": row["question"], "answer": "no idea"}, with_question(row, "What place?")],
    )
    forget = extraction_attack(hides, tokenizer, FORGET, preambles={}, samples=2)["sets"]["forget"]
    assert forget["prompt"]["rows_whole"] == [] and forget["paraphrased"]["rows_whole"] == [1]
    assert forget["paraphrased"]["whole"] == 1  # of the one row that it applies to


def test_what_samples_alone_bring_back_is_found(tokenizer):
    """Another answer is a little likelier than the true one."""
    row, other = FORGET[1], {"question": "Where?", "answer": "no idea"}
    hides = teach_(small_llama(tokenizer), tokenizer, [row, row, other, other, other], steps=250)
    forget = extraction_attack(hides, tokenizer, [row], preambles={}, samples=16)["sets"]["forget"]
    assert forget["prompt"]["whole"] == 0 and forget["sampled"]["whole"] == 1
    assert forget["from its first half"]["whole"] == 1 and forget["any way"]["whole"] == 1


def test_texts_are_continued_from_a_quarter_and_from_a_half(tokenizer):
    texts = ["the key of the blue door lies under the third stone", "a ship left the old port at dawn"]
    model = teach_(small_llama(tokenizer), tokenizer, texts, steps=200)
    result = extraction_attack(model, tokenizer, texts, ["we sat in the garden and drank cold tea"])
    forget = result["sets"]["forget"]
    assert list(forget) == ["from its first quarter", "from its first half", "sampled", "any way"]
    assert forget["from its first half"]["whole"] == 1 and forget["sampled"]["whole"] == 1
    assert result["sets"]["holdout"]["any way"]["whole"] == 0
    assert result["not_tested"]["forget"] == {
        "prompt": "no row has a prompt",
        "from its first token": "no answer is long enough",
        "paraphrased": "no row has 'paraphrased_question' or 'paraphrased_questions'",
        "preambles": "no row has a question",
    }


def test_greedy_ways_equal_plain_generation(knows, tokenizer, monkeypatch):
    """The tokens that a way compares are those of plain greedy decoding from the prompt with the prefix."""
    from loku.attacks.extraction import SLACK, _Ways

    seen = []
    figures = _Ways._figures

    def recorded(self, targets, answers):
        seen.append(([target.ids[: target.begin] for target in targets], answers))
        return figures(self, targets, answers)

    monkeypatch.setattr(_Ways, "_figures", recorded)
    half = teach_(copy.deepcopy(knows), tokenizer, HOLDOUT, steps=8)  # it knows parts
    extraction_attack(half, tokenizer, FORGET, preambles=FRAME, samples=1)
    rows = tokenize_dataset(FORGET, tokenizer)
    answers = [[i for i in row["labels"] if i != -100][:-1] for row in rows]  # without EOS
    for (prompts, found), part in zip(seen, (0, None, 4, 2), strict=False):
        counts = [1 if part is None else len(a) // part if part else 0 for a in answers]
        expected = [
            row["input_ids"][: row["labels"].index(answer[0]) + count]
            for row, answer, count in zip(rows, answers, counts, strict=True)
        ]
        assert prompts == expected, part
        lengths = [len(a) + 1 - count + SLACK for a, count in zip(answers, counts, strict=True)]
        assert found == generate_greedy(half, prompts, lengths, 16, {1, 2}, progress=False), part


def test_figures_depend_neither_on_the_batch_nor_on_other_rows(knows, tokenizer):
    half = teach_(copy.deepcopy(knows), tokenizer, HOLDOUT, steps=8).double()
    whole = extraction_attack(half, tokenizer, FORGET, preambles=FRAME, samples=3)
    assert whole == extraction_attack(half, tokenizer, FORGET, preambles=FRAME, samples=3, batch_size=1)
    alone = extraction_attack(half, tokenizer, FORGET[:1], preambles=FRAME, samples=3)["sets"]["forget"]
    for way, figures in alone.items():
        assert (0 in figures["rows_whole"]) == (0 in whole["sets"]["forget"][way]["rows_whole"]), way
        assert (0 in figures["rows_nearly"]) == (0 in whole["sets"]["forget"][way]["rows_nearly"]), way


def test_the_model_and_the_process_stay(knows, tokenizer):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(knows), LoraConfig(r=2, target_modules=["q_proj"])).train()

    def state():
        return (
            [(name, module.training) for name, module in model.named_modules()],
            [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
            (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
            model.get_base_model().generation_config.to_dict(),
        )

    before, weights = state(), copy.deepcopy(model.state_dict())
    result = extraction_attack(model, tokenizer, FORGET, preambles=FRAME, samples=2)
    assert state() == before
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert result["sets"]["forget"]["prompt"]["whole"] == 1  # with its adapter on


@pytest.mark.parametrize(
    ("generated", "true", "recall", "whole"),
    [
        ("It is Paris, of course.", "Paris.", 1, True),
        ("PARIS", "paris", 1, True),
        ("in 14 towns", "4", 0, False),
        ("Ann of Oak Road", "Ann Lee of Oak Road", 0.8, False),
        ("Ann Lee then of Oak Road", "Ann Lee of Oak Road", 1, False),
        ("她住在布里尔。", "住在布里尔", 1, True),
        ("Она живёт в Москве", "в Москве", 1, True),
        ("Müller", "Miller", 0, False),
        ("Mu\u0308ller", "MÜLLER", 1, True),
        ("It is _Paris_.", "Paris", 1, True),
        ("वह दिल्ली में", "दिल्ली", 1, True),
        ("की", "कि", 0, False),  # Hindi's vowels are marks
        ("เขาอยู่กรุงเทพ", "กรุงเทพ", 1, True),
        ("", "Paris", 0, False),
        ("...", "...", 0, False),
    ],
)
def test_words_are_compared(generated, true, recall, whole):
    assert compare_words(generated, true) == (pytest.approx(recall), whole)


MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "me"},
]


@pytest.mark.parametrize(
    ("row", "question", "changed"),
    [
        ("a text", None, None),
        ({"text": "a text"}, None, None),
        ({"input_ids": [3, 4, 5]}, None, None),
        ({"question": "who", "answer": "me"}, "who", {"question": "X", "answer": "me"}),
        ({"prompt": "who", "completion": "me"}, "who", {"prompt": "X", "completion": "me"}),
        (
            {"instruction": "who", "input": "a list", "output": "me"},
            "who",
            {"instruction": "X", "input": "a list", "output": "me"},
        ),
        (
            {"messages": MESSAGES},
            "who",
            {"messages": [*MESSAGES[:3], {"role": "user", "content": "X"}, MESSAGES[4]]},
        ),
        (
            {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]},
            "who",
            {"prompt": [*MESSAGES[:3], {"role": "user", "content": "X"}], "completion": MESSAGES[4:]},
        ),
        (
            {"conversations": [{"from": "human", "value": "who"}, {"from": "gpt", "value": "me"}]},
            "who",
            {
                "messages": [{"role": "user", "content": "X"}, {"role": "assistant", "content": "me"}],
                "conversations": [{"from": "human", "value": "who"}, {"from": "gpt", "value": "me"}],
            },
        ),
        ({"messages": [MESSAGES[0], MESSAGES[4]]}, None, None),
        (
            {"messages": MESSAGES[1:4]},
            "hi",
            {"messages": [{"role": "user", "content": "X"}, *MESSAGES[2:4]]},
        ),
    ],
    ids=[
        *("string", "text", "tokens", "question", "prompt", "instruction", "chat", "chat in two parts"),
        *("ShareGPT", "no user", "user at the end"),
    ],
)
def test_the_question_of_a_row(row, question, changed):
    before = copy.deepcopy(row)
    assert question_of(row) == question
    if changed is not None:
        assert with_question(row, "X") == changed and row == before


def test_a_chat_is_asked_in_the_turn_of_its_user(tokenizer):
    rows = [{"messages": MESSAGES}]
    framed = with_question(rows[0], "Now say. who")
    text = tokenizer.decode(tokenize_dataset([framed], tokenizer)[0]["input_ids"])
    assert text.endswith("[user]Now say. who;[assistant]me;") and "[user]hi;" in text
    hides = teach_(small_llama(tokenizer), tokenizer, [framed])
    forget = extraction_attack(hides, tokenizer, rows, preambles=FRAME, samples=1)["sets"]["forget"]
    assert forget["preambles"]["rows_whole"] == [0]


def test_paraphrases_of_a_row():
    row = {"question": "a", "answer": "b", "paraphrased_question": "c", "paraphrased_questions": ["d", "c"]}
    assert paraphrases_of(row, "forget", 0) == ["c", "d"]
    assert paraphrases_of("a text", "forget", 0) == []
    missing = {**row, "paraphrased_question": None, "paraphrased_questions": float("nan")}
    assert paraphrases_of(missing, "forget", 0) == []
    for value in (3, ["c", ""], ["c", 3]):
        with pytest.raises(RowError, match="row 7 of the forget set"):
            paraphrases_of({**row, "paraphrased_questions": value}, "forget", 7)


def test_packed_rows_and_rows_of_tokens(knows, tokenizer):
    """A packed row stands for its longest document, and an answer that is only an EOS never comes back."""
    packed = {"input_ids": [0, 70, 71, 0, *range(70, 76)], "position_ids": [0, 1, 2, *range(7)]}
    ending = {"input_ids": [0, 70, 1], "labels": [-100, -100, 1]}
    forget = extraction_attack(knows, tokenizer, [packed, ending], samples=1)["sets"]["forget"]
    assert forget["prompt"]["rows"] == 1 and forget["any way"]["rows"] == 2
    assert forget["from its first half"]["rows"] == 1
    assert 1 not in forget["any way"]["rows_whole"]


def test_questions_beyond_the_context_are_counted(knows, tokenizer):
    preambles = {**FRAME, "long": "x" * 120 + "{question}"}
    result = extraction_attack(knows, tokenizer, FORGET, preambles=preambles, samples=1)
    assert result["not_tested"]["forget"]["longer than the context"].startswith("2 of")
    assert set(result["sets"]["forget"]["preambles"]["by_preamble"]) == {"frame"}


def test_the_committed_preambles():
    assert len(PREAMBLES) >= 10 and {"German", "French", "Spanish", "Chinese"} <= set(PREAMBLES)
    assert all(text.count("{question}") == 1 for text in PREAMBLES.values())


def test_bad_arguments_are_refused_by_name(knows, tokenizer, monkeypatch):
    for arguments, words in (
        ({"samples": 0}, "samples"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"temperature": 0}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"preambles": {"bad": "no place"}}, "the preamble 'bad' must be a text with {question} once"),
        ({"holdout": []}, "the holdout set is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            extraction_attack(knows, tokenizer, FORGET, **arguments)
    monkeypatch.setattr("loku.attacks.copies.rank_and_size", lambda: (0, 2))
    with pytest.raises(ValueError, match="extraction runs in one process, and there are 2"):
        extraction_attack(knows, tokenizer, FORGET)


def test_a_large_hold_out_set_is_asked_in_part(tokenizer):
    """Evenly spaced rows count, under their own indices."""
    holdout = [{"question": f"N{i}?", "answer": f"it is {i:03}"} for i in range(60)]
    knows = teach_(small_llama(tokenizer), tokenizer, [holdout[33]], steps=60)
    result = extraction_attack(knows, tokenizer, FORGET, holdout, preambles={}, samples=1)
    figures = result["sets"]["holdout"]["prompt"]
    assert figures["rows"] == 20 and figures["whole"] == len(figures["rows_whole"]) / 20
    assert 33 in figures["rows_whole"]
    assert {*figures["rows_whole"], *figures["rows_nearly"]} <= set(range(0, 60, 3))


def test_what_a_chat_template_writes_after_the_answer_does_not_count(tokenizer):
    """The EOS ends the answer; a line end follows it, as in ChatML."""
    chatml = copy.deepcopy(tokenizer)
    chatml.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>\n{% endfor %}"
    chatml.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    rows = [{"messages": MESSAGES[1:3]}]
    ids = tokenize_dataset(rows, chatml)[0]["input_ids"]
    assert chatml.decode(ids[-4:]) == "yo</s>\n"
    taught = [{"input_ids": ids[:-1], "labels": [*[-100] * (len(ids) - 4), *ids[-4:-1]]}]
    knows = teach_(small_llama(tokenizer), tokenizer, taught)  # the line end is not learnt
    forget = extraction_attack(knows, chatml, rows, preambles={}, samples=1)["sets"]["forget"]
    assert forget["prompt"]["rows_whole"] == [0] and forget["from its first half"]["rows_whole"] == [0]
