"""RMU against open-unlearning, and its runs."""

import pytest
import torch
from peer_batches import SIZE, changed, losses_of, original, projection, token_batch
from small_trainers import FORGET, RETAIN, trainer_of, with_lora
from tiny_models import tiny_model

from loku import UnlearnConfig, UnlearnTrainer
from loku.objectives import rmu

ARGUMENTS = {"layer": 1, "steering_coeff": 3.0, "steering_seed": 5}


def rmu_config(**arguments):
    return UnlearnConfig(method="rmu", method_args={**ARGUMENTS, **arguments}, use_cpu=True)


def test_value_and_gradient_are_those_of_open_unlearning():
    """``trainer/unlearn/rmu.py: RMU.compute_loss`` with EMBED_DIFF, our vector, the second of three layers.

    Its means divide the sum of each row by the number of tokens of every row, so all rows have the same.
    """
    model, config, prompts = changed(), rmu_config(), (4, 4, 4)
    batches = {"forget": token_batch(3, prompts), "retain": token_batch(4, prompts)}
    losses = losses_of(config.objective(), model, batches)
    sum(losses.values()).backward()
    assert losses["forget_loss"].item() == pytest.approx(1.7483304314986299, rel=1e-6)
    assert losses["retain_loss"].item() == pytest.approx(0.1517805427294022, rel=1e-9)
    assert projection(model) == pytest.approx(-6.954195873619953, rel=1e-6)


def test_losses_are_means_of_the_labelled_tokens():
    """By the formula, on whole activations."""
    model, tokens = changed(), {"forget": token_batch(3), "retain": token_batch(4)}
    losses = losses_of(rmu_config().objective(), model, tokens)
    vector = 3.0 * rmu.steering_vector(SIZE, 5)

    def activations(model, kind):
        with torch.no_grad():
            ids = tokens[kind]["input_ids"]
            return model(input_ids=ids, output_hidden_states=True).hidden_states[2]  # 0 are the embeddings

    def mean(kind, squares):
        return torch.stack(
            [s[label != -100].mean() for s, label in zip(squares, tokens[kind]["labels"], strict=True)]
        ).mean()

    expected = mean("forget", (activations(model, "forget") - vector) ** 2)
    torch.testing.assert_close(losses["forget_loss"].detach(), expected)
    expected = mean("retain", (activations(model, "retain") - activations(original(), "retain")) ** 2)
    torch.testing.assert_close(losses["retain_loss"].detach(), expected)


def test_the_steering_vector_follows_from_its_seed():
    vector = rmu.steering_vector(64, 3)
    assert vector.norm().item() == pytest.approx(1) and (vector >= 0).all()
    torch.manual_seed(1)
    rmu.steering_vector.cache_clear()
    assert torch.equal(rmu.steering_vector(64, 3), vector)
    assert not torch.equal(rmu.steering_vector(64, 4), vector)
    settings = rmu_config().deciding_settings()["method_args"]
    assert settings == ARGUMENTS  # a checkpoint of another vector is refused


def test_a_layer_by_its_name_is_the_layer_by_its_number():
    batches = {"forget": token_batch(3), "retain": token_batch(4)}
    by_number = losses_of(rmu_config().objective(), changed(), batches)
    by_name = losses_of(rmu_config(layer=r"model\.layers\.1").objective(), changed(), batches)
    assert by_number == by_name
    other = losses_of(rmu_config(layer=2).objective(), changed(), batches)
    assert other["forget_loss"] != by_number["forget_loss"]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_training_steers_the_layers_up_to_the_layer(tuning, tmp_path):
    model = tiny_model("llama")
    if tuning == "lora":
        model = with_lora(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    options = {"method_args": {**ARGUMENTS, "layer": 0}, "num_train_epochs": 8, "learning_rate": 1e-2}
    trainer = trainer_of(model, "rmu", tmp_path, **options)
    trainer.train()
    log = [line for line in trainer.state.log_history if "forget_loss" in line]
    assert log[0]["retain_loss"] == pytest.approx(0, abs=1e-10)  # the original's own activations
    assert log[-1]["forget_loss"] < 0.9 * log[0]["forget_loss"]
    assert 0 < log[-1]["forget_probability"] < 1
    for name, parameter in model.named_parameters():
        if name in before:
            after = ".layers.1." in name or "lm_head" in name or name.endswith("model.norm.weight")
            assert torch.equal(parameter, before[name]) == after, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, tmp_path):
    """It changes nothing: the output of a checkpointed layer is that of the checkpoint."""
    results = []
    for checkpointing in (False, True):
        model = with_lora(tiny_model("llama"))
        options = {"method_args": {**ARGUMENTS, "layer": 1}, "max_steps": 2}
        if checkpointing:
            options |= {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            }
        trainer = trainer_of(model, "rmu", tmp_path, **options)
        trainer.train()
        results.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_wrong_arguments_are_refused_first(tmp_path):
    for wrong in ({"layer": -1}, {"layer": "("}, {"layer": True}, {"layer": 1.5}):
        with pytest.raises(ValueError, match="layer of method 'rmu' must be an integer >= 0 or a regular"):
            rmu_config(**wrong)
    with pytest.raises(ValueError, match="steering_coeff of method 'rmu' must be a finite number >= 0"):
        rmu_config(steering_coeff=-1.0)
    with pytest.raises(ValueError, match="has no argument 'vector'"):
        rmu_config(vector=3)
    model = tiny_model("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ValueError,
        match=r"there is no layer 7: LlamaForCausalLM has the layers 0 to 1\. Choose one by method_args",
    ):
        trainer_of(model, "rmu", tmp_path)
    assert [name for name, _ in model.named_modules()] == names


def test_packed_retain_rows_are_refused(tmp_path):
    """Their mean would be one over all documents of a row."""
    packed = [{**RETAIN[0], "position_ids": [0, 1, 2, *range(len(RETAIN[0]["input_ids"]) - 3)]}]
    args = UnlearnConfig(str(tmp_path), method="rmu", method_args={"layer": 0}, use_cpu=True)
    with pytest.raises(ValueError, match="give each document of the retain set a row"):
        UnlearnTrainer(with_lora(tiny_model("llama")), args, FORGET, packed)


def test_compiled(tmp_path):
    """The layer's output is found in a compiled model, too."""
    weights = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = with_lora(tiny_model("llama"))
        options |= {"method_args": {**ARGUMENTS, "layer": 1}, "max_steps": 2}
        trainer = trainer_of(model, "rmu", tmp_path, **options)
        trainer.train()
        weights.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*weights)


def test_a_resumed_run_has_the_same_bits(tmp_path):
    """A model that changes in place measures the original again; the vector follows from its seed."""

    def run(**further):
        options = {"method_args": {**ARGUMENTS, "layer": 1}, "save_strategy": "epoch", "num_train_epochs": 2}
        trainer = trainer_of(tiny_model("llama"), "rmu", tmp_path, **options, **further)
        trainer.train()
        return [parameter.detach() for parameter in trainer.model.parameters()]

    whole = run()
    rmu.steering_vector.cache_clear()
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(map(torch.equal, resumed, whole))
    with pytest.raises(ValueError, match="method_args"):
        options = {"method_args": {**ARGUMENTS, "steering_seed": 6}, "save_strategy": "epoch"}
        further = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1")}
        trainer_of(tiny_model("llama"), "rmu", tmp_path, **options, **further).train()
