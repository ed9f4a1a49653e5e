"""An adapter that is given as the model is merged into its base and unlearned from there."""

import json
import logging
import shutil

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from small_trainers import FORGET, RETAIN, arguments, lora
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import loku
from loku.adapter_folders import load_on_base
from loku.commands.evaluate import _load
from loku.data import collate, infer_tokenizer
from loku.demo import EMBEDDED
from loku.models import load_model
from loku.saving.models import save_merged_model, save_residual_model

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model):
    with torch.no_grad():
        return model.eval()(**collate(FORGET, pad_token_id=0)).logits


def trained(model, config, scale=0.3):
    """Put an adapter into a model, and change every trained tensor of it."""
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return peft_model


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def sft(base, tmp_path):
    """The folder of an SFT adapter, and the logits of the model that it stands for."""
    peft_model = trained(load(base), lora())
    peft_model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft", logits(peft_model)


def assert_close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_an_adapter_is_merged(sft, base, caplog):
    folder, expected = sft
    assert (logits(load(base)) - expected).abs().max() > 0.1 * expected.abs().max()
    with caplog.at_level(logging.WARNING, "loku"):
        model = load_model(folder)
    assert f"{folder} is an adapter: it was merged into its base {base}" in caplog.text
    assert_close(logits(model), expected)
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unlearning_begins_at_the_given_adapter(sft, tmp_path):
    """With the reference methods the first step compares the given model with itself."""
    folder, given = sft
    for options in ({}, {"init": "default"}, {"tuning": "full"}):
        config = arguments(tmp_path, learning_rate=1e-9, max_steps=1, **options)
        result = loku.unlearn(folder, FORGET, RETAIN, config=config)
        assert_close(logits(result.model), given)
    config = arguments(tmp_path, method="npo", beta=0.1, max_steps=1)
    history = loku.unlearn(folder, FORGET, RETAIN, config=config).history
    assert history[0]["forget_loss"] == pytest.approx(20 * torch.tensor(2.0).log().item(), rel=1e-4)


def test_what_was_merged_is_remembered(sft, base):
    folder, _ = sft
    model = load_model(folder)
    merged = model._loku_merged_adapter
    assert merged["base_model_name_or_path"] == str(base)
    original = load(base).state_dict()
    for name, (B, A) in merged["factors"].items():
        weight = model.get_submodule(name).weight
        assert B.dtype == A.dtype == torch.float32
        torch.testing.assert_close(original[f"{name}.weight"] + B @ A, weight, rtol=1e-5, atol=1e-6)
    assert len(merged["factors"]) == 4


