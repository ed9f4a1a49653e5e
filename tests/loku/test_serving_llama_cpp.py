"""llama.cpp gives the logits of the adapter on its base; skipped where llama-cpp-python is not installed."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from loku.serving.gguf_adapter import write_gguf_adapter

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is built from C++")
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

VOCABULARY, HEADS, KEY_HEADS = 97, 4, 2
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_base(model, path):
    """A Llama as GGUF, with made-up tokens."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(3, VOCABULARY))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in NAMES:
            place = NAMES[module]
        else:
            _, _, layer, part = module.split(".", 3)
            place = f"blk.{layer}.{NAMES[part]}"
        for part, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
            if module.endswith(part):
                half = len(value) // heads // 2
                order = [
                    h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in (0, 1)
                ]
                value = value[order]
        writer.add_tensor(f"{place}.weight", value.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def served(base, row, **options):
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llama = llama_cpp.Llama(
        str(base), n_ctx=128, n_threads=1, logits_all=True, verbose=False, **cache, **options
    )
    llama.eval(row)
    logits = np.array(llama.scores[: len(row)])
    llama.close()
    return torch.tensor(logits)


def test_the_logits_of_base_and_adapter(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        architectures=["LlamaForCausalLM"],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    config.save_pretrained(tmp_path / "base")
    write_base(model, tmp_path / "base.gguf")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3)
    peft_model.save_pretrained(tmp_path / "adapter")
    write_gguf_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter.gguf")
    row = list(range(3, 90, 5))
    with torch.no_grad():
        expected = peft_model(torch.tensor([row])).logits[0]
        with peft_model.disable_adapter():
            before = peft_model(torch.tensor([row])).logits[0]
    size = expected.abs().max()
    assert (expected - before).abs().max() > 0.1 * size
    base = tmp_path / "base.gguf"
    torch.testing.assert_close(served(base, row) / size, before / size, atol=1e-4, rtol=0)
    with_adapter = served(base, row, lora_path=str(tmp_path / "adapter.gguf"))
    torch.testing.assert_close(with_adapter / size, expected / size, atol=1e-4, rtol=0)
