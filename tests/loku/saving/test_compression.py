"""The adapter of a smaller rank is the best one, and peft computes with it."""

import copy
import json
import math

import pytest
import torch
from fila_models import assert_close, initialized, logits, make_base, train
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from saved_models import EXPERTS, perturb
from saved_models import make_base as make_any_base
from saved_models import make_peft as make_any_peft

import loku
from loku.adapters import adapter_layers
from loku.saving.adapter import plain_adapter, portable_adapter
from loku.saving.compression import compressed_adapter, errors_by_rank

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

NAME = "base_model.model.layer"


def adapter_of(B, A, **options):
    """The config and tensors of an adapter of one linear module."""
    config = LoraConfig(**{"r": len(A), "lora_alpha": 3, "target_modules": ["layer"], **options})
    return config, {f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B}


def product(state):
    return state[f"{NAME}.lora_B.weight"].double() @ state[f"{NAME}.lora_A.weight"].double()


@given(
    d=st.integers(1, 24),
    k=st.integers(1, 24),
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    rslora=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_it_is_the_truncated_svd_of_the_formed_product(d, k, n, rank, rslora, seed):
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((d, n), (n, k)))
    config, state = adapter_of(B, A, use_rslora=rslora)
    scaling = 3 / (math.sqrt(n) if rslora else n)
    exact = scaling * B @ A
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    norm, tail = S.norm().item(), S[rank:].norm().item()

    new_config, new, lost = compressed_adapter(config, state, rank)
    (module,) = lost.modules.values()
    assert module.norm == pytest.approx(norm, rel=1e-12)
    assert module.error == pytest.approx(tail, rel=1e-12, abs=1e-13 * norm)
    assert lost.relative_error == pytest.approx(tail / norm, rel=1e-12, abs=1e-13)
    assert (module.exact_rank, module.rank) == (n, min(rank, n))
    assert errors_by_rank(config, state, [rank]) == [lost]

    kept = min(rank, n)
    assert (new_config.r, new_config.lora_alpha, new_config.use_rslora) == (kept, kept, False)
    if rank >= n:  # exact, with the scaling in B
        assert torch.equal(new[f"{NAME}.lora_A.weight"].float(), A.float())
        assert torch.equal(new[f"{NAME}.lora_B.weight"].float(), (scaling * B).float())
        return
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    # peft builds the factors by the rank of the config, also where d or k is smaller.
    shapes = {name.split(".")[-2]: tuple(tensor.shape) for name, tensor in new.items()}
    assert shapes == {"lora_A": (rank, k), "lora_B": (d, rank)}
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    stored = product(new)
    assert (stored - best).norm() <= 1e-6 * norm
    assert (stored - exact).norm() == pytest.approx(tail, rel=1e-6, abs=1e-6 * norm)
    B_new, A_new = new[f"{NAME}.lora_B.weight"], new[f"{NAME}.lora_A.weight"]
    assert torch.allclose(B_new.norm(dim=0), A_new.norm(dim=1), rtol=1e-5, atol=1e-6)  # balanced
    largest = B_new.gather(0, B_new.abs().argmax(dim=0, keepdim=True))
    assert (largest >= 0).all()  # the signs are fixed
    for _ in range(5):  # Eckart and Young: nothing of this rank is nearer
        other = torch.randn(d, rank, generator=generator, dtype=torch.float64)
        nearest = other @ torch.linalg.lstsq(other, exact).solution
        assert (nearest - exact).norm() >= tail * (1 - 1e-9)
        moved = product({key: value + 1e-3 * torch.randn_like(value) for key, value in new.items()})
        assert (moved - exact).norm() >= tail * (1 - 1e-9)


