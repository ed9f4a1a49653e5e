"""Every measure, training and every command ask questions in the template that they are given."""

import copy
import json
import math

import pandas as pd
import pytest
import torch
from naive_measures import naive_scores
from rouge_score.rouge_scorer import RougeScorer
from transformers import LlamaConfig, LlamaForCausalLM

import loku
from loku import UnlearnConfig, attacks, cli, demo
from loku.callbacks import ProbabilityGauge
from loku.data import QuestionTemplate, check_template_used, tokenize_dataset
from loku.deletion.measures import measure_rows
from loku.evaluation import evaluate, evaluate_tofu_rows, forget_quality
from loku.evaluation.tofu_logs import check_reference
from loku.prepared_rows import prepare_rows
from loku.robustness import relearning_curve
from loku.trainer import UnlearnTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

END = "<|im_end|>"  # another token than the EOS of the tokenizer and of the model
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The template, the texts around a question, the labelled text before an answer, and the end of the answer.
TEMPLATES = {
    "tofu": (QuestionTemplate(), "Question: ", "\nAnswer:", " ", "<|endoftext|>"),
    "phi": (
        QuestionTemplate("Question: {question}\n", "Answer: {answer}"),
        *("Question: ", "\n", "Answer: ", "<|endoftext|>"),
    ),
    "llama2": (
        QuestionTemplate("[INST] {question} [/INST]", "{answer}"),
        *("[INST] ", " [/INST]", "", "<|endoftext|>"),
    ),
    "chat": (QuestionTemplate("chat"), "<|im_start|>user\n", f"{END}\n<|im_start|>assistant\n", "", END),
}


@pytest.fixture(scope="module")
def tokenizer():
    _, tokenizer = demo.load_model()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END]})
    tokenizer.chat_template = CHATML
    return tokenizer


def random_model(tokenizer, seed=0):
    """A small model in float64, so that batching changes no argmax."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(tokenizer)


@pytest.fixture(scope="module")
def questions():
    rows, retain = demo.load_rows()
    return rows[:3], [row for row in retain if row.get("perturbed_answer")][:2]


@pytest.fixture(params=TEMPLATES)
def case(request):
    return TEMPLATES[request.param]


def by_hand(tokenizer, case, question, answer):
    """The tokens of a question, the labelled tokens after them, by the tokenizer alone."""
    _, before, after, begin, end = case
    prompt = f"{before}{question}{after}"
    whole = tokenizer(prompt + begin + answer + end, return_offsets_mapping=True)
    labels = [
        token if stop > len(prompt) else -100
        for token, (_, stop) in zip(whole["input_ids"], whole["offset_mapping"], strict=True)
    ]
    return {"input_ids": whole["input_ids"], "labels": labels}


def naive_loss(model, row):
    losses, _ = naive_scores(model, row)
    return sum(losses) / len(losses), len(losses)


def naive_answer(model, tokenizer, row, room, ends):
    ids = row["input_ids"][: row["labels"].count(-100)]
    new = []
    while len(new) < room and not ends & {*new}:
        new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return tokenizer.decode(new, skip_special_tokens=True)


@torch.no_grad()
def naive_section(model, tokenizer, rows, case):
    """A section of TOFU's log by its definitions, one sequence at a time."""
    made = [by_hand(tokenizer, case, row["question"], row["answer"]) for row in rows]
    losses = [naive_loss(model, row) for row in made]
    wrong = [
        [naive_loss(model, by_hand(tokenizer, case, row["question"], a))[0] for a in row["perturbed_answer"]]
        for row in rows
    ]
    right = [
        naive_loss(model, by_hand(tokenizer, case, row["question"], row["paraphrased_answer"]))[0]
        for row in rows
    ]
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(case[4])}
    room = max(count for _, count in losses) + 16
    texts = [naive_answer(model, tokenizer, row, room, ends) for row in made]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return {
        "avg_gt_loss": [loss for loss, _ in losses],
        "num_token_gt": [count for _, count in losses],
        "average_perturb_loss": wrong,
        "truth_ratio": [math.exp(p - sum(w) / len(w)) for p, w in zip(right, wrong, strict=True)],
        "texts": texts,
        "rougeL_recall": [
            scorer.score(row["answer"], text)["rougeL"].recall for row, text in zip(rows, texts, strict=True)
        ],
    }


