"""The rows of a run are checked before its model is touched, and their file and line are named."""

import copy
import json
from functools import partial

import pandas as pd
import pytest
import torch
from character_tokenizer import PLAIN_CHAT, character_tokenizer
from tiny_models import tiny_model
from transformers import ProcessorMixin

import loku
from loku import UnlearnConfig
from loku.data import RowError, row_places, tokenize_dataset
from loku.prepared_rows import prepare_rows

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"question": "why?", "answer": "so"}, {"question": "who?", "answer": "me"}]
LONG = {"question": "why?", "answer": "so " * 60}


def config(tmp_path, **options):
    return UnlearnConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", max_steps=1, **options
    )


def write(path, rows):
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")  # every second line is empty
    return path


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_row_longer_than_the_context_is_refused_before_the_model_is_touched(kind, name, tmp_path):
    tokenizer = character_tokenizer()
    model = tiny_model(kind, len(tokenizer))
    before = copy.deepcopy(model.state_dict())
    sets = {"forget": ROWS, "retain": ROWS} | {name: [*ROWS, LONG]}
    with pytest.raises(RowError, match=rf"row 2 of the {name} set: it has \d+ tokens.*max_length=128"):
        loku.unlearn(model, **sets, config=config(tmp_path), tokenizer=tokenizer)
    assert before.keys() == model.state_dict().keys()  # no adapter
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    with pytest.warns(UserWarning, match=f"1 of the 3 rows of the {name} set were cut"):
        rows = prepare_rows(model, **sets, config=config(tmp_path, max_length=128), tokenizer=tokenizer)
    assert max(len(row["input_ids"]) for row in getattr(rows, name)) == 128


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    tokenizer = character_tokenizer(chat_template="<new>" + PLAIN_CHAT)
    model = tiny_model("llama", len(tokenizer))
    tokenizer.add_tokens("<new>", special_tokens=True)
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    with pytest.raises(RowError, match=r"row 1 of the retain set.*resize_token_embeddings"):
        prepare_rows(model, ROWS, [ROWS[0], chat], config(tmp_path), tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    assert len(prepare_rows(model, ROWS, [ROWS[0], chat], config(tmp_path), tokenizer).retain) == 2


def test_files_are_read_and_their_lines_named(tmp_path):
    tokenizer = character_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    forget, retain = write(tmp_path / "f.jsonl", ROWS), write(tmp_path / "r.jsonl", [*ROWS, {"text": " "}])
    rows = prepare_rows(model, str(forget), forget, config(tmp_path), tokenizer)
    assert rows.forget == rows.retain == tokenize_dataset(ROWS, tokenizer)
    message = r"r\.jsonl, line 5: row 2 of the retain set: 'text' is blank"
    with pytest.raises(RowError, match=message) as caught:
        prepare_rows(model, forget, str(retain), config(tmp_path), tokenizer)
    assert (caught.value.name, caught.value.index) == ("retain", 2)
    long = write(tmp_path / "long.jsonl", [*ROWS, LONG])
    with pytest.raises(RowError, match=r"long\.jsonl, line 5: row 2 of the forget set: it has"):
        prepare_rows(model, long, ROWS, config(tmp_path), tokenizer)
    assert not isinstance(prepare_rows(model, ROWS, ROWS, config(tmp_path), tokenizer).retain, str)


def test_lines_of_rows_that_are_read_as_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("loku.data.large_sets.LAZY_ROWS", 2)
    tokenizer = character_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    retain = write(tmp_path / "r.jsonl", [*ROWS, {"text": " "}])
    rows = prepare_rows(model, ROWS, retain, config(tmp_path), tokenizer)
    with pytest.raises(RowError, match=r"r\.jsonl, line 5: row 2 of the retain set: 'text' is blank"):
        rows.retain[2]


def test_measured_rows_must_fit_too(tmp_path):
    tokenizer = character_tokenizer()
    run = partial(loku.unlearn, forget=ROWS, retain=ROWS, tokenizer=tokenizer)
    settings = config(tmp_path, init="default", eval_strategy="steps", eval_steps=1)
    with pytest.raises(RowError, match=r"row 1 of the evaluation set: it has \d+ tokens"):
        run(
            tiny_model("llama", len(tokenizer)), eval_dataset=pd.DataFrame([*ROWS[:1], LONG]), config=settings
        )
    gauge = loku.ProbabilityGauge({"other": [LONG]})
    with pytest.raises(RowError, match=r"row 0 of the other set: it has \d+ tokens"):
        run(tiny_model("llama", len(tokenizer)), callbacks=[gauge], config=config(tmp_path, init="default"))


class Processor(ProcessorMixin):
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def test_the_tokenizer_of_a_processor(tmp_path):
    tokenizer = character_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    rows = prepare_rows(model, ROWS, ROWS, config(tmp_path), Processor(tokenizer))
    assert rows.tokenizer is tokenizer and rows.forget == tokenize_dataset(ROWS, tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer is the str 'here'.*AutoTokenizer"):
        prepare_rows(model, ROWS, ROWS, config(tmp_path), "here")


def test_row_places():
    with pytest.raises(RowError, match=r"^row 3 of the b set: bad$"), row_places({"a": "a.jsonl"}):
        raise RowError("b", 3, "bad")
    with pytest.raises(RowError, match=r"^here: row 3 of the a set: bad$"), row_places({"a": "a.jsonl"}):
        raise RowError("a", 3, "bad", "here")
    with pytest.raises(RowError, match=r"^hub/name: row 3 of the a set: bad$"), row_places({"a": "hub/name"}):
        raise RowError("a", 3, "bad")


def test_a_data_frame_unlearns_as_its_rows(tmp_path):
    tokenizer = character_tokenizer()
    weights = []
    for forget in (ROWS, pd.DataFrame(ROWS)):
        model = tiny_model("llama", len(tokenizer))
        result = loku.unlearn(
            model, forget, forget, config=config(tmp_path, init="default"), tokenizer=tokenizer
        )
        weights.append([p for p in result.model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


@pytest.mark.parametrize("method", ["dpo", "idk"])
def test_refusals_are_checked_with_the_rows(method, tmp_path):
    tokenizer = character_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    (tmp_path / "long.txt").write_text("no\n" + "I do not know " * 9, encoding="utf-8")
    settings = config(tmp_path, method=method, refusals=str(tmp_path / "long.txt"))
    with pytest.raises(RowError, match=r"row 0 of the forget set: it has 1.. tokens"):
        prepare_rows(model, ROWS, ROWS, settings, tokenizer)


@pytest.mark.parametrize("method", ["ihl", "npo", "rmu"])
def test_refusals_without_effect_are_refused(method, tmp_path):
    tokenizer = character_tokenizer()
    settings = config(tmp_path, method=method, refusals=["I do not know."])
    with pytest.raises(ValueError, match=f"'{method}' trains on no refusals: leave refusals out"):
        prepare_rows(tiny_model("llama", len(tokenizer)), ROWS, ROWS, settings, tokenizer)


def test_a_padding_token_that_the_model_lacks_does_not_stop_training(tmp_path):
    tokenizer = character_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    rows = [*ROWS, {"question": "why not?", "answer": "because"}]
    result = loku.unlearn(model, rows, rows, config=config(tmp_path, init="fila"), tokenizer=tokenizer)
    assert result.history
