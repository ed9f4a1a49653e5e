"""``linear_kl_divergence_loss`` against torch's ``kl_div`` in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DTYPES, IGNORE
from peak_memory import PeakMemory, needs_proc
from torch.nn.functional import cross_entropy, kl_div, linear, one_hot

from loku_kernels import linear_kl_divergence_loss, logits_blocks

SETTINGS = [
    {},
    {"softcap": 6.0},
    {"logit_scale": 0.25},
    {"softcap": 5.0, "logit_scale": 1.5},
    {"lowering": 10.0},
    {"softcap": 6.0, "logit_scale": 1.5, "lowering": 10.0},
]


def two_models(n, d, v, dtype, seed=0, bias=True, memorised=True):
    """Make hidden, weight and bias of a model and of a reference near it, and labels.

    The model is nearly sure of one word in every third row, the label. The other labels are any words.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, offset = randn(n, d), randn(v, d) / d**0.5, randn(v)
    if memorised:
        chosen = torch.randint(0, v, (n,), generator=generator)
        target = weight[chosen][::3]
        hidden[::3] += 14 * target / target.norm(dim=1, keepdim=True) ** 2
    reference = hidden + 0.3 * randn(n, d), weight + 0.1 * randn(v, d), offset + 0.1 * randn(v)
    operands = [x.to(dtype) for x in (hidden, weight, offset, *reference)]
    if not bias:
        operands[2] = operands[5] = None
    labels = torch.randint(0, v, (n,), generator=generator)
    if memorised:
        labels[::3] = chosen[::3]
    labels[n // 2] = IGNORE
    return operands, labels


def logits_of(hidden, weight, bias, softcap=None, logit_scale=1.0):
    logits = logit_scale * linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def lowered_logits(operands, labels, lowering, **options):
    """The reference's logits (N, V) after the labels' logits are lowered."""
    logits = logits_of(*operands[3:], **options)
    if not lowering:  # then a label may be outside the vocabulary
        return logits
    return logits - lowering * one_hot(labels.clamp(min=0), logits.shape[-1])


def eager(operands, labels, lowering=0.0, **options):
    """Compute the divergences (N,) in plain torch."""
    log_p = logits_of(*operands[:3], **options).log_softmax(-1)
    log_q = lowered_logits(operands, labels, lowering, **options).log_softmax(-1)
    return kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).where(labels != IGNORE, 0.0)


def ours(operands, labels, **options):
    hidden, weight, bias, reference_hidden, reference_weight, reference_bias = operands
    return linear_kl_divergence_loss(
        hidden,
        weight,
        reference_hidden,
        labels,
        bias,
        reference_weight=reference_weight,
        reference_bias=reference_bias,
        reduction="none",
        **options,
    )