def test_equal_adapters_become_equal_bytes_and_noise_is_zero():
    B, A = torch.randn(9, 6), torch.randn(6, 7)
    A[3:] = A[:3]  # rank 3
    config, state = adapter_of(B, A)
    _, once, lost = compressed_adapter(config, state, 4)
    _, again, _ = compressed_adapter(config, copy.deepcopy(state), 4)
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert (once[f"{NAME}.lora_A.weight"][3] == 0).all() and (once[f"{NAME}.lora_B.weight"][:, 3] == 0).all()
    assert lost.relative_error <= 1e-15
    _, nothing, lost = compressed_adapter(*adapter_of(torch.zeros(9, 6), A), 2)
    assert lost.relative_error == 0 and not product(nothing).any() and math.isfinite(lost.worst[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 12, "q_proj": 3}},
    ],
    ids=["lora", "rslora", "patterns"],
)
def test_fila_saved_at_a_smaller_rank(options, tmp_path):
    model = initialized("llama", **options)
    train(model)
    before = logits(model)
    lost = loku.save_portable_adapter(model, tmp_path / "small", rank=5)
    assert torch.equal(logits(model), before)
    assert loku.save_portable_adapter(model, tmp_path / "exact") is None
    exact, small = (
        PeftModel.from_pretrained(make_base("llama"), tmp_path / name) for name in ("exact", "small")
    )
    layers = adapter_layers(small, "default")
    assert {scaling for layer in layers.values() for scaling in layer.scaling.values()} == {1.0}
    squares = []
    for name, layer in adapter_layers(exact, "default").items():
        delta, kept = (each.get_delta_weight("default").double() for each in (layer, layers[name]))
        S = torch.linalg.svdvals(delta)
        rank = min(5, layer.r["default"])
        assert layers[name].r["default"] == rank
        assert lost.modules[name].rank == rank and lost.modules[name].exact_rank == layer.r["default"]
        assert (delta - kept).norm() == pytest.approx(
            S[rank:].norm().item(), rel=1e-4, abs=1e-6 * S.norm().item()
        )
        assert lost.modules[name].relative_error == pytest.approx(
            (S[rank:].norm() / S.norm()).item(), rel=1e-4, abs=1e-6
        )
        squares.append((S[rank:].square().sum(), S.square().sum()))
    errors, norms = (sum(column).sqrt().item() for column in zip(*squares, strict=True))
    assert lost.relative_error == pytest.approx(errors / norms, rel=1e-4) and lost.relative_error > 0.01
    assert lost.worst[1] == max(module.relative_error for module in lost.modules.values())
    assert json.loads(json.dumps(lost.facts())) == lost.facts()
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and type(config["lora_alpha"]) is int


def test_a_rank_that_the_adapter_has_keeps_the_exact_bytes(tmp_path):
    model = initialized("llama")
    train(model)
    loku.save_portable_adapter(model, tmp_path / "exact")
    for rank in (8, 100):
        lost = loku.save_portable_adapter(model, tmp_path / str(rank), rank=rank)
        assert lost.relative_error == 0 and lost.exact_rank == 8
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / str(rank) / file).read_bytes() == (tmp_path / "exact" / file).read_bytes()


def test_the_sum_of_several_unlearnings_becomes_one_adapter_of_the_rank(tmp_path):
    """A second run on the adapter of the first: the sum of both, for the untouched base."""
    make_base("llama").save_pretrained(tmp_path / "base")
    model, ranks = tmp_path / "base", []
    for name, start in (("first", 3), ("second", 30)):
        rows = [{"input_ids": [start, start + i, 5, 7 + i, 11]} for i in range(4)]
        config = loku.UnlearnConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            learning_rate=1e-2,
            lora_rank=3,
            use_cpu=True,
            disable_tqdm=True,
        )
        result = loku.unlearn(model, rows[:2], rows[2:], config=config)
        result.save(model := tmp_path / name)
        ranks.append(result.save(tmp_path / f"{name} small", rank=4))
    assert [(lost.exact_rank, lost.rank) for lost in ranks] == [(6, 4), (12, 4)]
    exact, small = (
        PeftModel.from_pretrained(make_base("llama"), tmp_path / name) for name in ("second", "second small")
    )
    assert_close(logits(exact), logits(result.model), 1e-4)
    layers = adapter_layers(small, "default")
    for name, layer in adapter_layers(exact, "default").items():
        delta, kept = (each.get_delta_weight("default").double() for each in (layer, layers[name]))
        S = torch.linalg.svdvals(delta)
        assert (delta - kept).norm() <= S[4:].norm() + 1e-5 * S.norm()
        assert layers[name].r["default"] == 4


