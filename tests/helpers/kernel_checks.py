"""Comparisons of the kernels with the float64 reference, and the yardstick for their errors."""

import torch
from kernel_inputs import IGNORE

from loku_kernels import linear_softmax_triplet, softmax_triplet
from loku_kernels.backends import reference


def ulp(dtype):
    return torch.finfo(dtype).eps


def assert_as_good_as_eager(ours, eager, reference, dtype=None, ulps=4):
    """Assert an error of at most twice that of eager torch, plus a few ulps of the row's largest entry.

    Args:
        ours: The tensor (N, ...) under test.
        eager: The same tensor (N, ...) by eager torch, in the dtype of ``ours``.
        reference: The same tensor (N, ...) in float64.
        dtype: The dtype of the ulp, by default that of ``ours``.
        ulps: The number of ulps.
    """
    assert ours.dtype == eager.dtype and reference.dtype == torch.float64
    dtype = dtype or ours.dtype
    assert torch.isfinite(ours).all()
    error, allowed = ours.double() - reference, eager.double() - reference
    scale = reference.abs().flatten(1).amax(1) if reference.dim() > 1 else reference.abs()
    error, allowed = (x.abs().flatten(1).amax(1) if x.dim() > 1 else x.abs() for x in (error, allowed))
    # The reference subtracts probabilities, so it is off by a few ulps of 1 in float64.
    oracle = 8 * ulp(torch.float64) + torch.finfo(ours.dtype).smallest_normal
    bound = 2 * allowed.nan_to_num(0.0) + ulps * ulp(dtype) * scale + oracle
    worst = (error / bound).max().item()
    assert worst <= 1, f"error is {worst:.2f} of what is allowed, at row {(error / bound).argmax().item()}"


def lean_eager_ihl(logits, labels):
    """Compute IHL (N,) in plain torch, with care but without a kernel."""
    p = logits.softmax(-1)
    index = labels[:, None]
    return 1 + p.gather(1, index)[:, 0] - p.scatter(1, index, -torch.inf).amax(1)


def check_against_reference(logits, labels, seed=0):
    logits = logits.detach().requires_grad_()
    triplet, runner_up_id = softmax_triplet(logits, labels)
    exact_logits = logits.detach().double().requires_grad_()
    flat_labels = labels.reshape(-1)
    exact, exact_id = reference.softmax_triplet(exact_logits.reshape(-1, logits.shape[-1]), flat_labels)
    exact, exact_id = exact.reshape(triplet.shape), exact_id.reshape(runner_up_id.shape)

    assert triplet.dtype == torch.float64 and runner_up_id.dtype == torch.int64
    assert torch.equal(runner_up_id, exact_id)
    assert torch.equal(triplet[..., :2].detach(), exact[..., :2].detach())  # exact copies of inputs
    finite = exact[..., 2].isfinite()
    assert torch.equal(triplet[..., 2].isfinite(), finite)
    assert (triplet[..., 2] - exact[..., 2])[finite].abs().le(2e-6).all()

    upstream = torch.randn(
        triplet.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(triplet.device)
    # No gradient flows through a rest of -inf, by contract. Autograd gives NaN on the masked words there.
    torch.autograd.backward(
        [exact[..., :2], exact[..., 2].where(finite, 0.0)], [upstream[..., :2], upstream[..., 2]]
    )
    upstream[..., 2].masked_fill_(~finite, torch.nan)  # a loss may give NaN there
    triplet.backward(upstream)
    expected = exact_logits.grad.nan_to_num(0.0)
    scale = expected.abs().amax(-1, keepdim=True)
    error = (logits.grad.double() - expected).abs()
    tiny = torch.finfo(logits.dtype).smallest_normal
    assert error.le(4 * max(ulp(logits.dtype), 5e-7) * scale + tiny).all()
    assert logits.grad[labels == IGNORE].eq(0).all()


def gradients(loss_function, logits, labels, weights):
    """Return the losses of the rows, and the gradient of their weighted sum."""
    leaf = logits.clone().requires_grad_()
    loss = loss_function(leaf, labels)
    (loss * weights.to(loss.dtype)).sum().backward()
    return loss.detach(), leaf.grad


def per_row(loss_function, **options):
    return lambda logits, labels: loss_function(logits, labels, reduction="none", **options)


def eager_logits(hidden, weight, bias, softcap, logit_scale):
    logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager_triplet(hidden, weight, labels, bias, softcap=None, logit_scale=1.0):
    return reference.softmax_triplet(eager_logits(hidden, weight, bias, softcap, logit_scale), labels)


def run_linear(function, operands, labels, upstream, **options):
    """Return triplet, runner_up_id and the gradients of all operands of ``function``."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in operands]
    hidden, weight, bias = leaves
    triplet, runner_up_id = function(hidden, weight, labels, bias, **options)
    triplet.backward(upstream)
    return triplet.detach(), runner_up_id, [None if x is None else x.grad for x in leaves]


def check_linear(operands, labels, **options):
    hidden = operands[0]
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(len(labels), 3, generator=generator, dtype=torch.float64).to(hidden.device)
    wide = [None if x is None else x.double() for x in operands]
    exact, exact_id, exact_grads = run_linear(eager_triplet, wide, labels, upstream, **options)
    eager, eager_id, eager_grads = run_linear(eager_triplet, operands, labels, upstream, **options)
    ours, ours_id, grads = run_linear(linear_softmax_triplet, operands, labels, upstream, **options)

    # Either word is right if the runner-up leads by less than the error of a logit.
    sure = (ours_id == exact_id) & (eager_id == exact_id)
    assert sure.float().mean() >= (0.9 if hidden.dtype in (torch.float32, torch.float64) else 0.7)
    assert (ours_id[labels == IGNORE] == -1).all() and (ours[labels == IGNORE] == 0).all()
    assert_as_good_as_eager(ours[sure], eager[sure], exact[sure], hidden.dtype, ulps=8)  # sums of d products
    if hidden.dtype == torch.float64:
        torch.testing.assert_close(ours, exact)
        torch.testing.assert_close(grads, exact_grads)
        return
    assert_as_good_as_eager(grads[0][sure], eager_grads[0][sure], exact_grads[0][sure], ulps=8)
    if sure.all():
        # whole tensors, because each of their rows mixes all tokens
        for ours_grad, eager_grad, exact_grad in zip(
            grads[1:], eager_grads[1:], exact_grads[1:], strict=True
        ):
            if ours_grad is not None:
                flat = [x.reshape(1, -1) for x in (ours_grad, eager_grad, exact_grad)]
                assert_as_good_as_eager(*flat, ulps=8)


def exact_fisher(inputs, grad_outputs, divisor=None):
    """Compute the Fisher in float64, by one backward a sample through a real linear layer."""
    total = 0
    for x, delta in zip(inputs.double(), grad_outputs.double(), strict=True):
        weight = torch.zeros(delta.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
        torch.nn.functional.linear(x, weight).backward(delta)
        total = total + weight.grad.square()
    return total if divisor is None else (total / divisor.double()).sum(1)