def test_a_section_is_that_of_its_definition(model, tokenizer, questions, case):
    forget, _ = questions
    template, before, after, _, _ = case
    section = evaluate_tofu_rows(model, tokenizer, forget, 2, progress=False, template=template)
    expected = naive_section(model, tokenizer, forget, case)
    for quantity in ("avg_gt_loss", "num_token_gt", "truth_ratio", "rougeL_recall"):
        assert list(section[quantity].values()) == pytest.approx(expected[quantity], rel=1e-9), quantity
    for ours, theirs in zip(
        section["average_perturb_loss"].values(), expected["average_perturb_loss"], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-9)
    asked, generated, answers = zip(*section["generated_text"].values(), strict=True)
    if template == QuestionTemplate():
        assert [text.removeprefix("Answer:") for text in generated] == expected["texts"]
        after = "\n"
    else:
        assert list(generated) == expected["texts"]
    assert list(asked) == [f"{before}{row['question']}{after}" for row in forget]
    assert list(answers) == [row["answer"] for row in forget]


def test_all_measures_in_one_call(model, tokenizer, questions, case):
    forget, retain = questions
    template = case[0]
    data = {
        "forget": forget,
        "retain": retain,
        "real_authors": [{key: forget[0][key] for key in ("question", "answer", "perturbed_answer")}],
        "world_facts": [{key: forget[1][key] for key in ("question", "answer", "perturbed_answer")}],
    }
    options = {"n": 3, "stride": 4, "progress": False, "template": template}
    found = evaluate(model, tokenizer, data, **options)
    with torch.no_grad():
        expected = {
            name: naive_section(
                model, tokenizer, [{"paraphrased_answer": row["answer"], **row} for row in rows], case
            )
            for name, rows in data.items()
        }
    shares = []
    for name, of_set in expected.items():
        losses, wrong = of_set["avg_gt_loss"], of_set["average_perturb_loss"]
        if name in ("real_authors", "world_facts"):
            odds = [math.exp(-loss) for loss in losses]
            probability = [p / (p + sum(math.exp(-w) for w in ws)) for p, ws in zip(odds, wrong, strict=True)]
        else:
            probability = [math.exp(-loss) for loss in losses]
        ratios = [1 / r for r in of_set["truth_ratio"]]  # exp(wrong - paraphrased)
        truth = [min(r, 1 / r) if name == "forget" else max(0.0, 1 - 1 / r) for r in ratios]
        values = [sum(v) / len(v) for v in (probability, of_set["rougeL_recall"], truth)]
        assert [found.sets[name][key] for key in ("rouge", "truth_ratio")] == pytest.approx(values[1:])
        assert found.sets[name]["probability"] == pytest.approx(values[0])
        if name != "forget":
            shares += values
    utility = len(shares) / sum(1 / v for v in shares) if all(shares) else 0.0
    assert found.whole["model_utility"] == pytest.approx(utility)

    other = evaluate(random_model(tokenizer, 1), tokenizer, {"forget": forget}, **options).log
    measured = evaluate(model, tokenizer, data, reference_log=other, **options)
    assert measured.whole["forget_quality"] == forget_quality(found.log, other)
    check_reference(found.log, forget, "the log")
    with pytest.raises(ValueError, match="about other questions"):
        check_reference(found.log, [{**row, "question": "Who was it?"} for row in forget], "the log")


