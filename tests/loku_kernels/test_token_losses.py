"""The losses of triplets, the softmax of the rest and the gradient of hidden states, against float64."""

import math

import pytest
import torch
from kernel_inputs import DTYPES, IGNORE, planted_logits, planted_operands

from loku_kernels import cross_entropy, inverted_hinge, reduce_loss, softmax_triplet, triplet_loss
from loku_kernels.backends import choose, native, reference

LOSSES = {"inverted_hinge": inverted_hinge, "cross_entropy": cross_entropy}


def planted_triplets(rows=24, v=50):
    """Return triplets and labels of planted logits: ties, masked words, memorised tokens, ignored rows."""
    logits, labels = planted_logits(rows, v, torch.float64)
    triplet, _ = softmax_triplet(logits, labels)
    return triplet, labels


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("v", [2, 50])
def test_a_loss_and_its_gradient_are_those_of_autograd(backend, loss, reduction, dtype, v):
    triplet, labels = planted_triplets(v=v)
    finite = triplet[:, 0].isfinite()  # the cross entropy of a masked target is inf
    triplet, labels = triplet[finite], labels[finite]
    leaf = triplet.clone().requires_grad_()
    counted = labels != IGNORE
    exact = reduce_loss(LOSSES[loss](leaf), counted, reduction)
    exact.sum().backward()
    value, grad = choose("token_losses", labels).token_losses(
        loss, triplet, labels, IGNORE, reduction, dtype, True
    )
    assert value.dtype == dtype and value.shape == exact.shape
    torch.testing.assert_close(value, exact.detach().to(dtype), rtol=1e-6, atol=1e-9)
    expected = leaf.grad.nan_to_num()  # plain torch has NaN where a rest of -inf meets its own softmax
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
    assert grad[~counted].eq(0).all() and grad[counted].abs().sum() > 0
    without, nothing = choose("token_losses", labels).token_losses(
        loss, triplet, labels, IGNORE, reduction, dtype, False
    )
    assert nothing is None and torch.equal(without, value)


@pytest.mark.parametrize("loss", LOSSES)
def test_triplet_loss_is_that_of_plain_torch(backend, loss):
    triplet, labels = planted_triplets()
    finite = triplet[:, 0].isfinite()
    triplet, labels = triplet[finite].view(1, -1, 3), labels[finite].view(1, -1)
    for reduction in ("mean", "sum", "none"):
        results = []
        for compute in (
            lambda t, r=reduction: triplet_loss(loss, t, labels, reduction=r),
            lambda t, r=reduction: reduce_loss(LOSSES[loss](t), labels != IGNORE, r),
        ):
            leaf = triplet.clone().requires_grad_()
            value = compute(leaf)
            (value * torch.arange(1, value.numel() + 1).view(value.shape)).sum().backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(*results)
    assert torch.autograd.gradcheck(lambda t: triplet_loss(loss, t, labels), triplet.clone().requires_grad_())


