"""Generation against brute force: neither the batch nor the model's own settings count."""

import numpy as np
import pytest
import torch
import transformers
from naive_measures import EOS, naive_greedy
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, WatermarkingConfig

from loku.evaluation import extraction_likelihood, generate_greedy
from loku.evaluation.generation import eos_ids, generate_sampled

PROMPTS, LENGTHS = [[5, 6], [7, 8, 9, 10, 11, 12], [3], [20, 4, 19]], [9, 5, 12, 0]
LEAKS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [*range(2, 20)],
    "begin_suppress_tokens": [*range(2, 20)],
    "bad_words_ids": [[i] for i in range(2, 20)],
    "sequence_bias": [[[7], 100.0]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "min_length": 40,
    "min_new_tokens": 9,
    "exponential_decay_length_penalty": (1, 50.0),
    "stop_strings": ["a"],
    "max_time": 1e-9,
    "guidance_scale": 30.0,
    "watermarking_config": WatermarkingConfig(bias=50.0),
    "num_beams": 3,
    "num_return_sequences": 2,
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 3,
    "return_dict_in_generate": True,
    "max_length": 3,
    "cache_implementation": "static",
    "prompt_lookup_num_tokens": 2,
    "use_cache": False,
    "eos_token_id": [*range(2, 20)],
    "a_setting_of_custom_code": 3,
}


@pytest.fixture
def with_config(model):
    """Put a generation config on the model for one test."""
    own = model.generation_config

    def put(config):
        model.generation_config = config
        return model

    yield put
    model.generation_config = own


def test_greedy_generation_does_not_depend_on_the_batch(model):
    expected = [naive_greedy(model, p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]
    for batch_size in (1, 4):
        assert generate_greedy(model, PROMPTS, LENGTHS, batch_size, progress=False) == expected


@pytest.mark.parametrize("setting", LEAKS)
def test_the_models_generation_config_does_not_count(with_config, setting):
    config = GenerationConfig(eos_token_id=EOS)
    setattr(config, setting, LEAKS[setting])
    model = with_config(config)
    expected = [naive_greedy(model, p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]
    new = generate_greedy(model, PROMPTS, LENGTHS, 4, eos_token_id=EOS, progress=False)
    assert new == expected
    assert model.generation_config is config and getattr(config, setting) == LEAKS[setting]


def test_eos_is_the_models_own_or_the_given_one_or_none(with_config):
    model = with_config(GenerationConfig(eos_token_id=[*range(2, 23)]))
    assert eos_ids(model) == [*range(2, 23)]
    assert [len(new) for new in generate_greedy(model, PROMPTS, LENGTHS, progress=False)] == [1, 1, 1, 0]
    new = generate_greedy(model, PROMPTS, LENGTHS, eos_token_id=[], progress=False)
    assert [len(tokens) for tokens in new] == LENGTHS  # the model's own EOS does not pad them


def test_the_generation_config_of_a_peft_wrapper_does_not_count():
    model = tiny_model("llama").double()
    expected = generate_greedy(model, PROMPTS, LENGTHS, progress=False)
    own = model.generation_config
    wrapper = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    wrapper.generation_config = config = GenerationConfig(eos_token_id=2, suppress_tokens=[*range(3, 60)])
    assert generate_greedy(wrapper, PROMPTS, LENGTHS, progress=False) == expected
    assert wrapper.generation_config is config and model.generation_config is own


def test_the_generation_config_comes_back_after_an_error(with_config, monkeypatch):
    config = GenerationConfig(eos_token_id=EOS, top_k=3)
    model = with_config(config)

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(KeyboardInterrupt):
        generate_greedy(model, PROMPTS, LENGTHS, progress=False)
    assert model.generation_config is config


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])  # gpt_neo has a table of positions
def test_greedy_generation_ends_with_the_context(kind):
    """The room for new tokens depends on the prompt's own width, not on its neighbours in the batch."""
    model = tiny_model(kind).double()
    context = model.config.max_position_embeddings
    prompts = [
        [3 + i % 90 for i in range(width)] for width in (14, 60, context - 3, context - 40, context, 5)
    ]
    alone = [generate_greedy(model, [p], [80], eos_token_id=[], progress=False)[0] for p in prompts]
    assert [len(new) for new in alone] == [80, context - 60, 3, 40, 0, 80]
    together = generate_greedy(model, prompts, [80] * 6, batch_size=6, eos_token_id=[], progress=False)
    assert together == alone


COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"num_attention_heads": 4, "intermediate_size": 48}
RECURRENT = {
    "Rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "RecurrentGemma": {**ATTENTION, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "Bamba": {
        **ATTENTION,
        **{"num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
        **{"mamba_d_state": 8, "mamba_chunk_size": 16},
    },
    "Bloom": {"n_head": 4},  # a padded row has NaN in float64
}


@pytest.mark.parametrize("name", RECURRENT)
def test_no_model_depends_on_the_batch(name):
    """RecurrentGemma reads the padding; RWKV mixes the rows of a batch, even of prompts of one length."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **RECURRENT[name]})
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(6)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in (3, 11, 5, 3)]
    alone, together = (
        generate_greedy(model, prompts, [7] * 4, batch_size, [], progress=False) for batch_size in (1, 4)
    )
    assert together == alone and len({*alone[0], *alone[1]}) > 1
    if name != "RecurrentGemma":
        return
    rows = [{"input_ids": ids, "labels": ids} for ids in prompts]
    few, many = (
        extraction_likelihood(model, rows, 2, batch_size=batch_size, progress=False) for batch_size in (1, 4)
    )
    assert few == many


def test_batches_of_attention_models_stay_large(model, monkeypatch):
    """Only a model that reads its padding needs prompts of one length in a batch."""
    sizes = []
    generate = model.generate

    def counted(**kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", counted)
    generate_greedy(model, [[5] * n for n in range(1, 9)], [4] * 8, 8, progress=False)
    assert sizes == [1, 2, 8]  # alone and together in a probe, then all


def test_nan_logits_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="logits have a NaN after prompt"):
        generate_greedy(model, PROMPTS, LENGTHS, progress=False)


@torch.no_grad()
def naive_sample(model, ids, length, numbers, temperature, top_p):
    """Sample by the inverse of the cumulative distribution, one token at a time."""
    new = []
    while len(new) < length and EOS not in new:
        p = (model(torch.tensor([ids + new])).logits[0, -1] / temperature).softmax(-1).tolist()
        nucleus, mass = [], 0.0
        for token in sorted(range(len(p)), key=lambda i: -p[i]):
            if mass >= top_p:
                break
            nucleus.append(token)
            mass += p[token]
        left = numbers[len(new)] * mass
        for token in nucleus:
            left -= p[token]
            if left < 0:
                break
        new.append(token)
    return new


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (3.0, 0.5)])
def test_samples_follow_from_their_keys_alone(model, temperature, top_p):
    keys = [(0, 1), (0, 2), (0, 1), (7,)]
    expected = [
        naive_sample(model, p, n, np.random.default_rng(list(key)).random(n), temperature, top_p)
        for p, n, key in zip(PROMPTS, LENGTHS, keys, strict=True)
    ]
    state = torch.get_rng_state()
    for batch_size in (1, 4):
        found = generate_sampled(
            model,
            PROMPTS,
            LENGTHS,
            keys,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            progress=False,
        )
        assert found == expected, batch_size
    assert torch.equal(torch.get_rng_state(), state)
    assert expected[0] != naive_greedy(model, PROMPTS[0], LENGTHS[0])


def test_samples_have_the_frequencies_of_the_distribution(model):
    count = 2000
    found = generate_sampled(
        model, [[5, 6]] * count, [1] * count, [(3, i) for i in range(count)], batch_size=500, progress=False
    )
    with torch.no_grad():
        p = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(found)[:, 0], minlength=len(p)).double() / count
    assert (counts - p).abs().max() < 4 * 0.5 / count**0.5


def test_a_nucleus_of_nothing_is_greedy(model):
    found = generate_sampled(model, PROMPTS, LENGTHS, [(1,)] * 4, top_p=1e-9, progress=False)
    assert found == [naive_greedy(model, p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]


def test_bad_sampling_is_refused():
    model = tiny_model("llama")
    for arguments, words in (({"temperature": 0}, "temperature"), ({"top_p": 1.5}, "top_p")):
        with pytest.raises(ValueError, match=words):
            generate_sampled(model, PROMPTS, LENGTHS, [(1,)] * 4, **arguments)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="sampling: the model's logits have a NaN after prompt"):
        generate_sampled(model, PROMPTS, LENGTHS, [(1,)] * 4, progress=False)
