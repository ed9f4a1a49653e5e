"""FILA as the authors' code has it: one switch, with the factors of their formulas.

The formulas are those of csm9493/efficient-llm-unlearning, TOFU/measure_importance.py and TOFU/forget.py.
"""

import pytest
import torch
from fila_models import MODELS, assert_close, factors, logits, lora_layers, make_base, make_peft
from fisher_batches import batches, rows
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

import loku
import loku.unlearning
from loku import FilaConfig, UnlearnConfig, get_fila_state_dict, initialize_lora_fila_weights
from loku.fila.factors import official_factors
from loku.fila.initialize import initialize_from_row_scales
from loku.fila.measured_rows import official_rows, sampled
from loku.fila.row_scales import balanced
from loku.target_modules import default_target_modules

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 61


def importances(model, names, data):
    """Return name -> squared gradients of mean losses, weighted by label tokens, as measure_importance.py."""
    totals, tokens = dict.fromkeys(names, 0), 0
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        count = (batch["labels"] != -100).sum()
        for name in names:
            totals[name] = totals[name] + model.get_submodule(name).weight.grad.square() * count
        tokens += count
    return {name: total / tokens for name, total in totals.items()}


def authors_factors(model, names, forget, retain, rank, scaling, seed):
    """Return name -> (B, A) by their formulas."""
    forget, retain = importances(model, names, forget), importances(model, names, retain)
    torch.manual_seed(seed)
    result = {}
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        s = (forget[name] / (1e-5 + retain[name])).sum(1).sqrt()
        U, S, V = torch.svd_lowrank(s[:, None] * weight, q=rank)
        S = S / scaling
        result[name] = (1 / (s + 1e-5))[:, None] * (U * S.sqrt()), (V * S.sqrt()).T
    return result


