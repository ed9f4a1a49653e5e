"""Callbacks stop training at their thresholds, and log the measures."""

import copy

import pytest
import torch
from bigram_model import bigram_model
from tiny_models import tiny_model
from transformers import TrainerControl, TrainerState, TrainingArguments

import loku
from loku.evaluation import extraction_likelihood, memorization_accuracy, token_scores

pytestmark = pytest.mark.usefixtures("one_thread")
N = 3


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").double()


@pytest.fixture(scope="module")
def texts(model):
    """A text that the model has memorised, and the same with other words in its second half."""
    ids = [5, 7, 11]
    with torch.no_grad():
        while len(ids) < 24:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    changed = [*ids[:13], *range(30, 41)]
    return [{"input_ids": text, "labels": [-100] * 3 + text[3:]} for text in (ids, changed)]


class Run:
    """A stand-in for the trainer, which calls a callback."""

    def __init__(self, callback, log=()):
        self.callback, self.state, self.control = callback, TrainerState(epoch=0), TrainerControl()
        self.state.log_history = list(log)

    def __call__(self, event, model, step, epoch=None):
        self.state.global_step, self.state.epoch = step, epoch
        getattr(self.callback, event)(
            TrainingArguments("unused"), self.state, self.control, model=model, processing_class=None
        )
        return self.control.should_training_stop


def test_extraction_stopping(model, texts):
    memorized, changed = texts
    callback = loku.ExtractionStopping([memorized], [changed], n=N)
    run = Run(callback)
    assert not run("on_train_begin", model, 0)
    likelihood = extraction_likelihood(model, [changed], n=N, progress=False).mean
    accuracy = memorization_accuracy(model, [changed], progress=False)
    assert 0 < likelihood < 1 and 0 < accuracy < 1  # so the threshold can be missed
    assert callback.history == [
        {
            "step": 0,
            "epoch": 0.0,
            f"holdout_extraction_likelihood_{N}": likelihood,
            "holdout_memorization_accuracy": accuracy,
            f"forget_extraction_likelihood_{N}": 1.0,
            "forget_memorization_accuracy": 1.0,
        }
    ]
    assert not run("on_step_end", model, 1)
    assert not run("on_epoch_end", model, 1, 1.0)  # still known by heart
    other = tiny_model("llama", seed=1).double()
    assert not run("on_step_end", other, 2)  # measured at the end of an epoch alone
    assert run("on_epoch_end", other, 2, 2.0)
    assert [entry["step"] for entry in callback.history] == [0, 1, 2]
    assert callback.history[-1]["forget_memorization_accuracy"] <= accuracy
    assert run.state.log_history == callback.history


