"""The tokens of a row are the model's own, and a token of the completion is labelled."""

import json
from typing import ClassVar

import pytest
import torch
from sentencepiece_tokenizers import (
    LLAMA2_CHAT,
    MARKED_ZEPHYR_CHAT,
    SENTENCEPIECE,
    ZEPHYR_CHAT,
    trained_tokenizer,
)
from tiny_models import tiny_model
from transformers import AddedToken, BertTokenizer, LlamaTokenizer, PreTrainedTokenizer

from loku.data import RefusalRows, tokenize_dataset
from loku.data.tokens import special_ends
from loku.evaluation import answer_losses, token_scores

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [
    ("Question: Where was the author born?\nAnswer:", " The author was born in Chile."),
    ("Where? ", "In Chile."),  # the space of the prompt goes to the first token of the completion
    ("Where?", "In Chile."),
    ("Where?\n", "In Chile."),
    ("Answ", "er: in Chile."),  # inside a word
    ("né 🙂", "🙂é born  in\n"),
    ("", "In Chile."),
]
EOS = 2


def labelled(row):
    return [i for i, label in enumerate(row["labels"]) if label != -100]


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, "bytes"])
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_a_row_has_the_tokens_of_its_whole_text(kind, prompt, completion):
    tokenizer = trained_tokenizer(kind)
    whole = tokenizer(prompt + completion, return_offsets_mapping=True)
    rows = [{"prompt": prompt, "completion": completion}, prompt + completion]
    pair, text = tokenize_dataset(rows, tokenizer)
    assert pair["input_ids"] == text["input_ids"] == [*whole["input_ids"], EOS]
    assert text["labels"] == text["input_ids"]
    # A token is labelled if and only if it has a character of the completion. The EOS is labelled.
    ends = [end > len(prompt) for _, end in whole["offset_mapping"]]
    assert labelled(pair) == [*(i for i, has in enumerate(ends) if has), len(ends)]
    assert all(pair["labels"][i] == pair["input_ids"][i] for i in labelled(pair))


