"""After an exception at any stage a model is what it was, and a retry gives the result of a fresh model."""

from functools import partial
from pathlib import Path

import peft.tuners.lora.model
import pytest
import torch
from model_facts import facts, same_facts
from peft import PeftModel, get_peft_model
from small_trainers import FORGET, RETAIN, VOCAB, arguments, lora
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import loku
import loku.checkpoint_folder
import loku.checkpoints
import loku.fila.initialize
import loku.fila.row_scales
import loku.trainer
import loku.unlearning
from loku.data import collate
from loku.fila.initialize import initialize_from_factors, initialize_from_row_scales, restore_base_
from loku.rollback import all_or_nothing

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
FACTS = [
    "weights",
    "requires_grad",
    "mode",
    "config",
    "generation config",
    "hooks",
    "gradient checkpointing",
    "modules and classes",
    "attributes",
    "gradients",
]
ALL_BUT_WEIGHTS = [name for name in FACTS if name != "weights"]
# Each stage: the function that fails there, at which of its calls, and whether it has done its work before.
UNLEARN = {
    "tokenising the rows": (loku.unlearning, "prepare_rows", 1, False),
    "putting the adapter in": (peft.tuners.lora.model.LoraModel, "_create_and_replace", 3, True),
    "checking the output embedding": (loku.trainer, "check_head", 1, True),
    "making the trainer": (loku.trainer, "StepLog", 1, True),
    "measuring the retain set": (loku.fila.row_scales, "accumulate_squared_grad_", 2, True),
    "measuring the forget set": (loku.fila.row_scales, "accumulate_squared_grad_", 16, True),
    "decomposing the weights": (loku.fila.initialize, "row_scaled_svd", 2, False),
    "writing the residual": (loku.fila.initialize, "_add_to_base_", 3, True),
    "adding the reference": (PeftModel, "add_adapter", 1, True),
    "beginning to train": (TrainerCallback, "on_train_begin", 1, False),
    "the first step": (loku.trainer.UnlearnTrainer, "compute_loss", 1, True),
    "the middle of training": (loku.trainer.UnlearnTrainer, "compute_loss", 2, True),
    "writing a checkpoint": (loku.checkpoint_folder, "write_manifest", 1, True),
    "checking the end": (loku.checkpoints, "check_parameters", 3, False),
    "the end of training": (TrainerCallback, "on_train_end", 1, False),
    "handing the model over": (loku.unlearning, "inherit_modes_", 1, True),
}
FULL = {stage: UNLEARN[stage] for stage in ("checking the output embedding", "making the trainer")}
FULL_TRAINING = {
    stage: UNLEARN[stage]
    for stage in ("the middle of training", "writing a checkpoint", "handing the model over")
}
TRAINER = {stage: UNLEARN[stage] for stage in ("putting the adapter in", "making the trainer")}
# What is restored, by the call and the stage at which it fails. The guide shows it.
RESTORED = {
    **{("unlearn", stage): FACTS for stage in UNLEARN},
    **{('unlearn, tuning="full"', stage): FACTS for stage in FULL},
    **{('unlearn, tuning="full"', stage): ALL_BUT_WEIGHTS for stage in FULL_TRAINING},
    **{("UnlearnTrainer with peft_config", stage): FACTS for stage in TRAINER},
    ("UnlearnTrainer.train", "the middle of training"): ALL_BUT_WEIGHTS,
    ("initialize_lora_fila_weights", "measuring the forget set"): FACTS,
    ("initialize_from_row_scales", "decomposing the weights"): FACTS,
    ("initialize_from_row_scales", "adding the reference"): FACTS,
    ("initialize_from_factors", "writing the residual"): FACTS,
}


