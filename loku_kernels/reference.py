"""The softmax triplet in plain torch: the readable truth, and the fallback where nothing is built.

With target t and runner-up r = argmax over v != t of y_v, a row of logits y becomes

    target = y_t        runner_up = y_r        rest = log sum over v not in {t, r} of exp(y_v)

``softmax_triplet`` is differentiable; the kernels' gradients are tested against autograd through it,
in float64. ``inverted_hinge_loss`` is the paper's formula, with no triplet in it.
"""

import torch


def softmax_triplet(logits, labels, ignore_index=-100):
    """Triplet (N, 3), float64, and runner_up_id (N,), int64, of logits (N, V) and labels (N,).

    Rows whose label is ``ignore_index`` get zeros and -1.
    """
    counted = labels != ignore_index
    target_id = labels.where(counted, 0).unsqueeze(1)
    logits = logits.double()
    others = logits.scatter(1, target_id, -torch.inf)
    runner_up_id = others.detach().argmax(1, keepdim=True)
    # All other words masked: argmax saw only -inf and may have met the target first.
    runner_up_id = runner_up_id.where(runner_up_id != target_id, (target_id == 0).long())
    rest = others.scatter(1, runner_up_id, -torch.inf).logsumexp(1)
    triplet = torch.stack([logits.gather(1, target_id)[:, 0], logits.gather(1, runner_up_id)[:, 0], rest], 1)
    return triplet.where(counted[:, None], 0.0), runner_up_id[:, 0].where(counted, -1)


def softmax_triplet_backward(
    grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, first=0, softcap=0.0
):
    """Gradient (N, C) of the logits of columns [first, first + C), float64; with a softcap, of its argument,
    from the tanh of it.

    g_target at the label, g_runner_up at the runner-up, g_rest * exp(y - rest) elsewhere.
    """
    counted = (labels != ignore_index)[:, None]
    rest = triplet[:, 2:]
    entries = logits.double()
    logits = entries * (softcap or 1.0)
    grad = grad_triplet[:, 2:] * (logits - rest).exp()
    grad = grad.where(rest != -torch.inf, 0.0)
    column = torch.arange(first, first + logits.shape[1], device=logits.device)
    grad = grad_triplet[:, :1].where(column == labels[:, None], grad)
    grad = grad_triplet[:, 1:2].where(column == runner_up_id[:, None], grad)
    if softcap:
        grad = grad * (1 - entries**2)
    return grad.where(counted, 0.0)


def triplet_columns(logits, first, labels, numbers, runner_up_id, softcap=0.0):
    """Rows whose columns come in several blocks: takes logits (N, C) of the next, from ``first`` on.

    numbers (N, 4) are target, runner_up, rest_max and the sum over the rest of exp(y - rest_max).
    Returns exp(y - rest_max) (N, C), 0 at target and runner-up, times the softcap's slope; the new numbers
    and runner_up_id; and rescale, demoted_id, demoted_share (N,) as blocks.OnlineState has them.
    """
    target, runner_up, rest_max, rest_sum = numbers.unbind(1)
    entries = logits.double()
    logits = entries * (softcap or 1.0)
    slope = 1 - entries**2 if softcap else torch.ones_like(entries)
    column = torch.arange(first, first + logits.shape[1], device=logits.device)
    is_target = column == labels[:, None]
    target = target.where(~is_target.any(1), logits.masked_fill(~is_target, 0).sum(1))
    others = logits.masked_fill(is_target, -torch.inf)
    best, best_index = others.max(1)
    better = best > runner_up
    demoted = better & (runner_up != -torch.inf)
    demoted_logit = runner_up.where(demoted, -torch.inf)
    demoted_id = runner_up_id.where(demoted, -1)
    runner_up = best.where(better, runner_up)
    runner_up_id = (first + best_index).where(better, runner_up_id)
    others = others.masked_fill(column == runner_up_id[:, None], -torch.inf)
    new_max = torch.stack([rest_max, others.amax(1), demoted_logit]).amax(0)
    reference = new_max.where(new_max != -torch.inf, 0.0)  # with nothing but masked words, exp(-inf) = 0
    terms = (others - reference[:, None]).exp()
    share = (demoted_logit - reference).exp()
    rescale = (rest_max - reference).exp()
    rest_sum = rest_sum * rescale + terms.sum(1) + share
    if softcap:
        share = share * (1 - (demoted_logit.where(demoted, 0.0) / softcap) ** 2)
    numbers = torch.stack([target, runner_up, new_max, rest_sum], 1)
    terms = (terms * slope).masked_fill(others == -torch.inf, 0.0)
    return terms, numbers, runner_up_id, rescale, demoted_id, share


def inverted_hinge_loss(logits, labels):
    """IHL (N,) of logits (N, V) and labels (N,): 1 + p_target - max over other tokens of p (Eq. 3).

    On ties the maximum, and with it the gradient, is the lowest index's.
    """
    p = logits.softmax(-1)
    is_target = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    runner_up_id = p.detach().masked_fill(is_target, -torch.inf).argmax(-1, keepdim=True)
    return 1 + p[is_target] - p.gather(-1, runner_up_id)[..., 0]
