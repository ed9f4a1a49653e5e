"""The public functions with their formulas in plain torch, and the ways to ask torch for derivatives of them.

A function takes leaves and returns a scalar. A way takes such a function and its leaves, and returns tensors.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd import functional as autograd
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loku_kernels import (
    cross_entropy,
    cross_entropy_loss,
    ihl_loss,
    inverted_hinge,
    linear_cross_entropy_loss,
    linear_ihl_loss,
    linear_kl_divergence_loss,
    linear_softmax_triplet,
    softmax_triplet,
    triplet_loss,
)

LABELS = torch.tensor([1, 6, -100, 0, 3])
SOFTCAP = {"softcap": 2.5, "logit_scale": 0.7}
SHAPES = {"logits": (5, 7), "triplet": (5, 3), "hidden": (5, 3), "weight": (7, 3), "bias": (7,)}


def _numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


UPSTREAM, UPSTREAM_OF_TRIPLETS = _numbers((5,), 7), _numbers((5, 3), 8)
REFERENCE_HIDDEN, REFERENCE_WEIGHT = _numbers((5, 3), 6), _numbers((7, 3), 9)


def operands_of(names, dtype=torch.float64, seed=11):
    """Return operands by their names. No two logits are tied."""
    return {name: _numbers(SHAPES[name], seed + i).to(dtype) for i, name in enumerate(names)}


# Formulas in plain torch, in float64


def plain_triplet(logits):
    logits, counted = logits.double(), LABELS != -100
    target_id = LABELS.where(counted, 0)[..., None]
    others = logits.scatter(-1, target_id, -torch.inf)
    runner_up_id = others.detach().argmax(-1, keepdim=True)
    rest = others.scatter(-1, runner_up_id, -torch.inf).logsumexp(-1, keepdim=True)
    triplet = torch.cat([logits.gather(-1, target_id), logits.gather(-1, runner_up_id), rest], -1)
    return triplet.where(counted[..., None], 0.0)


def plain_logits(hidden, weight, bias, softcap=None, logit_scale=1.0):
    logits = logit_scale * linear(hidden, weight, bias)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def reference_of(settings, dtype):
    """Return the reference's hidden states, and its weight, or None for the model's head."""
    return REFERENCE_HIDDEN.to(dtype), None if "softcap" in settings else REFERENCE_WEIGHT.to(dtype)


def plain_divergence(hidden, weight, bias, lowering=0.0, **settings):
    reference_hidden, reference_weight = reference_of(settings, hidden.dtype)
    reference_head = (weight, bias) if reference_weight is None else (reference_weight, None)
    log_p = plain_logits(hidden, weight, bias, **settings).log_softmax(-1)
    original = plain_logits(reference_hidden, *reference_head, **settings)
    # one_hot looks at its values, which torch.func.linearize refuses.
    lowered = torch.zeros_like(original).scatter(-1, LABELS.clamp(min=0)[..., None], lowering)
    log_q = (original - lowered).log_softmax(-1).detach()
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def reduced(losses, reduction):
    counted = LABELS != -100
    losses = losses.where(counted, 0.0)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted.sum()}[reduction]


def scalar(x):
    """Turn a loss, the losses of the rows or triplets into one number."""
    if x.dim() == 0:
        return x.double()
    return (x.double() * (UPSTREAM if x.dim() == 1 else UPSTREAM_OF_TRIPLETS)).sum()


def functions(reduction="mean"):
    """Return the functions by name, each as the names of its leaves, the function and its formula."""
    of_logits, of_head, found = ("logits",), ("hidden", "weight", "bias"), {}

    def add(name, leaves, function, formula):
        found[name] = leaves, (lambda *x: scalar(function(*x))), (lambda *x: scalar(formula(*x)))

    add("softmax_triplet", of_logits, lambda y: softmax_triplet(y, LABELS)[0], plain_triplet)
    losses = {
        "inverted_hinge": (inverted_hinge, ihl_loss, linear_ihl_loss),
        "cross_entropy": (cross_entropy, cross_entropy_loss, linear_cross_entropy_loss),
    }
    for name, (of_triplet, on_logits, from_hidden) in losses.items():

        def plain(triplet, of_triplet=of_triplet):
            return reduced(of_triplet(triplet), reduction)

        def fused(triplet, name=name):
            return triplet_loss(name, triplet, LABELS, reduction=reduction)

        def logits_loss(y, loss=on_logits):
            return loss(y, LABELS, reduction=reduction)

        def plain_logits_loss(y, plain=plain):
            return plain(plain_triplet(y))

        add(f"triplet_loss {name}", ("triplet",), fused, plain)
        add(on_logits.__name__, of_logits, logits_loss, plain_logits_loss)
        for suffix, settings in (("", {}), (" capped", SOFTCAP)):

            def linear_loss(h, w, b, loss=from_hidden, settings=settings):
                return loss(h, w, LABELS, b, reduction=reduction, **settings)

            def plain_linear_loss(h, w, b, plain=plain, settings=settings):
                return plain(plain_triplet(plain_logits(h, w, b, **settings)))

            add(from_hidden.__name__ + suffix, of_head, linear_loss, plain_linear_loss)

    def in_place(y):
        return ihl_loss(y * 1, LABELS, reduction=reduction, inplace=True)

    add(
        "ihl_loss in place",
        of_logits,
        in_place,
        lambda y: reduced(inverted_hinge(plain_triplet(y)), reduction),
    )
    for suffix, settings in (("", {}), (" capped", SOFTCAP)):

        def linear_triplet(h, w, b, settings=settings):
            return linear_softmax_triplet(h, w, LABELS, b, **settings)[0]

        def plain_linear_triplet(h, w, b, settings=settings):
            return plain_triplet(plain_logits(h, w, b, **settings))

        add("linear_softmax_triplet" + suffix, of_head, linear_triplet, plain_linear_triplet)
    for suffix, settings in (("", {}), (" capped", SOFTCAP), (" lowered", {"lowering": 3.0})):

        def divergence(h, w, b, settings=settings):
            other, other_weight = reference_of(settings, h.dtype)
            return linear_kl_divergence_loss(
                h, w, other, LABELS, b, reference_weight=other_weight, reduction=reduction, **settings
            )

        def plain_divergence_loss(h, w, b, settings=settings):
            return reduced(plain_divergence(h, w, b, **settings), reduction)

        add("linear_kl_divergence_loss" + suffix, of_head, divergence, plain_divergence_loss)
    return found


# Ways


def leaves_of(leaves):
    return [x.detach().clone().requires_grad_() for x in leaves]


def constants(leaves):
    return tuple(x.detach().clone() for x in leaves)


def tangents(leaves):
    return tuple(x.detach().cos() for x in leaves)


def every(leaves):
    return tuple(range(len(leaves)))


def squares(tensors):
    return sum(x.double().square().sum() for x in tensors)


def gradients_of(loss, leaves, *args, **kwargs):
    return torch.autograd.grad(loss, leaves, *args, allow_unused=True, materialize_grads=True, **kwargs)


def first(function, leaves):
    leaves = leaves_of(leaves)
    return gradients_of(function(*leaves), leaves)


def penalty(function, leaves):
    """Compute the gradient of a penalty of the gradient, beside another term of the leaves."""
    leaves = leaves_of(leaves)
    gradients = gradients_of(function(*leaves), leaves, create_graph=True)
    return gradients_of(squares(gradients) + squares(leaves), leaves)


def penalty_by_backward(function, leaves):
    leaves = leaves_of(leaves)
    function(*leaves).backward(create_graph=True)
    loss = squares(x.grad for x in leaves)
    for x in leaves:
        x.grad = None
    loss.backward()
    return [x.grad for x in leaves]


def third(function, leaves):
    leaves = leaves_of(leaves)
    gradients = gradients_of(function(*leaves), leaves, create_graph=True)
    gradients = gradients_of(squares(gradients), leaves, create_graph=True)
    return gradients_of(squares(gradients), leaves)


def penalty_of_a_batch(function, leaves):
    leaves = leaves_of(leaves)
    loss = function(*leaves)
    factors = torch.tensor([1.0, 2.0], dtype=loss.dtype)
    gradients = gradients_of(loss, leaves, factors, is_grads_batched=True, create_graph=True)
    return gradients_of(squares(gradients), leaves)


def batch_of_penalties(function, leaves):
    leaves = leaves_of(leaves)
    loss = squares(gradients_of(function(*leaves), leaves, create_graph=True))
    return gradients_of(loss, leaves, torch.tensor([1.0, 2.0], dtype=loss.dtype), is_grads_batched=True)


def derivative_by_the_upstream_gradient(function, leaves):
    leaves = leaves_of(leaves)
    loss = function(*leaves)
    factor = torch.full_like(loss, 1.5).requires_grad_()
    gradients = gradients_of(loss, leaves, factor, create_graph=True)
    return gradients_of(squares(gradients), [factor, *leaves])


def backward_twice(function, leaves):
    leaves = leaves_of(leaves)
    loss = function(*leaves)
    return [*gradients_of(loss, leaves, retain_graph=True), *gradients_of(loss, leaves)]


def reentrant_checkpoint(function, leaves):
    leaves = leaves_of(leaves)
    checkpoint(function, *leaves, use_reentrant=True).backward()
    return [x.grad for x in leaves]


def through_checkpoint(way):
    return lambda function, leaves: way(lambda *x: checkpoint(function, *x, use_reentrant=False), leaves)


def dual(function, leaves):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents(leaves), strict=True)]
        return list(forward_ad.unpack_dual(function(*duals)))


def dual_without_grad(function, leaves):
    with torch.no_grad():
        return dual(function, constants(leaves))


def dual_over_reverse(create_graph):
    def way(function, leaves):
        leaves = leaves_of(leaves)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents(leaves), strict=True)]
            gradients = gradients_of(function(*duals), duals, create_graph=create_graph)
            return [part for x in gradients for part in forward_ad.unpack_dual(x)]

    return way


def dual_of_the_upstream_gradient(function, leaves):
    leaves = leaves_of(leaves)
    loss = function(*leaves)
    with forward_ad.dual_level():
        factor = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 3))
        return [part for x in gradients_of(loss, leaves, factor) for part in forward_ad.unpack_dual(x)]


def func_penalty(function, leaves):
    gradient = torch.func.grad(function, every(leaves))
    return torch.func.grad(lambda *x: squares(gradient(*x)), every(leaves))(*constants(leaves))


def jvp_twice(function, leaves):
    leaves = constants(leaves)

    def slope(*x):
        return torch.func.jvp(function, x, tangents(leaves))[1]

    return torch.func.jvp(slope, leaves, tangents(leaves))


def mapped(transform):
    def way(function, leaves):
        batches = [torch.stack([x, 1.5 * x]) for x in constants(leaves)]
        return torch.func.vmap(transform(function, every(leaves)))(*batches)

    return way


def penalty_of_vmap(function, leaves):
    def over_a_batch(*x):
        return torch.func.vmap(function)(*(torch.stack([y, 1.5 * y]) for y in x)).sum()

    return penalty(over_a_batch, leaves)


class Mode(TorchDispatchMode):
    """A mode that sends every function to the registered operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def in_a_mode(way):
    def run(function, leaves):
        with Mode():
            return way(function, leaves)

    return run


