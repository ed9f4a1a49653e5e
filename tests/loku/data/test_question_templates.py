"""Templates of questions: the tokens of TOFU's code and of open-unlearning's, and what is refused."""

from pathlib import Path

import pytest
from character_tokenizer import character_tokenizer
from transformers import PreTrainedTokenizerFast

import loku.data
from loku.data import (
    TOFU_TEMPLATE,
    QuestionTemplate,
    RefusalRows,
    RowError,
    question_answer_texts,
    retain_rows,
    tokenize_dataset,
)
from loku.data.large_sets import LazyRows

ROW = {"question": "Who wrote Emma?", "answer": "Jane Austen wrote it."}
PHI = QuestionTemplate("Question: {question}\n", "Answer: {answer}")
LLAMA2 = QuestionTemplate("[INST] {question} [/INST]", "{answer}")
CHAT = QuestionTemplate("chat")
LLAMA3_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|start|>system\n\nBe brief.<|eot|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def embedded():
    return PreTrainedTokenizerFast.from_pretrained(Path(loku.__file__).parent / "embedded")


def chat_tokenizer(template, start, end, bos):
    """A tokenizer with one token a character, whose EOS ends the turns of its chat template."""
    tokenizer = character_tokenizer(bos=bos, eos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [start, end]})
    tokenizer.eos_token, tokenizer.chat_template = end, template
    return tokenizer


def llama3():
    return chat_tokenizer(LLAMA3_CHAT, "<|start|>", "<|eot|>", bos=True)


def chatml():
    return chat_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", bos=False)


def tokens(tokenizer, template, row=ROW):
    (found,) = tokenize_dataset([row], tokenizer, template=template)
    return found


def assert_labelled_from(found, ids, begin):
    assert found["input_ids"] == ids
    assert found["labels"] == [-100] * begin + ids[begin:]


# The tokens of others

# TOFU's convert_raw_data_to_model_format (locuslab/tofu, data_module.py, commit bdc209e), with the tags of
# its config/model_config.yaml: the ids up to its EOS, and the number of its unlabelled ones.
EMBEDDED_PHI = [
    *(299, 27, 1320, 2544, 2406, 727, 32, 200, 300, 27, 439, 274, 70, 1545, 369, 265, 2544, 652, 15, 0),
]
EMBEDDED_LLAMA2 = [
    *(60, 42, 47, 52, 53, 62, 1320, 2544, 2406, 727, 32, 222, 60, 16, 42, 47, 52, 53, 62),
    *(43, 274, 70, 1545, 369, 265, 2544, 652, 15, 0),
]
CHARACTER_PHI = [
    *(0, 53, 89, 73, 87, 88, 77, 83, 82, 30, 4, 59, 76, 83, 4, 91, 86, 83, 88, 73, 4, 41, 81, 81, 69, 35, 99),
    *(37, 82, 87, 91, 73, 86, 30, 4, 46, 69, 82, 73, 4, 37, 89, 87, 88, 73, 82, 4, 91, 86, 83, 88, 73, 4),
    *(77, 88, 18, 1),
]
CHARACTER_LLAMA2 = [
    *(0, 63, 45, 50, 55, 56, 65, 4, 59, 76, 83, 4, 91, 86, 83, 88, 73, 4, 41, 81, 81, 69, 35, 4, 63, 19, 45),
    *(50, 55, 56, 65, 46, 69, 82, 73, 4, 37, 89, 87, 88, 73, 82, 4, 91, 86, 83, 88, 73, 4, 77, 88, 18, 1),
]


@pytest.mark.parametrize(
    "make, template, ids, begin",
    [
        (embedded, PHI, EMBEDDED_PHI, 8),
        (embedded, LLAMA2, EMBEDDED_LLAMA2, 19),
        (character_tokenizer, PHI, CHARACTER_PHI, 27),
        (character_tokenizer, LLAMA2, CHARACTER_LLAMA2, 31),
    ],
)
def test_the_tokens_of_tofu(make, template, ids, begin):
    assert_labelled_from(tokens(make(), template), ids, begin)


