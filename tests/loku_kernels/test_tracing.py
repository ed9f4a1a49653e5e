"""The ways to a function that its kernels cannot see: modes, transforms, views and defaults of torch."""

import contextlib

import pytest
import torch
from kernel_inputs import planted_logits, planted_operands
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy, kl_div, linear

from loku_kernels import (
    accumulate_squared_grad_,
    cross_entropy_loss,
    ihl_loss,
    inverted_hinge,
    linear_cross_entropy_loss,
    linear_ihl_loss,
    linear_kl_divergence_loss,
    linear_softmax_triplet,
    row_scaled_svd,
    softmax_triplet,
    triplet_loss,
)
from loku_kernels import cross_entropy as triplet_cross_entropy

ON_LOGITS = {
    "ihl_loss": ihl_loss,
    "ihl_loss in place": lambda logits, labels: ihl_loss(logits * 1, labels, inplace=True),
    "cross_entropy_loss": cross_entropy_loss,
    "softmax_triplet": lambda logits, labels: softmax_triplet(logits, labels)[0].sum(),
}
FROM_HIDDEN = {
    "linear_ihl_loss": linear_ihl_loss,
    "linear_cross_entropy_loss": linear_cross_entropy_loss,
    "linear_softmax_triplet": lambda *operands: linear_softmax_triplet(*operands)[0].sum(),
    "linear_kl_divergence_loss": lambda hidden, weight, labels, bias: linear_kl_divergence_loss(
        hidden, weight, torch.ones_like(hidden), labels, bias
    ),
}
NAMES = [*ON_LOGITS, *FROM_HIDDEN]


def eager_triplet(logits, labels):
    """The docstring of ``softmax_triplet``."""
    counted = labels != -100
    labels = labels.where(counted, 0)[:, None]
    target, others = logits.gather(1, labels), logits.scatter(1, labels, -torch.inf)
    runner_up, runner_up_id = others.max(1, keepdim=True)
    rest = others.scatter(1, runner_up_id, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([target, runner_up, rest], 1).double() * counted[:, None]


def eager_ihl(logits, labels):
    """The docstring of ``ihl_loss``. The runner-up of tied words is the lowest."""
    counted = labels != -100
    p, labels = logits.softmax(-1), labels.where(counted, 0)[:, None]
    runner_up_id = p.detach().scatter(-1, labels, -torch.inf).argmax(-1, keepdim=True)
    return (1 + p.gather(-1, labels) - p.gather(-1, runner_up_id))[counted].mean()


def eager_kl(hidden, weight, labels, bias):
    """The docstring of ``linear_kl_divergence_loss``."""
    log_p = linear(hidden, weight, bias).log_softmax(-1)
    log_q = linear(torch.ones_like(hidden), weight, bias).log_softmax(-1).detach()
    return kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)[labels != -100].mean()


EAGER_ON_LOGITS = {
    "ihl_loss": eager_ihl,
    "ihl_loss in place": eager_ihl,
    "cross_entropy_loss": cross_entropy,
    "softmax_triplet": lambda logits, labels: eager_triplet(logits, labels).sum(),
}
EAGER_FROM_HIDDEN = {
    "linear_ihl_loss": lambda h, w, labels, b: eager_ihl(linear(h, w, b), labels),
    "linear_cross_entropy_loss": lambda h, w, labels, b: cross_entropy(linear(h, w, b), labels),
    "linear_softmax_triplet": lambda h, w, labels, b: eager_triplet(linear(h, w, b), labels).sum(),
    "linear_kl_divergence_loss": eager_kl,
}
TWICE = [name for name in NAMES if "in place" not in name]


def function_and_leaves(name, on_logits=ON_LOGITS, from_hidden=FROM_HIDDEN):
    """Return a function of leaves, and the leaves."""
    if name in ON_LOGITS:
        logits, labels = planted_logits(12, 9, torch.float32)
        leaves = [logits.nan_to_num(neginf=-9.0)]
        return (lambda logits: on_logits[name](logits, labels)), [x.requires_grad_() for x in leaves]
    *leaves, labels = planted_operands(12, 4, 9, torch.float32)
    leaves = [x.requires_grad_() for x in leaves]
    return (lambda hidden, weight, bias: from_hidden[name](hidden, weight, labels, bias)), leaves


def function_and_oracle(name):
    """Return a function, its eager equivalent and float64 leaves of both, of a head without ties."""
    function, leaves = function_and_leaves(name)
    oracle, _ = function_and_leaves(name, EAGER_ON_LOGITS, EAGER_FROM_HIDDEN)
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in leaves]
    return function, oracle, leaves


def loss_and_gradients(function, leaves):
    loss = function(*leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves)


