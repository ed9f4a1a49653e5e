"""The token by which a chat template of questions ends an answer is an ending, also if it is not special."""

import pytest
from bigram_model import bigram_model
from character_tokenizer import character_tokenizer

from loku import ExtractionStopping, UnlearnConfig, UnlearnTrainer
from loku.data import QuestionTemplate, tokenize_dataset
from loku.deletion.measures import measure_rows
from loku.evaluation import Endings, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
CHAT = (
    "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
EOS = 1


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with an added token that ends a turn, and that decoding does not skip."""
    found = character_tokenizer(bos=False)
    found.add_tokens(["<turn>"])
    found.chat_template = CHAT
    return found


def labelled(tokenizer, row, labels):
    ids = [token for token, label in zip(row["input_ids"], labels, strict=True) if label != -100]
    return tokenizer.convert_ids_to_tokens(ids)


def test_the_end_of_a_turn_is_an_ending_though_it_is_no_special_token(tokenizer, tmp_path):
    """The chat template of questions names it, in all that measures: 3 letters of the answer, and its end."""
    end, *abc = tokenizer.convert_tokens_to_ids(["<turn>", *"abc"])
    follower = {token: end for token in abc}
    model = bigram_model(follower, len(tokenizer), eos=EOS)
    rows, template = [{"question": "Q", "answer": "abc"}], QuestionTemplate("chat")
    (tokens,) = tokenize_dataset(rows, tokenizer, template=template)
    assert labelled(tokenizer, tokens, tokens["labels"]) == [*"abc", "<turn>"]
    assert labelled(tokenizer, tokens, Endings(model, tokenizer)(tokens)) == [*"abc", "<turn>"]
    assert labelled(tokenizer, tokens, Endings(model, tokenizer, template)(tokens)) == list("abc")

    settings = {"use_cpu": True, "report_to": [], "init": "default", "question_template": "chat"}
    for count_end, accuracy in ((True, 1 / 4), (False, 0)):
        options = {"template": template, "count_end": count_end}
        measured = evaluate(model, tokenizer, {"x": rows}, progress=False, **options)
        assert measured.sets["x"]["memorization_accuracy"] == accuracy
        assert measure_rows(model, tokenizer, rows, "x", **options)["memorization_accuracy"] == [accuracy]
        gauge = ExtractionStopping(rows, rows, n=1, every=1, count_end=count_end)
        trainer = UnlearnTrainer(
            bigram_model(follower, len(tokenizer), eos=EOS).float(),
            UnlearnConfig(str(tmp_path), eval_count_end=count_end, max_steps=1, lora_rank=1, **settings),
            rows,
            rows,
            eval_dataset={"x": rows},
            processing_class=tokenizer,
            callbacks=[gauge],
        )
        assert trainer.evaluate()["eval_x_memorization_accuracy"] == accuracy
        trainer.train()
        assert gauge.history[0]["forget_memorization_accuracy"] == accuracy


def test_the_end_of_a_turn_is_no_part_of_a_generated_text(tokenizer):
    line, end, *abc = tokenizer.convert_tokens_to_ids(["\n", "<turn>", *"abc"])
    model = bigram_model(dict(zip([line, *abc], [*abc, end], strict=True)), len(tokenizer), eos=EOS)
    rows = [{"question": "Q", "answer": "c"}]
    for stop_strings, text in (([], "a b c"), (["c", "b"], "a ")):
        section = evaluate(
            *(model, tokenizer, {"forget": rows}),
            template=QuestionTemplate("chat"),
            stop_strings=stop_strings,
            progress=False,
        ).log["eval_log_forget.json"]
        assert section["generated_text"] == {"0": ["user\nQ<turn>\nassistant\n", text, "c"]}
