"""FILA leaves the model's outputs unchanged, and its base can be restored."""

import pytest
import torch
from fila_models import (
    MODELS,
    VOCAB,
    assert_close,
    factors,
    initialized,
    logits,
    lora_layers,
    make_base,
    make_peft,
    random_scales,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import loku.fila.initialize
from loku.adapters import active_adapters, reference_model
from loku.fila.initialize import (
    FilaConfig,
    get_fila_state_dict,
    initialize_from_row_scales,
    initialize_lora_fila_weights,
    release_base_copy_,
    restore_base_,
)
from loku.fila.targets import fila_targets
from loku.target_modules import default_target_modules

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


# Initialisation


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}], ids=["lora", "rslora"])
def test_outputs_are_unchanged_by_initialisation(kind, options):
    before = logits(make_base(kind))
    model = initialized(kind, **options)
    assert_close(logits(model), before, 1e-5)
    with active_adapters(model, []):  # the residual alone must be another model, or this tests nothing
        assert (logits(model) - before).abs().max() > 0.1 * before.abs().max()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bfloat16_base_is_off_by_one_rounding_of_its_weights(kind, autocast_adapter_dtype):
    base = make_base(kind, torch.bfloat16)
    original = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(
        base,
        LoraConfig(r=4, lora_alpha=8, target_modules=default_target_modules(base)),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    initialize_from_row_scales(model, random_scales(model))
    for name, layer in lora_layers(model).items():
        A, B, scaling = factors(layer)
        assert layer.lora_A["default"].weight.dtype == (
            torch.float32 if autocast_adapter_dtype else torch.bfloat16
        )
        residual = layer.get_base_layer().weight.double()
        error = (residual + scaling * B @ A - original[f"{name}.weight"].double()).abs()
        assert (error <= 2**-8 * residual.abs() + 1e-30).all()
    # In float32 the weights are rounded, and the activations are not.
    assert_close(logits(model.float()), logits(make_base(kind, torch.bfloat16).float()), 2**-5)


def test_all_ones_are_pissa():
    base, theirs = make_base("llama"), make_base("llama")
    for model in (
        base,
        theirs,
    ):  # a spectrum that decays: on a flat one the leading directions are not unique
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                U, S, Vh = torch.linalg.svd(parameter.data, full_matrices=False)
                parameter.data.copy_(U * (0.6 ** torch.arange(len(S))) @ Vh)
    options = {"r": 4, "lora_alpha": 12, "target_modules": default_target_modules(base)}
    model = get_peft_model(base, LoraConfig(**options))
    scales = {name: torch.ones(layer.out_features) for name, layer in fila_targets(model).items()}
    initialize_from_row_scales(model, scales)
    pissa = get_peft_model(theirs, LoraConfig(**options, init_lora_weights="pissa"))
    for (name, ours), their in zip(lora_layers(model).items(), lora_layers(pissa).values(), strict=True):
        A, B, _ = factors(ours)
        their_A, their_B, _ = factors(their)
        assert (B @ A - their_B @ their_A).norm() <= 1e-3 * (their_B @ their_A).norm(), name
        signs = (A * their_A).sum(1).sign()  # singular vectors have no sign
        assert (A - signs[:, None] * their_A).norm() <= 1e-2 * their_A.norm(), name
        residual, their_residual = (x.get_base_layer().weight.double() for x in (ours, their))
        assert (residual - their_residual).norm() <= 3e-3 * (their_B @ their_A).norm(), name


@pytest.mark.parametrize("kind", MODELS)
def test_factors_are_those_of_the_paper(kind):
    base = make_base(kind)
    model = make_peft(kind, r=5, lora_alpha=20)
    scales = random_scales(model)
    initialize_from_row_scales(model, scales)
    for name, layer in lora_layers(model).items():
        W, s = base.get_submodule(name).weight.detach().double(), scales[name].double()
        U, S, Vh = torch.linalg.svd(s[:, None] * W, full_matrices=False)
        paper_B = (1 / s)[:, None] * U[:, :5] * S[:5].sqrt()
        paper_A = S[:5, None].sqrt() * Vh[:5]
        A, B, scaling = factors(layer)
        assert scaling == 4
        assert_close(scaling * B @ A, paper_B @ paper_A, 1e-4)
        # Equal up to the sign of each direction, with peft's scaling shared evenly by A and B.
        sign = (A * paper_A).sum(1).sign()
        assert_close(sign[:, None] * A * scaling**0.5, paper_A, 1e-3)
        assert_close(sign * B * scaling**0.5, paper_B, 1e-3)


def test_module_prefix_of_peft_is_accepted_and_further_scales_are_ignored():
    model, other = make_peft("llama"), make_peft("llama")
    scales = random_scales(model)
    initialize_from_row_scales(model, scales)
    prefixed = {f"base_model.model.{name}": scale for name, scale in scales.items()}
    initialize_from_row_scales(other, {**prefixed, "another.module": torch.ones(3)})
    assert torch.equal(logits(model), logits(other))


class OneLinear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.weight = nn.Parameter(weight.clone())

    def forward(self, x):
        return self.linear(x)


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 20),
    k=st.integers(1, 20),
    rank=st.integers(1, 24),
    weight_rank=st.integers(1, 20),
    zero_rows=st.sampled_from([0.0, 0.5, 0.95]),
    alpha=st.sampled_from([1, 7, 64]),
    use_rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_any_shape_rank_and_row_scale(d, k, rank, weight_rank, zero_rows, alpha, use_rslora, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    W = (draw(d, weight_rank) @ draw(weight_rank, k)).to(dtype)
    s = draw(d).exp() * (torch.rand(d, generator=generator) >= zero_rows)
    s[0] = 1.0
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["linear"])
    model = get_peft_model(OneLinear(W), config)
    initialize_from_row_scales(model, {"linear": s})

    layer = model.get_base_model().linear
    A, B, scaling = factors(layer)
    residual = layer.get_base_layer().weight.double()
    unit = torch.finfo(dtype).eps / 2
    error = (residual + scaling * B @ A - W.double()).abs()
    assert (error <= 1.01 * unit * residual.abs() + 1e-7 * (dtype == torch.float16) + 1e-14).all()
    # The rest of diag(s) W is as small as the best projection of that rank leaves it.
    S = torch.linalg.svdvals(s.double()[:, None] * W.double())
    left = s.double()[:, None] * (W.double() - scaling * B @ A)
    assert (left.norm() ** 2 <= 1.001 * (S[rank:] ** 2).sum() + 1e-3 * (S**2).sum()).item()
    # Both factors are 0 in directions that diag(s) W does not have.
    used = A.norm(dim=1) > 0
    assert torch.equal(used, B.norm(dim=0) > 0)
    assert (S[:rank] > 2e-6 * S[0]).sum() <= used.sum() <= (S > 5e-7 * S[0]).sum()
    assert torch.equal(restore_base_(model).linear.weight, W)