def forward_in_a_mode(function, leaves):
    def forward(*x):
        with Mode():
            return function(*x)

    return penalty(forward, leaves)


def backward_in_a_mode(function, leaves):
    leaves = leaves_of(leaves)
    loss = function(*leaves)
    with Mode():
        gradients = gradients_of(loss, leaves, create_graph=True)
    return gradients_of(squares(gradients), leaves)


def of_a_subclass(way):
    def run(function, leaves):
        def of_subclass(*x):
            return function(*(y.as_subclass(Subclass) for y in x)).as_subclass(torch.Tensor)

        return way(of_subclass, leaves)

    return run


def functional(transform, **settings):
    return lambda function, leaves: transform(function, constants(leaves), **settings)


def product(transform):
    return lambda function, leaves: transform(function, constants(leaves), tangents(leaves))


def transformed(transform):
    """Return the way of a transform that takes a function and the numbers of its arguments."""
    return lambda function, leaves: transform(function, every(leaves))(*constants(leaves))


func = torch.func
FIRST = {
    "grad": first,
    "backward twice": backward_twice,
    "checkpoint, reentrant": reentrant_checkpoint,
    "checkpoint": through_checkpoint(first),
    "dual": dual,
    "dual, no grad": dual_without_grad,
    "functional.vjp": functional(autograd.vjp),
    "functional.jvp": product(autograd.jvp),
    "functional.jacobian, forward": functional(autograd.jacobian, vectorize=True, strategy="forward-mode"),
    "func.grad": transformed(func.grad),
    "func.jvp": product(func.jvp),
    "func.vjp": lambda f, leaves: func.vjp(f, *constants(leaves))[1](torch.ones((), dtype=torch.float64)),
    "func.linearize": lambda f, leaves: func.linearize(f, *constants(leaves))[1](*tangents(leaves)),
    "vmap": mapped(lambda f, _: f),
    "vmap of grad": mapped(func.grad),
    "vmap of jvp": mapped(lambda f, _: lambda *x: func.jvp(f, x, tuple(y.cos() for y in x))),
    "grad of a subclass": of_a_subclass(first),
    "dual of a subclass": of_a_subclass(dual),
    "dual in a mode": in_a_mode(dual),
}
SECOND = {
    "penalty": penalty,
    "penalty by backward": penalty_by_backward,
    "third": third,
    "batch of penalties": batch_of_penalties,
    "penalty of a batch": penalty_of_a_batch,
    "by the upstream gradient": derivative_by_the_upstream_gradient,
    "penalty through checkpoint": through_checkpoint(penalty),
    "dual over reverse": dual_over_reverse(False),
    "dual over reverse, create_graph": dual_over_reverse(True),
    "dual of the upstream gradient": dual_of_the_upstream_gradient,
    "functional.hessian": functional(autograd.hessian),
    "functional.hessian, vectorized": functional(autograd.hessian, vectorize=True),
    "functional.hessian, forward": functional(
        autograd.hessian, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.hvp": product(autograd.hvp),
    "functional.vhp": product(autograd.vhp),
    "func.hessian": transformed(func.hessian),
    "jacrev of jacrev": transformed(lambda f, n: func.jacrev(func.jacrev(f, n), n)),
    "jacfwd of jacfwd": transformed(lambda f, n: func.jacfwd(func.jacfwd(f, n), n)),
    "jacrev of jacfwd": transformed(lambda f, n: func.jacrev(func.jacfwd(f, n), n)),
    "grad of a penalty": func_penalty,
    "jvp of jvp": jvp_twice,
    "vmap of hessian": mapped(func.hessian),
    "penalty of vmap": penalty_of_vmap,
    "penalty in a mode": in_a_mode(penalty),
    "penalty, forward in a mode": forward_in_a_mode,
    "penalty, backward in a mode": backward_in_a_mode,
    "hessian in a mode": in_a_mode(transformed(func.hessian)),
    "penalty of a subclass": of_a_subclass(penalty),
    "functional.hessian of a subclass": of_a_subclass(functional(autograd.hessian)),
}


def flat(results):
    """Return the tensors of nested tuples, without their graphs."""
    if isinstance(results, torch.Tensor):
        return [results.detach()]
    return [x for part in results for x in flat(part)]


# Comparison


WAYS = FIRST | SECOND
# The gradient overwrites the logits, so it is there once. These ways ask for more, and a function that
# torch.func transforms or whose forward is in forward mode is not computed in place.
REFUSED_IN_PLACE = {
    *("backward twice", "functional.jvp", "penalty", "penalty by backward", "third", "batch of penalties"),
    *("penalty of a batch", "by the upstream gradient", "penalty through checkpoint"),
    *("dual of the upstream gradient", "functional.hessian", "functional.hessian, vectorized"),
    *("functional.hvp", "functional.vhp", "penalty in a mode", "penalty, forward in a mode"),
    *("penalty, backward in a mode", "penalty of a subclass", "functional.hessian of a subclass"),
}
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}


