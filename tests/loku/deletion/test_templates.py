"""A deletion request asks its questions in the template that its training has."""

import math

import pytest
from naive_measures import naive_scores

from loku import UnlearnConfig, demo
from loku.data import QuestionTemplate, tokenize_dataset
from loku.deletion.own_texts import forms_of
from loku.deletion.request import read_request
from loku.deletion.training import _utility

LLAMA2 = QuestionTemplate("[INST] {question} [/INST]", "{answer}")
TRAINING = 'training: {question_template: "[INST] {question} [/INST]", answer_template: "{answer}"}'


def request_file(folder, training):
    (folder / "rows.jsonl").write_text('{"question": "Who?", "answer": "Me."}\n')
    file = folder / "request.yaml"
    file.write_text(f"model: someone/model\nforget: rows.jsonl\nholdout: rows.jsonl\n{training}\n")
    return file


def test_the_template_of_a_request(tmp_path):
    assert read_request(request_file(tmp_path, "")).template == QuestionTemplate()
    assert read_request(request_file(tmp_path, TRAINING)).template == LLAMA2
    chat = "training: {question_template: chat}"
    assert read_request(request_file(tmp_path, chat)).template == QuestionTemplate("chat")
    with pytest.raises(ValueError, match=r"line 4.*question_template without answer_template"):
        read_request(request_file(tmp_path, 'training: {question_template: "{question}"}'))


def test_the_utility_of_training_takes_the_template(tmp_path, one_thread):
    model, tokenizer = demo.load_model()
    rows = demo.load_rows()[0][:2]
    config = UnlearnConfig(
        output_dir=str(tmp_path), question_template=LLAMA2.question, answer_template=LLAMA2.answer
    )
    found = _utility(model, {"kept": rows}, tokenizer, config)
    losses = [naive_scores(model, row)[0] for row in tokenize_dataset(rows, tokenizer, template=LLAMA2)]
    expected = sum(math.exp(-sum(of_row) / len(of_row)) for of_row in losses) / 2
    assert found["kept"] == pytest.approx(expected, rel=1e-4)


def test_a_model_writes_questions_in_tofus_form_alone():
    _, tokenizer = demo.load_model()
    rows = [{"question": "Who?", "answer": "Me."}]
    assert "own question" in forms_of(tokenizer, rows)
    assert "own question" not in forms_of(tokenizer, rows, LLAMA2)