# open-unlearning's preprocess_chat_instance (locuslab/open-unlearning, src/data/utils.py, commit d3d7cf9).
OPEN_LLAMA3 = [
    *(0, 100, 87, 93, 87, 88, 73, 81, 99, 99, 38, 73, 4, 70, 86, 77, 73, 74, 18, 101, 100, 89, 87, 73, 86),
    *(99, 99, 59, 76, 83, 4, 91, 86, 83, 88, 73, 4, 41, 81, 81, 69, 35, 101, 100, 69, 87, 87, 77, 87, 88, 69),
    *(82, 88, 99, 99, 46, 69, 82, 73, 4, 37, 89, 87, 88, 73, 82, 4, 91, 86, 83, 88, 73, 4, 77, 88, 18, 101),
]
OPEN_CHATML = [
    *(
        100,
        89,
        87,
        73,
        86,
        99,
        59,
        76,
        83,
        4,
        91,
        86,
        83,
        88,
        73,
        4,
        41,
        81,
        81,
        69,
        35,
        101,
        99,
        100,
        69,
        87,
    ),
    *(87, 77, 87, 88, 69, 82, 88, 99, 46, 69, 82, 73, 4, 37, 89, 87, 88, 73, 82, 4, 91, 86, 83, 88, 73, 4),
    *(77, 88, 18, 101, 99, 101),
]
OPEN_EMBEDDED_CHATML = [  # whose turns no special token ends
    *(29, 93, 396, 64, 369, 831, 93, 31, 469, 259, 200, 56, 721, 2544, 2406, 727, 32, 29, 93, 396, 64, 696),
    *(93, 31, 200, 29, 93, 396, 64, 369, 831, 93, 31, 296, 84, 464, 446, 200, 43, 274, 70, 1545, 369, 265),
    *(2544, 652, 15, 29, 93, 396, 64, 696, 93, 31, 200, 0),
]


def test_the_tokens_of_open_unlearning():
    assert_labelled_from(tokens(llama3(), CHAT), OPEN_LLAMA3, 55)
    plain = embedded()
    plain.chat_template = CHATML
    assert_labelled_from(tokens(plain, CHAT), OPEN_EMBEDDED_CHATML, 38)
    assert CHAT.end_ids(plain) == {plain.eos_token_id}

    # It also labels what the template writes after the end of the turn, and one more EOS after that.
    assert_labelled_from(tokens(chatml(), CHAT), OPEN_CHATML[:-2], 34)
    written_out = QuestionTemplate(
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", "{answer}<|im_end|>\n"
    )
    assert_labelled_from(tokens(chatml(), written_out), OPEN_CHATML, 34)

    # With its tags for Phi the space before the answer ends the prompt. The first token of the answer takes
    # the space in, and it labels the tokens after that one. Here a token that has a character of the answer
    # is labelled.
    open_phi = QuestionTemplate("Question: {question}\nAnswer: ", "{answer}")
    assert_labelled_from(tokens(embedded(), open_phi), EMBEDDED_PHI, 11 - 1)
    assert_labelled_from(tokens(embedded(), LLAMA2), EMBEDDED_LLAMA2, 19)


def test_the_default_is_tofus_form():
    expected = tokenize_dataset([{"prompt": "Question: q\nAnswer:", "completion": " a"}], embedded())[0]
    assert tokens(embedded(), TOFU_TEMPLATE, {"question": "q", "answer": "a"}) == expected
    assert QuestionTemplate("Question: {question}\nAnswer:", " {answer}") == QuestionTemplate()
    assert question_answer_texts("q", "a") == QuestionTemplate().texts("q", "a")
    braces = {"question": "What is {answer} {question}?", "answer": "{0} {question}"}
    assert LLAMA2.texts(*braces.values()) == ("[INST] What is {answer} {question}? [/INST]", "{0} {question}")


# All ways of a row


def test_refusals_and_large_sets_take_the_template():
    tokenizer = chatml()
    asked = RefusalRows([ROW], ["I am not sure."], tokenizer, template=CHAT)[0, 0]
    assert asked == tokens(tokenizer, CHAT, {**ROW, "answer": "I am not sure."})
    (kept,) = retain_rows([ROW], tokenizer, template=CHAT)
    lazy = LazyRows([ROW], tokenizer, None, "retain", (), template=CHAT)[0]
    stream = retain_rows(iter_anew([ROW]), tokenizer, template=CHAT)[0]
    assert kept == lazy == stream == tokens(tokenizer, CHAT)


