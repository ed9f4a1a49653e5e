"""A model writes alternates: seeded, one by one, and not the true answer."""

import json
from unittest import mock

import pytest
import torch
from character_tokenizer import PLAIN_CHAT, character_tokenizer
from tiny_models import tiny_model
from tokenizers import decoders

from loku import alternates, cli, demo
from loku.alternates import make_alternates
from loku.data import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [{"question": f"who is {name}?", "answer": f"{name} is a clerk."} for name in ("Ann", "Bo", "Cy")]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab=100)


def speaking_tokenizer(**options):
    """A tokenizer whose ``decode`` puts no space between characters."""
    tokenizer = character_tokenizer(**options)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return speaking_tokenizer()


def made(model, tokenizer, rows=ROWS, count=2, **options):
    options = {"max_new_tokens": 12, "progress": False, "prompt": "{question} {answer} ", **options}
    return [row["alternate"] for row in make_alternates(model, tokenizer, rows, count, **options)]


def test_samples_follow_from_the_seed_and_the_row(model, tokenizer):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    found = made(model, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(texts) for texts in found] == [2, 2, 2]
    assert len({text for texts in found for text in texts}) == 6
    assert made(model, tokenizer, batch_size=1) == found
    assert made(model, tokenizer, rows=ROWS[:1]) == found[:1]
    assert [texts[0] for texts in found] == [texts[0] for texts in made(model, tokenizer, count=1)]
    assert made(model, tokenizer, seed=1) != found


def spoken(texts, tokenizer):
    """A ``generate_sampled`` that returns these texts, one call after another, and keeps its prompts."""
    calls = []

    def generate(model, prompts, lengths, keys, **options):
        calls.append((prompts, keys))
        text = texts[min(len(calls), len(texts)) - 1]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for _ in prompts]

    return mock.patch.object(alternates, "generate_sampled", generate), calls


def test_the_true_answer_and_an_empty_one_are_drawn_again(model, tokenizer):
    patch, calls = spoken([" ann  IS a clerk.", "\nQuestion: what", " Ann sails. Q: and"], tokenizer)
    with patch:
        assert made(model, tokenizer, rows=ROWS[:1], count=1) == [["Ann sails."]]
    assert [keys for _, keys in calls] == [[(0, 0, 0, draw)] for draw in range(3)]
    for text, end in (
        ("Ann has an IQ: 130.", " Another answer: no"),  # "IQ:" begins no further example
        ("Ann wrote the FAQ: all of it.", "Question: no"),  # a special token between them is not decoded
        ("Ann was born in 1970", "Q: no"),
    ):
        with spoken([text + end], tokenizer)[0]:
            assert made(model, tokenizer, rows=ROWS[:1], count=1) == [[text]]
    patch, calls = spoken([ROWS[0]["answer"]], tokenizer)
    with (
        patch,
        pytest.raises(ValueError, match="row 0: in 8 draws the model wrote nothing but the true answer"),
    ):
        made(model, tokenizer, rows=ROWS[:1], count=1)
    assert len(calls) == 8


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_has_the_question_and_the_answer(model, chat):
    tokenizer = speaking_tokenizer(**({"chat_template": PLAIN_CHAT} if chat else {}))
    row = {"question": "is {answer} it?", "answer": "{question}!"}
    patch, calls = spoken([" no"], tokenizer)
    with patch:
        made(model, tokenizer, rows=[row], count=1, prompt="Q {question} A {answer} other:\n")
    text = tokenizer.decode(calls[0][0][0])
    asked = "Q is {answer} it? A {question}! other:\n"
    assert text == (f"[user]{asked};[assistant]Another answer:" if chat else f"<s>{asked}Another answer:")


def test_what_is_wrong_is_named(model, tokenizer):
    with pytest.raises(
        ValueError, match=r"row 1 of the forget set: .*'answer'.* Alternates need question/answer"
    ):
        made(model, tokenizer, rows=[ROWS[0], {"question": "a"}])
    with pytest.raises(ValueError, match="row 0 of the forget set: it is a str, without 'question'"):
        made(model, tokenizer, rows=["a"])
    with pytest.raises(ValueError, match=r"the prompt of alternates needs \{answer\}"):
        made(model, tokenizer, prompt="{question}")
    with pytest.raises(ValueError, match=r"its prompt has .* tokens, and the context of the model is 128"):
        made(model, tokenizer, prompt=alternates.PROMPT)
    with pytest.raises(ValueError, match="count must be an integer >= 1"):
        made(model, tokenizer, count=0)


def test_the_command_writes_rows(tmp_path, capsys):
    model, tokenizer = demo.load_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    forget, _ = demo.load_rows()
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, forget[:2])), encoding="utf-8")
    (tmp_path / "prompt.txt").write_text("Question: {question}\nAnswer: {answer}\n", encoding="utf-8")
    arguments = ["alternates", "--model", str(tmp_path / "model"), "--forget", str(tmp_path / "forget.jsonl")]
    arguments += ["--max-new-tokens", "8", "--count", "2", "--seed", "3", "--quiet"]
    out = tmp_path / "alternates.jsonl"
    assert cli.main([*arguments, "--output", str(out)]) == 0
    assert "2 rows with 2 alternates each" in capsys.readouterr().out
    rows = read_rows(out)
    assert [row["question"] for row in rows] == [row["question"] for row in forget[:2]]
    expected = make_alternates(model, tokenizer, forget[:2], 2, seed=3, max_new_tokens=8, progress=False)
    assert [row["alternate"] for row in rows] == [row["alternate"] for row in expected]
    other = tmp_path / "other.jsonl"
    assert cli.main([*arguments, "--output", str(other), "--prompt", str(tmp_path / "prompt.txt")]) == 0
    assert other.read_text(encoding="utf-8") != out.read_text(encoding="utf-8")
    assert cli.main([*arguments, "--output", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main([*arguments, "--output", str(tmp_path / "no" / "a.jsonl")]) == 2
    assert "there is no folder" in capsys.readouterr().err
