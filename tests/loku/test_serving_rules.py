"""What each server can serve, by the configs and the names of tensors."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

from loku.serving import check_target, check_tensors, max_lora_rank
from loku.serving.rules import SERVERS, VLLM_RANKS, served_rank, tensor_names

LLAMA = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
PLAIN = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"]).to_dict()
ADAPTERS = ("vllm", "gguf", "ollama", "tgi")


@pytest.mark.parametrize("server", SERVERS)
def test_a_plain_adapter_of_a_llama_is_served_by_all(server):
    assert check_target(server, PLAIN, LLAMA) == []
    assert check_target(server, {}, LLAMA) == []


def test_a_server_that_is_not_known():
    with pytest.raises(ValueError, match="target must be one of"):
        check_target("triton", PLAIN, LLAMA)


@pytest.mark.parametrize("server", ADAPTERS)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "a bias beside B"),
        ("bias", "lora_only", "trains biases"),
        ("modules_to_save", ["lm_head"], "whole modules"),
        ("trainable_token_indices", [1, 2], "rows of the embedding"),
        ("target_parameters", ["experts.down_proj"], "tensor of experts"),
        ("layer_replication", [[0, 1]], "repeated layers"),
        ("init_lora_weights", "pissa", "changes the base"),
        ("init_lora_weights", "olora", "changes the base"),
        ("target_modules", ["q_proj", "embed_tokens"], "of an embedding"),
        ("target_modules", ["lm_head"], "of an embedding"),
        ("peft_type", "IA3", "IA3 adapter"),
    ],
)
def test_what_is_no_plain_lora_is_refused(server, field, value, message):
    problems = check_target(server, {**PLAIN, field: value}, LLAMA)
    assert any(message in problem for problem in problems)
    assert all("instead" in problem or "portable" in problem for problem in problems if "TGI" not in problem)
    assert check_target("merged", {**PLAIN, field: value}, LLAMA) == []


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_keeps_the_base_is_served(start):
    assert check_target("vllm", {**PLAIN, "init_lora_weights": start}, LLAMA) == []


@pytest.mark.parametrize(
    ("rank", "option"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (257, 320), (512, 512)]
)
def test_the_rank_that_vllm_is_started_with(rank, option):
    assert max_lora_rank(rank) == option
    assert check_target("vllm", {**PLAIN, "r": rank, "lora_alpha": rank}, LLAMA) == []


def test_vllm_has_no_greater_rank():
    assert VLLM_RANKS[-1] == 512
    with pytest.raises(ValueError, match="rank 512 at most, and this one has rank 513: export it"):
        max_lora_rank(513)
    assert "rank 513" in check_target("vllm", {}, LLAMA, 513)[0]
    assert "rank 513" in check_target("vllm", {**PLAIN, "rank_pattern": {"q_proj": 513}}, LLAMA)[0]


def test_the_greatest_rank_of_a_module():
    assert served_rank({"r": 8, "rank_pattern": {"q_proj": 24, "v_proj": 4}}) == 24
    assert served_rank({"r": 8, "rank_pattern": None}) == 8
    assert served_rank({}) is None


def test_scalings_that_differ_are_refused_for_vllm():
    # As loku saves a sum: alpha is the rank everywhere, so earlier versions are right without the patterns.
    even = {"r": 8, "lora_alpha": 8, "rank_pattern": {"^q": 16}, "alpha_pattern": {"^q": 16}}
    assert check_target("vllm", even, LLAMA) == []
    for uneven in (
        {**even, "alpha_pattern": {}},
        {**even, "lora_alpha": 16},
        {**even, "use_rslora": True},
        {**even, "rank_pattern": {}},
    ):
        assert "scales its modules differently" in check_target("vllm", uneven, LLAMA)[0]
        assert check_target("gguf", uneven, LLAMA) == []  # the writer multiplies them into B


def test_classes_that_a_server_does_not_have():
    gpt2 = {"architectures": ["GPT2LMHeadModel"]}
    assert "GPT2LMHeadModel without adapters" in check_target("vllm", {}, gpt2)[0]
    assert check_target("gguf", {}, gpt2) == []
    phi = {"architectures": ["PhiForCausalLM"]}
    assert check_target("vllm", {}, phi) == []
    (problem,) = check_target("ollama", {}, phi)
    assert "not for PhiForCausalLM" in problem and "python convert_lora_to_gguf.py ADAPTER" in problem
    assert "without architectures" in check_target("gguf", {}, {})[0]


def test_a_scaling_of_zero_is_refused_for_gguf():
    assert "lora_alpha is 0" in check_target("gguf", {**PLAIN, "lora_alpha": 0}, LLAMA)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "c_fc"]}, "leaves the adapters of c_fc out"),
        ({"rank_pattern": {"q_proj": 32}}, "one rank and one scaling"),
        ({"alpha_pattern": {"q_proj": 32}}, "one rank and one scaling"),
        ({"layers_to_transform": [1]}, "every layer"),
        ({"r": 12}, "TGI pads rank 12"),
    ],
)
def test_what_tgi_would_leave_out(changes, message):
    assert message in check_target("tgi", {**PLAIN, **changes}, LLAMA)[0]


@pytest.mark.parametrize("rank", [8, 16, 32, 48])
def test_ranks_that_tgi_does_not_pad(rank):
    assert check_target("tgi", {**PLAIN, "r": rank}, LLAMA) == []


def names_of(tmp_path, **options):
    peft_model = get_peft_model(tiny_model("llama"), LoraConfig(r=8, **options))
    peft_model.save_pretrained(tmp_path)
    return tensor_names(tmp_path)


def test_the_names_of_tensors_are_those_in_the_file(tmp_path):
    names = names_of(tmp_path, target_modules=["q_proj"])
    assert names == [
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{letter}.weight"
        for layer in range(2)
        for letter in "AB"
    ]
    assert all(check_tensors(server, names, LLAMA) == [] for server in SERVERS)


def test_a_layer_without_an_adapter_is_refused_for_tgi(tmp_path):
    names = names_of(tmp_path, target_modules=["q_proj"], layers_to_transform=[1])
    assert check_tensors("vllm", names, LLAMA) == []
    assert "all q_proj out, for layer 0 has none" in check_tensors("tgi", names, LLAMA)[0]


def test_tensors_that_are_no_factors_of_a_linear_are_refused(tmp_path):
    names = names_of(tmp_path, target_modules=["q_proj", "embed_tokens"])
    for server in ADAPTERS:
        assert "model.embed_tokens.base_layer.weight" in check_tensors(server, names, LLAMA)[0]
    assert "2 modules out, the first model.embed_tokens" in check_tensors("tgi", names, LLAMA)[1]


@pytest.mark.parametrize("content", [b"", b"12345678{", b"\xff" * 20], ids=["empty", "short", "no_header"])
def test_a_file_that_is_no_safetensors(tmp_path, content):
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is no safetensors file"):
        tensor_names(tmp_path)


def test_the_rules_take_a_config_as_it_is_in_its_file(tmp_path):
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert check_target("vllm", saved, LLAMA) == check_target("vllm", config.to_dict(), LLAMA) == []
