"""The modules and parameters that get an adapter: sweeps of many classes, names, expressions, exclusions."""

import argparse
import ast
import re
import warnings
from importlib.metadata import version

import pytest
import torch
from fila_models import make_base
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import loku
from loku import UnlearnConfig, UnlearnTrainer
from loku.commands.settings import add_fields, joined
from loku.target_modules import check_lora_config, choose_targets, default_target_modules
from loku.text_decoder import check_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

LLAMA = ["down_proj", "gate_proj", "q_proj", "up_proj", "v_proj"]
NO_GATE = ["down_proj", "q_proj", "up_proj", "v_proj"]
MLA = ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"]
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
# peft takes these names for experts. So their linears are adapted as parameters.
SHARED = ["down_proj.weight", *EXPERTS, "gate_proj.weight", "up_proj.weight"]
NEOX = ["dense_4h_to_h", "dense_h_to_4h", "query_key_value"]

# The names and parameters of the default sweep, by transformers' model type.
DEFAULT_TARGETS = {
    "arcee": (NO_GATE, []),
    "aria_text": (LLAMA, EXPERTS),
    "bamba": (LLAMA, []),
    "biogpt": (["fc1", "fc2", "q_proj", "v_proj"], []),
    "bloom": (NEOX, []),
    "ctrl": (["Wq", "Wv", "ffn.0", "ffn.2"], []),
    "deepseek_v3": (MLA, SHARED),
    "falcon": (NEOX, []),
    "falcon_h1": (LLAMA, []),
    "falcon_mamba": (["in_proj"], []),
    "gemma3": (  # its vision tower has q_proj and v_proj, too
        [
            *("down_proj", "gate_proj", "up_proj"),
            *(f"language_model.layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("q_proj", "v_proj")),
        ],
        [],
    ),
    "gemma3_text": (LLAMA, []),
    "glm4": (["down_proj", "gate_up_proj", "q_proj", "v_proj"], []),
    "glm4_moe": (["q_proj", "v_proj"], SHARED),
    "gpt2": (["c_attn", "c_fc", "mlp.c_proj"], []),
    "gpt_bigcode": (["c_attn", "c_fc", "mlp.c_proj"], []),
    "gpt_neo": (["c_fc", "c_proj", "q_proj", "v_proj"], []),
    "gpt_neox": (NEOX, []),
    "gpt_oss": (["q_proj", "v_proj"], EXPERTS),
    "gptj": (["fc_in", "fc_out", "q_proj", "v_proj"], []),
    "granitemoe": (["q_proj", "v_proj"], EXPERTS),
    "granitemoehybrid": (["input_linear", "output_linear", "q_proj", "v_proj"], EXPERTS),
    "jamba": (LLAMA, EXPERTS),
    "jetmoe": (["kv_proj"], ["input_linear.weight", "mlp.output_linear.weight"]),
    "lfm2": (["q_proj", "v_proj", "w1", "w2", "w3"], []),
    "llama4_text": (LLAMA, EXPERTS),
    "mamba": (["in_proj"], []),
    "minicpm3": ([*LLAMA[:2], *MLA, "up_proj"], []),
    "minimax": (["q_proj", "qkv_proj", "v_proj"], EXPERTS),
    "mixtral": (["q_proj", "v_proj"], EXPERTS),
    "modernbert-decoder": (["Wi", "mlp.Wo", "q_proj", "v_proj"], []),
    "moshi": (["fc1", "fc2", "q_proj.linear", "v_proj.linear"], []),
    "mpt": (["Wqkv", "down_proj", "up_proj"], []),
    "nemotron_h": (NO_GATE, ["experts.down_proj", "experts.up_proj"]),
    "olmoe": (["q_proj", "v_proj"], EXPERTS),
    "opt": (["fc1", "fc2", "q_proj", "v_proj"], []),
    "persimmon": (NEOX, []),
    "phi": (["fc1", "fc2", "q_proj", "v_proj"], []),
    "phi3": (["down_proj", "gate_up_proj", "qkv_proj"], []),
    "phimoe": (["q_proj", "v_proj"], EXPERTS),
    "qwen2_moe": (LLAMA, EXPERTS),
    "qwen3_moe": (["q_proj", "v_proj"], EXPERTS),
    "qwen3_next": (["q_proj", "v_proj"], SHARED),
    "recurrent_gemma": (LLAMA, []),
    "rwkv": (["feed_forward.key", "receptance", "value"], []),
    "starcoder2": (["c_fc", "c_proj", "q_proj", "v_proj"], []),
    "xlstm": (["proj_down", "proj_up", "proj_up_gate", "q", "v"], []),
}
SETTINGS: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"n_layers": 2, "attn_config": {"kv_n_heads": 8, "rope_theta": 1e4}},
    "deepseek_v3": {"num_hidden_layers": 2, "first_k_dense_replace": 1},
    "gemma3": {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 3}},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 8},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "minimax": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {"num_hidden_layers": 10},
    "qwen3_next": {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
}
# Linears beside attention that the default leaves without an adapter, and the names that adapt some of them.
LEFT = {
    "bamba": ("mamba.in_proj, mamba.out_proj", "in_proj"),
    "falcon_h1": ("mamba.in_proj, mamba.out_proj", "in_proj"),
    "falcon_mamba": ("mixer.x_proj, mixer.dt_proj, mixer.out_proj", None),
    "granitemoehybrid": ("mamba.in_proj, mamba.out_proj", "in_proj"),
    "jamba": ("mamba.in_proj, mamba.x_proj, mamba.dt_proj, mamba.out_proj", "x_proj"),
    "lfm2": ("conv.in_proj, conv.out_proj", "conv.out_proj"),
    "mamba": ("mixer.x_proj, mixer.dt_proj, mixer.out_proj", None),
    "nemotron_h": ("mixer.in_proj, mixer.out_proj", "in_proj"),
    "qwen3_next": ("linear_attn.in_proj_qkvz, linear_attn.in_proj_ba, linear_attn.out_proj", "in_proj_ba"),
    "recurrent_gemma": (
        "temporal_block.linear_y, temporal_block.linear_x, temporal_block.linear_out",
        "linear_x",
    ),
}