@contextlib.contextmanager
def defaults_of_torch(dtype):
    """A context with another default dtype, and the default device meta."""
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_torch_change_nothing(name, dtype, backend, monkeypatch):
    """The memory for a kernel's results is where the operands are, and in the dtype that it writes."""
    function, leaves = function_and_leaves(name)
    ways = [loss_and_gradients]
    if name in TWICE:
        ways.append(lambda f, leaves: torch.autograd.functional.hvp(f, tuple(leaves), tuple(leaves)))
        ways.append(lambda f, leaves: torch.func.jvp(f, tuple(leaves), tuple(leaves)))
    for way in ways:
        expected = way(function, leaves)
        with defaults_of_torch(dtype):
            for block_bytes in (16 << 20, 64):
                monkeypatch.setattr("loku_kernels.logits_blocks.BLOCK_BYTES", block_bytes)
                torch.testing.assert_close(way(function, leaves), expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_defaults_of_torch_change_no_fisher_and_no_svd(default, dtype, backend):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 5, 6, generator=generator).to(dtype)
    deltas, scales = torch.randn(2, 5, 9, generator=generator).to(dtype), torch.ones(2, 5)
    fishers = [torch.zeros(9, 6), torch.zeros(9), torch.zeros(9, 6), torch.zeros(9)]
    divisor = torch.ones(9, 6)

    def results(i):
        accumulate_squared_grad_(fishers[i], inputs, deltas)
        accumulate_squared_grad_(fishers[i + 1], inputs, deltas, divisor)
        return fishers[i], fishers[i + 1], *row_scaled_svd(inputs, scales, 2)

    expected = results(0)
    with defaults_of_torch(default):
        torch.testing.assert_close(results(2), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_before_dispatch(name):
    function, leaves = function_and_leaves(name)
    leaves = [x.detach() for x in leaves]
    graph = make_fx(function, pre_dispatch=True)(*leaves)
    torch.testing.assert_close(graph(*leaves), function(*leaves))


@pytest.mark.parametrize("name", [name for name in NAMES if "in place" not in name])
def test_a_batch_of_gradients(name):
    function, leaves = function_and_leaves(name)
    _, expected = loss_and_gradients(function, leaves)
    loss = function(*leaves)
    factors = torch.tensor([1.0, -2.0], dtype=loss.dtype)
    batches = torch.autograd.grad(loss, leaves, factors, is_grads_batched=True)
    torch.testing.assert_close(batches, tuple(torch.stack([x, -2 * x]) for x in expected))


def penalty_gradients(function, leaves):
    """Return the gradients of a penalty of the gradient."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)


@pytest.mark.parametrize("name", TWICE)
def test_a_penalty_of_the_gradient(name):
    function, oracle, leaves = function_and_oracle(name)
    torch.testing.assert_close(penalty_gradients(function, leaves), penalty_gradients(oracle, leaves))


@pytest.mark.parametrize("name", TWICE)
def test_a_product_with_the_hessian(name):
    """``hvp`` takes a missing second derivative for zeros."""
    function, oracle, leaves = function_and_oracle(name)
    vectors = tuple(x.flip(0) for x in leaves)
    for vectorize in (False, True):
        result = torch.autograd.functional.hvp(function, tuple(leaves), vectors)
        expected = torch.autograd.functional.hvp(oracle, tuple(leaves), vectors)
        torch.testing.assert_close(result, expected)
        hessians = torch.autograd.functional.hessian(function, tuple(leaves), vectorize=vectorize)
        torch.testing.assert_close(hessians, torch.autograd.functional.hessian(oracle, tuple(leaves)))


def test_a_second_derivative_of_a_frozen_head():
    hidden, weight, bias, labels = planted_operands(12, 4, 9, torch.float64)
    for ours, eager in ((linear_ihl_loss, eager_ihl), (linear_cross_entropy_loss, cross_entropy)):
        result = penalty_gradients(lambda h, ours=ours: ours(h, weight, labels, bias), [hidden])
        expected = penalty_gradients(lambda h, eager=eager: eager(linear(h, weight, bias), labels), [hidden])
        torch.testing.assert_close(result, expected)


def test_operands_that_depend_on_one_another():
    """A second derivative must not count the way from one operand to another twice."""
    hidden, _, _, labels = planted_operands(9, 4, 9, torch.float64)

    def on(loss):
        return lambda hidden: loss(hidden, hidden.tanh(), labels, hidden.sum(1))

    result = penalty_gradients(on(FROM_HIDDEN["linear_ihl_loss"]), [hidden])
    expected = penalty_gradients(on(EAGER_FROM_HIDDEN["linear_ihl_loss"]), [hidden])
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("loss", ["inverted_hinge", "cross_entropy"])
def test_derivatives_of_triplet_loss(loss):
    triplet = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, -100, 0, 5, 1])
    eager = {"inverted_hinge": inverted_hinge, "cross_entropy": triplet_cross_entropy}[loss]

    def function(triplet):
        return triplet_loss(loss, triplet, labels)

    def oracle(triplet):
        return eager(triplet)[labels != -100].mean()

    torch.testing.assert_close(penalty_gradients(function, [triplet]), penalty_gradients(oracle, [triplet]))
    tangents = (triplet,), (triplet.cos(),)
    torch.testing.assert_close(torch.func.jvp(function, *tangents), torch.func.jvp(oracle, *tangents))


@pytest.mark.parametrize("penalty", ["alone", "beside other terms"])
def test_a_second_derivative_in_place_is_refused(penalty):
    function, (leaf,) = function_and_leaves("ihl_loss in place")
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    loss = gradient.square().sum() + (0 if penalty == "alone" else leaf.sum())
    with pytest.raises(RuntimeError, match="use inplace=False"):
        torch.autograd.grad(loss, leaf, allow_unused=True)


@pytest.mark.parametrize("name", NAMES)
def test_transforms(name):
    function, oracle, leaves = function_and_oracle(name)
    every = tuple(range(len(leaves)))
    tangents = tuple(x.flip(0) for x in leaves)
    batch = [torch.stack([x, 2 * x]) for x in leaves]
    transforms = {
        "jvp": lambda f: torch.func.jvp(f, tuple(leaves), tangents),
        "grad": lambda f: torch.func.grad(f, every)(*leaves),
        "vmap": lambda f: torch.func.vmap(f)(*batch),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f, every))(*batch),
        "hessian": lambda f: torch.func.hessian(f, every)(*leaves),
        "jacfwd of grad": lambda f: torch.func.jacfwd(torch.func.grad(f, every), every)(*leaves),
    }
    for key, transform in transforms.items():
        torch.testing.assert_close(
            transform(function), transform(oracle), msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", ["ihl_loss", "linear_ihl_loss", "linear_kl_divergence_loss"])
def test_compiled_transforms(name):
    """The registered operators would lose the tangents of forward mode."""
    function, oracle, leaves = function_and_oracle(name)
    tangents = tuple(x.flip(0) for x in leaves)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run():
        return torch.func.jvp(function, tuple(leaves), tangents)

    torch.testing.assert_close(run(), torch.func.jvp(oracle, tuple(leaves), tangents))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name):
    function, oracle, leaves = function_and_oracle(name)
    leaves = [x.requires_grad_() for x in leaves]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.detach().flip(0)) for x in leaves]
        result, expected = (forward_ad.unpack_dual(f(*duals)) for f in (function, oracle))
    torch.testing.assert_close(tuple(result), tuple(expected))


@pytest.mark.parametrize("name", TWICE)
def test_forward_mode_over_a_backward(name):
    """The forward was before the dual level, and its thin backward must not lose the tangent."""
    function, leaves = function_and_leaves(name)
    loss = function(*leaves)
    with forward_ad.dual_level():
        factor = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 3))
        for gradient in torch.autograd.grad(loss, leaves, factor):
            value, tangent = forward_ad.unpack_dual(gradient)
            torch.testing.assert_close(tangent, 3 * value)


def test_functions_without_derivatives_refuse_transforms():
    """They would return constants where derivatives are asked for."""
    x = torch.ones(2, 3, 4)
    calls = {
        "accumulate_squared_grad_": lambda x: accumulate_squared_grad_(torch.zeros(4, 4), x, x).sum(),
        "row_scaled_svd": lambda x: row_scaled_svd(x, torch.ones(2, 3), 1)[0].sum(),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name} has no derivatives"):
            torch.func.grad(call)(x)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{name} has no derivatives"):
            call(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", [name for name in NAMES if "in place" not in name])
def test_an_operand_that_changed_before_the_backward_is_refused(name):
    function, leaves = function_and_leaves(name)
    for i in range(len(leaves)):
        operands = [x * 1 for x in leaves]
        loss = function(*operands)
        with torch.no_grad():
            operands[i].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_a_lazy_negation(name):
    function, leaves = function_and_leaves(name)
    leaves = [x.detach() for x in leaves]
    torch.testing.assert_close(function(*map(torch._neg_view, leaves)), function(*(-x for x in leaves)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_backward_under_autocast_is_that_of_its_forward(name, dtype):
    function, leaves = function_and_leaves(name)
    expected = loss_and_gradients(function, leaves)
    loss = function(*leaves)
    with torch.autocast("cpu", dtype):
        gradients = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close((loss.detach(), gradients), expected)
