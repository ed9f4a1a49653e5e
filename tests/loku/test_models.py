"""Models are loaded, unwrapped, and evaluated without a trace."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import nn

from loku import UnlearnConfig, demo
from loku.models import evaluating, keep_differentiable_, load_model, model_device, unwrapped
from loku.trust import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mixed():
    """A model in training mode with one module in evaluation mode."""
    model = tiny_model("llama").train()
    model.model.layers[0].mlp.eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_evaluating_restores_every_mode(mixed):
    before = modes(mixed)
    assert True in before and False in before
    with evaluating(mixed):
        assert not any(modes(mixed)) and not torch.is_grad_enabled()
        assert not mixed(torch.arange(3, 9)[None]).logits.requires_grad
    assert modes(mixed) == before and torch.is_grad_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_evaluating_restores_every_mode_after_an_exception(mixed, error):
    before = modes(mixed)
    with pytest.raises(error, match="inside"), evaluating(mixed):
        mixed.model.layers[1].train()
        raise error("inside")
    assert modes(mixed) == before and torch.is_grad_enabled()


def test_evaluating_inside_evaluating(mixed):
    before = modes(mixed)
    with evaluating(mixed):
        with evaluating(mixed.model):
            pass
        assert not any(modes(mixed)) and not torch.is_grad_enabled()
    assert modes(mixed) == before


def test_caches_that_grow_in_evaluation_can_train(mixed):
    """In inference mode the cache would be an inference tensor, which autograd refuses."""

    class Cached(nn.Module):
        cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.ones(3)
            return (x * self.cache).sum()

    model, x = Cached(), torch.ones(3, requires_grad=True)
    with evaluating(model):
        model(x)
    model(x).backward()
    assert x.grad.eq(1).all()


def test_unwrapped():
    model = tiny_model("llama")
    assert unwrapped(model) is model
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert unwrapped(adapted) is model
    wrapper = nn.Module()
    wrapper.module = adapted  # the attribute of DistributedDataParallel
    assert unwrapped(wrapper) is model
    model.module = "a text is no wrapped model"
    assert unwrapped(model) is model


def test_model_device():
    assert model_device(tiny_model("llama")) == torch.device("cpu")
    assert model_device(nn.Linear(2, 3, device="meta")) == torch.device("meta")


def test_load_model(tmp_path):
    model = tiny_model("llama")
    assert load_model(model) is model
    model.save_pretrained(tmp_path / "model")
    with_dtype = UnlearnConfig(str(tmp_path), model_init_kwargs={"dtype": "bfloat16"})
    for path, expected in ((str(tmp_path / "model"), torch.bfloat16), (tmp_path / "model", torch.bfloat16)):
        loaded = load_model(path, with_dtype.init_arguments())
        assert loaded.dtype == expected and torch.equal(
            loaded.lm_head.weight, model.lm_head.weight.bfloat16()
        )
    with pytest.raises(ValueError, match="by its path or name"):
        load_model(model, with_dtype.init_arguments())


def test_keep_differentiable_unpacks_quantised_layers_alone():
    """A stand-in for bitsandbytes' layer, whose state_dict has the side effect of unpacking."""

    class Packed(nn.Linear):
        support_avx512bf16_for_cpu, unpacked = True, 0

        def state_dict(self, *args, **kwargs):
            self.unpacked += 1
            return super().state_dict(*args, **kwargs)

    class Unpacked(Packed):
        support_avx512bf16_for_cpu = False

    model = nn.Sequential(Packed(2, 3), nn.Linear(3, 3), Unpacked(3, 2))
    keep_differentiable_(model)
    assert model[0].unpacked == 1 and model[0].support_avx512bf16_for_cpu is False
    assert model[2].unpacked == 0
    keep_differentiable_(model)
    assert model[0].unpacked == 1


def changed(**fields):
    return lambda config: json.dumps({**config, **fields})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(("config.json", text) for text in ("null", "3", "[" * 10**5, '{"model_type": ' * 10**4)),
        ("config.json", changed(model_type=["llama"])),
        ("config.json", changed(model_type="x" * 10**5)),
        ("config.json", changed(auto_map={"AutoConfig": 3})),
        ("config.json", changed(num_attention_heads=0)),
        ("config.json", changed(hidden_size="x")),
        ("config.json", changed(dtype="__class__")),
        ("config.json", changed(intermediate_size=12)),
        ("generation_config.json", "[" * 10**5),
        *(("model.safetensors", text) for text in ("", "\x10" + "\0" * 7 + "{", "\0" * 100)),
    ],
)
def test_hostile_files_get_one_error_that_names_the_model(file, text, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / file).write_text(text if isinstance(text, str) else text(config))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} cannot be loaded: ")) as error:
        load_model(tmp_path)
    assert len(str(error.value)) < 1000


def test_a_model_without_some_of_its_weights_is_refused(tmp_path):
    """transformers would draw them at random, and the command does not show its report."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(changed(num_hidden_layers=layers + 1)(config))
    with pytest.raises(ValueError, match=rf"lack 9 weights .* the first model.layers.{layers}\."):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(("tokenizer_config.json", text) for text in ("[]", "[", "[" * 10**5, "")),
        *(("tokenizer.json", text) for text in ("[]", "[", "[" * 10**5, "")),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": []}}'),
        ("tokenizer_config.json", '{"auto_map": 3}'),
    ],
)
def test_hostile_files_of_a_tokenizer(file, text, tmp_path):
    demo.load_model()[1].save_pretrained(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} cannot be loaded: ")):
        load_tokenizer(tmp_path)