def given():
    """A model with every kind of state that a failure could leave changed."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, bos_token_id=1, eos_token_id=2))
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.norm.weight.requires_grad_(False)
    model.model.embed_tokens.register_forward_hook(_no_change)
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    model.mine = {"an attribute": "of the user"}
    return model


def _no_change(module, args, output):
    return None


class Fault:
    """Make a function fail at one of its calls."""

    def __init__(self, monkeypatch, stage, error):
        owner, name, at, after = stage
        self.calls, real = 0, getattr(owner, name)

        def failing(*args, **kwargs):
            self.calls += 1
            if self.calls == at and not after:
                raise error
            result = real(*args, **kwargs)
            if self.calls == at:
                raise error
            return result

        monkeypatch.setattr(owner, name, failing)


def run(model, tmp_path, **options):
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": True, **options}
    config = arguments(tmp_path, lora_rank=2, **options)
    return loku.unlearn(model, FORGET, RETAIN, config=config, callbacks=[TrainerCallback()])


def logits(model):
    with torch.no_grad():
        return model.eval()(**collate(FORGET, pad_token_id=0)).logits


def check(model, before, expected):
    same = same_facts(before, facts(model))
    assert [name for name in FACTS if not same[name] and name in expected] == []


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The logits of a run that does not fail."""
    return logits(run(given(), tmp_path_factory.mktemp("fresh")).model)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", UNLEARN)
def test_unlearn_restores_all_and_can_be_tried_again(stage, error, fresh, tmp_path, monkeypatch):
    model = given()
    before = facts(model)
    with monkeypatch.context() as patched:
        fault = Fault(patched, UNLEARN[stage], error)
        with pytest.raises(error):
            run(model, tmp_path)
    assert fault.calls > 0
    check(model, before, RESTORED["unlearn", stage])
    if error is MemoryError:
        assert logits(run(model, tmp_path / "again").model).equal(fresh)


@pytest.mark.parametrize("stage", [*FULL, *FULL_TRAINING])
def test_full_tuning_restores_all_but_trained_weights(stage, tmp_path, monkeypatch):
    model = given()
    before = facts(model)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        Fault(patched, UNLEARN[stage], MemoryError)
        run(model, tmp_path, tuning="full")
    check(model, before, RESTORED['unlearn, tuning="full"', stage])


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
@pytest.mark.parametrize("stage", TRAINER)
def test_a_trainer_that_is_not_made_restores_all(stage, init, tmp_path, monkeypatch):
    """peft's PiSSA and OLoRA replace the base weights."""
    model = given()
    before = facts(model)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        Fault(patched, UNLEARN[stage], KeyboardInterrupt)
        config = arguments(tmp_path, gradient_checkpointing=True)
        loku.UnlearnTrainer(model, config, FORGET, RETAIN, peft_config=lora(init_lora_weights=init))
    check(model, before, RESTORED["UnlearnTrainer with peft_config", stage])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_trainer_that_fails_leaves_the_trained_weights_alone(tuning, tmp_path, monkeypatch):
    model = given() if tuning == "full" else get_peft_model(given(), lora())
    trainer = loku.UnlearnTrainer(model, arguments(tmp_path, method="npo"), FORGET, RETAIN)
    before = facts(model)
    stage = "the middle of training"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        Fault(patched, (loku.trainer.UnlearnTrainer, "compute_loss", 2, True), KeyboardInterrupt)
        trainer.train()
    check(model, before, RESTORED["UnlearnTrainer.train", stage])
    after = model.state_dict()
    changed = {name for name, value in before["weights"].items() if not value.equal(after[name])}
    assert changed and (tuning == "full" or all(".lora_" in name for name in changed))
    trainer.train()  # and it goes on
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    "name, stage", [key for key in RESTORED if key[0].startswith("initialize")], ids=lambda value: value
)
def test_an_initialisation_that_fails_restores_all(name, stage, tmp_path, monkeypatch):
    model = get_peft_model(given(), lora())
    names = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    layers = {name: model.get_base_model().get_submodule(name) for name in names}
    scales = {name: torch.ones(layer.out_features) for name, layer in layers.items()}
    factors = {
        name: (torch.randn_like(layer.lora_B.default.weight), torch.randn_like(layer.lora_A.default.weight))
        for name, layer in layers.items()
    }
    batches = [collate(FORGET, pad_token_id=0)]
    call = {
        "initialize_lora_fila_weights": partial(
            loku.initialize_lora_fila_weights, model, batches, batches, progress=False
        ),
        "initialize_from_row_scales": partial(initialize_from_row_scales, model, scales),
        "initialize_from_factors": partial(initialize_from_factors, model, factors),
    }[name]
    owner, function, _, after = UNLEARN[stage]
    at = {"measuring the forget set": 5, "writing the residual": 3}.get(stage, 1)
    before, configs = facts(model), dict(model.peft_config)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        Fault(patched, (owner, function, at, after), MemoryError)
        call()
    check(model, before, RESTORED[name, stage])
    assert model.peft_config == configs and model.active_adapters == ["default"]
    call()  # and it can be tried again
    base = restore_base_(model)
    assert all(
        before["weights"][f"base_model.model.{n}.base_layer.weight"].equal(base.get_submodule(n).weight)
        for n in names
    )