def test_an_adapter_on_an_adapter(sft, base, tmp_path):
    """The factors of both are joined, of rank 2r where both have a module."""
    folder, _ = sft
    second = trained(load_model(folder), LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    second.peft_config["default"].base_model_name_or_path = str(folder)
    second.save_pretrained(tmp_path / "second")
    model = load_model(tmp_path / "second")
    assert_close(logits(model), logits(second))
    merged = model._loku_merged_adapter
    assert merged["base_model_name_or_path"] == str(base)
    original = load(base).state_dict()
    ranks = {}
    for name, (B, A) in merged["factors"].items():
        ranks[name.split(".")[-1]] = len(A)
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(original[f"{name}.weight"] + B @ A, weight, rtol=1e-5, atol=1e-5)
    assert ranks == {"q_proj": 7, "v_proj": 4, "up_proj": 3}


def test_our_own_saves_as_models(base, tmp_path):
    result = loku.unlearn(base, FORGET, RETAIN, config=arguments(tmp_path))
    unlearned = logits(result.model)
    result.save(tmp_path / "portable")
    save_residual_model(result.model, tmp_path / "residual")
    save_merged_model(result.model, tmp_path / "merged")
    shutil.copytree(tmp_path / "residual", tmp_path / "moved")
    shutil.rmtree(tmp_path / "residual")
    for folder in ("portable", "moved", "moved/adapter", "merged"):
        assert_close(logits(load_model(tmp_path / folder)), unlearned, 1e-4)
        second = loku.unlearn(str(tmp_path / folder), FORGET, RETAIN, config=arguments(tmp_path))
        assert (logits(second.model) - unlearned).abs().max() > 1e-3 * unlearned.abs().max()
        second.save(tmp_path / "second" / folder)
        named = PeftConfig.from_pretrained(tmp_path / "second" / folder).base_model_name_or_path
        assert named == str(tmp_path / "merged" if folder == "merged" else base)
        loaded = PeftModel.from_pretrained(load(named), tmp_path / "second" / folder)
        assert_close(logits(loaded), logits(second.model), 1e-4)


def test_the_tokenizer_lies_beside_the_adapter_or_the_base(sft, base):
    folder, _ = sft
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    with pytest.raises(ValueError, match=r"no tokenizer|only special tokens"):  # as transformers has it
        infer_tokenizer(load_model(folder))
    tokenizer.save_pretrained(base)
    assert infer_tokenizer(load_model(folder)).get_vocab() == tokenizer.get_vocab()
    tokenizer.add_tokens(["<sft>"])
    tokenizer.save_pretrained(folder)
    assert "<sft>" in infer_tokenizer(load_model(folder)).get_vocab()


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        lora(modules_to_save=["lm_head"]),
        lora(init_lora_weights="pissa"),
        LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["DoRA", "modules_to_save", "PiSSA", "embedding", "IA3"],
)
def test_other_adapters_are_merged_but_have_no_plain_factors(config, base, tmp_path):
    peft_model = trained(load(base), config)
    peft_model.save_pretrained(tmp_path / "other")
    model = load_model(tmp_path / "other")
    assert_close(logits(model), logits(peft_model), 1e-4)
    assert model._loku_merged_adapter["factors"] is None


