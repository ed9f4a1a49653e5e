"""Unlearning stops on the limits of a request, keeps the best state, and goes on where it was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killed_trainings import LIMITS, memorised_rows, saved_model, train

from loku.deletion.measures import limits_of, measure_sets
from loku.deletion.training import PATIENCE, _config, _spread
from loku.demo import load_model
from loku.evaluation import extraction_likelihood
from loku.evaluation.scores import mean_answer_probability, token_measures, token_scores
from loku.models import load_model as load

pytestmark = pytest.mark.usefixtures("one_thread")

PROBABILITY = "retain_probability"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The folder of a tiny model, rows that it knows, and rows to keep."""
    return saved_model(tmp_path_factory.mktemp("model"))


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def measured(model, rows):
    return token_measures(token_scores(model, rows, progress=False))


def test_it_stops_at_the_first_state_within_all_limits(places, tmp_path):
    folder, forget, retain = places
    before = contents(folder)
    done = train(folder, tmp_path, forget, retain)
    assert done.outcome == "forgotten" and contents(folder) == before
    facts, history = done.facts, done.facts["history"]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["reason"] == "all limits hold, and the utility is kept"
    assert [entry["step"] for entry in history] == list(range(2, facts["steps"] + 1, 2))
    assert facts["chosen_step"] == facts["steps"] == history[-1]["step"] < facts["planned_steps"] == 12
    *earlier, last = [entry["forgotten_with_utility"] for entry in history]
    assert earlier and max(earlier) < 0 and last >= 1

    model = done.result.model
    likelihood = extraction_likelihood(model, forget, 3, progress=False).mean
    now, kept = measured(model, forget), measured(model, retain)["probability"]
    assert now["memorization_accuracy"] <= 0.5 and likelihood <= 0.5
    assert history[-1]["forget_memorization_accuracy"] == now["memorization_accuracy"]
    assert history[-1]["forget_extraction_likelihood_3"] == likelihood
    assert "forget_extraction_likelihood_3" not in history[0]  # the others did not hold yet
    original = measured(load(folder, {"dtype": "float32"}), retain)["probability"]
    assert facts["utility"]["original"] == {"retain": pytest.approx(original)}
    assert facts["utility"]["floors"] == {"retain": pytest.approx(original / 2)}
    assert facts["utility"]["chosen"] == {"retain": pytest.approx(kept, rel=1e-5)}
    assert facts["utility"]["kept"] == pytest.approx(kept / original, rel=1e-5)
    assert facts["training"]["lora_rank"] == 8 and facts["training"]["learning_rate"] == 1e-2


def test_the_lowest_share_of_the_utility_sets_counts(places, tmp_path):
    folder, forget, retain = places
    sets = {"first": retain[:3], "second": retain[3:]}
    done = train(folder, tmp_path, forget, retain, utility_sets=sets)
    shares = {
        name: mean_answer_probability(token_scores(done.result.model, rows, progress=False))
        / done.facts["utility"]["original"][name]
        for name, rows in sets.items()
    }
    assert done.facts["utility"]["kept"] == pytest.approx(min(shares.values()), rel=1e-5)
    assert {"first_probability", "second_probability"} <= done.facts["history"][0].keys()


def test_limits_that_are_never_met_leave_the_nearest_state(places, tmp_path):
    folder, forget, retain = places
    slow = {"learning_rate": 1e-3, "max_steps": 5}
    done = train(folder, tmp_path, forget, retain, training=slow, limits={"memorization_accuracy": 0.0})
    values = [entry["forgotten_with_utility"] for entry in done.facts["history"]]
    steps = [entry["step"] for entry in done.facts["history"]]
    assert done.outcome == "not forgotten" and done.facts["reason"] == "all steps are done"
    assert steps == [2, 4, 5]  # the last step is measured, too
    assert done.facts["chosen_step"] == steps[values.index(max(values))]
    assert -measured(done.result.model, forget)["memorization_accuracy"] == pytest.approx(max(values))


def test_a_run_that_loses_the_utility_is_undone(places, tmp_path):
    folder, forget, retain = places
    before = contents(folder)
    options = {"limits": {"probability": 0.0}, "utility_floor": 1.0, "utility_sets": {"same": forget}}
    done = train(folder, tmp_path, forget, retain, **options, training={"eval_steps": 1})
    assert done.outcome == "undone" and done.result is None and contents(folder) == before
    assert done.facts["steps"] == PATIENCE and done.facts["chosen_step"] is None
    assert done.facts["utility"]["kept"] is None
    assert done.facts["reason"] == f"the utility was under its floor in {PATIENCE} evaluations in a row"
    # A run that ends before, under the floor in all its states, is undone as well.
    done = train(folder, tmp_path / "short", forget, retain, **options, training={"max_steps": 3})
    assert (done.outcome, done.facts["reason"]) == ("undone", "all steps are done")


