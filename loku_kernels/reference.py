"""The softmax triplet in plain torch: the readable truth, and the fallback where nothing is built.

With target t and runner-up r = argmax over v != t of y_v, a row of logits y becomes

    target = y_t        runner_up = y_r        rest = log sum over v not in {t, r} of exp(y_v)

``softmax_triplet`` is differentiable; the kernels' gradients are tested against autograd through it,
in float64. ``inverted_hinge_loss`` is the paper's formula, with no triplet in it.
"""

import torch


def softmax_triplet(logits, labels, ignore_index=-100, softcap=0.0):
    """Triplet (N, 3), float64, and runner_up_id (N,), int64, of logits (N, V) and labels (N,).

    Rows whose label is ``ignore_index`` get zeros and -1. With a softcap the entries are the tanh of it.
    """
    counted = labels != ignore_index
    target_id = labels.where(counted, 0).unsqueeze(1)
    logits = logits.double() * (softcap or 1.0)
    others = logits.scatter(1, target_id, -torch.inf)
    runner_up_id = others.detach().argmax(1, keepdim=True)
    # All other words masked: argmax saw only -inf and may have met the target first.
    runner_up_id = runner_up_id.where(runner_up_id != target_id, (target_id == 0).long())
    rest = others.scatter(1, runner_up_id, -torch.inf).logsumexp(1)
    triplet = torch.stack([logits.gather(1, target_id)[:, 0], logits.gather(1, runner_up_id)[:, 0], rest], 1)
    return triplet.where(counted[:, None], 0.0), runner_up_id[:, 0].where(counted, -1)


def softmax_triplet_backward(grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, softcap=0.0):
    """Gradient (N, V) of the logits, float64; with a softcap, of its argument, from the tanh of it.

    g_target at the label, g_runner_up at the runner-up, g_rest * exp(y - rest) elsewhere.
    """
    counted = (labels != ignore_index)[:, None]
    rest = triplet[:, 2:]
    entries = logits.double()
    logits = entries * (softcap or 1.0)
    grad = grad_triplet[:, 2:] * (logits - rest).exp()
    grad = grad.where(rest != -torch.inf, 0.0)
    grad = grad.scatter(1, labels[:, None].where(counted, 0), grad_triplet[:, :1])
    grad = grad.scatter(1, runner_up_id[:, None].where(counted, 0), grad_triplet[:, 1:2])
    if softcap:
        grad = grad * (1 - entries**2)
    return grad.where(counted, 0.0)


def inverted_hinge_loss(logits, labels):
    """IHL (N,) of logits (N, V) and labels (N,): 1 + p_target - max over other tokens of p (Eq. 3).

    On ties the maximum, and with it the gradient, is the lowest index's.
    """
    p = logits.softmax(-1)
    is_target = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    runner_up_id = p.detach().masked_fill(is_target, -torch.inf).argmax(-1, keepdim=True)
    return 1 + p[is_target] - p.gather(-1, runner_up_id)[..., 0]