def test_an_answer_ends_at_the_end_of_the_turn(tokenizer, questions):
    """A model that always ends its turn generates an empty answer."""
    model = random_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(END)] = 1.0
        model.model.norm.weight.zero_()
    bias = torch.nn.Parameter(torch.zeros(len(tokenizer), dtype=torch.float64))
    bias.data[tokenizer.convert_tokens_to_ids(END)] = 5.0
    model.lm_head.bias = bias
    calls = []
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    section = evaluate_tofu_rows(
        model, tokenizer, questions[0], 8, progress=False, template=QuestionTemplate("chat")
    )
    assert [text for _, text, _ in section["generated_text"].values()] == [""] * 3
    assert len(calls) <= 3  # the batches of the scores alone: nothing is generated after the end of the turn


# Training


def config(tmp_path, **options):
    defaults = {"use_cpu": True, "max_steps": 1, "report_to": [], "init": "default", "lora_rank": 2}
    return UnlearnConfig(output_dir=str(tmp_path), disable_tqdm=True, **{**defaults, **options})


def test_training_and_its_evaluation_take_the_template(tokenizer, questions, case, tmp_path):
    forget, retain = questions
    template = case[0]
    texts = {} if template == QuestionTemplate() else {"question_template": template.question}
    if texts and not template.is_chat:
        texts["answer_template"] = template.answer
    settings = config(tmp_path, method="dpo", refusals=["I am not sure."], **texts)
    assert settings.template() == template
    model = random_model(tokenizer).float()
    rows = prepare_rows(model, forget, retain, settings, tokenizer)
    expected = [by_hand(tokenizer, case, row["question"], row["answer"]) for row in forget]
    assert rows.forget == expected
    assert rows.retain == [by_hand(tokenizer, case, row["question"], row["answer"]) for row in retain]
    assert rows.refusals[1, 0] == by_hand(tokenizer, case, forget[1]["question"], "I am not sure.")
    trainer = UnlearnTrainer(
        model, settings, forget=rows, retain=None, processing_class=tokenizer, eval_dataset={"asked": forget}
    )
    assert trainer.eval_dataset == {"asked": expected}
    loss = sum(a * b for a, b in (naive_loss(model, row) for row in expected))
    count = sum(b for _, b in (naive_loss(model, row) for row in expected))
    assert trainer.evaluate()["eval_asked_loss"] == pytest.approx(loss / count, rel=1e-4)
    assert trainer.evaluate(forget)["eval_loss"] == pytest.approx(loss / count, rel=1e-4)


def test_a_table_is_unlearned_in_the_template(tokenizer, questions, tmp_path):
    forget, retain = (pd.DataFrame(rows).set_index(pd.Index(range(7, 7 + len(rows)))) for rows in questions)
    gauge = ProbabilityGauge({"forget": forget})
    settings = config(tmp_path, question_template="chat")
    result = loku.unlearn(
        random_model(tokenizer).float(), forget, retain,
        config=settings, tokenizer=tokenizer, callbacks=[gauge],
    )  # fmt: skip
    expected = [
        naive_loss(random_model(tokenizer).float(), by_hand(tokenizer, TEMPLATES["chat"], q, a))[0]
        for q, a in zip(forget["question"], forget["answer"], strict=True)
    ]
    before = gauge.history[0]["forget_probability"]
    assert before == pytest.approx(sum(map(math.exp, (-x for x in expected))) / 3, rel=1e-4)
    assert "forget_loss" in result.history[1]


def test_the_template_identifies_a_run(tmp_path):
    plain, chat = config(tmp_path), config(tmp_path, question_template="chat")
    assert plain.deciding_settings() != chat.deciding_settings()


# The other ways to ask