def test_the_time_of_earlier_parts_counts(places, tmp_path):
    folder, forget, retain = places
    (tmp_path / "seconds.json").write_text('{"seconds": 60.0}')
    done = train(folder, tmp_path, forget, retain, minutes=1, training={"learning_rate": 1e-5})
    assert done.outcome == "not forgotten" and done.facts["reason"] == "the time is over"
    assert done.facts["steps"] == done.facts["chosen_step"] == 1
    assert 60 < done.facts["seconds"] < 600
    again = train(folder, tmp_path, forget, retain, minutes=1, training={"learning_rate": 1e-5})
    assert again.facts["history"] == done.facts["history"]  # it has ended already


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {}}, "there are no limits"),
        ({"limits": {"perplexity": 0.5}}, "eval_limits: 'forget_perplexity' must be one of"),
        ({"limits": {"extraction_likelihood_20": 0.5}}, "no row of the forget set has more than 20 answer"),
        ({"utility_floor": 0}, r"utility_floor must be in \(0, 1\], got 0"),
        ({"minutes": 0}, "minutes must be > 0, got 0"),
        ({"utility_sets": {}}, "utility_sets must name at least one set"),
        ({"utility_sets": {"forget": []}}, "and none 'forget'"),
        ({"training": {"save_strategy": "no"}}, "training: save_strategy is set by the procedure itself"),
        ({"training": {"lora_rnk": 4}}, "training: UnlearnConfig has no field 'lora_rnk'"),
        ({"training": {"lora_rank": 0}}, "lora_rank must be an integer >= 1"),
    ],
)
def test_what_cannot_be_is_refused_before_training(options, message, places, tmp_path, monkeypatch):
    monkeypatch.setattr("loku.trainer.UnlearnTrainer.train", None)
    folder, forget, retain = places
    with pytest.raises(ValueError, match=message):
        train(folder, tmp_path, forget, retain, **options)


@pytest.mark.parametrize(
    ("rows", "given", "epochs", "eval_steps"),
    [
        (4, {}, 80, 4),
        (8, {}, 80, 4),
        (9, {}, 40, 4),
        (40, {}, 16, 4),
        (400, {}, 10, 25),
        (400, {"num_train_epochs": 2}, 2, 5),
        (400, {"max_steps": 100}, 10, 5),
        (400, {"eval_steps": 7}, 10, 7),
        (32, {"per_device_train_batch_size": 1}, 10, 16),
    ],
)
def test_the_length_of_a_run(rows, given, epochs, eval_steps, tmp_path):
    config = _config({"use_cpu": True, **given}, rows, tmp_path, False)
    assert (config.num_train_epochs, config.eval_steps, config.save_steps) == (epochs, eval_steps, eval_steps)
    assert (config.lora_rank, config.lora_alpha, config.retain_weight) == (8, 16, 5)


def test_rows_at_equal_distances():
    assert _spread(range(5), 32) == [0, 1, 2, 3, 4]
    assert _spread(range(64), 32) == list(range(0, 64, 2))
    assert _spread(range(65), 32) == list(range(0, 65, 3))


def test_memorised_rows_are_forgotten_to_the_hold_out(places, tmp_path):
    """From the measures before, by the paper's limits, to the same measures after."""
    folder, forget, retain = places
    _, tokenizer = load_model()
    model = load(folder, {"dtype": "float32"})
    holdout = [{"input_ids": row["input_ids"][::-1]} for row in retain]
    before = measure_sets(model, tokenizer, {"forget": forget, "holdout": holdout}, n=3)
    assert before["forget"]["extracted"] == 1 and before["holdout"]["extracted"] == 0
    limits = limits_of({}, before["holdout"], before["forget"])
    done = train(folder, tmp_path, forget, retain, limits=limits, training={"max_steps": 30})
    after = measure_sets(done.result.model, tokenizer, {"forget": forget}, n=3)["forget"]
    assert done.outcome == "forgotten" and limits.keys() == {*LIMITS}
    assert all(after[name] <= limit for name, limit in limits.items())


def test_memorised_rows_are_greedy(places):
    model = load(places[0], {"dtype": "float32"})
    assert memorised_rows(model) == places[1]
    assert all(score.memorized.all() for score in token_scores(model, places[1], progress=False))


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    script = Path(__file__).parents[2] / "helpers" / "killed_trainings.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) > 3