def check(way, name, dtype=torch.float64, reduction="mean", trained=None, tolerance=None):
    """Compare the derivatives by the leaves ``trained`` (default: all) with the formula's in float64."""
    leaf_names, function, formula = functions(reduction)[name]
    operands = operands_of(leaf_names, dtype)
    trained = trained or leaf_names

    def of_leaves(function, dtype):
        def with_constants(*leaves):
            given = dict(zip(trained, leaves, strict=True))
            return function(*(given.get(key, x.to(dtype)) for key, x in operands.items()))

        return with_constants

    leaves = [operands[key] for key in trained]
    if name == "ihl_loss in place" and way in REFUSED_IN_PLACE:
        with pytest.raises(RuntimeError, match=r"ihl_loss\(inplace=True\).* inplace=False"):
            WAYS[way](of_leaves(function, dtype), leaves)
        return
    ours = flat(WAYS[way](of_leaves(function, dtype), leaves))
    expected = flat(WAYS[way](of_leaves(formula, torch.float64), [x.double() for x in leaves]))
    assert len(ours) == len(expected)
    for x, exact in zip(ours, expected, strict=True):
        error, largest = (x.double() - exact).abs().max(), exact.abs().max()
        assert error <= (tolerance or TOLERANCES[dtype]) * largest, (
            f"{name}, {trained}: off by {error:.2e} of {largest:.2e}"
        )
