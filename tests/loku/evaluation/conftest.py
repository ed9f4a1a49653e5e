"""A small model and rows that it partly knows, for the tests of measures."""

import pytest
import torch
from naive_measures import EOS, VOCAB, naive_greedy
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model():
    """A random model in float64, so that batching and caching change no argmax."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def rows(model):
    """Rows that the model partly knows: its continuations, in which every seventh token is replaced."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index, length in enumerate([24, 9, 17, 30, 12, 4]):
        ids = torch.randint(2, VOCAB, (3 + index,), generator=generator).tolist()
        start = len(ids)
        while len(ids) < start + length:
            ids += naive_greedy(model, ids, 1)
            if len(ids) % 7 == 0 or ids[-1] == EOS:
                ids[-1] = int(torch.randint(2, VOCAB, (), generator=generator))
        labels = ids if index == 3 else [-100] * start + ids[start:]  # row 3 is a text without a prompt
        made.append({"input_ids": ids, "labels": labels})
    made[0]["labels"][12:14] = [-100, -100]  # a hole, as between two turns of a dialogue
    made[1]["input_ids"][-1] = made[1]["labels"][-1] = EOS
    # The last row holds an EOS that the model predicts, as packed texts do. Generation ends there.
    starts = ([a, b] for a in range(2, VOCAB) for b in range(2, VOCAB))
    ids = next(s + new for s in starts if EOS in (new := naive_greedy(model, s, 8)) and len(new) > 4)
    for _ in range(8):
        ids = ids + naive_greedy(model, ids, 1)
    made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made
