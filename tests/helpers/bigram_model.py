"""A Llama whose next token depends on the last token alone, by a given table."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def bigram_model(follower, vocab, eos=None, context=256):
    """Make a Llama in float64 that predicts ``follower[token]`` after a token, and token 0 after others.

    The attention and the MLP add nothing, so the hidden state of a position is that of its token.
    """
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=4 * vocab,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=eos,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab, 4 * vocab, dtype=torch.float64))
        model.lm_head.weight.zero_()
        for token in range(vocab):
            model.lm_head.weight[follower.get(token, 0), token] = 1.0
    return model
