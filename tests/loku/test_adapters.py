"""The original model of a peft model, and adapters that an initialisation must not touch."""

import math

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from small_trainers import FORGET, RETAIN, arguments, lora
from tiny_models import tiny_model
from transformers import TrainerCallback

import loku
from loku.adapters import SNAPSHOT_ADAPTER, has_residual_base, reference_model, snapshot_reference
from loku.data import collate
from loku.fila.initialize import initialize_from_factors, initialize_from_row_scales
from loku.saving.adapter import save_portable_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

BETA = 0.1
NPO_AT_START = 2 / BETA * math.log(2)
BATCH = collate(FORGET, pad_token_id=0)


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def changed(model, seed=1, scale=0.3):
    """Change every trained tensor of a model, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def peft_model(config, train=True):
    model = get_peft_model(tiny_model("llama"), config)
    return changed(model) if train else model


def several_active():
    model = peft_model(lora())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.data += 0.3
    model.base_model.set_adapter(["default", "second"])
    return model


def unlearned(init):
    def make(tmp_path):
        options = arguments(tmp_path, init=init)
        return loku.unlearn(tiny_model("llama"), FORGET, RETAIN, config=options).model

    return make


COPIED = {
    "trained": lambda path: peft_model(lora()),
    "trained, rsLoRA, alpha 3": lambda path: peft_model(lora(use_rslora=True, lora_alpha=3)),
    "random B": lambda path: peft_model(lora(init_lora_weights=False), train=False),
    "PiSSA of peft": lambda path: peft_model(lora(init_lora_weights="pissa"), train=False),
    "OLoRA of peft": lambda path: peft_model(lora(init_lora_weights="olora"), train=False),
    "PiSSA of peft, trained": lambda path: peft_model(lora(init_lora_weights="pissa")),
    "unlearned by FILA": unlearned("fila"),
    "unlearned by default LoRA": unlearned("default"),
}
FRESH = {
    "fresh": lambda path: peft_model(lora(), train=False),
    "gaussian": lambda path: peft_model(lora(init_lora_weights="gaussian"), train=False),
    "fresh, with modules_to_save": lambda path: peft_model(lora(modules_to_save=["norm"]), train=False),
}
KEPT = {
    "DoRA, trained": lambda path: peft_model(lora(use_dora=True)),
    "DoRA": lambda path: peft_model(lora(use_dora=True), train=False),
    "modules_to_save, trained": lambda path: peft_model(lora(modules_to_save=["norm"])),
    "biases": lambda path: peft_model(lora(bias="all"), train=False),
    "embedding, trained": lambda path: peft_model(LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    "several active": lambda path: several_active(),
    "IA3": lambda path: peft_model(
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "no adapter": lambda path: tiny_model("llama"),
}
MODELS = COPIED | FRESH | KEPT


class Adapters(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        self.adapters = list(getattr(model, "peft_config", {}))


@pytest.mark.parametrize("kind", MODELS)
def test_the_reference_is_the_model_that_was_given(kind, tmp_path):
    """At the first step NPO is (2 / beta) log 2 and KL is 0. At the second the model has moved away."""
    for method, first in (("npo", NPO_AT_START), ("kl", 0.0)):
        model = MODELS[kind](tmp_path)
        given = logits(model)
        names = list(getattr(model, "peft_config", {}))
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        options = {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4}
        options |= {"beta": BETA} if method == "npo" else {}
        trainer = loku.UnlearnTrainer(model, arguments(tmp_path, method=method, **options), FORGET, RETAIN)
        seen = Adapters()
        trainer.add_callback(seen)
        trainer.train()
        loss = "forget_loss" if method == "npo" else "retain_loss"
        values = [entry[loss] for entry in trainer.state.log_history if loss in entry]
        assert values[0] == pytest.approx(first, rel=1e-5, abs=1e-5)
        assert values[2] != pytest.approx(first, rel=1e-4, abs=1e-4)
        assert (SNAPSHOT_ADAPTER in seen.adapters) == (kind in COPIED)
        assert list(getattr(model, "peft_config", {})) == names
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert (logits(model) - given).abs().max() > 1e-3


def test_what_is_copied():
    assert snapshot_reference(peft_model(lora(), train=False)).factors == {}
    reference = snapshot_reference(peft_model(lora()))
    assert reference.adapter == "default" and len(reference.factors) == 4
    assert all(snapshot_reference(make(None)) is None for make in KEPT.values())


def test_a_second_train_keeps_the_first_reference(tmp_path):
    model = peft_model(lora())
    given = logits(model)
    options = {"beta": BETA, "max_steps": 2, "per_device_train_batch_size": 4}
    trainer = loku.UnlearnTrainer(model, arguments(tmp_path, method="npo", **options), FORGET, RETAIN)
    trainer.train()
    trainer.train()
    values = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
    assert values[0] != pytest.approx(NPO_AT_START, rel=1e-4)
    with trainer._original_model(), reference_model(model):
        torch.testing.assert_close(logits(model), given)


def test_a_resumed_run_compares_with_the_given_adapter(tmp_path):
    """The checkpoint's adapter is loaded after the reference was taken."""

    def run(folder, **options):
        args = arguments(
            tmp_path, method="npo", beta=BETA, max_steps=4, save_strategy="steps", save_steps=2, **options
        )
        args.output_dir = str(tmp_path / folder)
        trainer = loku.UnlearnTrainer(peft_model(lora()), args, FORGET, RETAIN)
        trainer.train()
        return trainer

    whole = run("whole")
    resumed = run("whole", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    ours, theirs = (trainer.model.state_dict() for trainer in (resumed, whole))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="another given adapter"):
        args = arguments(tmp_path, method="npo", beta=BETA, max_steps=4, save_strategy="steps", save_steps=2)
        args.output_dir = str(tmp_path / "whole")
        args.resume_from_checkpoint = "true"
        loku.UnlearnTrainer(changed(peft_model(lora()), seed=2), args, FORGET, RETAIN).train()


def test_a_trained_adapter_on_the_untouched_base_is_saved_as_it_is(tmp_path):
    model = peft_model(lora())
    trainer = loku.UnlearnTrainer(model, arguments(tmp_path, method="npo"), FORGET, RETAIN)
    trainer.train()
    assert not has_residual_base(model)
    save_portable_adapter(model, tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_of_peft_that_change_the_base_are_saved_as_peft_loads_them(init, tmp_path):
    """peft repeats the initialisation when it loads such an adapter on the untouched base."""
    model = peft_model(lora(init_lora_weights=init), train=False)
    trainer = loku.UnlearnTrainer(model, arguments(tmp_path, method="npo"), FORGET, RETAIN)
    trainer.train()
    assert not has_residual_base(model)
    save_portable_adapter(model, tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["trained", "random B", "unlearned by default LoRA"])
def test_an_adapter_that_changes_the_outputs_is_not_initialised(how, tmp_path):
    model = MODELS[how](tmp_path)
    given = logits(model)
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    scales = {name: torch.ones(layer.out_features) for name, layer in layers.items()}
    factors = {n: (m.lora_B.default.weight, m.lora_A.default.weight) for n, m in layers.items()}
    calls = [
        lambda: loku.initialize_lora_fila_weights(model, [BATCH], [BATCH]),
        lambda: loku.get_fila_state_dict(model, [BATCH], [BATCH]),
        lambda: initialize_from_row_scales(model, scales),
        lambda: initialize_from_factors(model, factors),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"already changes the outputs.*merge_and_unload"):
            call()
    assert logits(model).equal(given)