def run(function, operands, labels, upstream, **options):
    """Return the divergences (N,) and the gradients of hidden, weight and bias."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in operands[:3]]
    divergence = function([*leaves, *operands[3:]], labels, **options)
    divergence.backward(upstream.to(divergence.dtype))
    return divergence.detach(), [None if x is None else x.grad for x in leaves]


def check(operands, labels, **options):
    dtype = operands[0].dtype
    upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = [None if x is None else x.double() for x in operands]
    exact, exact_grads = run(eager, wide, labels, upstream, **options)
    divergence, grads = run(ours, operands, labels, upstream, **options)
    assert (divergence[labels == IGNORE] == 0).all() and (grads[0][labels == IGNORE] == 0).all()
    assert divergence.dtype == torch.promote_types(dtype, torch.float32)
    assert all(grad is None or grad.dtype == dtype for grad in grads)
    if dtype == torch.float64:
        torch.testing.assert_close(divergence, exact)
        torch.testing.assert_close(grads, exact_grads)
        return
    eager_divergence, eager_grads = run(eager, operands, labels, upstream, **options)
    # The rounding of the logits bounds the accuracy of p and q, and the backward's blocks round otherwise
    # than the forward's. If p and q are both near 1, their difference may be less than that rounding.
    largest = (wide[0] @ wide[1].t()).abs().max().clamp(min=1)
    probability = 8 * torch.finfo(torch.float32).eps * largest
    sizes = [1.0] + [operands[1].abs().max(), operands[0].abs().max(), 1.0]
    for size, a, b, c in zip(
        sizes, [divergence, *grads], [eager_divergence, *eager_grads], [exact, *exact_grads], strict=True
    ):
        if a is not None:  # whole tensors, because single entries may be all rounding
            error, allowed = (a.double() - c).abs().max(), (b.double() - c).abs().max()
            bound = 2 * allowed + 8 * torch.finfo(dtype).eps * c.abs().max()
            assert error <= bound + probability * size * upstream.abs().max()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_against_kl_div(dtype, options):
    check(*two_models(24, 16, 301, dtype), **options)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(8, 40),
    st.integers(2, 700),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
    st.integers(1, 40000),
    st.integers(0, 99),
)
def test_any_shape_and_block(n, d, v, dtype, bias, block_bytes, seed):
    with mock.patch.object(logits_blocks, "BLOCK_BYTES", block_bytes):
        check(*two_models(n, d, v, dtype, seed, bias))


@pytest.mark.parametrize("lowering", [0.0, 10.0])
def test_block_size_changes_nothing_beyond_rounding(lowering):
    operands, labels = two_models(50, 32, 900, torch.float32)
    upstream = torch.ones(50)
    results = []
    for block_bytes in (1, 9 * 900 * 12, 64 << 20):
        with mock.patch.object(logits_blocks, "BLOCK_BYTES", block_bytes):
            results.append(run(ours, operands, labels, upstream, lowering=lowering))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)


def test_gradcheck_and_opcheck():
    operands, labels = two_models(5, 4, 7, torch.float64, memorised=False)
    leaves = [x.requires_grad_() for x in operands[:3]]
    for options in SETTINGS:
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: ours([h, w, b, *operands[3:]], labels, **o), leaves
        )
    op = torch.ops.loku_kernels.linear_kl_divergence.default
    for dtype in DTYPES[:2]:
        (h, w, b, *reference), labels = two_models(5, 8, 33, dtype)
        rows = labels, IGNORE
        torch.library.opcheck(op, (h.requires_grad_(), w, b, *reference, *rows, 0.0, 1.0, 0.0, True))
        torch.library.opcheck(op, (h, w.requires_grad_(), None, *reference, *rows, 5.0, 0.5, 10.0, True))
        torch.library.opcheck(op, (h.detach(), w.detach(), b, *reference, *rows, 0.0, 1.0, 10.0, False))


def test_one_head_for_both_and_other_sizes():
    (hidden, weight, bias, *reference), labels = two_models(12, 16, 101, torch.float64)
    same = linear_kl_divergence_loss(hidden, weight, reference[0], labels, bias)
    mean = eager([hidden, weight, bias, reference[0], weight, bias], labels).sum() / (labels != IGNORE).sum()
    torch.testing.assert_close(same, mean)
    # A trainable head serves both models, and gets no gradient from the reference.
    leaf = weight.clone().requires_grad_()
    linear_kl_divergence_loss(hidden, leaf, reference[0], labels, bias).backward()
    other = weight.clone().requires_grad_()
    exact = eager([hidden, other, bias, reference[0], weight, bias], labels).sum() / (labels != IGNORE).sum()
    exact.backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    # The reference may have other hidden states than the model.
    wider = torch.randn(12, 24, dtype=torch.float64), torch.randn(101, 24, dtype=torch.float64), None
    operands = [hidden, weight, bias, *wider]
    torch.testing.assert_close(ours(operands, labels), eager(operands, labels))


def test_the_same_model_diverges_by_nothing():
    for dtype in DTYPES:
        (hidden, weight, bias, *_), labels = two_models(24, 16, 301, dtype)
        divergence, grads = run(ours, [hidden, weight, bias] * 2, labels, torch.ones(24))
        assert divergence.eq(0).all() and all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lowered_is_undial(dtype):
    """The loss is the cross-entropy with the lowered reference less its entropy; the gradient is the same.

    The lowered reference of a memorised label is far from the reference. ``q / (1 - q_t (1 - exp(-10)))``
    would lose most digits of float32 there.
    """
    (hidden, weight, bias, *_), labels = two_models(24, 16, 301, dtype)
    memorised = slice(1, None)  # each label's logit leads by 20 nats
    labels[memorised] = logits_of(hidden, weight, bias)[memorised].argmax(-1)
    leader = weight[labels[memorised]]
    hidden[memorised] = 20 * leader / (leader @ leader.t()).diagonal()[:, None]
    labels[5] = IGNORE
    operands = [hidden, weight, bias, hidden + 0.01, weight, bias]
    wide = [x.double() for x in operands]
    counted = labels != IGNORE
    target_id = labels.clamp(min=0)[:, None]
    assert logits_of(*wide[3:]).softmax(-1).gather(1, target_id)[memorised].median() > 0.999
    target = lowered_logits(wide, labels, 10.0).softmax(-1)
    assert target.gather(1, target_id)[memorised].median() < 0.9
    leaf = wide[0].clone().requires_grad_()
    exact = cross_entropy(logits_of(leaf, *wide[1:3]), target, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact[counted].sum(), leaf)
    entropy = -(target * target.log()).sum(-1)
    loss, grads = run(ours, operands, labels, torch.ones(24), lowering=10.0)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype is torch.float32 else {}
    torch.testing.assert_close(loss.double()[counted], (exact - entropy)[counted].detach(), **tolerance)
    torch.testing.assert_close(grads[0].double(), exact_grad, **tolerance)


def test_lowering_of_a_softcap_comes_after_it():
    """A lowering far above the softcap takes the label out of the target."""
    operands, labels = two_models(12, 16, 40, torch.float64)
    loss = ours(operands, labels, softcap=2.0, lowering=200.0)
    others = [i for i in range(12) if labels[i] != IGNORE]
    log_p = logits_of(*operands[:3], softcap=2.0).log_softmax(-1)
    logits = logits_of(*operands[3:], softcap=2.0).scatter(1, labels[:, None].clamp(min=0), -torch.inf)
    q = logits.softmax(-1)
    exact = (torch.special.xlogy(q, q) - q * log_p).sum(-1)
    torch.testing.assert_close(loss[others], exact[others])


def test_reductions_and_shapes():
    operands, labels = two_models(24, 16, 301, torch.float32)
    hidden, weight, bias, reference_hidden, _, _ = operands
    arguments = hidden, weight, reference_hidden
    none = linear_kl_divergence_loss(*arguments, labels, bias, reduction="none")
    for reduction, expected in (("sum", none.sum()), ("mean", none.sum() / 23)):
        torch.testing.assert_close(
            linear_kl_divergence_loss(*arguments, labels, bias, reduction=reduction), expected
        )
    batched = linear_kl_divergence_loss(
        hidden.view(4, 6, -1),
        weight,
        reference_hidden.view(4, 6, -1),
        labels.view(4, 6),
        bias,
        reduction="none",
    )
    torch.testing.assert_close(batched.flatten(), none)
    counted = labels != IGNORE
    without = linear_kl_divergence_loss(hidden[counted], weight, reference_hidden[counted], bias=bias)
    torch.testing.assert_close(without, none.sum() / 23)
    assert (none >= 0).all() and (none[counted] > 1e-4).all()


def test_masked_and_extreme_words():
    """Words that both models mask give no NaN, as in torch, and a gap of hundreds of nats no overflow."""
    (hidden, weight, bias, *reference), labels = two_models(9, 8, 40, torch.float32)
    masked = torch.arange(40) % 3 == 0
    kept = [
        hidden,
        weight[~masked],
        bias[~masked],
        reference[0],
        reference[1][~masked],
        reference[2][~masked],
    ]
    bias[masked], reference[2][masked] = -torch.inf, -torch.inf
    exact, exact_grads = run(eager, kept, labels, torch.ones(9))
    divergence, grads = run(ours, [hidden, weight, bias, *reference], labels, torch.ones(9))
    torch.testing.assert_close(divergence, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], exact_grads[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[1][~masked], exact_grads[1], rtol=1e-4, atol=1e-6)
    assert grads[1][masked].eq(0).all() and grads[2][masked].eq(0).all()

    far = [
        100 * hidden,
        weight,
        bias.nan_to_num(neginf=0.0),
        -100 * hidden,
        weight,
        bias.nan_to_num(neginf=0.0),
    ]
    exact, exact_grads = run(eager, [x.double() for x in far], labels, torch.ones(9))
    divergence, grads = run(ours, far, labels, torch.ones(9))
    torch.testing.assert_close(divergence.double(), exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grads[0].double(), exact_grads[0], rtol=1e-4, atol=1e-4)


def test_empty_and_all_ignored():
    weight = torch.randn(9, 4, requires_grad=True)
    for n in (0, 3):
        hidden = torch.randn(n, 4, requires_grad=True)
        loss = linear_kl_divergence_loss(hidden, weight, torch.randn(n, 4), torch.full((n,), IGNORE))
        loss.backward()
        assert loss.item() == 0 and hidden.grad.eq(0).all() and weight.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_linear(dtype):
    operands, labels = two_models(24, 16, 301, torch.float32)
    operands[0].requires_grad_()
    with torch.autocast("cpu", dtype):
        divergence = ours(operands, labels)
    assert torch.equal(divergence, ours([x.to(dtype) for x in operands], labels))
    divergence.sum().backward()
    assert operands[0].grad.dtype == torch.float32 and operands[0].grad.abs().sum() > 0


def test_compile():
    operands, labels = two_models(24, 16, 301, torch.float32)
    operands[0].requires_grad_()

    def step(hidden):
        return ours([hidden * 2, *operands[1:]], labels).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(operands[0]), operands[0])
    torch.testing.assert_close(grad, torch.autograd.grad(step(operands[0]), operands[0])[0])


def test_errors():
    (hidden, weight, bias, *_), labels = two_models(6, 4, 9, torch.float32)
    with pytest.raises(ValueError, match=r"of the reference model: hidden must have shape \(\.\.\., 4\)"):
        linear_kl_divergence_loss(hidden, weight, hidden[:, :3], labels)
    with pytest.raises(ValueError, match=r"the rows of hidden, \(6,\), got \(5,\)"):
        linear_kl_divergence_loss(hidden, weight, hidden[:5], labels)
    with pytest.raises(ValueError, match="both be float64 or both be narrower"):
        linear_kl_divergence_loss(hidden, weight, hidden.double(), labels, reference_weight=weight.double())
    with pytest.raises(ValueError, match="as many rows as weight, 9, got 8"):
        linear_kl_divergence_loss(hidden, weight, hidden, labels, reference_weight=weight[:8])
    with pytest.raises(ValueError, match=r"\(9,\), got \(8,\)"):
        linear_kl_divergence_loss(hidden, weight, hidden, labels, bias[:8])
    with pytest.raises(ValueError, match="lowering must be finite and not negative, got -1"):
        linear_kl_divergence_loss(hidden, weight, hidden, labels, lowering=-1.0)
    with pytest.raises(ValueError, match="pass labels"):
        linear_kl_divergence_loss(hidden, weight, hidden, lowering=1.0)
    for bad in (-1, 9):
        with pytest.raises(IndexError, match=rf"label {bad} at position 2 is neither in \[0, 9\)"):
            linear_kl_divergence_loss(
                hidden, weight, hidden, labels.index_fill(0, torch.tensor([2]), bad), lowering=1.0
            )
        linear_kl_divergence_loss(hidden, weight, hidden, labels.index_fill(0, torch.tensor([2]), bad))
    with pytest.raises(ValueError, match="reduction must be"):
        linear_kl_divergence_loss(hidden, weight, hidden, reduction="batchmean")


@needs_proc
def test_memory_is_a_block():
    n, d, v = 192, 32, 100_000  # each model has 73 MiB of logits, a block at most 16 MiB
    operands, _ = two_models(n, d, v, torch.float32, bias=False)
    hidden, weight, _, reference, _, _ = operands
    hidden.requires_grad_()
    linear_kl_divergence_loss(hidden[:4], weight, reference[:4]).backward()
    peak = PeakMemory()
    linear_kl_divergence_loss(hidden, weight, reference).backward()
    assert peak.extra() < 32 << 20
    weight.requires_grad_()
    peak = PeakMemory()
    linear_kl_divergence_loss(hidden, weight, reference).backward()
    assert peak.extra() < (32 << 20) + 2 * weight.nbytes  # the gradient, and the sum that autograd makes
