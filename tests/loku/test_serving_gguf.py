"""LoRA adapters as GGUF: names, order of rows, scaling, and what is refused."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from loku.adapters import REFERENCE_ADAPTER
from loku.serving.gguf_adapter import check_gguf_adapter, write_gguf_adapter
from loku.serving.rules import GGUF_ARCHITECTURES

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
HEADS = {"q_proj": 4, "k_proj": 2}


def model_of(kind):
    if kind == "gpt2":
        config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)
    else:
        classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
        config = classes[kind](
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    return AutoModelForCausalLM.from_config(config)


def saved(tmp_path, kind="llama", **options):
    """A random adapter and the config of its base, in folders; and the peft model."""
    targets = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else LINEARS
    options = {"r": 4, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": kind == "gpt2"} | options
    peft_model = get_peft_model(model_of(kind), LoraConfig(**options))
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_()
    peft_model.save_pretrained(tmp_path / "adapter")
    config = peft_model.get_base_model().config
    config.architectures = [type(peft_model.get_base_model()).__name__]
    config.save_pretrained(tmp_path / "base")
    return peft_model


def written(tmp_path):
    write_gguf_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    return reader, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def by_pairs(weight, heads):
    """The rows of a query or key weight of Llama in llama.cpp's order, one by one."""
    half = len(weight) // heads // 2
    rows = []
    for head in range(heads):
        for pair in range(half):
            rows += [weight[head * 2 * half + pair], weight[head * 2 * half + half + pair]]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj|c_fc": 2}, "alpha_pattern": {"o_proj|c_attn": 20}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_tensors_are_the_change_of_the_weights_in_gguf(tmp_path, kind, options):
    peft_model = saved(tmp_path, kind, **options)
    reader, tensors = written(tmp_path)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    layers = {
        name: module
        for name, module in peft_model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    assert len(tensors) == 2 * len(layers) > 0
    for name, layer in layers.items():
        number, module = name.split(".", 3)[2:]
        A, B = (tensors[f"blk.{number}.{NAMES[module]}.weight.lora_{letter}"] for letter in "ab")
        change = layer.get_delta_weight("default").detach()
        change = change.T if kind == "gpt2" else change  # GGUF has the rows of outputs, Conv1D the columns
        last = module.rsplit(".", 1)[-1]
        if kind in ("llama", "mistral") and last in HEADS:
            change = by_pairs(change, HEADS[last])
        assert A.dtype == B.dtype == torch.float32
        torch.testing.assert_close(alpha / B.shape[1] * (B @ A), change)


def test_factors_with_the_scaling_of_the_file_are_not_touched(tmp_path):
    peft_model = saved(tmp_path)
    _, tensors = written(tmp_path)
    layer = peft_model.get_base_model().model.layers[1].mlp.up_proj
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_a"], layer.lora_A["default"].weight)
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_b"], layer.lora_B["default"].weight)


def test_the_facts_that_llama_cpp_reads(tmp_path):
    saved(tmp_path)
    facts = write_gguf_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter.gguf")
    assert facts == {"architecture": "llama", "modules": 14, "rank": 4, "alpha": 6.0}
    reader, _ = written(tmp_path)
    fields = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    saved(tmp_path)
    contents = []
    for _ in range(2):
        write_gguf_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter.gguf")
        contents.append((tmp_path / "adapter.gguf").read_bytes())
    assert contents[0] == contents[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.gguf", "base"]


def test_a_bfloat16_adapter_is_written_exactly(tmp_path):
    peft_model = saved(tmp_path)
    peft_model.to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    _, tensors = written(tmp_path)
    weight = peft_model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight
    assert torch.equal(tensors["blk.0.ffn_up.weight.lora_b"], weight.float())


def refused(tmp_path, message, error=ValueError):
    for function in (
        lambda: check_gguf_adapter(tmp_path / "adapter", tmp_path / "base"),
        lambda: write_gguf_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter.gguf"),
    ):
        with pytest.raises(error, match=message):
            function()
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "of an embedding"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"bias": "lora_only"}, "trains biases"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_more_than_plain_lora_is_refused(tmp_path, options, message):
    saved(tmp_path, **options)
    refused(tmp_path, f"cannot be written as GGUF: .*{message}")


def test_another_class_is_refused_with_the_line_of_llama_cpp(tmp_path):
    saved(tmp_path)
    assert "PhiForCausalLM" not in GGUF_ARCHITECTURES
    tiny_model("phi").save_pretrained(tmp_path / "base")
    refused(
        tmp_path, "not for PhiForCausalLM: convert the adapter by llama.cpp's own line, python convert_lora"
    )


def test_an_adapter_of_another_base_is_refused(tmp_path):
    saved(tmp_path)
    config = model_of("gpt2").config
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "base")
    refused(tmp_path, "model.layers.0.mlp.gate_proj, which llama.cpp's gpt2 has not")


def test_a_residual_save_is_refused(tmp_path):
    saved(tmp_path)
    for name in (REFERENCE_ADAPTER, "base"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "loku_save.json").write_text(
        json.dumps({"kind": "residual", "untouched": "org/base", "files": {"base/config.json": "0"}}),
        encoding="utf-8",
    )
    refused(tmp_path, "stands for the residual base beside it")


def test_a_base_without_a_config(tmp_path):
    saved(tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    refused(tmp_path, "has no config.json")
    (tmp_path / "base" / "config.json").write_text("[]")
    refused(tmp_path, "is not the config of a model")


def test_heads_that_do_not_divide_the_rows(tmp_path):
    saved(tmp_path)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": 3}))
    with pytest.raises(ValueError, match="16 rows of B do not divide into 3 heads"):
        write_gguf_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_without_gguf_the_line_that_installs_it_is_named(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path, r"pip install \"loku-kernels\[gguf\]\"", ImportError)
