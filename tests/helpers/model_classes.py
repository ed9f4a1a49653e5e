"""A tiny random model of each class of causal LM, and what one run of it shows."""

import copy
import inspect
import warnings

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 61

# Configs name one size in many ways. A config takes those that it knows.
SIZES = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the width
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "attention_hidden_size": 32,
    "lru_width": 32,
    # the MLP
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    # the depth
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    # the heads
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "head_dim": 8,
    "rotary_dim": 8,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    # the context
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "context_length": 64,
    "sliding_window": 16,
    # multi-head latent attention
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # state spaces
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    # others
    "dim_model_base": 16,
}
MLA = {"head_dim": None, "num_key_value_heads": 4}

# The settings of a class beside SIZES; None takes a name out of SIZES.
SETTINGS = {
    "axk1": {**MLA},
    "axk2": {**MLA},
    "deepseek_v2": {**MLA},
    "deepseek_v3": {**MLA},
    "deepseek_v32": {**MLA},
    "glm4_moe_lite": {**MLA},
    "glm_moe_dsa": {**MLA},
    "longcat_flash": {**MLA},
    "minicpm3": {**MLA},
    "youtu": {**MLA},
    "cohere": {"logit_scale": 0.5},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 2.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "nanochat": {"final_logit_softcapping": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "xlstm": {"output_logit_soft_cap": 3.0},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"final_logit_softcapping": 3.0, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
}


def tiny_config(kind):
    """Make the config of a model type, with the sizes above."""
    config_class = CONFIG_MAPPING[kind]
    names = set(inspect.signature(config_class.__init__).parameters)
    names |= set(getattr(config_class, "__dataclass_fields__", ()))
    aliases = set(getattr(config_class, "attribute_map", ()))
    sizes = {name: size for name, size in SIZES.items() if name in names and name not in aliases}
    sizes |= copy.deepcopy(SETTINGS.get(kind, {}))
    return config_class(**{name: size for name, size in sizes.items() if size is not None})


def make_model(kind):
    """Make a fresh copy of the class's model, the same each time, in evaluation mode.

    Its matrices are larger than transformers makes them, so that every layer changes the predictions.
    """
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and parameter.is_floating_point() and "conv" not in name:
                nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    return model
