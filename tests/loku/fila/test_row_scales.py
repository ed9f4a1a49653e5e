"""FILA's row scales against the exact per-sample loop in float64."""

import json

import pytest
import torch
from fisher_batches import batches, rows, targets
from fisher_peak import BUDGET
from fresh_process import run_python
from peak_memory import needs_proc
from tiny_models import KINDS, tiny_model
from torch import nn

from loku.data import collate
from loku.fila import row_scales
from loku.fila.row_scales import balanced, fisher_row_scales
from loku.fila.settings import FilaConfig, memory_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def exact_scales(model, forget, retain, damping, mode):
    """Compute the row scales in float64, by a full backward of each row, squared and added."""
    model = tiny_model_copy(model)
    modules = targets(model)

    def fishers(rows):
        totals = dict.fromkeys(modules, 0)
        for row in rows:
            batch = collate([row], pad_token_id=0)
            model.zero_grad()
            logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum").backward()
            for name, module in modules.items():
                totals[name] = totals[name] + module.weight.grad.square() / len(rows)
        return totals

    forget, retain = fishers(forget), fishers(retain)
    scales = {}
    for name in modules:
        added = damping * (retain[name].mean() if mode == "relative" else 1.0)
        score = (forget[name] / (retain[name] + added)).sum(1)
        scales[name] = score.sqrt()
    return scales


def tiny_model_copy(model):
    copy = type(model)(model.config).double().eval()
    copy.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("damping", "mode"), [(1.0, "relative"), (0.1, "relative"), (1e-5, "absolute")])
def test_against_the_exact_loop(kind, damping, mode):
    model = tiny_model(kind)
    forget, retain = rows(5, 0), rows(7, 1)
    expected = exact_scales(model, forget, retain, damping, mode)
    ours = fisher_row_scales(
        model,
        targets(model),
        batches(forget, 2),
        batches(retain, 3),
        damping=damping,
        damping_mode=mode,
        progress=False,
    )
    assert ours.keys() == expected.keys() and len(ours) >= 8
    for name, scale in ours.items():
        assert scale.dtype == torch.float32
        unit = expected[name].square().mean().sqrt()
        torch.testing.assert_close(scale.double() / unit, expected[name] / unit, rtol=1e-3, atol=1e-5)
        with pytest.raises(AssertionError):  # without the square or the retain set all would be equal
            torch.testing.assert_close(torch.ones_like(scale), scale / unit.float(), rtol=1e-3, atol=1e-5)


def test_batching_padding_and_groups_change_nothing(capsys):
    model = tiny_model("llama")
    forget, retain = rows(5, 0), rows(7, 1)

    def scales(size, **options):
        return fisher_row_scales(
            model, targets(model), batches(forget, size), batches(retain, size), progress=False, **options
        )

    one = scales(1)
    tokens = max(batch["input_ids"].numel() for size in (forget, retain) for batch in batches(size, 3))
    weights = [module.weight for module in targets(model).values()]
    largest = max(4 * (w.numel() + tokens * w.shape[1]) + 12 * w.numel() for w in weights)
    several = scales(3, memory_budget=3 * largest)
    for other in (scales(4), scales(100), several, scales(3, memory_budget=largest)):
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5)

    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp.* needs .* more than the memory budget of"):
        scales(3, memory_budget=largest - 1)
    for size, budget in ((1, None), (3, 3 * largest)):
        once = fisher_row_scales(
            model,
            targets(model),
            iter(batches(forget, size)),
            iter(batches(retain, size)),
            memory_budget=budget,
        )
        assert all(torch.equal(once[name], (several if budget else one)[name]) for name in one)
        printed = capsys.readouterr().out
        assert ("in 1 group, 2 passes" in printed) == (budget is None) and "10 modules" in printed
        assert ("in one group" in printed) == (budget is not None)


def test_memory_sizes():
    assert memory_bytes("4GiB") == 4 << 30 and memory_bytes("1.5MB") == 1_500_000 and memory_bytes("64") == 64
    assert memory_bytes(64) == 64 and memory_bytes(None) is None
    for wrong in ("4 apples", "GiB", -1, 1.5, True):
        with pytest.raises(ValueError, match=r"budget|valid format"):
            memory_bytes(wrong)