def test_refusals(sft, base, tmp_path):
    folder, _ = sft

    def rewritten(name, **facts):
        shutil.copytree(folder, tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))
        return tmp_path / name

    with pytest.raises(ValueError, match="an adapter for '/not/there', which cannot be loaded"):
        load_model(rewritten("lost", base_model_name_or_path="/not/there"))
    with pytest.raises(ValueError, match="does not name its base"):
        load_model(rewritten("nameless", base_model_name_or_path=None))
    with pytest.raises(ValueError, match="names itself as its base"):
        load_model(rewritten("itself", base_model_name_or_path=str(tmp_path / "itself")))
    with pytest.raises(ValueError, match=r"does not fit its base .*: 4 of its tensors have no place"):
        load_model(rewritten("fewer", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"does not fit its base .*: 4 tensors that belong there"):
        load_model(rewritten("more", target_modules=["q_proj", "v_proj", "k_proj"]))
    both = rewritten("both")
    load(base).save_pretrained(both)
    with pytest.raises(ValueError, match=r"holds an adapter .* and the weights of a model"):
        load_model(both)
    prompts = get_peft_model(load(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompts_folder = tmp_path / "prompts"
    prompts.save_pretrained(prompts_folder)
    for refused in (lambda: load_model(prompts_folder), lambda: _load(str(base), str(prompts_folder), {})):
        with pytest.raises(ValueError, match=r"learnt tokens before each row: .*neither measured nor merged"):
            refused()
    prefix = get_peft_model(load(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prefix.save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match="cannot be merged"):
        load_model(tmp_path / "prefix")


def test_command_line(sft, base, tmp_path, capsys):
    from loku.cli import main

    folder, given = sft
    rows = [tmp_path / name for name in ("forget.jsonl", "retain.jsonl")]
    for file, sample in zip(rows, (FORGET, RETAIN), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in sample))
    command = ["unlearn", "--model", str(folder), "--forget", str(rows[0]), "--retain", str(rows[1])]
    options = ["--max_steps", "1", "--learning_rate", "1e-9", "--use_cpu", "--quiet", "--save", "merged"]
    main([*command, *options, "--output", str(tmp_path / "out")])
    assert_close(logits(load(tmp_path / "out")), given)
    main([*command, *options[:-1], "portable", "--output", str(tmp_path / "adapter")])
    assert f"AutoModelForCausalLM.from_pretrained({str(base)!r}), " in capsys.readouterr().out
    assert_close(logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter")), given)


def test_live_models_with_adapters_are_refused(sft, base, tmp_path):
    folder, given = sft
    injected = load(folder)  # by transformers, which makes no PeftModel
    assert not isinstance(injected, PeftModel)
    peft_model = PeftModel.from_pretrained(load(base), folder)
    cases = {
        "transformers put there: pass the adapter's folder": injected,
        "model is a PeftModel already; .*merge_and_unload": peft_model,
        "adapter of an earlier PeftModel.*merge_and_unload": peft_model.get_base_model(),
    }
    for message, model in cases.items():
        flags = [parameter.requires_grad for parameter in model.parameters()]
        for options in ({}, {"init": "default"}, {"tuning": "full"}):
            with pytest.raises(ValueError, match=message):
                loku.unlearn(model, FORGET, RETAIN, config=arguments(tmp_path, **options))
        with pytest.raises(ValueError, match=message):
            loku.UnlearnTrainer(model, arguments(tmp_path), FORGET, RETAIN, peft_config=lora())
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert_close(logits(model), given)
    merged = peft_model.merge_and_unload()
    result = loku.unlearn(merged, FORGET, RETAIN, config=arguments(tmp_path, learning_rate=1e-9))
    assert_close(logits(result.model), given)


# Safetensors alone


def pickled(folder, name="adapter_model"):
    """Turn the weights of a folder into a pickle."""
    torch.save(load_file(folder / f"{name}.safetensors"), folder / f"{name}.bin")
    (folder / f"{name}.safetensors").unlink()


def test_a_pickled_adapter_is_refused(sft, base, tmp_path):
    folder, expected = sft
    pickled(folder)
    message = r"has no adapter_model\.safetensors.*if you trust its adapter_model\.bin"
    with pytest.raises(ValueError, match=message):
        load_model(folder)
    with pytest.raises(ValueError, match=message):
        _load(str(base), str(folder), {})
    with pytest.raises(ValueError, match=message):
        _load(str(folder), None, {})
    # The user's own argument allows pickles, of the base as well.
    torch.save(load(base).state_dict(), base / "pytorch_model.bin")
    assert_close(logits(load_model(folder, {"use_safetensors": False})), expected)


def test_an_adapter_is_refused_before_its_base_is_loaded(sft, base, monkeypatch):
    folder, _ = sft
    (folder / "adapter_model.safetensors").unlink()
    monkeypatch.setattr("loku.adapter_folders.load_causal_lm", lambda *_: pytest.fail("base loaded"))
    monkeypatch.setattr("loku.models.load_causal_lm", lambda *_: pytest.fail("base loaded"))
    for loading in (lambda: load_on_base(str(folder), {}), lambda: _load(str(base), str(folder), {})):
        with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
            loading()


def test_a_pickled_adapter_on_the_hub_is_refused(sft, base, monkeypatch, tmp_path):
    """peft takes adapter_model.bin where a repository has no safetensors."""
    folder, _ = sft
    pickled(folder)
    asked = []

    def file_of_the_hub(place, name, **hub):
        asked.append((str(place), name, hub.get("revision")))
        return str(folder / name) if (folder / name).is_file() else None

    monkeypatch.setattr("transformers.utils.hub.cached_file", file_of_the_hub)
    monkeypatch.setattr("peft.config.hf_hub_download", lambda _, name, **hub: str(folder / name))
    with pytest.raises(ValueError, match=r"adapter org/sft has no adapter_model\.safetensors"):
        load_on_base("org/sft", {"revision": "v1"})
    assert asked == [("org/sft", "adapter_model.safetensors", "v1")]


def test_pickled_initial_factors_are_refused(base, tmp_path):
    result = loku.unlearn(base, FORGET, RETAIN, config=arguments(tmp_path))
    save_residual_model(result.model, tmp_path / "residual")
    load_model(tmp_path / "residual")
    pickled(tmp_path / "residual" / "reference")
    with pytest.raises(ValueError, match=r"reference has no adapter_model\.safetensors"):
        load_model(tmp_path / "residual")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"megatron_config": {"hidden_size": 2}, "megatron_core": "antigravity"}, "has megatron_config"),
        ({"peft_type": "XLORA", "adapters": {"0": "org/other"}, "hidden_size": 2}, "has adapters"),
        (
            {
                "peft_type": "MULTITASK_PROMPT_TUNING",
                "prompt_tuning_init": "EXACT_SOURCE_TASK",
                "prompt_tuning_init_state_dict_path": "other.bin",
                "num_virtual_tokens": 2,
            },
            "has prompt_tuning_init_state_dict_path",
        ),
        ({"target_modules": "("}, "cannot be loaded: .*unterminated"),
        ({"r": 3}, "cannot be loaded: its weights have other shapes"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path is"),
        ({"peft_type": "NONE"}, "is not the config of an adapter"),
        ({"peft_type": ["LORA"]}, "is not the config of an adapter"),
        ("[" * 10**5, "is not the config of an adapter"),
        ("[1, 2]", "is not the config of an adapter"),
        ("{", "is not the config of an adapter"),
        ("\udcff", "is not the config of an adapter"),
    ],
)
def test_hostile_adapter_configs(fields, message, sft, base):
    folder, _ = sft
    path = folder / "adapter_config.json"
    known = json.loads(path.read_text())
    text = fields if isinstance(fields, str) else json.dumps({**known, **fields})
    path.write_bytes(text.encode(errors="surrogateescape"))
    for loading in (lambda: load_model(folder), lambda: _load(str(base), str(folder), {})):
        with pytest.raises(ValueError, match=message) as error:
            loading()
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("how", ["subfolder", "variant", "shards"])
def test_safetensors_in_other_places(how, base, tmp_path):
    expected = logits(load(base))
    if how == "subfolder":  # transformers would follow the adapter in the folder above
        trained(load(base), lora()).save_pretrained(tmp_path / "folder")
        shutil.move(base, tmp_path / "folder" / "part")
        found = load_model(tmp_path / "folder", {"subfolder": "part"})
    elif how == "variant":
        load(base).save_pretrained(tmp_path / "folder", variant="fp16")
        found = load_model(tmp_path / "folder", {"variant": "fp16"})
    else:
        load(base).save_pretrained(tmp_path / "folder", max_shard_size="20KB")
        assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
        found = load_model(tmp_path / "folder")
    assert torch.equal(logits(found), expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_an_index_of_pickles_is_refused(variant, base, tmp_path):
    """transformers reads what the index names, by torch.load if it is no safetensors."""
    (base / "model.safetensors").rename(tmp_path / "moved.safetensors")
    tensors = load_file(tmp_path / "moved.safetensors")
    torch.save(tensors, base / "part.bin")
    index = base / (
        "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
    )
    names = dict.fromkeys(tensors, "part.bin")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    options = {} if variant is None else {"variant": variant}
    with pytest.raises(ValueError, match=r"names 'part\.bin' as a file of its weights"):
        load_model(base, options)
    for text in ("[" * 10**5, "{}", '{"weight_map": 3}', "{"):
        index.write_text(text)
        with pytest.raises(ValueError, match="is not the index of a model's weights"):
            load_model(base, options)


def test_a_config_that_names_a_pickle_is_refused(base):
    torch.save(load(base).state_dict(), base / "adapter_model.bin")
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ValueError, match=r"names 'adapter_model\.bin' as a file of its weights"):
        load_model(base)