def test_rank_and_alpha_patterns():
    patterns = {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 40}}
    before = logits(make_base("llama"))
    model = initialized("llama", **patterns)
    assert_close(logits(model), before, 1e-5)
    ranks = {
        name: factors(layer)[0].count_nonzero(dim=1).count_nonzero().item()
        for name, layer in lora_layers(model).items()
    }
    assert ranks["model.layers.0.self_attn.q_proj"] == 7
    assert ranks["model.layers.1.mlp.up_proj"] == 2
    assert ranks["model.layers.0.mlp.up_proj"] == 4


def test_only_the_adapter_trains_and_the_callers_generator_does_not_move():
    model = make_peft("llama")
    scales = random_scales(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    initialize_from_row_scales(model, scales)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.active_adapters == ["default"]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags.get(name, False), name
    train(model)
    layer = next(iter(lora_layers(model).values()))
    (A, B, _), (A0, B0, _) = factors(layer), factors(layer, "reference")
    assert not torch.equal(A, A0) and not torch.equal(B, B0)


# The reference model


@pytest.mark.parametrize("kind", MODELS)
def test_reference_model_is_the_original(kind):
    before = logits(make_base(kind))
    model = initialized(kind)
    train(model)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.05 * before.abs().max()
    flags = [p.requires_grad for p in model.parameters()]
    with reference_model(model) as reference:
        assert_close(logits(reference), before, 1e-5)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not torch.is_grad_enabled()
    assert torch.equal(logits(model), trained)
    assert [p.requires_grad for p in model.parameters()] == flags

    with pytest.raises(RuntimeError, match="inside"), reference_model(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), trained)


def test_reference_model_inside_disable_adapter_and_frozen_adapter():
    before = logits(make_base("llama"))
    model = initialized("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    train_flags = [p.requires_grad for p in model.parameters()]
    with reference_model(model):
        pass
    assert [p.requires_grad for p in model.parameters()] == train_flags
    with active_adapters(model, []):
        residual = logits(model)
        with reference_model(model):
            assert_close(logits(model), before, 1e-5)
        assert torch.equal(logits(model), residual)


def test_reference_model_after_default_initialisation_and_merged():
    before = logits(make_base("llama"))
    model = make_peft("llama", modules_to_save=["lm_head"])
    train(model)
    with reference_model(model):
        assert torch.equal(logits(model), before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"), reference_model(model):
        pass


# Restoring the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_restore_is_exact(dtype):
    base = make_base("llama", dtype)
    original = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=default_target_modules(base)))
    initialize_from_row_scales(model, random_scales(model))
    if dtype == torch.float32:
        train(model)
    restored = restore_base_(model)
    assert restored is base
    assert sorted(original) == sorted(name for name, _ in base.named_parameters())
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, original[name]), name
    assert not hasattr(base, "peft_config")


