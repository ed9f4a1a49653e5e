"""AltPO against open-unlearning, and its runs."""

import pytest
from peer_batches import changed, losses_of, projection, token_batch

from loku import UnlearnConfig, UnlearnTrainer, demo, unlearn
from loku.data import AlternateRows

ANSWERS = ["It is unknown.", "Nobody by that name."]


def test_value_and_gradient_are_those_of_open_unlearning():
    """``trainer/unlearn/dpo.py: DPO`` with beta 0.1, which AltPO's scripts run on its alternates."""
    model = changed()
    batches = {"forget": token_batch(3), "refusal": token_batch(6), "retain": token_batch(4)}
    objective = UnlearnConfig(method="altpo", use_cpu=True).objective()
    losses = losses_of(objective, model, batches, beta=objective.beta)
    sum(losses.values()).backward()
    assert losses["forget_loss"].item() == pytest.approx(22.722862758638907, rel=1e-9)
    assert losses["retain_loss"].item() == pytest.approx(8.240137100219727, rel=1e-6)  # theirs is float32
    assert projection(model) == pytest.approx(-115.587540913791, rel=1e-5)


@pytest.fixture(scope="module")
def rows():
    forget, retain = demo.load_rows()
    return [{**row, "alternate": ANSWERS} for row in forget[:3]], retain[:3]


def test_a_run_prefers_the_alternates(rows, tmp_path):
    model, tokenizer = demo.load_model()
    config = UnlearnConfig(
        output_dir=str(tmp_path),
        method="altpo",
        max_steps=6,
        learning_rate=3e-3,
        init="default",
        disable_tqdm=True,
        use_cpu=True,
    )
    result = unlearn(model, *rows, config=config, tokenizer=tokenizer)
    log = [line for line in result.history if "refusal_probability" in line]
    assert log[-1]["refusal_probability"] > 2 * log[0]["refusal_probability"]
    assert log[-1]["forget_loss"] < log[0]["forget_loss"]


def test_what_it_trains_on_is_asked_for(rows, tmp_path):
    forget, retain = rows
    model, tokenizer = demo.load_model()

    def trainer(forget, refusals=None):
        args = UnlearnConfig(str(tmp_path), method="altpo", use_cpu=True)
        return UnlearnTrainer(model, args, forget, retain, tokenizer, refusals)

    with pytest.raises(ValueError, match="row 0 of the forget set: it has no column 'alternate'"):
        trainer([{key: value for key, value in row.items() if key != "alternate"} for row in forget])
    args = UnlearnConfig(str(tmp_path), method="altpo", use_cpu=True, refusals=["no"])
    with pytest.raises(
        ValueError, match="'altpo' trains on the rows' own alternates, so it takes no refusals"
    ):
        UnlearnTrainer(model, args, forget, retain, tokenizer)
    tokens = [{"input_ids": [1, 2, 3]}]
    with pytest.raises(ValueError, match=r"'altpo' trains on alternates; pass a loku\.data\.AlternateRows"):
        trainer(tokens)
    given = AlternateRows(forget, tokenizer)
    assert trainer(forget, refusals=given).train_dataset.refusals is given