@pytest.mark.parametrize("loss", LOSSES)
def test_hostile_triplets(backend, loss):
    """A NaN or +inf stays one, a masked target costs inf, and a memorised token keeps its digits."""
    inf, nan = torch.inf, torch.nan
    rows = torch.tensor(
        [[nan, 0, 0], [0, nan, 0], [0, 0, nan], [inf, 0, 0], [-inf, -inf, -inf], [-inf, 0, 0], [0, -40, -50]],
        dtype=torch.float64,
    )
    labels = torch.zeros(len(rows), dtype=torch.int64)
    value, grad = choose("token_losses", labels).token_losses(
        loss, rows, labels, IGNORE, "none", torch.float64, True
    )
    assert value[:5].isnan().all() and grad[:5].isnan().any(1).all()
    p1, p2 = torch.tensor(-40.0).double().exp(), torch.tensor(-50.0).double().exp()
    if loss == "cross_entropy":
        assert value[5] == inf and grad[5].isfinite().all()
        torch.testing.assert_close(value[6], p1 + p2, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(grad[6], torch.stack([-(p1 + p2), p1, p2]), rtol=1e-9, atol=0)
    else:
        assert value[5] == 0.5
        torch.testing.assert_close(grad[6, 0], 2 * p1 + p2, rtol=1e-9, atol=0)


@pytest.mark.skipif(native._core is None, reason="no compiled core")
def test_the_core_keeps_the_digits_of_a_memorised_token():
    """The probabilities of the others, 2e-13 here, are added to 1 by no operation."""
    triplet = torch.tensor([[30.0, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.zeros(1, dtype=torch.int64)
    value, grad = native.token_losses("cross_entropy", triplet, labels, IGNORE, "sum", torch.float64, True)
    exact = math.log1p(2 * math.exp(-30))
    assert value.item() == pytest.approx(exact, rel=1e-12, abs=0.0)
    assert grad[0, 0].item() == pytest.approx(-exact, rel=1e-12, abs=0.0)


@pytest.mark.skipif(native._core is None, reason="no compiled core")
def test_the_core_reads_no_row_outside_of_the_weight():
    triplet, weight = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(5, 4)
    for label, runner_up in ((5, 0), (-1, 0), (0, 5)):
        ids = [torch.tensor([0, x]) for x in (label, runner_up)]
        with pytest.raises(ValueError, match="row 1 has a label or a runner-up outside"):
            native.hidden_gradient(
                *(triplet, None, weight, ids[0], triplet, ids[1], torch.zeros(2, 4)),
                softcap=0.0,
                logit_scale=1.0,
            )


def test_nothing_counts(backend):
    labels = torch.full((3,), IGNORE)
    assert choose("mean_scale", labels).mean_scale(labels, IGNORE) == 1
    for n in (0, 3):
        value, grad = choose("token_losses", labels).token_losses(
            "cross_entropy", torch.randn(n, 3).double(), labels[:n], IGNORE, "mean", torch.float32, True
        )
        assert value == 0 and grad.eq(0).all()


def test_the_mean_of_many_rows(backend):
    labels = torch.arange(5000) % 7
    assert choose("mean_scale", labels).mean_scale(labels, 3).item() == 1 / (labels != 3).sum().item()
    triplet = torch.randn(5000, 3).double()
    value, _ = choose("token_losses", labels).token_losses(
        "inverted_hinge", triplet, labels, 3, "mean", torch.float64, False
    )
    torch.testing.assert_close(value, inverted_hinge(triplet)[labels != 3].mean())


def test_unknown_names_are_refused():
    triplet, labels = planted_triplets()
    with pytest.raises(ValueError, match="'hinge'"):
        triplet_loss("hinge", triplet, labels)
    with pytest.raises(ValueError, match="'max'"):
        triplet_loss("cross_entropy", triplet, labels, reduction="max")
    with pytest.raises(ValueError, match="float64"):
        triplet_loss("cross_entropy", triplet.float(), labels)
    with pytest.raises(ValueError, match="labels"):
        triplet_loss("cross_entropy", triplet, labels[:-1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(0.0, 1.0), (0.0, 0.5), (30.0, 1.5)])
@pytest.mark.parametrize("factor", [None, torch.tensor(0.25), torch.linspace(-1, 1, 24)], ids=str)
def test_gradient_of_hidden_states(backend, dtype, softcap, logit_scale, factor):
    """g_t y'_t W[t] + g_r y'_r W[r] + g_rest logit_scale O, rounded once."""
    _, weight, _, labels = planted_operands(24, 16, 50, dtype, bias=False)
    logits, _ = planted_logits(24, 50, torch.float64)
    triplet, runner_up_id = softmax_triplet(logits.clamp(-29, 29), labels)
    grad, direction = torch.randn(24, 3).double(), torch.randn(24, 16).to(dtype)
    counted = labels != IGNORE
    direction[~counted] = torch.nan  # an ignored row's direction is not trusted
    triplet[3, 2] = -torch.inf  # no rest
    ours = choose("hidden_gradient", direction, weight).hidden_gradient(
        grad,
        factor,
        weight,
        labels,
        triplet,
        runner_up_id,
        direction,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    g = grad * (1.0 if factor is None else factor.double().view(-1, 1) if factor.dim() else factor.double())
    slope = (
        logit_scale * (1 - (triplet[:, :2] / softcap) ** 2) if softcap else torch.full((24, 2), logit_scale)
    )
    rest = g[:, 2].where(triplet[:, 2] != -torch.inf, 0.0) * logit_scale
    exact = (g[:, :1] * slope[:, :1]) * weight.double()[labels.clamp(0)]
    exact += (g[:, 1:2] * slope[:, 1:]) * weight.double()[runner_up_id.clamp(0)]
    exact += (rest[:, None] * direction.double()).nan_to_num()
    exact[~counted] = 0
    assert ours.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours.double(), exact, rtol=eps, atol=max(eps * 1e-2, 1e-6 if dtype != torch.float64 else 1e-12)
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("v", [2, 3, 50, 3001])
def test_softmax_of_the_rest(backend, dtype, softcap, v):
    """The logits become exp(y - rest) times the slope, and 0 at target and runner-up."""
    logits, labels = planted_logits(24, v, dtype)
    if softcap:
        logits = logits.double().div(softcap).tanh().to(dtype)
    block = torch.nn.functional.pad(logits, (1, 2))[:, 1:-2]  # rows that begin anywhere
    kept = block.clone()
    triplet, runner_up_id = choose("rest_probabilities_", block).rest_probabilities_(
        block, labels, IGNORE, softcap=softcap
    )
    exact_triplet, exact_id = reference.softmax_triplet(kept.double(), labels, IGNORE, softcap)
    assert torch.equal(runner_up_id, exact_id)
    torch.testing.assert_close(triplet, exact_triplet, rtol=1e-6, atol=1e-6)
    y = kept.double() * (softcap or 1.0)
    exact = (y - exact_triplet[:, 2:]).exp() * (1 - kept.double() ** 2 if softcap else 1.0)
    exact = exact.where(exact_triplet[:, 2:] != -torch.inf, 0.0).where((labels != IGNORE)[:, None], 0.0)
    column = torch.arange(v)
    exact[(column == labels[:, None]) | (column == exact_id[:, None])] = 0
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        block.double(), exact, rtol=max(2 * eps, 2e-5), atol=1e-6 * (dtype != torch.float64)
    )
    assert v < 4 or block.count_nonzero() > 0


def test_forward_of_capped_logits(backend):
    logits, labels = planted_logits(24, 300, torch.float32)
    u = (logits / 30).tanh()
    triplet, runner_up_id = choose("triplet_forward", u).triplet_forward(u, labels, IGNORE, softcap=30.0)
    exact, exact_id = reference.softmax_triplet(u.double() * 30.0, labels)
    assert torch.equal(runner_up_id, exact_id)
    torch.testing.assert_close(triplet, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_a_backward(backend, dtype):
    logits, labels = planted_logits(24, 300, dtype)
    triplet, runner_up_id = softmax_triplet(logits, labels)
    grad = torch.randn(24, 3).double()
    rows = torch.linspace(-2, 2, 24)
    run = choose("triplet_backward", logits).triplet_backward
    for factor in (torch.tensor(0.3), rows, rows[:1].expand(24), rows.to(torch.bfloat16)):
        ours = run(grad, logits, labels, IGNORE, triplet, runner_up_id, factor=factor)
        scaled = grad * (factor.double()[:, None] if factor.dim() else factor.double())
        assert torch.equal(ours, run(scaled, logits, labels, IGNORE, triplet, runner_up_id))