@needs_proc
def test_the_peak_is_within_the_budget():
    """The budget comes on top of the memory of a forward and backward without weight gradients."""
    result = run_python("import fisher_peak; fisher_peak.main()")
    assert result.returncode == 0, result.stderr
    peaks = json.loads(result.stdout.splitlines()[-1])
    least, extra = peaks["plain"], peaks["budget"]
    assert least < 8 << 20
    assert 8 << 20 < extra <= BUDGET + least  # the budget is used
    assert peaks["no budget"] > BUDGET + least + (8 << 20)


def test_sums_are_float32_in_a_bfloat16_model():
    """A sum in bfloat16 would stop at 256 times its addends."""
    model = tiny_model("llama").bfloat16()
    forget, retain = rows(3, 0), rows(2, 1)
    one, many = (
        fisher_row_scales(
            model, targets(model), batches(forget * n, 40), batches(retain * n, 40), progress=False
        )
        for n in (1, 400)
    )
    for name in one:
        assert many[name].dtype == torch.float32
        torch.testing.assert_close(many[name], one[name], rtol=2e-3, atol=1e-4)


def test_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].mlp.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]

    def check():
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert flags == [parameter.requires_grad for parameter in model.parameters()]
        assert modes == [module.training for module in model.modules()]
        assert hooks == [len(m._forward_hooks) for m in model.modules()]
        assert all(parameter.grad is None for parameter in model.parameters())

    fisher_row_scales(model, targets(model), batches(rows(2, 0), 2), batches(rows(2, 1), 2), progress=False)
    check()
    broken = [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}]
    with pytest.raises(KeyError):
        fisher_row_scales(model, targets(model), broken, batches(rows(2, 1), 2), progress=False)
    check()
    with torch.no_grad():  # the caller's grad mode does not matter
        fisher_row_scales(
            model, targets(model), batches(rows(2, 0), 2), batches(rows(2, 1), 2), progress=False
        )
    check()


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_useless_scales_fall_back_to_ones_by_name(mode):
    model = tiny_model("llama")
    name, module = next((n, m) for n, m in targets(model).items() if n.endswith("0.mlp.up_proj"))
    model.model.layers[0].mlp.down_proj.weight.data.zero_()  # no gradient flows back
    data = batches(rows(2, 0), 2)
    with pytest.warns(UserWarning, match=r"0\.mlp\.up_proj: its Fisher information is zero"):
        scales = fisher_row_scales(model, {name: module}, data, data, damping_mode=mode, progress=False)
    assert scales[name].eq(1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_fisher_that_is_not_finite_stops_and_names_the_module(value):
    model = tiny_model("llama")
    data, poisoned = batches(rows(6, 0, vocab=96), 2), batches(rows(6, 1, vocab=96), 2)
    poisoned[1]["input_ids"][0, 0] = 96
    model.model.embed_tokens.weight.data[96] = value
    message = (
        r"retain Fisher: .*\(model\.layers\.0\.self_attn\.q_proj is the first module whose is not; "
        "the loss is not finite from batch 1 on"
    )
    with pytest.raises(FloatingPointError, match=message):
        fisher_row_scales(model, targets(model), data, poisoned, progress=False)
    with pytest.raises(FloatingPointError, match=r"forget Fisher: .*batch 1 on"):
        fisher_row_scales(model, targets(model), poisoned, data, progress=False)


def test_without_a_retain_fisher_the_forget_set_decides():
    model = tiny_model("llama")
    data = batches(rows(4, 0), 2)
    nothing = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in data]
    ours = fisher_row_scales(model, targets(model), data, nothing, progress=False)
    expected = fisher_row_scales(
        model, targets(model), data, nothing, damping_mode="absolute", progress=False
    )
    assert all(torch.equal(ours[name], expected[name]) and not ours[name].eq(1).all() for name in ours)


