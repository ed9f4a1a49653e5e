"""Small tokenizers of the kinds that models have, trained on a few sentences.

SentencePiece puts a space before a text, as the tokenizers of Llama 2, Mistral and T5 do: "prefix" by a
normalizer, "always" and "first" by the pre-tokenizer, "unigram" with another model. "bytes" is GPT-2's
byte-level BPE.
"""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCEPIECE = ["prefix", "always", "first", "unigram"]
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "Question: Where was the author Jaime Vasquez born?",
    "Answer: The author was born in Santiago, Chile.",
    "Question: What does the father of Hsiao Yun-Hwa do?\nAnswer: He is a civil engineer, it seems.",
    "<|user|> <|assistant|> [INST] hello there [/INST] what is the name of the river in the capital",
]
ZEPHYR_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED_ZEPHYR_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


@cache
def _backend(kind):
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = {"vocab_size": 450, "special_tokens": SPECIAL, "initial_alphabet": alphabet}
        trainer = trainers.BpeTrainer(**options, show_progress=False)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        options = {"vocab_size": 140, "special_tokens": SPECIAL, "unk_token": "<unk>"}
        trainer = trainers.UnigramTrainer(**options, show_progress=False)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        # The merges stay within words, as those of Llama 2, which does not split a text into words.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        options = {"vocab_size": 500, "special_tokens": [*SPECIAL, *bytes_]}
        trainer = trainers.BpeTrainer(**options, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    if kind != "bytes":
        spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    if kind == "prefix":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind in ("always", "first"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    return backend.to_str()


def trained_tokenizer(kind, **settings):
    """Make a tokenizer of one of the kinds, which adds a BOS by default except for "bytes"."""
    backend = Tokenizer.from_str(_backend(kind))
    if kind != "bytes":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings
    )
