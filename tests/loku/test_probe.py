"""The probe of general ability: its rows, their tokens, and measures that are equal to their definitions."""

import json
import math

import pytest
import torch
from character_tokenizer import MARKED_CHAT, PLAIN_CHAT, character_tokenizer
from tiny_models import tiny_model

from loku.demo import load_model
from loku.evaluation.text_fluency import repetition
from loku.probe import measure_probe, probe_rows, relative_ability
from loku.probe.ability import NEW_TOKENS, has_answer
from loku.probe.rows import KINDS, probe_tokens

CHARACTERS = 100  # of the tokenizer


@pytest.fixture(scope="module")
def embedded():
    return load_model()


def test_the_rows():
    rows = probe_rows()
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}
    assert counts == {"arithmetic": 20, "capitals": 20, "completions": 20, "fluency": 16, "openings": 12}
    assert len(rows) == sum(counts.values())
    assert len({json.dumps(row) for row in rows}) == len(rows)
    for row in rows:
        if "answer" in row:
            # A model that repeats the question, or the begin of the sentence, has not answered.
            assert has_answer(f"It is {row['answer']}.", row)
            assert not has_answer(row.get("question", row.get("prompt")), row)
            assert not has_answer(row.get("begin", ""), row)


def test_rows_that_mention_what_is_forgotten_are_left_out():
    left_out = [row for row in probe_rows() if row not in probe_rows(["Paris", "east"])]
    assert [row.get("question", row.get("prompt")) for row in left_out] == [
        "What is the capital of France?",
        "The sun rises in the east and sets in the",
    ]
    assert probe_rows(["four"]) == [
        row for row in probe_rows() if row.get("answer") != "4" and "four" not in row.get("prompt", "")
    ]


@pytest.mark.parametrize("template", [None, PLAIN_CHAT, MARKED_CHAT], ids=["plain", "chat", "marked chat"])
def test_the_tokens_of_the_rows(template):
    tokenizer = character_tokenizer(chat_template=template)

    def text(ids):
        return "".join(tokenizer.convert_ids_to_tokens(ids))

    rows = {row["kind"]: row for row in reversed(probe_rows())}  # the first one of each kind
    tokens = dict(zip(rows, probe_tokens(list(rows.values()), tokenizer), strict=True))
    answers = {
        kind: text([t for t in row.scored["labels"] if t != -100])
        for kind, row in tokens.items()
        if row.scored
    }
    assert answers == {
        "arithmetic": " 4",
        "capitals": " Paris",
        "completions": " west",
        "fluency": rows["fluency"]["text"],
    }
    question = "What is 2+2?"
    asked = f"<s>Question: {question}\nAnswer:" if template is None else f"[user]{question};[assistant]"
    assert text(tokens["arithmetic"].prompt) == asked
    begun = text(tokens["arithmetic"].scored["input_ids"])
    assert begun.removesuffix("</s>") == f"{asked}{' ' if template is None else ''}2+2 is 4"
    opening = rows["openings"]
    expected = f"<s>{opening['prompt']}" if template is None else f"[user]{opening['question']};[assistant]"
    assert text(tokens["openings"].prompt) == expected
    assert tokens["openings"].scored is None and tokens["fluency"].prompt == []


def naive_losses(model, row):
    """Return the losses of the labelled tokens of a row."""
    ids = torch.tensor([row["input_ids"]])
    losses = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return [-losses[i - 1, t].item() for i, t in enumerate(row["labels"]) if i and t != -100]


