"""Of an enormous text only the start is tokenised, and its tokens are those of the whole text."""

import random
from contextlib import contextmanager
from itertools import pairwise

import pytest
from character_tokenizer import character_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peak_memory import PeakMemory, needs_proc
from sentencepiece_tokenizers import SENTENCEPIECE, TEXTS, trained_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from loku import demo
from loku.data import RowError, TokenLimits, tokenize_dataset
from loku.data.tokens import LabelledText, TextTokenizer
from loku.evaluation.tofu import tokenized_answers

WORDS = " ".join(TEXTS).split()


def word_piece():
    """A tokenizer as that of BERT. A word of more than 20 letters is one unknown token."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=20))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def digits(groups):
    """A tokenizer that groups the digits of a number from its end."""
    vocab = {"<unk>": 0, "</s>": 1, **{str(n): 2 + n for n in range(1000)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = rf"\d{{1,{groups}}}(?=(\d{{{groups}}})*(\D|$))"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def chain():
    """A BPE whose first merge depends on the last letter of a run of a, b, ..., z."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = [(a, b) for a, b in pairwise(letters)][::-1]
    tokens = ["<unk>", "</s>", *letters, *(a + b for a, b in merges), " "]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def normalized():
    backend = trained_tokenizer("bytes").backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Lowercase()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def with_added():
    tokenizer = trained_tokenizer("bytes")
    added = [AddedToken("<|user|>", rstrip=True), AddedToken("<|x|>", lstrip=True), "Chile"]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


class Slow:
    """A tokenizer without offsets."""

    def __init__(self, fast):
        self.fast, self.eos_token_id = fast, fast.eos_token_id

    def __call__(self, text, **kwargs):
        return {"input_ids": self.fast(text, **kwargs)["input_ids"]}


MAKERS = {
    **{kind: lambda kind=kind: trained_tokenizer(kind) for kind in [*SENTENCEPIECE, "bytes"]},
    "words": word_piece,
    "characters": character_tokenizer,
    "digits by two": lambda: digits(2),
    "digits by three": lambda: digits(3),
    "chain": chain,
    "normalized": normalized,
    "added tokens": with_added,
    "slow": lambda: Slow(trained_tokenizer("bytes")),
    "demo": lambda: demo.load_model()[1],
}
PIECES = st.one_of(
    st.sampled_from(
        [*WORDS, "e\u0301", "ﬁ", "🙂", "né", "<|user|> ", " <|x|>", "</s>", "Chile", "\n", "  ", "的"]
    ),
    st.integers(1, 300).map(lambda n: "1234567890" * n),
    st.integers(1, 60).map(lambda n: "abcdefghijklmnopqrstuvwxyz" * n),
    st.tuples(st.sampled_from(["a", "ab", " ", "Question", "é", "."]), st.integers(1, 400)).map(
        lambda pair: pair[0] * pair[1]
    ),
    st.text(max_size=40),
)


@pytest.fixture(scope="module", params=MAKERS)
def tokenize(request):
    return TextTokenizer(MAKERS[request.param]())


@contextmanager
def small_bounds():
    """A text is enormous from 500 characters on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loku.data.tokens.MOST_CHARACTERS", 1)
        patch.setattr("loku.data.tokens.MARGIN_CHARACTERS", 500)
        patch.setattr("loku.data.tokens.MARGIN_TOKENS", 64)
        yield


def check(tokenize, labelled, most):
    whole, _ = tokenize(labelled)
    found, complete = tokenize(labelled, most)
    length = len(whole["input_ids"])
    assert complete == (found == whole) or length > most
    if not complete:
        assert min(length, len(found["input_ids"])) > most
    assert {key: values[:most] for key, values in found.items()} == {k: v[:most] for k, v in whole.items()}
    return complete


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_the_tokens_of_a_start_are_those_of_the_whole(tokenize, data):
    with small_bounds():
        pieces = data.draw(st.lists(PIECES, min_size=1, max_size=12))
        text = data.draw(st.sampled_from(["", " "])).join(pieces * data.draw(st.sampled_from([1, 3])))
        assume(len(text) > 1)
        bounds = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2, unique=True)))
        spans = data.draw(st.sampled_from([None, (tuple(bounds),), ((0, bounds[0]), (bounds[1], len(text)))]))
        if isinstance(tokenize.tokenizer, Slow):
            spans = None  # most bounds are no bounds of tokens
        check(tokenize, LabelledText(text, spans), data.draw(st.integers(2, 200)))


def test_texts_that_depend_on_their_end(tokenize):
    """Digits that are grouped from the end, and merges that begin there."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    for text in ("7" * 4_000, "ab" * 2_000, alphabet * 150, " " * 4_000, "e\u0301" * 2_000):
        for more in range(3):
            with small_bounds():
                check(tokenize, LabelledText(text + text[:more]), 50)


@pytest.mark.parametrize("kind", ["prefix", "bytes", "slow"])
def test_little_of_an_enormous_text_is_tokenised(kind):
    tokenizer = MAKERS[kind]()
    tokenize = TextTokenizer(tokenizer)
    lengths = []
    tokenize.tokenizer = lambda text, **kwargs: lengths.append(len(text)) or tokenizer(text, **kwargs)
    tokenize.tokenizer.eos_token_id = tokenizer.eos_token_id
    text = " ".join(random.Random(0).choices(WORDS, k=200_000))
    span = (0 if kind == "slow" else 20, len(text))
    row, whole = tokenize(LabelledText(text, (span,)), 256)
    assert not whole and len(row["input_ids"]) > 256
    assert len(lengths) <= 3 and max(lengths) < 120_000 < len(text) / 8
    assert (row["labels"][0] == -100) == (kind != "slow") and row["labels"][100:257] == row["input_ids"][
        100:257
    ]


@needs_proc
def test_peak_memory_of_an_enormous_row(one_thread):
    """It was 180 bytes for each character."""
    _, tokenizer = demo.load_model()
    text = " ".join(random.Random(0).choices(WORDS, k=400_000))
    rows = [{"question": "What?", "answer": text}]
    tokenize_dataset([text[:80_000]], tokenizer)
    peak = PeakMemory()
    with pytest.warns(UserWarning, match="1 of the 1 rows"):
        (row,) = tokenize_dataset(rows, tokenizer, max_length=256)
    limits = TokenLimits(512, None, None)
    with pytest.raises(RowError, match="it has more than 512 tokens, and the model's context has 512; cut"):
        tokenize_dataset(rows, tokenizer, limits=limits)
    with pytest.raises(RowError, match="no label token is left of its more than 256 tokens after"):
        tokenize_dataset([{"prompt": text, "completion": "b"}], tokenizer, max_length=256, limits=limits)
    with pytest.raises(RowError, match="it has more than 512 tokens, and the model's context"):
        tokenize_dataset([{"prompt": text, "completion": "b"}], tokenizer, limits=limits)
    with pytest.raises(
        RowError, match=r"answer has more than 512 tokens, and the model's context is 512. .*drop"
    ):
        tokenized_answers(rows, tokenizer, "forget", 600, limits)
    with pytest.raises(RowError, match="answer has more than 300 tokens, and max_length is 300"):
        tokenized_answers(rows, tokenizer, "forget", 300, limits)
    extra = peak.extra()
    assert extra < 20 * len(text), f"{extra / 2**20:.0f} MiB for {len(text) / 2**20:.1f} MiB of text"
    assert row["input_ids"] == tokenizer(f"Question: What?\nAnswer: {text[:9000]}")["input_ids"][:256]