CASES = {
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "expert patterns": (
        "mixtral",
        {
            "target_modules": ["q_proj", "gate"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"gate_up_proj": 2, "layers.1.*q_proj": 3},
            "alpha_pattern": {"down_proj": 20},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "biases": ("gpt_neox", {"target_modules": ["dense"], "bias": "lora_only"}),
    "lora_bias": ("gpt_neox", {"target_modules": ["dense"], "lora_bias": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*(rank_pattern|alpha_pattern|embedding)")
def test_every_part_of_a_plain_adapter(case, tmp_path):
    kind, options = CASES[case]
    model = perturb(make_any_peft(kind, r=5, **options))
    rank = 3
    deltas = {
        name: layer.get_delta_weight("default").detach().double().clone()
        for name, layer in adapter_layers(model, "default").items()
        if not layer.lora_bias.get("default")
    }
    lost = loku.save_portable_adapter(model, tmp_path, rank=rank)
    loaded = PeftModel.from_pretrained(make_any_base(kind), tmp_path)
    # The model in memory with the best factors in the place of its own computes the same.
    for name, layer in adapter_layers(loaded, "default").items():
        assert layer.scaling["default"] == 1 and layer.r["default"] == min(
            rank, lost.modules[name].exact_rank
        )
        if name in deltas:
            kept = layer.get_delta_weight("default").double()
            U, S, Vh = torch.linalg.svd(deltas[name], full_matrices=False)  # of each expert
            S[..., rank:] = 0
            assert (kept - U * S[..., None, :] @ Vh).norm() <= 1e-5 * deltas[name].norm()
    state, own = plain_adapter(loaded, "default")[1], plain_adapter(model, "default")[1]
    for key, value in own.items():
        if ".lora_" not in key:
            assert torch.equal(state[key], value)
        elif key.endswith(".lora_B.bias"):
            assert torch.allclose(state[key], value * 8 / 5)
    # Without a loss all outputs stay: the rest of the adapter is kept, too.
    exact = loku.save_portable_adapter(model, tmp_path, rank=5)
    assert exact.relative_error == 0
    assert_close(logits(PeftModel.from_pretrained(make_any_base(kind), tmp_path)), logits(model), 1e-5)


@pytest.mark.filterwarnings("ignore:.*(rank_pattern|alpha_pattern)")
def test_experts_of_several_ranks_need_their_parameters_names():
    model = perturb(make_any_peft("mixtral", r=5, **CASES["expert patterns"][1]))
    config, state = portable_adapter(model)
    with pytest.raises(ValueError, match=r"experts.*several ranks or alphas.*--model"):
        compressed_adapter(config, state, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
    ids=["dora", "pissa", "olora", "alora"],
)
def test_variants_are_refused_by_name(options, message, tmp_path):
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(make_base("llama"), LoraConfig(**options))
    with pytest.raises(ValueError, match=message):
        loku.save_portable_adapter(model, tmp_path / "new", rank=2)
    assert not (tmp_path / "new").exists()


def test_wrong_ranks_and_factors_are_refused():
    config, state = adapter_of(torch.randn(5, 4), torch.randn(4, 6))
    for rank in (0, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match="rank must be an integer >= 1"):
            compressed_adapter(config, state, rank)
    with pytest.raises(ValueError, match="rank 4, and its config says 3"):
        compressed_adapter(LoraConfig(r=3, target_modules=["layer"]), state, 2)
    with pytest.raises(ValueError, match="NaN or Inf"):
        compressed_adapter(config, {**state, f"{NAME}.lora_A.weight": torch.full((4, 6), math.nan)}, 2)
    with pytest.raises(ValueError, match=r"no tensor and \(4, 6\)"):
        compressed_adapter(config, {f"{NAME}.lora_A.weight": torch.randn(4, 6)}, 2)
    with pytest.raises(ValueError, match=r"lora_C\.weight is no factor"):
        compressed_adapter(config, {**state, f"{NAME}.lora_C.weight": torch.randn(4, 6)}, 2)
    with pytest.raises(ValueError, match=r"\(4, 6, 1, 1\)"):
        compressed_adapter(config, {**state, f"{NAME}.lora_A.weight": torch.randn(4, 6, 1, 1)}, 2)
    with pytest.raises(ValueError, match="no LoRA factors"):
        compressed_adapter(config, {"base_model.model.norm.weight": torch.ones(3)}, 2)
