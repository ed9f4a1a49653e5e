"""The learning rate that a run chooses by itself."""

import copy

import pytest
from small_trainers import FORGET, RETAIN, VOCAB, arguments, with_lora
from tiny_models import tiny_model

import loku
from loku.learning_rates import default_learning_rate, with_learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("parameters", "lora", "full"),
    [
        (4_212_992, 2e-3, 2e-4),
        (10**7 - 1, 2e-3, 2e-4),
        (10**7, 1e-3, 1e-4),
        (125_000_000, 5e-4, 5e-5),
        (10**9, 2e-4, 1e-5),
        (7 * 10**9, 2e-4, 1e-5),
    ],
)
def test_larger_models_get_smaller_rates(parameters, lora, full, monkeypatch):
    model = tiny_model("llama", VOCAB)

    def count(self):
        return parameters + sum(p.numel() for name, p in self.named_parameters() if ".lora_" in name)

    monkeypatch.setattr(type(model), "num_parameters", count)
    assert default_learning_rate(model) == full
    assert default_learning_rate(with_lora(model)) == lora


def test_a_given_rate_stays():
    config = loku.UnlearnConfig(learning_rate=3e-5)
    assert with_learning_rate(config, tiny_model("llama", VOCAB)) is config and config.learning_rate == 3e-5


def test_the_choice_is_said(capsys):
    config = loku.UnlearnConfig(disable_tqdm=False)
    chosen = with_learning_rate(config, tiny_model("llama", VOCAB))
    assert config.learning_rate is None and chosen.learning_rate == 2e-4
    assert "learning_rate 0.0002, chosen for all weights of a model of 0.0" in capsys.readouterr().out
    with_learning_rate(loku.UnlearnConfig(disable_tqdm=True), tiny_model("llama", VOCAB))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("tuning", "rate"), [("lora", 2e-3), ("full", 2e-4)])
def test_the_optimizer_and_the_identity_of_the_run_have_it(tuning, rate, tmp_path):
    config = arguments(
        tmp_path, learning_rate=None, tuning=tuning, init="default", max_steps=1, save_strategy="steps"
    )
    before = copy.copy(config)
    result = loku.unlearn(tiny_model("llama", VOCAB), FORGET, RETAIN, config=config)
    assert config.learning_rate is None and before.learning_rate is None
    assert [entry["learning_rate"] for entry in result.history if "learning_rate" in entry] == [rate]
    (manifest,) = (tmp_path / "out").rglob("loku_checkpoint.json")
    assert f'"learning_rate": {rate}' in manifest.read_text()


def test_settings_that_train_nothing_are_refused():
    for settings, message in [
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"max_steps": 0}, "max_steps must be > 0"),
        ({"num_train_epochs": -1}, "num_train_epochs must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            loku.UnlearnConfig(**settings)