def decaying(model):
    """Give the blocks' weights a decaying spectrum: the leading directions of a flat one are not unique."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ("layers." in name or ".h." in name):
            U, S, Vh = torch.linalg.svd(parameter.data, full_matrices=False)
            parameter.data.copy_(U * (S[0] * 0.6 ** torch.arange(len(S))) @ Vh)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_factors_are_those_of_the_authors_code(kind):
    data = batches(rows(5, 0, VOCAB), 2), batches(rows(5, 1, VOCAB), 2)
    base = decaying(make_base(kind))
    before = logits(base)

    def fresh_peft():
        targets = default_target_modules(base)
        return get_peft_model(
            decaying(make_base(kind)), LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        )

    model = fresh_peft()
    expected = authors_factors(base, list(lora_layers(model)), *data, rank=4, scaling=2.0, seed=5)
    state = torch.get_rng_state()
    initialize_lora_fila_weights(model, *data, config=FilaConfig.official(seed=5), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    for name, layer in lora_layers(model).items():
        A, B, scaling = factors(layer)
        assert scaling == 2.0
        assert_close(A, expected[name][1].double(), 1e-5)
        assert_close(B, expected[name][0].double(), 1e-5)
        assert not 2 / 3 < B.norm() / A.norm() < 3 / 2  # the scales are as measured, so the shares are uneven
    assert_close(logits(model), before, 1e-5)

    # Each choice of theirs changes the factors.
    for other in (
        {"balance": "normalised"},
        {"fisher": "per-sample"},
        {"decomposition": "row_scaled_svd"},
        {"damping": 1e-4},
        {"seed": 6},
    ):
        changed = fresh_peft()
        config = FilaConfig(**{**vars(FilaConfig.official(seed=5)), **other})
        initialize_lora_fila_weights(changed, *data, config=config, progress=False)
        A, B, _ = factors(lora_layers(changed)[name])
        assert (
            max((A - expected[name][1]).norm() / A.norm(), (B - expected[name][0]).norm() / B.norm()) > 1e-3
        )


def test_a_rank_beyond_the_weight_is_filled_with_zeros():
    generator = torch.Generator().manual_seed(0)
    weight, s = torch.randn(3, 7, generator=generator), torch.rand(3, generator=generator)
    B, A = official_factors(weight.double(), s, 5, 4.0)
    assert (B.shape, A.shape, B.dtype) == ((3, 5), (5, 7), torch.float32)
    assert B[:, 3:].eq(0).all() and A[3:].eq(0).all()
    torch.testing.assert_close(4 * B @ A, weight * (s / (s + 1e-5))[:, None])


@pytest.mark.parametrize("init", ["fila", "pissa"])
@pytest.mark.parametrize("balance", [0.01, 4.0])
def test_the_balance_leaves_the_product_alone(init, balance):
    scales = {
        name: torch.ones(layer.out_features)
        if init == "pissa"
        else torch.rand(layer.out_features, generator=torch.Generator().manual_seed(3)) + 0.1
        for name, layer in lora_layers(make_peft("llama")).items()
    }
    models = []
    for c in ("normalised", balance):
        models.append(make_peft("llama"))
        initialize_from_row_scales(models[-1], balanced(scales, c))
    for one, other in zip(*(lora_layers(model).values() for model in models), strict=True):
        (A, B, _), (other_A, other_B, _) = factors(one), factors(other)
        sign = (A * other_A).sum(1).sign()  # singular vectors have no sign
        assert_close(sign[:, None] * other_A, balance**0.5 * A, 1e-3)
        assert_close(sign * other_B, B / balance**0.5, 1e-3)
        assert_close(other_B @ other_A, B @ A, 1e-3)


def test_balances_of_the_state_dict():
    data = batches(rows(5, 0), 2), batches(rows(5, 1), 2)
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))

    def scales(balance):
        return get_fila_state_dict(model, *data, config=FilaConfig(balance=balance), progress=False)

    paper, normalised, tenth = map(scales, ("paper", "normalised", 0.1))
    for name, measured in paper.items():
        rms = measured.square().mean().sqrt()
        assert abs(rms - 1) > 0.1
        torch.testing.assert_close(normalised[name], measured / rms)
        torch.testing.assert_close(tenth[name], 0.1 * normalised[name])


# The rows


def test_official_rows():
    forget, retain = list(range(10)), list(range(100, 1100))
    drawn, kept = official_rows(forget, retain, seed=0)
    assert sorted(drawn) == forget != drawn
    assert len(kept) == 10 and set(kept) <= {*retain} and (drawn, kept) == official_rows(forget, retain, 0)
    assert official_rows(forget, retain, 1) != (drawn, kept)
    assert len(set(official_rows(range(200), range(10), 0)[1])) == 10  # with replacement


def test_batches_that_are_shuffled_are_grouped_once():
    """Every pass, and the cache, must see the same batches."""
    loader = torch.utils.data.DataLoader(
        [{"input_ids": torch.tensor([i])} for i in range(50)], 5, shuffle=True
    )
    once, again = ([batch["input_ids"] for batch in loader] for _ in range(2))
    assert not torch.equal(torch.stack(once), torch.stack(again))
    batches = sampled(loader, FilaConfig.official())
    once, again = ([batch["input_ids"] for batch in batches] for _ in range(2))
    assert torch.equal(torch.stack(once), torch.stack(again))


def unlearned(monkeypatch, tmp_path, **settings):
    """Run ``unlearn`` without training on tokenised rows; return the model and the measured batches."""
    seen = []
    real = loku.unlearning.initialize_lora_fila_weights

    def recorded(peft_model, *loaders, **options):
        seen.extend(list(loader) for loader in loaders)
        seen.append(options["config"])
        real(peft_model, *loaders, **options)

    monkeypatch.setattr(loku.unlearning, "initialize_lora_fila_weights", recorded)
    config = UnlearnConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, num_train_epochs=0, lora_rank=4, disable_tqdm=True,
        **settings,
    )  # fmt: skip
    result = loku.unlearn(decaying(tiny_model("llama")), rows(6, 0), rows(20, 1), config=config)
    return result.model, seen


def test_unlearn_takes_the_rows_and_settings_of_the_authors_code(monkeypatch, tmp_path):
    model, (forget, retain, config) = unlearned(
        monkeypatch, tmp_path, init="official-fila", target_modules="all", seed=3
    )
    assert config == FilaConfig.official(seed=3)
    assert [len(batch["input_ids"]) for batch in forget] == [4, 2] == [len(b["input_ids"]) for b in retain]
    layers = lora_layers(model)
    assert len(layers) == 2 * 7
    expected = authors_factors(decaying(tiny_model("llama")), list(layers), forget, retain, 4, 8.0, seed=3)
    for name, layer in layers.items():
        A, B, _ = factors(layer, "reference")
        assert_close(A, expected[name][1].double(), 1e-5)
        assert_close(B, expected[name][0].double(), 1e-5)


def test_fewer_rows_and_a_balance_reach_the_initialisation(monkeypatch, tmp_path):
    _, (forget, retain, config) = unlearned(
        monkeypatch, tmp_path, init="official-fila", fisher_samples=3, seed=1
    )
    assert config.fisher_samples == 3 and len(forget) == len(retain) == 2
    model, (_, _, config) = unlearned(monkeypatch, tmp_path, fila_balance="0.01")
    assert config.balance == 0.01
    for layer in lora_layers(model).values():
        A, B, _ = factors(layer, "reference")
        assert B.norm() > 10 * A.norm()
    models = []
    for balance in ("normalised", 0.01):
        settings = UnlearnConfig(
            output_dir=str(tmp_path / "out"), use_cpu=True, num_train_epochs=0, lora_rank=4, init="pissa",
            fila_balance=balance, disable_tqdm=True,
        )  # fmt: skip
        models.append(loku.unlearn(tiny_model("llama"), rows(6, 0), rows(9, 1), config=settings).model)
    for one, other in zip(*(lora_layers(model).values() for model in models), strict=True):
        assert_close(factors(other)[0], 0.1 * factors(one)[0], 1e-5)


# Factors of another kind


def test_factors_that_do_not_fit_are_refused():
    model = make_peft("llama")
    given = {
        name: (torch.zeros(layer.out_features, 4), torch.ones(4, layer.in_features))
        for name, layer in lora_layers(model).items()
    }
    name = next(iter(given))
    for wrong, message in (
        ((torch.zeros(3, 4), given[name][1]), "must have the shapes"),
        ((given[name][0].fill_(float("nan")), given[name][1]), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            loku.initialize_from_factors(model, {**given, name: wrong})
    assert torch.equal(logits(model), logits(make_base("llama")))