def test_injection_that_peft_refuses_halfway(tmp_path):
    """peft has wrapped q_proj when it comes to the norm, which it cannot adapt."""
    model = given()
    before = facts(model)
    with pytest.raises(ValueError):
        run(model, tmp_path, target_modules=["q_proj", "input_layernorm"])
    check(model, before, FACTS)


def test_the_guide_shows_what_is_restored():
    lines = (ROOT / "docs/guide.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in table().splitlines() if line not in lines] == []
    shown = [line for line in lines if line.startswith(tuple(f"| {call} |" for call, _ in RESTORED))]
    assert len(shown) == len(RESTORED)


def table():
    """The table of docs/guide.md: what is restored after a failure, by the call and the stage."""
    rows = [
        [call, stage, *("yes" if name in restored else "no" for name in FACTS)]
        for (call, stage), restored in RESTORED.items()
    ]
    head = ["call", "fails while or at", *FACTS]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# After success

NARROW = {"bf16": {"bf16": True}, "compiled": {"torch_compile": True, "torch_compile_backend": "eager"}}
CHECKPOINTING = {
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "bf16": True,
    },
}
AFTER_SUCCESS = {"default": {}, **NARROW, **CHECKPOINTING}


@pytest.mark.parametrize("options", AFTER_SUCCESS.values(), ids=AFTER_SUCCESS)
def test_success_leaves_the_settings_of_the_model_as_they_were(options, tmp_path):
    model = given()
    model.config.pad_token_id = None
    names = {module: name for name, module in model.named_modules()}
    before, attributes = facts(model), {m: set(vars(m)) - {"peft_config"} for m in names}
    result = run(model, tmp_path, **{"gradient_checkpointing": False, **options})
    for module, name in names.items():
        assert module.training == before["mode"][name], name
        assert set(vars(module)) - {"peft_config"} == attributes[module], name
        hooks = {kind: list(vars(module)[kind].items()) for n, kind in before["hooks"] if n == name}
        assert all(hooks[kind] == before["hooks"][name, kind] for kind in hooks), name
        assert getattr(module, "gradient_checkpointing", None) == before["gradient checkpointing"].get(name)
    assert model.config.to_dict() == before["config"]
    assert model.generation_config.to_dict() == before["generation config"]
    assert not {"forward", "_is_accelerate_prepared", "_is_torch_compile"} & set(vars(result.model))


@pytest.mark.parametrize("mode", [True, False])
def test_adapters_have_the_mode_of_what_they_wrap(mode, tmp_path):
    model = given().train(mode)
    model.model.layers[1].mlp.train(not mode)
    result = run(model, tmp_path).model
    for name, module in result.named_modules():
        assert module.training == (mode if ".layers.1.mlp" not in name else not mode), name


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_trainer_puts_the_settings_back_after_success(tuning, tmp_path):
    model = given() if tuning == "full" else get_peft_model(given(), lora())
    before = facts(model)
    options = {"method": "npo", "bf16": True, "gradient_checkpointing": True}
    trainer = loku.UnlearnTrainer(model, arguments(tmp_path, **options), FORGET, RETAIN)
    check(model, before, FACTS)
    for _ in range(2):
        trainer.train()
        check(model, before, ALL_BUT_WEIGHTS)