def test_errors():
    model = tiny_model("llama")
    data = batches(rows(2, 0), 2)
    with pytest.raises(ValueError, match="no batch for the forget Fisher"):
        fisher_row_scales(model, targets(model), [], data, progress=False)
    with pytest.raises(RuntimeError, match="elsewhere took no part"):
        fisher_row_scales(model, {"elsewhere": nn.Linear(3, 3)}, data, data, progress=False)
    model.model.layers[1].mlp.up_proj = model.model.layers[1].mlp.gate_proj
    twice = {"gate_proj": model.model.layers[1].mlp.gate_proj}
    with pytest.raises(RuntimeError, match="gate_proj is called more than once"):
        fisher_row_scales(model, twice, data, data, progress=False)


def test_config_is_checked():
    for options, message in [
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"damping_mode": "other"}, "damping_mode"),
        ({"fisher_samples": 0}, "fisher_samples"),
        ({"fisher": "per-token"}, "fisher must be 'per-sample' or 'per-batch', got 'per-token'"),
        ({"decomposition": "exact"}, "decomposition must be"),
        ({"balance": 0}, "balance must be"),
        ({"balance": "even"}, "balance must be"),
        ({"balance": True}, "balance must be"),
        ({"balance": float("inf")}, "balance must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            FilaConfig(**options)


def test_balances():
    tiny = torch.tensor([3e-30, 4e-30])
    measured = {"a": torch.tensor([0.0, 1.0, 2.0]), "b": torch.zeros(2), "c": tiny}
    paper, normalised, c = (balanced(measured, balance) for balance in ("paper", "normalised", 0.01))
    assert all(torch.equal(paper[name], measured[name]) for name in measured)
    for name in ("a", "c"):
        torch.testing.assert_close(normalised[name].square().mean(), torch.tensor(1.0))
        torch.testing.assert_close(c[name], 0.01 * normalised[name])
    torch.testing.assert_close(normalised["c"], tiny / 3.5355339e-30)
    assert all(scales["b"].eq(0).all() for scales in (paper, normalised, c))
    assert FilaConfig(balance="0.5").balance == 0.5 and FilaConfig(balance=None).balance == "normalised"


# The per-batch Fisher of the authors' code


def official_scales(model, forget, retain):
    """Compute the row scales in float64 by the authors' formulas, by a full backward of each batch."""
    model = tiny_model_copy(model)
    modules = targets(model)

    def importances(batches):
        totals, tokens = dict.fromkeys(modules, 0), 0
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()  # the mean over the predicted labels
            count = (batch["labels"] != -100).sum()
            for name, module in modules.items():
                totals[name] = totals[name] + module.weight.grad.square() * count
            tokens += count
        return {name: total / tokens for name, total in totals.items()}

    forget, retain = importances(forget), importances(retain)
    return {name: (forget[name] / (1e-5 + retain[name])).sum(1).sqrt() for name in modules}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_label", [False, True])
def test_the_per_batch_fisher_is_that_of_the_authors_code(kind, first_label):
    model = tiny_model(kind)
    if first_label:  # they count the first label of a row, too, which is never predicted
        forget, retain = ([{**r, "labels": r["input_ids"]} for r in rows(n, n)] for n in (5, 6))
    else:
        forget, retain = rows(5, 0), rows(6, 1)
    data = batches(forget, 2), batches(retain, 3)
    expected = official_scales(model, *data)
    options = {"damping": 1e-5, "damping_mode": "absolute", "progress": False}
    ours = fisher_row_scales(model, targets(model), *data, fisher="per-batch", **options)
    per_sample = fisher_row_scales(model, targets(model), *data, **options)
    for name, scale in ours.items():
        torch.testing.assert_close(scale.double(), expected[name], rtol=1e-4, atol=1e-7)
        assert not torch.allclose(per_sample[name], scale, rtol=0.05)
    other = fisher_row_scales(
        model, targets(model), data[0], batches(retain, 2), fisher="per-batch", **options
    )
    assert any(not torch.allclose(other[name], ours[name], rtol=1e-2) for name in ours)  # the grouping counts


def test_a_batch_of_the_per_batch_fisher_is_never_taken_in_parts(monkeypatch):
    model = tiny_model("llama")
    data = batches(rows(6, 0), 6), batches(rows(6, 1), 3)
    whole = fisher_row_scales(model, targets(model), *data, fisher="per-batch", progress=False)
    monkeypatch.setattr(row_scales, "_token_limit", lambda device: 20)
    limited = fisher_row_scales(model, targets(model), *data, fisher="per-batch", progress=False)
    assert all(torch.equal(limited[name], whole[name]) for name in whole)


# A card takes the rows of a large batch in parts


@pytest.fixture
def in_parts(monkeypatch):
    """Take at most 20 tokens in a forward, as a card takes 1024, and return the shapes of the forwards."""
    monkeypatch.setattr(row_scales, "_token_limit", lambda device: 20)
    shapes, real = [], row_scales.negative_log_likelihood

    def recorded(model, batch):
        shapes.append(tuple(batch["input_ids"].shape))
        return real(model, batch)

    monkeypatch.setattr(row_scales, "negative_log_likelihood", recorded)
    return shapes


def test_the_parts_of_batches_change_nothing(in_parts, monkeypatch):
    model = tiny_model("llama")
    forget, retain = batches(rows(5, 0), 5), batches(rows(7, 1), 7)
    ours = fisher_row_scales(model, targets(model), forget, retain, progress=False)
    sizes = [shape[0] * shape[1] for shape in in_parts]
    assert len(in_parts) > 2 and all(
        size <= 20 or shape[0] == 1 for size, shape in zip(sizes, in_parts, strict=True)
    )
    assert sum(shape[0] for shape in in_parts) == 12
    monkeypatch.setattr(row_scales, "_token_limit", lambda device: None)
    in_parts.clear()
    whole = fisher_row_scales(model, targets(model), forget, retain, progress=False)
    assert [shape[0] for shape in in_parts] == [7, 5]
    for name in whole:
        torch.testing.assert_close(ours[name], whole[name], rtol=1e-4, atol=1e-5)


def test_parts_are_equal_and_keep_their_batch():
    def shapes(limit, *given):
        data = [{name: torch.zeros(shape) for name in ("input_ids", "labels", "other")} for shape in given]
        parts = list(row_scales._parts(data, limit))
        assert all(("other" in part) == (len(part["labels"]) == given[n][0]) for n, part in parts)
        return [(n, tuple(part["input_ids"].shape)) for n, part in parts]

    assert shapes(1024, (8, 200)) == [(0, (4, 200))] * 2
    assert shapes(1024, (5, 400), (2, 512), (1, 3000)) == [
        (0, (2, 400)), (0, (2, 400)), (0, (1, 400)), (1, (2, 512)), (2, (1, 3000)),
    ]  # fmt: skip
    assert shapes(1024, (3, 2000)) == [(0, (1, 2000))] * 3
    assert shapes(None, (80, 2000)) == [(0, (80, 2000))]
    assert row_scales._token_limit(torch.device("cpu")) is None
    assert row_scales._token_limit(torch.device("cuda")) == 1024


def test_a_loss_that_is_not_finite_names_the_batch_of_its_part(in_parts):
    model = tiny_model("llama")
    data, poisoned = batches(rows(6, 0, vocab=96), 3), batches(rows(6, 1, vocab=96), 3)
    poisoned[1]["input_ids"][0, 0] = 96
    model.model.embed_tokens.weight.data[96] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is not finite from batch 1 on"):
        fisher_row_scales(model, targets(model), data, poisoned, progress=False)
    assert len(in_parts) > 2


def test_parts_save_fewer_bytes_for_the_backward(in_parts, monkeypatch):
    """The activations of a forward are in proportion to its tokens."""
    model, saved = tiny_model("llama"), []
    one_part = row_scales.negative_log_likelihood

    def recorded(model, batch):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = one_part(model, batch)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved.append(sum(size for pointer, size in storages.items() if pointer not in weights))
        return loss

    monkeypatch.setattr(row_scales, "negative_log_likelihood", recorded)
    ids = torch.randint(0, 97, (8, 10))
    data = [{"input_ids": ids, "labels": ids}]
    peaks = []
    for limit in (None, 40, 20):
        monkeypatch.setattr(row_scales, "_token_limit", lambda device, limit=limit: limit)
        saved.clear()
        fisher_row_scales(model, targets(model), data, data, progress=False)
        peaks.append(max(saved))
    assert peaks[1] < 0.6 * peaks[0] and peaks[2] < 0.6 * peaks[1]