def naive_greedy(model, prompt, length, eos):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@torch.no_grad()
def test_the_measures_are_their_definitions(monkeypatch):
    for kind, length in {"arithmetic": 4, "capitals": 4, "completions": 2, "openings": 12}.items():
        monkeypatch.setitem(NEW_TOKENS, kind, length)
    tokenizer = character_tokenizer()
    model = tiny_model("llama", vocab=CHARACTERS).double()
    model.generation_config.eos_token_id = model.config.eos_token_id = 1
    random_state = torch.get_rng_state()
    found = measure_probe(model, tokenizer, batch_size=7)
    assert torch.equal(torch.get_rng_state(), random_state)
    rows = probe_rows()
    tokens = probe_tokens(rows, tokenizer)
    of_kind = {k: [(r, t) for r, t in zip(rows, tokens, strict=True) if r["kind"] == k] for k in KINDS}

    losses = [naive_losses(model, t.scored) for _, t in of_kind["capitals"]]
    probability = sum(math.exp(-sum(x) / len(x)) for x in losses) / len(losses)
    assert found["capitals"]["probability"] == pytest.approx(probability, rel=1e-9)
    assert found["capitals"]["accuracy"] == 0.0

    losses = [naive_losses(model, t.scored) for _, t in of_kind["fluency"]]
    tokens_of = sum(map(len, losses))
    assert found["fluency"]["loss"] == pytest.approx(sum(map(sum, losses)) / tokens_of, rel=1e-9)
    assert found["fluency"]["perplexity"] == pytest.approx(math.exp(found["fluency"]["loss"]))
    characters = sum(len(row["text"]) for row, _ in of_kind["fluency"])
    assert tokens_of == characters  # BOS is before the first
    assert found["fluency"]["bits_per_byte"] == pytest.approx(found["fluency"]["loss"] / math.log(2))

    texts = [naive_greedy(model, t.prompt, 12, 1) for _, t in of_kind["openings"]]
    repeated = [repetition(text) for text in texts]
    assert found["openings"]["repetition"] == pytest.approx(sum(repeated) / len(texts))
    bad = [len(t) < 8 or r > 0.5 for t, r in zip(texts, repeated, strict=True)]
    assert found["openings"]["degenerate"] == sum(bad) / len(bad)
    quality = sum(0 if b else 1 - r for b, r in zip(bad, repeated, strict=True)) / len(bad)
    assert found["openings"]["quality"] == pytest.approx(quality)
    assert found["form"] == "plain"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_model_of_one_domain_is_not_judged(embedded):
    found = measure_probe(*embedded, exclude=["Paris", "France"], batch_size=32)
    assert found["capitals"]["left_out"] == 1 and found["capitals"]["rows"] == 19
    assert found["arithmetic"]["left_out"] == 0
    assert found["arithmetic"]["accuracy"] == found["completions"]["accuracy"] == 0.0
    assert found["fluency"]["bits_per_byte"] > 4
    relative = relative_ability(found, found)
    assert relative["shares"] == dict.fromkeys(KINDS)
    assert relative["least"] is relative["mean"] is relative["least_kind"] is None
    assert set(relative["not_judged"].values()) == {"the original model cannot do it either"}


def test_broken_weights_raise():
    model = tiny_model("llama", vocab=CHARACTERS)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="probe"):
        measure_probe(model, character_tokenizer())


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The answer is 4.", True),
        ("2+2=4", True),
        (" FOUR!", True),
        ("2+2=4, for 2-(-2)=4.0", True),
        ("It is 4.0", True),
        ("14", False),
        ("-4", False),
        ("It is \u22124.", False),
        ("3.4 or 4.5 or 1,004 or 4th", False),
        ("2 + 2 is 40", False),
        ("", False),
        (" 5\nQuestion: What is 3+1?\nAnswer: 4", False),
    ],
)
def test_the_answer_is_found_as_a_whole_word(text, right):
    assert has_answer(text, {"answer": "4", "accept": ["four"]}) is right


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([7] * 8, 0.8), ([1, 2, 3, 4] * 2, 0.2)],
    ids=["none", "short", "new", "one token", "twice"],
)
def test_repetition(tokens, share):
    assert repetition(tokens) == pytest.approx(share)


def measured(accuracy=0.5, probability=0.4, loss=3.0, bits=1.0, quality=0.9, **others):
    answers = {"rows": 20, "left_out": 0, "probability": probability, "accuracy": accuracy}
    return {
        "arithmetic": answers,
        "capitals": {**answers, "accuracy": 0.9, "probability": 0.9},
        "completions": {**answers, "accuracy": 0.1, "probability": 0.1},  # below what is judged
        "fluency": {"rows": 16, "left_out": 0, "loss": loss, "perplexity": 20.0, "bits_per_byte": bits},
        "openings": {"rows": 12, "left_out": 0, "repetition": 0.1, "degenerate": 0.0, "quality": quality},
        "form": "chat",
        "digest": "d",
        **others,
    }


def test_what_is_left_of_the_ability():
    relative = relative_ability(measured(), measured(0.25, 0.2, 3.0 + math.log(2), quality=0.95))
    assert relative["shares"] == {
        "arithmetic": pytest.approx(0.5),
        "capitals": 1.0,
        "completions": None,
        "fluency": pytest.approx(0.5),
        "openings": 1.0,  # a gain makes up for nothing
    }
    assert relative["mean"] == pytest.approx(0.75)
    assert relative["least"] == pytest.approx(0.5)
    assert relative["least_kind"] in ("arithmetic", "fluency")
    assert relative["not_judged"] == {"completions": "the original model cannot do it either"}


def test_losses_beyond_every_number_leave_nothing():
    relative = relative_ability(measured(), measured(loss=None))
    assert relative["shares"]["fluency"] == relative["least"] == 0.0
    assert relative["least_kind"] == "fluency"


def test_a_kind_whose_rows_are_all_left_out_is_not_judged():
    none = {"rows": 0, "left_out": 20, "probability": None, "accuracy": None}
    relative = relative_ability(measured(capitals=none), measured(capitals=none))
    assert relative["shares"]["capitals"] is None
    assert relative["not_judged"]["capitals"] == "all its rows mention what is to be forgotten"


@pytest.mark.parametrize("difference", [{"digest": "e"}, {"form": "plain"}], ids=["rows", "form"])
def test_other_probes_are_not_compared(difference):
    with pytest.raises(ValueError, match="differ in their"):
        relative_ability(measured(), measured(**difference))