def test_the_second_train_of_a_trainer_multiplies_in_bfloat16_too(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            seen.append("forward" in vars(model))

    model = get_peft_model(given(), lora())
    trainer = loku.UnlearnTrainer(model, arguments(tmp_path, bf16=True), FORGET, RETAIN, callbacks=[Look()])
    trainer.train()
    trainer.train()
    assert seen == [True] * 4


@pytest.mark.parametrize("options", NARROW.values(), ids=NARROW)
def test_the_returned_model_computes_as_its_saved_adapter(options, tmp_path):
    result = run(given(), tmp_path, **options)
    result.save(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(given(), tmp_path / "saved")
    torch.testing.assert_close(logits(result.model), logits(loaded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_saved_model_has_the_given_config(tuning, tmp_path):
    """transformers' trainer switches use_cache off, and takes special tokens over from the tokenizer."""
    given().save_pretrained(tmp_path / "given")
    result = run(given(), tmp_path, tuning=tuning)
    result.save(tmp_path / "saved", "merged")
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "saved" / file).read_text() == (tmp_path / "given" / file).read_text()


def test_the_special_tokens_of_the_tokenizer_do_not_stay_in_the_configs(tmp_path):
    _, tokenizer = loku.demo.load_model()
    model = given()
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = 3
    before = facts(model)
    config = arguments(tmp_path, lora_rank=2)
    loku.unlearn(model, [{"text": "one two"}], [{"text": "three four"}], config=config, tokenizer=tokenizer)
    check(model, before, ["config", "generation config"])


# The context itself


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.numbers = [1, 2]
        self.config = LlamaConfig(vocab_size=5)


def test_a_block_that_ends_well_changes_what_it_changes():
    model = Owner()
    with all_or_nothing(model):
        model.inner = nn.Linear(2, 2)
        model.numbers.append(3)
    assert model.inner.out_features == 2 and model.numbers == [1, 2, 3]


def test_everything_comes_back():
    model = Owner()
    inner, weight, numbers, config = model.inner, model.inner.weight, model.numbers, model.config
    handle = inner.register_forward_hook(_no_change)

    class Other(nn.Linear):
        pass

    with pytest.raises(SystemExit), all_or_nothing(model):
        inner.__class__ = Other
        inner.forward = lambda x: x
        inner.register_forward_pre_hook(lambda module, args: None)
        inner.weight = nn.Parameter(torch.zeros(1))
        weight.requires_grad_(False)
        handle.remove()
        model.numbers.append(3)
        model.added = 1
        model.config.use_cache = False
        model.config.added = 1
        model.inner = nn.Identity()
        del model.numbers
        raise SystemExit
    assert model.inner is inner and type(inner) is nn.Linear and "forward" not in vars(inner)
    assert inner.weight is weight and weight.requires_grad
    assert list(inner._forward_hooks.values()) == [_no_change] and not inner._forward_pre_hooks
    assert model.numbers is numbers and numbers == [1, 2] and not hasattr(model, "added")
    assert model.config is config and config.use_cache is True and not hasattr(config, "added")
    handle.remove()  # the user's own handle still works
    assert not inner._forward_hooks


def test_weights_that_are_overwritten_or_replaced_come_back_if_they_are_kept():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    with pytest.raises(MemoryError), all_or_nothing(model, keep_weights=True):
        model.weight.data = torch.zeros(2, 2)
        model.bias.data.zero_()
        raise MemoryError
    assert model.weight.equal(before[0]) and model.bias.equal(before[1])


def test_a_replaced_parameter_is_not_kept_in_memory():
    import gc
    import weakref

    model = nn.Linear(2, 2)
    old = weakref.ref(model.weight)
    with pytest.raises(MemoryError), all_or_nothing(model):
        model.weight = nn.Parameter(torch.ones(2, 2))
        gc.collect()
        assert old() is None
        raise MemoryError
    assert model.weight.eq(1).all()


def test_second_unlearning_of_one_object_is_refused_and_harms_nothing(tmp_path):
    result = run(given(), tmp_path)
    unlearned = logits(result.model)
    with pytest.raises(ValueError, match="merge_and_unload"):
        run(result.model.get_base_model(), tmp_path / "second")
    assert logits(result.model).equal(unlearned)
    result.save(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(given(), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), unlearned, rtol=1e-4, atol=1e-4)