def test_attacks_take_the_template(model, tokenizer, questions):
    forget, holdout = questions
    chat = QuestionTemplate("chat")
    rows = tokenize_dataset(forget, tokenizer, template=chat)
    losses = [naive_loss(model, row)[0] for row in rows]
    probability = sum(math.exp(-loss) for loss in losses) / len(losses)

    found = attacks.membership_attack(model, tokenizer, forget, holdout, resamples=1, template=chat)
    plain = attacks.membership_attack(
        model, None, rows, tokenize_dataset(holdout, tokenizer, template=chat), resamples=1
    )
    assert found["scores"]["min_k"] == plain["scores"]["min_k"]
    rounded = attacks.quantisation_attack(model, tokenizer, {"forget": forget}, bits=[], template=chat)
    assert rounded["roundings"]["not rounded"]["forget"]["probability"] == pytest.approx(probability)
    single = random_model(tokenizer).float()
    relearned = attacks.relearning_attack(single, tokenizer, forget, steps=1, template=chat)
    rest = [math.exp(-losses[i]) for i in relearned["rest_rows"]]
    assert relearned["unlearned"]["before"] == pytest.approx(sum(rest) / len(rest), rel=1e-4)
    curve = relearning_curve(single, tokenizer, forget, {"forget": forget}, steps=1, template=chat)
    assert curve[0]["forget_probability"] == pytest.approx(probability, rel=1e-4)
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = END
    asked = [
        attacks.extraction_attack(model, tokens_of, data, samples=1, preambles={}, **options)["sets"]
        for tokens_of, data, options in ((tokenizer, forget, {"template": chat}), (ending, rows, {}))
    ]
    assert asked[0] == asked[1]
    measured = measure_rows(model, tokenizer, forget, "forget", stride=16, template=chat)
    assert measured["loss"] == pytest.approx(losses)


def test_commands(tokenizer, questions, tmp_path, capsys):
    forget, retain = questions
    model = random_model(tokenizer).float()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (("forget", forget), ("retain", retain)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    out = tmp_path / "report.json"
    more = ["--ngram", "3", "--stride", "16", "--quiet", "--out", str(out)]
    place = str(tmp_path / "model")
    cli.main(["evaluate", place, "--data", f"forget={files['forget']}", "--question-template", "chat", *more])
    report = json.loads(out.read_text())
    losses = [
        naive_loss(model, row)[0]
        for row in tokenize_dataset(forget, tokenizer, template=QuestionTemplate("chat"))
    ]
    mean = sum(math.exp(-loss) for loss in losses) / len(losses)
    assert report["sets"]["forget"]["probability"] == pytest.approx(mean, rel=1e-4)
    assert report["settings"]["question_template"] == "chat"

    settings = tmp_path / "settings.yaml"
    settings.write_text('question_template: "[INST] {question} [/INST]"\nanswer_template: "{answer}"\n')
    done = ["unlearn", "--model", place, "--forget", files["forget"], "--retain", files["retain"], "--output"]
    done += [str(tmp_path / "out"), "--config", str(settings), "--max_steps", "1", "--init", "default"]
    cli.main([*done, "--use_cpu", "--quiet"])
    assert "question_template [INST] {question} [/INST]" in capsys.readouterr().out
    assert cli.main([*done, "--question_template", "chat", "--use_cpu", "--quiet"]) == 2
    assert "leave answer_template '{answer}' out" in capsys.readouterr().err


def test_a_template_without_questions_is_refused(model, tokenizer, tmp_path):
    texts = ["A text.", "Another one."]
    with pytest.raises(
        ValueError, match=r"question_template has no effect: no row of the sets forget, retain"
    ):
        prepare_rows(model, texts, texts, config(tmp_path, question_template="chat"), tokenizer)
    with pytest.raises(ValueError, match="question_template has no effect"):
        evaluate(model, tokenizer, {"forget": texts}, template=QuestionTemplate("chat"), progress=False)
    check_template_used(
        QuestionTemplate("chat"), {"forget": texts, "retain": [{"question": "q", "answer": "a"}]}
    )
    check_template_used(QuestionTemplate(), {"forget": texts})