def on_meta(kind):
    """A model of two layers or so without memory for its weights."""
    config = CONFIG_MAPPING[kind](**SETTINGS.get(kind, {"num_hidden_layers": 2}))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapted(model, targets):
    """The names of what peft adapts with these targets: modules, and parameters."""
    peft_model = get_peft_model(model, LoraConfig(r=2, **targets.lora_arguments()))
    layers = {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    wrapped = {n: m.parameter_name for n, m in layers.items() if hasattr(m, "parameter_name")}
    parameters = {f"{name.replace('.base_layer', '')}.{leaf}" for name, leaf in wrapped.items()}
    return layers.keys() - wrapped.keys(), parameters


@pytest.mark.parametrize("kind", DEFAULT_TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_defaults_of_a_class(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {version('transformers')} has no {kind}")
    names, parameters = DEFAULT_TARGETS[kind]
    model = on_meta(kind)
    every_parameter = [name for name, _ in model.named_parameters()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        targets = choose_targets(model)
    assert (targets.names, targets.parameters) == (sorted(names), sorted(parameters))
    messages = [str(warning.message) for warning in caught if "without an adapter" in str(warning.message)]
    left, name = LEFT.get(kind, (None, None))
    assert len(messages) == (left is not None)
    if left is not None:
        assert f"without an adapter: {left}" in messages[0]
        assert (
            name is None
            or name in choose_targets(model, ast.literal_eval(messages[0].split("target_modules=")[-1])).names
        )
    modules, wrapped = adapted(model, targets)
    assert modules == set(targets.modules)
    assert wrapped == {n for n in every_parameter if any(n.endswith("." + p) for p in parameters)}


@pytest.mark.parametrize("kind", ["gpt_neo", "llama", "phi"])
def test_sweeps(kind):
    keys_and_outputs, mlp = {
        "gpt_neo": (["k_proj", "out_proj"], ["c_fc", "c_proj"]),
        "llama": (["k_proj", "o_proj"], ["down_proj", "gate_proj", "up_proj"]),
        "phi": (["dense", "k_proj"], ["fc1", "fc2"]),
    }[kind]
    model = make_base(kind)
    assert default_target_modules(model, "qv") == ["q_proj", "v_proj"]
    assert default_target_modules(model, "qkvo") == sorted(["q_proj", "v_proj", *keys_and_outputs])
    assert default_target_modules(model, "ffn") == mlp
    assert default_target_modules(model, "qv+ffn") == default_target_modules(model)
    assert default_target_modules(model, "all") == sorted(["q_proj", "v_proj", *keys_and_outputs, *mlp])


def test_longer_suffixes_where_names_collide():
    block = nn.ModuleDict(
        {
            "attn": nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "v_proj", "c_proj")}),
            "mlp": nn.ModuleDict({name: nn.Linear(4, 4) for name in ("c_fc", "c_proj")}),
        }
    )
    model = nn.ModuleDict({"h": nn.ModuleList([block])})
    targets = choose_targets(model)
    assert targets.names == ["c_fc", "mlp.c_proj", "q_proj", "v_proj"]
    assert adapted(model, targets)[0] == {
        f"h.0.{n}" for n in ("attn.q_proj", "attn.v_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_an_expression_where_a_full_name_ends_another():
    attention = {"0": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})}

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict(attention)
            self.vision_tower = nn.ModuleDict({"layers": nn.ModuleDict({**attention})})

    model = Wrapper()
    model.vision_tower.layers["0"] = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    targets = choose_targets(model, "q_proj")
    assert targets.names == re.escape("layers.0.q_proj")
    assert adapted(model, targets)[0] == {"layers.0.q_proj"}


def test_unknown_layouts_are_refused():
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(4, 4)})])})
    with pytest.raises(ValueError, match=r"no query projection .* pass target_modules=\[\.\.\.\] .*'mlp'"):
        choose_targets(model)
    with pytest.raises(ValueError, match=r"no MLP linear .*'in_proj'"):
        choose_targets(on_meta("mamba"), "ffn")
    dbrx = on_meta("dbrx")  # its forward reads the weights of its experts without a call
    with pytest.raises(ValueError, match=r"no MLP linear .*'Wqkv'"):
        choose_targets(dbrx)
    assert choose_targets(dbrx, "qv").names == ["Wqkv"]
    with pytest.raises(ValueError, match="would have no effect"):
        choose_targets(dbrx, ["Wqkv", "mlp.w1"])