def test_extraction_stopping_without_the_endings():
    """A model that knows the EOS of an answer and nothing else of it has forgotten the answer."""
    model = bigram_model({7: 2}, 97, eos=2)
    rows = [{"input_ids": [5, 6, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}]
    thresholds = {"holdout_extraction_likelihood_1": 0.5, "holdout_memorization_accuracy": 0.3}
    for count_end, accuracy in ((True, 1 / 3), (False, 0)):
        callback = loku.ExtractionStopping(
            rows, rows, n=1, every=1, thresholds=thresholds, count_end=count_end
        )
        run = Run(callback)
        run("on_train_begin", model, 0)
        assert callback.history[0]["forget_memorization_accuracy"] == pytest.approx(accuracy)
        assert run("on_step_end", model, 1) != count_end


def test_extraction_stopping_needs_both(model, texts):
    callback = loku.ExtractionStopping(texts[:1], texts[1:], n=N)
    Run(callback)("on_train_begin", model, 0)
    likelihood, accuracy = callback.thresholds.values()
    names = (f"forget_extraction_likelihood_{N}", "forget_memorization_accuracy")
    for over, stop in [((0, 0), True), ((1e-6, 0), False), ((0, 1e-6), False), ((-0.1, -0.1), True)]:
        entry = dict(zip(names, (likelihood + over[0], accuracy + over[1]), strict=True))
        assert callback.should_stop(entry) == stop


def test_a_resumed_run_keeps_the_thresholds_of_the_original_model(model, texts):
    callback = loku.ExtractionStopping(texts[:1], texts[1:], n=N)
    log = [
        {"loss": 1.0, "step": 0},
        {f"holdout_extraction_likelihood_{N}": 0.25, "holdout_memorization_accuracy": 0.5, "step": 0},
    ]
    Run(callback, log)("on_train_begin", model, 10)
    assert list(callback.thresholds.values()) == [0.25, 0.5]
    floor = loku.UtilityFloorStopping(texts, floor=0.5, every=1)
    Run(floor, [{"utility_floor": 0.125, "utility": 0.25, "step": 0}])("on_train_begin", model, 10)
    assert floor.utility_floor == 0.125


def test_short_rows_are_refused(model, texts):
    with pytest.raises(ValueError, match="n=30"):
        Run(loku.ExtractionStopping(texts, texts, n=30))("on_train_begin", model, 0)
    for every in (0, -1):
        with pytest.raises(ValueError, match="every"):
            loku.ExtractionStopping(texts, texts, every=every)


def test_a_model_with_nan_has_not_forgotten(model, texts):
    """NaN matches no token, which would look like a set that is forgotten, and utility that is kept."""
    broken = copy.deepcopy(model)
    callbacks = [
        loku.ExtractionStopping(texts[:1], texts[1:], n=N, every=1),
        loku.UtilityFloorStopping(texts, every=1),
        loku.ProbabilityGauge({"forget": texts}, every=1),
    ]
    runs = [Run(callback) for callback in callbacks]
    for run in runs:
        run("on_train_begin", model, 0)
    with torch.no_grad():
        broken.lm_head.weight[0] = torch.nan
    for run in runs:
        with pytest.raises(FloatingPointError, match="row 0: the model's loss is NaN"):
            run("on_step_end", broken, 1)
        assert not run.control.should_training_stop


def test_utility_floor(model, texts):
    callback = loku.UtilityFloorStopping(texts, floor=0.5, every=2)
    run = Run(callback)
    run("on_train_begin", model, 0)
    scores = token_scores(model, texts, progress=False)
    probability = sum((-score.losses.mean()).exp().item() for score in scores) / 2
    assert callback.history[0] == pytest.approx(
        {"step": 0, "epoch": 0.0, "utility": probability, "utility_floor": probability / 2}
    )
    other = tiny_model("llama", seed=1).double()
    assert not run("on_step_end", model, 2)
    assert not run("on_step_end", other, 3)  # measured every other step
    assert not run("on_epoch_end", other, 3)
    assert run("on_step_end", other, 4)
    assert callback.history[-1]["utility"] < probability / 2
    for floor in (0, 1.5):
        with pytest.raises(ValueError, match="floor"):
            loku.UtilityFloorStopping(texts, floor=floor)


def test_training_stops_and_the_history_says_why(texts, tmp_path):
    utilities = iter([1.0, 0.99, 0.95, 0.9, 0.0])  # 0.95 is at the floor
    callback = loku.UtilityFloorStopping(texts, floor=0.95, utility=lambda scores: next(utilities), every=1)
    gauge = loku.ProbabilityGauge({"forget": texts[:1]}, every=2)
    config = loku.UnlearnConfig(
        output_dir=str(tmp_path),
        lora_rank=2,
        per_device_train_batch_size=1,
        num_train_epochs=10,
        retain_weight=0,
        disable_tqdm=True,
        use_cpu=True,
    )
    result = loku.unlearn(
        tiny_model("llama"), texts[:1], texts[1:], config=config, callbacks=[callback, gauge]
    )
    measured = [(e["step"], e["utility"]) for e in result.history if "utility" in e]
    assert measured == [(0, 1.0), (1, 0.99), (2, 0.95), (3, 0.9)]
    assert [e["step"] for e in gauge.history] == [0, 2]
    assert gauge.history[0]["forget_probability"] > gauge.history[1]["forget_probability"]
    assert max(e["step"] for e in result.history) == 3
