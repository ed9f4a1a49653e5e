"""The ways to a function that its kernels cannot see: modes, transforms, views and defaults of torch."""

import pytest
import torch
from kernel_inputs import planted_logits, planted_operands
from torch.fx.experimental.proxy_tensor import make_fx

from loku_kernels import (
    cross_entropy_loss,
    ihl_loss,
    linear_cross_entropy_loss,
    linear_ihl_loss,
    linear_kl_divergence_loss,
    linear_softmax_triplet,
    softmax_triplet,
)

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


def function_and_leaves(name):
    """Return a function of leaves, and the leaves."""
    if name in ON_LOGITS:
        logits, labels = planted_logits(12, 9, torch.float32)
        leaves = [logits.nan_to_num(neginf=-9.0)]
        return (lambda logits: ON_LOGITS[name](logits, labels)), [x.requires_grad_() for x in leaves]
    *leaves, labels = planted_operands(12, 4, 9, torch.float32)
    leaves = [x.requires_grad_() for x in leaves]
    return (lambda hidden, weight, bias: FROM_HIDDEN[name](hidden, weight, labels, bias)), leaves


def loss_and_gradients(function, leaves):
    loss = function(*leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_torch_change_nothing(name, monkeypatch):
    """The memory for a kernel's results is where the operands are, and in the dtype that it writes."""
    function, leaves = function_and_leaves(name)
    expected = loss_and_gradients(function, leaves)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        for block_bytes in (16 << 20, 64):
            monkeypatch.setattr("loku_kernels.logits_blocks.BLOCK_BYTES", block_bytes)
            torch.testing.assert_close(loss_and_gradients(function, leaves), expected)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


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


@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_of_the_gradient_is_refused(name):
    """The gradient is no constant, so a loss on it must not go on without it."""
    function, leaves = function_and_leaves(name)
    gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    penalty = sum(x.square().sum() for x in gradients) + sum(x.sum() for x in leaves)
    with pytest.raises(RuntimeError, match=r"differentiate twice|Trying to backward through"):
        penalty.backward()


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