LLAMA_7 = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("target_modules", "exclude_modules", "names"),
    [
        ("q_proj", None, ["q_proj"]),
        ("self_attn.q_proj", None, ["q_proj"]),
        (["q_proj", "mlp.up_proj"], None, ["q_proj", "up_proj"]),
        ("model.layers.1.mlp.up_proj", None, ["layers.1.mlp.up_proj"]),
        (r".*\.(q|v)_proj", None, ["q_proj", "v_proj"]),
        (r".*layers\.0.*q_proj", None, ["layers.0.self_attn.q_proj"]),
        ("all-linear", None, LLAMA_7),
        ("all", None, LLAMA_7),
        ("qv+ffn", ["down_proj", "v_proj"], ["gate_proj", "q_proj", "up_proj"]),
        ("all-linear", r".*self_attn.*", ["down_proj", "gate_proj", "up_proj"]),
        ("q_proj", "layers.0.self_attn.q_proj", ["layers.1.self_attn.q_proj"]),
    ],
)
def test_names_and_expressions(target_modules, exclude_modules, names):
    model = make_base("llama")
    targets = choose_targets(model, target_modules, exclude_modules)
    assert (targets.names, targets.parameters) == (names, [])
    peft_model = get_peft_model(model, LoraConfig(**targets.lora_arguments()))
    layers = {n for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert layers == set(targets.modules) != set()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["q_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["qv"], ["q_proj", "v_proj"]),
        (["all-linear"], LLAMA_7),
        (["all"], LLAMA_7),
        (["self_attn.k_proj"], ["k_proj"]),
        ([".*layers.0.*(q|v)_proj"], ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]),
    ],
)
def test_words_of_the_command_line(words, names):
    parser = argparse.ArgumentParser()
    fields = add_fields(parser, UnlearnConfig, "own", "common", ())
    options = parser.parse_args(["--target_modules", *words])
    config = UnlearnConfig(**joined(fields, options))
    assert choose_targets(make_base("llama"), config.target_modules).names == names


