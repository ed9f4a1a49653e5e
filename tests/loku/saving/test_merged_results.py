"""What is trained on a model with a merged adapter is saved for the untouched base, or refused."""

import pytest
import torch
from fila_models import assert_close, logits, make_base, train
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import loku
from loku.saving.kinds import save

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")
ROWS = [{"input_ids": [3 + i, 5, 7 + 2 * i, 11, 13 + i]} for i in range(4)]


@pytest.fixture
def original(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def config(tmp_path, **options):
    defaults = {"lora_rank": 4, "learning_rate": 1e-2, "max_steps": 2}
    options = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, **options}
    return loku.UnlearnConfig(**{**defaults, **options})


def unlearn(model, tmp_path, *, save_kind="portable", **options):
    model = str(model) if isinstance(model, type(tmp_path)) else model
    run = config(tmp_path, **options)
    return loku.unlearn(model, ROWS[:2], ROWS[2:], config=run, save_kind=save_kind)


def adapter_folder(original, tmp_path, options):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(original), options)
    train(model)
    model.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


@pytest.mark.parametrize("first", ["fila", "default"])
@pytest.mark.parametrize("second", ["fila", "default"])
def test_a_merged_result_is_unlearned_further(first, second, original, tmp_path):
    merged = unlearn(original, tmp_path, init=first).model.merge_and_unload()
    given = logits(merged)
    result = unlearn(merged, tmp_path, init=second)
    expected = logits(result.model)
    assert (expected - given).abs().max() > 1e-3 * expected.abs().max()
    result.save(tmp_path / "portable")
    result.model.save_pretrained(tmp_path / "peft")
    for path in (tmp_path / "portable", tmp_path / "peft"):
        assert_close(logits(AutoModelForCausalLM.from_pretrained(path)), expected, 1e-5)
        assert_close(logits(PeftModel.from_pretrained(make_base("llama"), path)), expected, 1e-5)


def test_the_reference_merged_is_the_original(original, tmp_path):
    model = unlearn(original, tmp_path).model
    base = model.merge_and_unload(adapter_names=["reference"])
    assert_close(logits(base), logits(make_base("llama")), 1e-5)
    unlearn(base, tmp_path).save(tmp_path / "portable")


@pytest.mark.parametrize("init", ["fila", "default"])
def test_weights_that_changed_after_a_merge_are_noticed(init, original, tmp_path):
    merged = unlearn(original, tmp_path, init="default").model.merge_and_unload()
    merged.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match=r'its weights were changed after.*save_kind="merged"'):
        unlearn(merged, tmp_path, init=init)
    result = unlearn(merged, tmp_path, init=init, save_kind="merged")
    result.save(tmp_path / "merged", "merged")
    assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(result.model), 1e-5
    )


def test_a_trainer_on_an_adapter_folder_saves_for_the_untouched_base(original, tmp_path):
    lora = LoraConfig(r=3, target_modules=["q_proj", "up_proj"])
    given = adapter_folder(original, tmp_path, lora)
    options = {"save_strategy": "steps", "save_steps": 1}
    run = config(tmp_path, **options)
    trainer = loku.UnlearnTrainer(str(given), run, ROWS[:2], ROWS[2:], peft_config=lora)
    trainer.train()
    expected = logits(trainer.model)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.model.save_pretrained(tmp_path / "peft")
    for path in (tmp_path / "saved", tmp_path / "peft", tmp_path / "run" / "checkpoint-2"):
        assert_close(logits(AutoModelForCausalLM.from_pretrained(path)), expected, 1e-5)


@pytest.mark.parametrize("init", ["fila", "default"])
def test_checkpoints_of_what_has_no_portable_adapter(init, original, tmp_path):
    given = adapter_folder(original, tmp_path, LoKrConfig(r=2, target_modules=["q_proj"]))
    options = {"init": init, "save_kind": "merged", "save_strategy": "steps", "save_steps": 1}
    whole = unlearn(given, tmp_path, **options)
    assert not (tmp_path / "run" / "checkpoint-1" / "adapter_config.json").exists()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    resumed = unlearn(given, tmp_path, resume_from_checkpoint=checkpoint, **options)
    assert torch.equal(logits(resumed.model), logits(whole.model))


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_a_residual_save_after_an_initialisation_of_peft(init, tmp_path):
    """peft would repeat the initialisation on the residual when it loads the adapter."""
    model = get_peft_model(make_base("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=init))
    train(model)
    expected = logits(model)
    save(model, tmp_path, "residual")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected, 1e-5)


def test_a_random_initialisation_of_the_base_has_no_portable_adapter(tmp_path):
    """peft would draw another one when it loads the adapter."""
    options = {"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_2"}
    model = get_peft_model(make_base("llama"), LoraConfig(**options))
    with pytest.raises(ValueError, match=r"peft cannot repeat it.*\"residual\" or \"merged\""):
        save(model, tmp_path / "portable")
    save(model, tmp_path / "merged", "merged")
