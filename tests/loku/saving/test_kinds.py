"""Every kind of save is right for every layer that trains, or is refused before training."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from fila_models import assert_close, logits, train
from peft import LoraConfig, PeftModel, get_peft_model
from saved_models import EXPERTS, make_base, make_peft, perturb
from torch import nn
from transformers import AutoModelForCausalLM

import loku
from loku.adapter_folders import MERGED_ADAPTER
from loku.fila.initialize import initialize_from_row_scales
from loku.fila.targets import fila_targets
from loku.saving.kinds import KINDS, PlaceOfSave, check_save, save

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def loaded(path, kind, base):
    if kind == "merged":
        return AutoModelForCausalLM.from_pretrained(path)
    if kind == "residual":
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(path / "base"), path / "adapter"
        )
    return PeftModel.from_pretrained(base, path)


def assert_every_kind_is_right(model, make, tmp_path, tolerance=1e-5):
    expected = logits(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert (expected - logits(make())).abs().max() > 1e-2 * expected.abs().max()
    for kind in KINDS:
        check_save(model, kind)
        save(model, tmp_path / kind, kind)
        assert_close(logits(loaded(tmp_path / kind, kind, make())), expected, tolerance)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "kind, options",
    [
        ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),  # Conv1D
        ("gpt_neox", {"target_modules": ["query_key_value"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("tied", {"target_modules": ["lm_head", "q_proj"]}),
        ("tied", {"target_modules": ["lm_head", "embed_tokens"]}),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ("gpt_neox", {"target_modules": ["dense"], "bias": "lora_only"}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        ("mixtral", {"target_modules": [], "target_parameters": EXPERTS[:1], "use_rslora": True}),
        (
            "mixtral",
            {
                "target_modules": ["q_proj", "gate"],
                "target_parameters": EXPERTS,
                "rank_pattern": {"gate_up_proj": 2, "layers.1.*q_proj": 3},
                "alpha_pattern": {"down_proj": 20},
            },
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*(tie|rank_pattern|alpha_pattern|embedding)")
def test_default_lora(kind, options, tmp_path):
    model = perturb(make_peft(kind, **options))
    assert_every_kind_is_right(model, lambda: make_base(kind), tmp_path)


def fila_on(model, chosen):
    """What FILA leaves on some of the modules, beside default LoRA on the others: one adapter."""
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if chosen(name)}
    reference = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(layers),
        rank_pattern=model.peft_config["default"].rank_pattern,
        use_rslora=model.peft_config["default"].use_rslora,
        init_lora_weights=False,
    )
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        delta = layer.get_delta_weight("default")
        layer.get_base_layer().weight.data -= delta
    model.add_adapter("reference", reference)
    for layer in layers.values():
        for letter in ("lora_A", "lora_B"):
            getattr(layer, letter)["reference"].weight.data.copy_(getattr(layer, letter)["default"].weight)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS},
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": EXPERTS,
            "use_rslora": True,
            "rank_pattern": {"gate_up_proj": 2, "v_proj": 3},
        },
        {"target_modules": ["q_proj", "v_proj", "embed_tokens", "gate"]},
    ],
    ids=["experts", "patterns", "embedding"],
)
@pytest.mark.filterwarnings("ignore:.*(rank_pattern|embedding)")
def test_fila_on_the_attention_beside_default_lora(options, tmp_path):
    model = make_peft("mixtral", **options)
    model = perturb(fila_on(model, lambda name: name.endswith("q_proj")))
    assert_every_kind_is_right(model, lambda: make_base("mixtral"), tmp_path)
    config = loaded(tmp_path / "portable", "portable", make_base("mixtral")).peft_config["default"]
    ranks = {config.r, *config.rank_pattern.values()}
    assert {8, 4} <= ranks or {8, 3} <= ranks


def test_fila_on_experts_is_a_difference_too(tmp_path):
    """The layout of the factors of experts: A (E r, k), B (d, r E)."""
    model = make_peft("mixtral", target_modules=[], target_parameters=EXPERTS)
    for layer in model.modules():
        if hasattr(layer, "parameter_name"):
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
            parameter = getattr(layer.get_base_layer(), layer.parameter_name)
            parameter.data -= layer.get_delta_weight("default")
    try:
        model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
    except ValueError as error:
        pytest.skip(f"this version of peft: {error}")
    for layer in model.modules():
        if hasattr(layer, "parameter_name"):
            for factor in (layer.lora_A, layer.lora_B):
                factor["reference"].weight.data.copy_(factor["default"].weight)
    assert_every_kind_is_right(perturb(model), lambda: make_base("mixtral"), tmp_path)


@pytest.mark.parametrize("init", ["fila", "default"])
def test_the_adapter_that_was_given_reaches_the_portable_save(init, tmp_path):
    """``loku.unlearn`` merges a given adapter. The untouched base is the model under it."""
    given = perturb(make_peft("llama", target_modules=["q_proj", "up_proj"], r=3))
    factors = {
        name: (
            layer.scaling["default"] * layer.lora_B["default"].weight.detach().clone(),
            layer.lora_A["default"].weight.detach().clone(),
        )
        for name, layer in given.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    base = given.merge_and_unload()
    merged = {"base_model_name_or_path": "the/original", "factors": factors}
    setattr(base, MERGED_ADAPTER, merged)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    )
    if init == "fila":
        scales = {name: torch.rand(layer.out_features) for name, layer in fila_targets(model).items()}
        initialize_from_row_scales(model, scales)
    train(model)
    expected = logits(model)
    assert_every_kind_is_right(model, lambda: make_base("llama"), tmp_path)
    portable = loaded(tmp_path / "portable", "portable", make_base("llama"))
    assert portable.peft_config["default"].base_model_name_or_path == "the/original"
    model.save_pretrained(tmp_path / "again") if init == "fila" else None
    if init == "fila":
        assert_close(logits(loaded(tmp_path / "again", "portable", make_base("llama"))), expected, 1e-5)

    setattr(base, MERGED_ADAPTER, {**merged, "factors": None})
    with pytest.raises(ValueError, match=r'was an adapter that is no plain LoRA.*save_kind="merged"'):
        check_save(model, "portable")
    check_save(model, "merged")


ROWS = [{"input_ids": [3 + i, 5, 7 + 2 * i, 11, 13 + i]} for i in range(4)]


def test_unlearn_asks_before_it_trains(tmp_path, monkeypatch):
    """A kind that cannot be saved is refused before a Fisher is measured or a step is taken."""

    def unlearn(kind, model, **options):
        config = loku.UnlearnConfig(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, **options
        )
        return loku.unlearn(model, ROWS, ROWS[::-1], config=config, save_kind=kind)

    def never(*args, **kwargs):
        raise AssertionError("it was trained")

    base = make_base("llama")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    setattr(base, MERGED_ADAPTER, {"base_model_name_or_path": "original", "factors": None})
    monkeypatch.setattr(loku.unlearning, "initialize_lora_fila_weights", never)
    monkeypatch.setattr(loku.unlearning.UnlearnTrainer, "train", never)
    with pytest.raises(ValueError, match='choose the kind of save "merged"'):
        unlearn("portable", base)
    with pytest.raises(ValueError, match=r"kind must be one of \['portable', 'residual', 'merged'\]"):
        unlearn("gguf", base)
    after = base.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    monkeypatch.undo()
    result = unlearn("merged", base, init="default")
    result.save(tmp_path / "merged", "merged")
    with pytest.raises(ValueError, match='choose the kind of save "merged"'):
        result.save(tmp_path / "portable")


def test_what_no_merged_model_can_hold_is_refused(tmp_path):
    base = make_base("llama")
    first, second = (layer.self_attn for layer in base.model.layers)
    second.q_proj.weight = first.q_proj.weight
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    check_save(model, "portable")
    for refused in (lambda: check_save(model, "merged"), lambda: save(model, tmp_path, "merged")):
        with pytest.raises(ValueError, match=r"q_proj\.weight is shared with .*save the portable adapter"):
            refused()
    bias = make_peft("gpt_neox", target_modules=["dense"], lora_bias=True)
    with pytest.raises(ValueError, match=r"dense: its adapter is LoRA with a bias.*merge_and_unload"):
        check_save(bias, "merged")
    tokens = make_peft("llama", target_modules=["q_proj"], trainable_token_indices=[3, 5])
    with pytest.raises(ValueError, match="TrainableTokensWrapper is merged by peft's merge_and_unload"):
        check_save(tokens, "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("init", ["fila", "default"])
def test_a_residual_save_is_unlearned_further(init, tmp_path):
    """Its adapter is merged into the residual. The portable adapter is for the model before both runs."""
    make_base("llama").save_pretrained(tmp_path / "original")

    def unlearn(model, init):
        options = {"lora_rank": 4, "learning_rate": 1e-2, "max_steps": 2}
        config = loku.UnlearnConfig(
            output_dir=str(tmp_path / "run"), init=init, use_cpu=True, disable_tqdm=True, **options
        )
        return loku.unlearn(str(model), ROWS, ROWS[::-1], config=config)

    unlearn(tmp_path / "original", init).save(tmp_path / "first", "residual")
    second = unlearn(tmp_path / "first", "fila")
    second.save(tmp_path / "second")
    expected = logits(second.model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")  # on the base that it names
    assert_close(logits(again), expected, 1e-5)
    if init == "fila":
        assert_close(logits(loaded(tmp_path / "second", "portable", make_base("llama"))), expected, 1e-5)
        with pytest.raises(ValueError, match="is a residual, and the initial factors are not loaded"):
            unlearn(tmp_path / "first" / "base", "default")


@pytest.mark.parametrize("kind", ["residual", "merged"])
def test_a_rank_is_that_of_a_portable_adapter(kind, tmp_path):
    model = make_peft("llama", target_modules=["q_proj"])
    for refused in (check_save, lambda *args: save(model, tmp_path / "new", kind, rank=2)):
        with pytest.raises(ValueError, match=f"rank is that of a portable adapter.*'{kind}'"):
            refused(model, kind, 2)
    with pytest.raises(ValueError, match="has no adapter"):
        check_save(make_base("llama"), "portable", 2)
    with pytest.raises(ValueError, match="has no adapter"):
        save(make_base("llama"), tmp_path / "new", rank=2)
    with pytest.raises(ValueError, match="rank must be an integer >= 1, got 0"):
        save(model, tmp_path / "new", rank=0)
    assert list(tmp_path.iterdir()) == []


def test_the_place_of_a_save_refuses_an_adapter_that_cannot_have_the_rank(tmp_path):
    arguments = SimpleNamespace(init="default")
    plain = make_peft("llama", target_modules=["q_proj"])
    PlaceOfSave(tmp_path / "new", "portable", 2).on_init_end(arguments, None, None, model=plain)
    dora = make_peft("llama", target_modules=["q_proj"], use_dora=True)
    PlaceOfSave(tmp_path / "new", "portable").on_init_end(arguments, None, None, model=dora)
    with pytest.raises(ValueError, match="use_dora is not compressed"):
        PlaceOfSave(tmp_path / "new", "portable", 2).on_init_end(arguments, None, None, model=dora)


def test_a_result_is_saved_at_a_rank(tmp_path):
    model = perturb(make_peft("llama", target_modules=["q_proj", "v_proj"]))
    result = loku.UnlearnResult(model, [])
    assert result.save(tmp_path / "exact") is None
    lost = result.save(tmp_path / "small", rank=2)
    assert (lost.rank, lost.exact_rank) == (2, 4) and 0 < lost.relative_error < 1
    facts = json.loads((tmp_path / "small" / "loku_save.json").read_text())
    assert (facts["kind"], facts["rank"], facts["exact_rank"]) == ("portable", "2", "4")
    assert float(facts["relative_error"]) == pytest.approx(lost.relative_error, rel=1e-3)
    assert loaded(tmp_path / "small", "portable", make_base("llama")).peft_config["default"].r == 2
    save(model, tmp_path / "small")  # it makes way
    assert "rank" not in json.loads((tmp_path / "small" / "loku_save.json").read_text())