def test_experts_by_name_and_all_linear():
    mixtral, qwen = on_meta("mixtral"), on_meta("qwen2_moe")
    targets = choose_targets(mixtral, ["q_proj", "experts.down_proj"])
    assert (targets.names, targets.parameters) == (["q_proj"], ["experts.down_proj"])
    assert choose_targets(mixtral, "all-linear").parameters == EXPERTS
    assert choose_targets(qwen, "gate_proj").parameters == []
    targets = choose_targets(qwen, "all-linear", "experts.down_proj")
    assert targets.names == [*LLAMA_7[:-2], "shared_expert_gate", "up_proj", "v_proj"]
    assert targets.parameters == ["experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("kind", "target_modules", "message"),
    [
        (
            "llama",
            ["q_proj", "up_porj"],
            "'up_porj', which is no module of LlamaForCausalLM; did you mean 'up_proj'",
        ),
        ("llama", "up_porj", "'up_porj', which is no module .*did you mean 'up_proj'"),
        ("llama", "mlp.up_porj", "did you mean 'mlp.up_proj'"),
        ("llama", ".*up_porj", "regular expression that matches no module of LlamaForCausalLM"),
        ("llama", "q_proj,v_proj", "regular expression that matches no module"),
        ("llama", ["qv", "ffn"], "pass target_modules='ffn' alone"),
        ("llama", ["q_proj", ".*v_proj"], "in a list, which takes names"),
        ("llama", ["q_proj", "lm_head"], "lm_head, the output embedding of LlamaForCausalLM"),
        ("llama", ".*", "the output embedding of LlamaForCausalLM"),
        ("llama", "embed_tokens", "the input embedding of LlamaForCausalLM"),
        ("llama", ["q_proj", "input_layernorm"], "LlamaRMSNorm .*input_layernorm .* no linear"),
        ("llama", "self_attn", "no linear; its linears are .*'q_proj', 'k_proj'"),
        (
            "mixtral",
            ["q_proj", "gate_proj"],
            "'gate_proj', which is no module .* did you mean 'gate_up_proj'",
        ),
        ("gemma3", "fc1", "rows of text do not reach it: the linears of its text decoder are"),
        ("gemma3", "vision_tower", "rows of text|no linear"),
        ("falcon_h1", ["q_proj", "out_proj"], r"would have no effect.* exclude_modules=\['out_proj'\]"),
        ("jamba", "dt_proj", "would have no effect"),
    ],
)
def test_what_matches_nothing_is_refused_by_name(kind, target_modules, message):
    model = make_base("llama") if kind == "llama" else on_meta(kind)
    with pytest.raises(ValueError, match=message):
        choose_targets(model, target_modules)


def test_exclusions_that_match_nothing_are_refused():
    model = make_base("llama")
    with pytest.raises(ValueError, match=r"exclude_modules has 'k_proj', which matches none of the targets"):
        choose_targets(model, "qv+ffn", ["k_proj"])
    with pytest.raises(ValueError, match="leaves no target of target_modules='q_proj'"):
        choose_targets(model, "q_proj", "q_proj")


@pytest.mark.parametrize("target_modules", [[1], {"a": 1}, 5, [""]])
def test_forms_that_are_refused(target_modules, tmp_path):
    with pytest.raises(ValueError, match="target_modules must be a text or a list of names"):
        UnlearnConfig(str(tmp_path), target_modules=target_modules)
    with pytest.raises(ValueError, match=r"exclude_modules='\(' is no regular expression"):
        UnlearnConfig(str(tmp_path), exclude_modules="(")


def test_trainer_checks_each_name_of_a_config():
    model = make_base("llama")
    check_lora_config(model, LoraConfig(target_modules=["q_proj", "lm_head"]))
    check_lora_config(model, LoraConfig(target_modules=".*q_proj"))
    with pytest.raises(ValueError, match=r"'up_porj'.* did you mean 'up_proj'"):
        check_lora_config(model, LoraConfig(target_modules=["q_proj", "up_porj"]))


SMALL = {"vocab_size": 50, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}


def test_encoders_are_refused_before_anything_is_touched(tmp_path):
    bert = BertConfig(**SMALL, intermediate_size=16)
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    rows = [{"input_ids": [1, 2, 3]}]
    config = UnlearnConfig(str(tmp_path))
    for model, message in [
        (T5ForConditionalGeneration(t5), "T5ForConditionalGeneration is an encoder-decoder"),
        (BertLMHeadModel(bert), "BertLMHeadModel see later tokens.* is_decoder=True"),
        (BertForMaskedLM(bert), "BertForMaskedLM see later tokens"),
    ]:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            loku.unlearn(model, rows, rows, config=config)
        with pytest.raises(ValueError, match=message):
            UnlearnTrainer(model, config, rows, rows)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
        assert all(parameter.requires_grad for parameter in model.parameters())
    decoder = BertLMHeadModel(BertConfig(**SMALL, intermediate_size=16, is_decoder=True))
    check_causal_lm(decoder)
    assert choose_targets(decoder).names == ["intermediate.dense", "layer.0.output.dense", "query", "value"]