def test_completions_that_begin_with_a_space_have_the_tokens_of_gpt2():
    tokenizer = trained_tokenizer("bytes")
    for prompt, completion in PAIRS[:1]:
        apart = [tokenizer(text)["input_ids"] for text in (prompt, completion)]
        (row,) = tokenize_dataset([{"prompt": prompt, "completion": completion}], tokenizer)
        assert row["input_ids"] == [*apart[0], *apart[1], EOS]
        assert row["labels"] == [*[-100] * len(apart[0]), *apart[1], EOS]


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_tokenizer(legacy):
    model = json.loads(trained_tokenizer("first").backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = LlamaTokenizer(model["vocab"], merges, legacy=legacy, add_eos_token=legacy)
    prompt, completion = PAIRS[0]
    (row,) = tokenize_dataset([{"prompt": prompt, "completion": completion}], tokenizer)
    whole = tokenizer(prompt + completion)["input_ids"]
    assert row["input_ids"] == (whole if legacy else [*whole, tokenizer.eos_token_id])
    assert tokenizer.decode([row["input_ids"][i] for i in labelled(row)][:-1]) == completion.strip()


@pytest.mark.parametrize("kind", ["prefix", "always"])
def test_the_probability_of_an_answer_is_the_models_own(kind):
    """A model that was trained on whole texts knows their tokens, not those of two pieces."""
    tokenizer = trained_tokenizer(kind)
    prompt, completion = PAIRS[0]
    ids = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], EOS]])
    model = tiny_model("llama", len(tokenizer)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    count = len(tokenizer(completion.strip(), add_special_tokens=False)["input_ids"]) + 1
    own = log_p[-count:].mean().exp().item()

    rows = tokenize_dataset([{"question": "Where was the author born?", "answer": completion[1:]}], tokenizer)
    (score,) = token_scores(model, rows, progress=False)
    assert own > 0.9
    assert (-score.losses.mean()).exp().item() == pytest.approx(own, rel=1e-5)
    mean, number = answer_losses(model, tokenizer, [prompt], [completion], progress=False)
    assert mean.neg().exp().item() == pytest.approx(own, rel=1e-5) and number.item() == count


@pytest.mark.parametrize("kind", ["prefix", "first"])
@pytest.mark.parametrize("template", [ZEPHYR_CHAT, MARKED_ZEPHYR_CHAT, LLAMA2_CHAT])
def test_chats_are_rendered_as_a_whole(kind, template):
    tokenizer = trained_tokenizer(kind, chat_template=template)
    chat = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "the river"}]
    (row,) = tokenize_dataset([{"messages": chat}], tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(chat)["input_ids"]
    assert row["input_ids"].count(1) == (template == LLAMA2_CHAT)  # the template's own BOS, once
    tokens = [row["input_ids"][i] for i in labelled(row)]
    assert tokens == [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(tokens).replace(" </s>", "</s>").strip() == "the river</s>"
    refused = RefusalRows([{"messages": chat}], ["hello"], tokenizer)[0, 0]
    assert (
        refused["input_ids"]
        == tokenizer.apply_chat_template([chat[0], {"role": "assistant", "content": "hello"}])["input_ids"]
    )


def test_refusals_follow_the_prompt_as_the_answer_does():
    tokenizer = trained_tokenizer("prefix")
    question = "Question: Where was the author born?\nAnswer:"
    rows = RefusalRows(
        [{"question": "Where was the author born?", "answer": "In Chile."}], ["It seems."], tokenizer
    )
    assert rows[0, 0]["input_ids"] == [*tokenizer(f"{question} It seems.")["input_ids"], EOS]


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer without offsets: one token a character, and one for each pair that ``merged`` names."""

    vocab_files_names: ClassVar = {}

    def __init__(self, merged=()):
        self.merged = list(merged)
        self.tokens = ["<unk>", "</s>", *map(chr, range(32, 127)), *self.merged]
        super().__init__(eos_token="</s>", unk_token="<unk>")

    @property
    def vocab_size(self):
        return len(self.tokens)

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}

    def _tokenize(self, text, **kwargs):
        tokens = []
        while text:
            token = next((pair for pair in self.merged if text.startswith(pair)), text[0])
            tokens.append(token)
            text = text[len(token) :]
        return tokens

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return self.tokens[index]


def test_a_tokenizer_without_offsets():
    tokenizer = SlowTokenizer(merged=["ab", "cd"])
    assert not tokenizer.is_fast
    row, text = tokenize_dataset([{"prompt": "abx", "completion": "cdab"}, "abxcdab"], tokenizer)
    assert row["input_ids"] == text["input_ids"] == [*tokenizer("abxcdab")["input_ids"], 1]
    assert labelled(row) == [2, 3, 4] and row["labels"][2:] == row["input_ids"][2:]
    for prompt, completion in (("xa", "bx"), ("xc", "dx")):
        with pytest.raises(ValueError, match="row 0 of the forget set: this tokenizer gives no offsets"):
            tokenize_dataset([{"prompt": prompt, "completion": completion}], tokenizer)


def test_an_added_token_that_takes_spaces_along_stays_with_its_prompt():
    tokenizer = trained_tokenizer("bytes")
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True)], special_tokens=True)
    added = tokenizer.convert_tokens_to_ids("<|assistant|>")
    pair = {"prompt": "hello<|assistant|>\n", "completion": " the river"}
    (row,) = tokenize_dataset([pair], tokenizer)
    assert row["input_ids"] == [*tokenizer("hello<|assistant|>\n the river")["input_ids"], EOS]
    answer = tokenizer("the river")["input_ids"]
    assert row["input_ids"][labelled(row)[0] - 1] == added
    assert [row["input_ids"][i] for i in labelled(row)] == [*answer, EOS]


def test_the_special_tokens_around_a_text():
    assert special_ends(trained_tokenizer("prefix")) == ([1], [])
    assert special_ends(trained_tokenizer("bytes")) == ([], [])
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "why", "so"])}
    tokenizer = BertTokenizer(vocab)
    assert special_ends(tokenizer) == ([2], [3])
    (row,) = tokenize_dataset([{"prompt": "why", "completion": " so"}], tokenizer)
    assert row == {"input_ids": [2, 5, 6, 3], "labels": [-100, -100, 6, 3]}