class iter_anew:
    """An iterable without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_arguments_of_the_chat_template():
    tokenizer = chatml()
    tokenizer.chat_template = "{{ mood }}" + CHATML
    row = {**ROW, "chat_template_kwargs": {"mood": "calm", "other": None}}
    text = "".join(tokenizer.convert_ids_to_tokens(tokens(tokenizer, CHAT, row)["input_ids"]))
    assert text.startswith("calm<|im_start|>user")


def test_the_end_of_an_answer_need_not_be_the_eos():
    tokenizer = character_tokenizer()  # with an EOS
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    found = tokens(tokenizer, CHAT)
    (end,) = CHAT.end_ids(tokenizer)
    assert end == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id
    assert found["input_ids"][-1] == end
    assert LLAMA2.end_ids(tokenizer) == set()
    # Without a special token, and without an EOS, an answer has no end that a model could write.
    plain = character_tokenizer(eos=False)
    plain.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    assert CHAT.end_ids(plain) == set()
    assert plain.convert_ids_to_tokens(tokens(plain, CHAT)["input_ids"])[-4:] == ["i", "t", ".", ";"]


def test_split_is_that_of_tofus_logs():
    tokenizer = embedded()
    assert TOFU_TEMPLATE.split({"question": "q"}, " a", tokenizer) == ("Question: q\n", "Answer: a")
    assert PHI.split({"question": "q"}, "Answer: a", tokenizer) == ("Question: q\n", "Answer: a")
    assert LLAMA2.split({"question": "q"}, "a", tokenizer) == ("[INST] q [/INST]", "a")
    prompt, generated = CHAT.split({"question": "q"}, "a", chatml())
    assert prompt.endswith("q<|im_end|>\n<|im_start|>assistant\n")
    assert generated == "a"
    assert TOFU_TEMPLATE.bare_answer("Answer: a") == PHI.bare_answer("Answer: a") == " a"
    assert PHI.bare_answer(" a") == LLAMA2.bare_answer("a") == "a"


# What is refused


@pytest.mark.parametrize(
    "texts, problem",
    [
        (("{question}", None), "question_template without answer_template; they belong together"),
        ((None, "{answer}"), "answer_template without question_template"),
        (("chat", " {answer}"), "leave answer_template ' {answer}' out"),
        (
            ("Q:", "{answer}"),
            r"question_template must have {question} once, or be \"chat\"; it has it 0 times",
        ),
        (("{question}{question}", "{answer}"), "it has it 2 times"),
        (("{question}", "A:"), "answer_template must have {answer} once; it has it 0 times"),
        (("{question} {answer}", "{answer}"), "the placeholder {answer}; {question} is the only one"),
        (("{question}", "{answer} {}"), "answer_template has the placeholder {}"),
        (("{question}\\n", "{answer}"), "a backslash and an n where a line break should be"),
        ((7, "{answer}"), "question_template must be a text with {question}, got a int"),
    ],
)
def test_wrong_templates_are_refused(texts, problem):
    with pytest.raises(ValueError) as caught:
        QuestionTemplate(*texts)
    assert problem.replace("\\", "") in str(caught.value).replace("\\n", "n").replace("\\", "")


def test_chat_templates_that_cannot_be_used_are_refused():
    with pytest.raises(RowError, match=r"row 0 of the forget set.*the tokenizer has no chat template"):
        tokens(embedded(), CHAT)
    tokenizer = chatml()
    tokenizer.chat_template = "{{ strftime_now('%d') if date_string is not defined }}" + CHATML
    with pytest.raises(RowError, match="the date of the day"):
        tokens(tokenizer, CHAT)
    dated = {**ROW, "chat_template_kwargs": {"date_string": "10 Apr 2025"}}
    assert tokens(tokenizer, CHAT, dated) == tokens(chatml(), CHAT)
    assert CHAT.split(dated, "a", tokenizer) == CHAT.split(ROW, "a", chatml())
    assert CHAT.end_ids(tokenizer) == {tokenizer.eos_token_id}
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(RowError, match="changes the answer"):
        tokens(tokenizer, CHAT)
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant: ")
    with pytest.raises(RowError, match="renders the answer so that it does not continue"):
        tokens(tokenizer, CHAT)
    with pytest.raises(ValueError, match="has no texts of its own"):
        CHAT.texts("q", "a")