def test_restore_without_the_copy_adds_back():
    model = initialized("llama")
    train(model)
    release_base_copy_(model)
    model.merge_adapter()
    untouched = make_base("llama")
    assert_close(logits(restore_base_(model)), logits(untouched), 1e-5)
    # A model without FILA is only unloaded.
    assert torch.equal(logits(restore_base_(make_peft("llama"))), logits(untouched))


@pytest.mark.parametrize("where", ["svd", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_failure_midway_puts_everything_back(where, dtype, monkeypatch):
    model = make_peft("llama", dtype)
    scales = random_scales(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    real, calls = loku.fila.initialize.row_scaled_svd, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    def failing_clone(*args, **kwargs):
        PeftModel.add_adapter(model, *args, **kwargs)
        raise KeyboardInterrupt

    if where == "svd":
        monkeypatch.setattr(loku.fila.initialize, "row_scaled_svd", interrupted)
    else:
        monkeypatch.setattr(model, "add_adapter", failing_clone)
    with pytest.raises(KeyboardInterrupt):
        initialize_from_row_scales(model, scales)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    monkeypatch.undo()
    initialize_from_row_scales(model, scales)  # a second try succeeds


def test_a_weight_that_is_not_finite_is_named():
    model = make_peft("llama")
    scales = random_scales(model)
    layer = lora_layers(model)["model.layers.1.mlp.down_proj"]
    layer.get_base_layer().weight.data[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: .*not finite"):
        initialize_from_row_scales(model, scales)


def test_row_scales_that_do_not_fit_are_refused():
    model = make_peft("llama")
    scales = random_scales(model)
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=rf"no row scale for 1 of 10 .*{name}.* get_fila_state_dict"):
        initialize_from_row_scales(model, {key: s for key, s in scales.items() if key != name})
    for wrong, message in [
        (torch.ones(48), r"must have shape \(80,\).* got \(48,\)"),
        (torch.ones(80, 1), r"got \(80, 1\)"),
        (torch.zeros(80), "not all 0.* use ones"),
        (-torch.ones(80), ">= 0"),
        (torch.full((80,), float("inf")), "finite"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            initialize_from_row_scales(model, {**scales, name: wrong})
    assert torch.equal(logits(model), logits(make_base("llama")))


# From data, by the convention of peft's EVA


def batches(seed, rows=6):
    ids = torch.randint(1, VOCAB, (rows, 8), generator=torch.Generator().manual_seed(seed))
    dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    return torch.utils.data.DataLoader(dataset, batch_size=2)


@pytest.mark.parametrize("kind", MODELS)
def test_initialisation_from_dataloaders(kind):
    before = logits(make_base(kind))
    model, other = make_peft(kind), make_peft(kind)
    flags = [p.requires_grad for p in model.parameters()]
    state = get_fila_state_dict(model, batches(1), batches(2), progress=False)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert sorted(state) == sorted(lora_layers(model))
    initialize_lora_fila_weights(model, batches(1), batches(2), progress=False)
    initialize_lora_fila_weights(other, fila_state_dict=state)
    assert_close(logits(model), before, 1e-5)
    assert_close(logits(other), logits(model), 1e-5)
    with pytest.raises(ValueError, match="are required without fila_state_dict"):
        initialize_lora_fila_weights(make_peft(kind), batches(1))


def test_fisher_samples_cap_the_rows():
    model = make_peft("llama")
    forget, retain = batches(1), batches(2)
    capped = FilaConfig(fisher_samples=3, seed=5)
    first = get_fila_state_dict(model, forget, retain, config=capped, progress=False)
    again = get_fila_state_dict(model, forget, retain, config=capped, progress=False)
    every = get_fila_state_dict(model, forget, retain, progress=False)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(first[name], again[name])
    assert not torch.allclose(first[name], every[name])
    # The first rows of an iterable that is no DataLoader count.
    listed = get_fila_state_dict(model, list(forget), list(retain), config=capped, progress=False)
    short = [
        {k: v[:3] for k, v in next(iter(torch.utils.data.DataLoader(loader.dataset, 3))).items()}
        for loader in (forget, retain)
    ]
    expected = get_fila_state_dict(model, short[:1], short[1:], progress=False)
    assert torch.allclose(listed[name], expected[name], rtol=1e-4)
