"""The trainer evaluates data sets, keeps the best checkpoint, and refuses what would have no effect."""

import json
import shutil

import pytest
import torch
from bigram_model import bigram_model
from small_trainers import FORGET, RETAIN, VOCAB, arguments, lora, row, trainer_of, with_lora
from tiny_models import tiny_model
from transformers import EarlyStoppingCallback

import loku
from loku.eval_bounds import joint_measure
from loku.evaluation import extraction_likelihood
from loku.trainer_evaluation import EVAL_MEASURES

pytestmark = pytest.mark.usefixtures("one_thread")

HELD_OUT = [row(30 + i, 2, 9 + i) for i in range(3)]
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "learning_rate": 5e-2}
SAVES = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}


def trainer(folder, method="ihl", **options):
    model = tiny_model("llama", VOCAB)
    return trainer_of(with_lora(model), method, folder, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def evaluations(history):
    return [entry for entry in history if any(name.endswith("_loss") and "eval" in name for name in entry)]


@torch.no_grad()
def expected_loss_and_probability(model, rows):
    """The mean loss of a labelled token, and the mean answer probability of a row, from plain logits."""
    losses = []
    for example in rows:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        log_probability = model.eval()(ids).logits[0, :-1].double().log_softmax(-1)
        at = (labels != -100).nonzero()[:, 0]
        losses.append(-log_probability[at, labels[at]])
    probability = torch.stack([(-of_row.mean()).exp() for of_row in losses]).mean()
    return torch.cat(losses).mean().item(), probability.item()


def test_the_measures_of_each_set(tmp_path):
    model = with_lora(tiny_model("llama", VOCAB))
    sets = {"forget": FORGET, "held_out": HELD_OUT}
    options = {"eval_dataset": sets, **EVERY_STEP}
    config = arguments(tmp_path, **{k: v for k, v in options.items() if k != "eval_dataset"})
    ours = loku.UnlearnTrainer(model, config, FORGET, RETAIN, eval_dataset=sets)
    before = {name: expected_loss_and_probability(model, rows) for name, rows in sets.items()}
    measured = ours.evaluate()
    ours.train()
    history = evaluations(ours.state.log_history)
    assert [entry["step"] for entry in history] == [1, 2, 3]
    for entry, expected in ((measured, before), (history[-1], None)):
        for name, rows in sets.items():
            loss, probability = (expected or {}).get(name) or expected_loss_and_probability(model, rows)
            assert entry[f"eval_{name}_loss"] == pytest.approx(loss, rel=1e-5)
            assert entry[f"eval_{name}_probability"] == pytest.approx(probability, rel=1e-5)
            assert {f"eval_{name}_{measure}" for measure in EVAL_MEASURES} <= entry.keys()
    assert abs(history[-1]["eval_forget_loss"] - measured["eval_forget_loss"]) > 0.01
    assert all("tokens_per_second" not in entry and "loss" not in entry for entry in history)
    assert len([entry for entry in ours.state.log_history if "tokens_per_second" in entry]) == 3

    alone = ours.evaluate(HELD_OUT, metric_key_prefix="test")
    assert alone["test_loss"] == history[-1]["eval_held_out_loss"]
    assert ours.evaluate("held_out")["eval_loss"] == alone["test_loss"]
    ours.args.prediction_loss_only = True
    assert {name for name in ours.evaluate("forget") if name.split("_")[-1] in ("loss", "probability")} == {
        "eval_loss"
    }


def test_evaluation_changes_no_weight_and_resumes_exactly(tmp_path):
    """By default the forget and the retain set are evaluated."""
    plain = trainer(tmp_path / "plain", max_steps=4, learning_rate=5e-2)
    plain.train()
    options = {**EVERY_STEP, **SAVES, "metric_for_best_model": "forget_loss", "max_steps": 4}
    options["greater_is_better"] = False  # the first step is the best
    whole = trainer(tmp_path / "whole", **{**options, "load_best_model_at_end": False})
    whole.train()
    ours, expected = weights(whole.model), weights(plain.model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)

    best = trainer(tmp_path / "best", **options)
    best.train()
    history = evaluations(best.state.log_history)
    assert {"eval_forget_loss", "eval_retain_loss"} <= history[0].keys()
    losses = [entry["eval_forget_loss"] for entry in history]
    assert best.state.best_global_step == 1 and losses[0] == min(losses)
    reached = best.evaluate()  # with the weights of the best step
    assert reached["eval_forget_loss"] == pytest.approx(losses[0], rel=1e-6) != losses[-1]

    # The run is moved and goes on from its second checkpoint; the best one lies before it.
    moved = shutil.copytree(tmp_path / "best", tmp_path / "moved")
    shutil.rmtree(tmp_path / "best")
    for step in (3, 4):
        shutil.rmtree(moved / f"checkpoint-{step}", ignore_errors=True)
    again = trainer(moved, **options, resume_from_checkpoint=True)
    again.train()
    ours, expected = weights(again.model), weights(best.model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert [entry["step"] for entry in evaluations(again.state.log_history)] == [1, 2, 3, 4]
    state = json.loads((moved / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == best.state.best_global_step

    other = trainer(moved, **{**options, "metric_for_best_model": "retain_loss"}, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="metric_for_best_model='forget_loss', where this run has"):
        other.train()


def test_a_new_best_is_saved_between_the_checkpoints(tmp_path):
    options = {**EVERY_STEP, **SAVES, "save_steps": 3, "metric_for_best_model": "eval_forget_probability"}
    ours = trainer(tmp_path, **options)
    ours.train()
    assert not ours.args.greater_is_better  # of the forget set
    assert {entry.name for entry in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (1, 2, 3)}


def test_unlearn_evaluates_and_stops_early(tmp_path):
    model = tiny_model("llama", VOCAB)
    config = arguments(
        tmp_path, **{**EVERY_STEP, **SAVES, "max_steps": 6}, metric_for_best_model="eval_loss", lora_rank=2
    )
    result = loku.unlearn(
        model,
        FORGET,
        RETAIN,
        config=config,
        eval_dataset=HELD_OUT,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    losses = [entry["eval_loss"] for entry in evaluations(result.history)]
    worse = next(i for i in range(1, 6) if losses[i] >= min(losses[:i]))
    assert len(losses) == worse + 1 < 6
    found = expected_loss_and_probability(result.model, HELD_OUT)[0]
    assert found == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize(
    "options, arguments_of_trainer, message",
    [
        ({}, {"compute_metrics": dict}, "compute_metrics has no effect.*ProbabilityGauge"),
        ({}, {"preprocess_logits_for_metrics": dict}, "preprocess_logits_for_metrics has no effect"),
        ({}, {"compute_loss_func": dict}, "compute_loss_func has no effect"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor has no effect"),
        ({"include_for_metrics": ["loss"]}, {}, "include_for_metrics has no effect"),
        ({"bf16_full_eval": True}, {}, "bf16_full_eval has no effect"),
        (SAVES, {}, "metric_for_best_model must be one of forget_loss, .*retain_probability.*got 'loss'"),
        ({"metric_for_best_model": "accuracy"}, {"eval_dataset": HELD_OUT}, "must be one of loss, prob"),
        (
            {"metric_for_best_model": "eval_forgotten_with_utility"},
            {},
            "metric_for_best_model eval_forgotten_with_utility needs eval_limits and eval_floors",
        ),
        (
            {"eval_limits": {"other_probability": 0.1}, "eval_floors": {"retain_probability": 0.5}},
            {},
            "eval_limits: 'other_probability' must be one of forget_prob.*extraction_likelihood_<n> of a set",
        ),
        (
            {"eval_limits": {"forget_loss": 0.1}, "eval_floors": {"retain_probability": 0.5}},
            {},
            "eval_limits: 'forget_loss' must be one of",
        ),
        (
            {
                "eval_limits": {"forget_probability": 0.1},
                "eval_floors": {"retain_extraction_likelihood_2": 0.5},
            },
            {},
            "eval_floors: 'retain_extraction_likelihood_2' must be one of .*extracted$",
        ),
        (
            {
                "eval_limits": {"forget_extraction_likelihood_8": 0},
                "eval_floors": {"retain_probability": 0.5},
            },
            {},
            "no row of the forget set has more than 8 answer tokens",
        ),
        ({}, {"eval_dataset": {3: HELD_OUT}}, "the name of an evaluation set must be a text, got 3"),
        (
            {},
            {"eval_dataset": [{"input_ids": [1, 2], "labels": [-100, -100]}]},
            "row 0 of the evaluation set",
        ),
    ],
)
def test_refusals_touch_nothing(options, arguments_of_trainer, message, tmp_path):
    model = tiny_model("llama", VOCAB)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = arguments(tmp_path, **{**EVERY_STEP, "save_steps": 1, **options})
    with pytest.raises(ValueError, match=message):
        loku.UnlearnTrainer(model, config, FORGET, RETAIN, peft_config=lora(), **arguments_of_trainer)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_predict_is_refused_by_name(tmp_path):
    ours = trainer(tmp_path)
    for refused in (ours.predict, ours.get_test_dataloader):
        with pytest.raises(NotImplementedError, match=r"trainer\.evaluate\(rows, metric_key_prefix"):
            refused(HELD_OUT)
    with pytest.raises(NotImplementedError, match="without a dataloader"):
        ours.get_eval_dataloader()
    with pytest.raises(ValueError, match="there is no evaluation set 'validation'; there are"):
        ours.evaluate("validation")


@pytest.mark.parametrize(
    "metric, greater",
    [
        ("eval_forget_loss", True),
        ("forget_probability", False),
        ("retain_loss", False),
        ("eval_retain_probability", True),
        ("loss", False),
        ("forgotten_with_utility", True),
        ("eval_forgotten_with_utility", True),
    ],
)
def test_the_better_model_has_forgotten_more(metric, greater, tmp_path):
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    if "forgotten" not in metric:  # a smaller one is refused there
        other = arguments(tmp_path, metric_for_best_model=metric, greater_is_better=not greater)
        assert other.greater_is_better is (not greater)


LIMITS = {"a": 0.4, "b": 0.2}
FLOORS = {"u": 0.8, "v": 0.5}


@pytest.mark.parametrize(
    "a, b, u, v, value",
    [
        (0.4, 0.2, 0.8, 0.5, 1),  # the bounds themselves hold
        (0, 0, 1, 1, 1.25),
        (0, 0, 1, 0.55, 1.1),
        (0.6, 0, 1, 1, -0.1),
        (0.6, 0.5, 0.8, 0.5, -0.25),
        (1, 1, 0.8, 0.5, -0.7),
        (1, None, 0.8, 0.5, -0.7),  # what is not measured counts as 1
        (0, 0, 0.4, 1, -1.5),
        (1, 1, 0.4, 0.25, -1.5),
        (0, 0, 0, 0, -2),
    ],
)
def test_the_formula_of_forgetting_and_utility(a, b, u, v, value):
    measured = {"a": a, "u": u, "v": v, **({} if b is None else {"b": b})}
    assert joint_measure(measured, LIMITS, FLOORS) == pytest.approx(value)


def test_the_best_model_by_forgetting_and_utility(tmp_path):
    """Also with Extraction Likelihood, which is measured only where the other bounds hold."""
    limits = {"what must go_probability": 0.5, "what must go_extraction_likelihood_2": 0.25}
    floors = {"kept_probability": 1e-9}
    sets = {"what must go": FORGET, "kept": RETAIN}
    options = {**EVERY_STEP, **SAVES, "max_steps": 4, "metric_for_best_model": "forgotten_with_utility"}
    config = arguments(tmp_path, **options, eval_limits=limits, eval_floors=floors)
    model = with_lora(tiny_model("llama", VOCAB))
    ours = loku.UnlearnTrainer(model, config, FORGET, RETAIN, eval_dataset=sets)
    ours.train()
    history = evaluations(ours.state.log_history)
    likelihood = "eval_what must go_extraction_likelihood_2"
    for entry in history:
        measured = {name.removeprefix("eval_"): value for name, value in entry.items()}
        assert entry["eval_forgotten_with_utility"] == joint_measure(measured, limits, floors)
        assert (likelihood in entry) == (entry["eval_what must go_probability"] <= 0.5)
    values = [entry["eval_forgotten_with_utility"] for entry in history]
    assert ours.state.best_global_step == 1 + values.index(max(values)) and max(values) > 1
    again = ours.evaluate()
    assert again["eval_forgotten_with_utility"] == pytest.approx(max(values), rel=1e-6)
    assert again[likelihood] == extraction_likelihood(ours.model, FORGET, 2, progress=False).mean
    assert "test_forgotten_with_utility" not in ours.evaluate(HELD_OUT, metric_key_prefix="test")

    strict = {"what must go_probability": 0.0, "what must go_extraction_likelihood_2": 0.25}
    ours.args.eval_limits = strict
    entry = ours.evaluate()
    assert likelihood not in entry
    assert entry["eval_forgotten_with_utility"] == pytest.approx(
        -(entry["eval_what must go_probability"] + 0.75) / 2
    )


def test_the_endings_of_answers_count_or_not(tmp_path):
    """Eq. 6 of an answer of two tokens and an EOS, of which the model knows the EOS alone."""
    rows = [{"input_ids": [5, 6, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}]
    found = {}
    for count_end in (True, False):
        model = bigram_model({7: 2}, VOCAB, eos=2).float()
        config = arguments(tmp_path, eval_count_end=count_end, init="default", **EVERY_STEP)
        ours = loku.UnlearnTrainer(
            model, config, rows, RETAIN, eval_dataset={"forget": rows}, peft_config=lora()
        )
        found[count_end] = ours.evaluate()
    accuracy, strength = "eval_forget_memorization_accuracy", "eval_forget_extraction_strength"
    assert found[True][accuracy] == pytest.approx(1 / 3) == pytest.approx(found[True][strength])
    assert found[False][accuracy] == 0 == found[False][strength]
    for measure in ("loss", "probability"):
        assert found[True][f"eval_forget_{measure}"] == found[False][f"eval_forget_{measure}"]

    bounds = {
        "eval_limits": {"forget_extraction_likelihood_2": 0.5},
        "eval_floors": {"forget_probability": 0.1},
    }
    for count_end in (True, False):  # two tokens without the EOS, and EL_2 needs three
        model = bigram_model({7: 2}, VOCAB, eos=2).float()
        config = arguments(tmp_path, eval_count_end=count_end, **EVERY_STEP, **bounds)
        options = {"eval_dataset": {"forget": rows}, "peft_config": lora()}
        if count_end:
            loku.UnlearnTrainer(model, config, rows, RETAIN, **options)
        else:
            with pytest.raises(ValueError, match="no row of the forget set has more than 2 answer tokens"):
                loku.UnlearnTrainer(model, config, rows, RETAIN, **options)


def test_sets_are_read_from_files(tmp_path):
    """The error of a row names the file and the line."""
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    model, config = tiny_model("llama", VOCAB), arguments(tmp_path, **EVERY_STEP)
    options = {"args": config, "forget": FORGET, "retain": RETAIN, "peft_config": lora()}
    one = loku.UnlearnTrainer(model, eval_dataset=file, **options)
    assert one.eval_dataset == {"": HELD_OUT}
    model = tiny_model("llama", VOCAB)
    both = loku.UnlearnTrainer(model, eval_dataset={"a": str(file), "b": FORGET}, **options)
    assert both.eval_dataset == {"a": HELD_OUT, "b": FORGET}
    file.write_text(file.read_text() + '{"input_ids": []}\n')
    model = tiny_model("llama", VOCAB)
    with pytest.raises(ValueError, match=r"held_out\.jsonl, line 4: row 3 of the a set: "):
        loku.UnlearnTrainer(model, eval_dataset={"a": str(file)}, **options)
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        loku.UnlearnTrainer(model, eval_dataset={"a": tmp_path / "absent.jsonl"}, **options)
