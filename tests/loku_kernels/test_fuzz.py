"""Any arguments give a Python exception or the result of plain torch, and never a crash.

``scripts/sanitize.sh`` runs this file with the address and undefined-behaviour sanitizers. There a read or
write outside a tensor ends the process. Operands lie between guards, which must not change.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loku_kernels
from loku_kernels.backends import native, one_call, reference
from loku_kernels.backends.online_state import OnlineState

pytestmark = pytest.mark.skipif(native._core is None, reason="no compiled core")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LIES = [torch.float64, torch.int32, torch.bool, torch.complex64]
GUARD = 64  # elements before and after a tensor
EXPECTED = (ValueError, IndexError, TypeError, RuntimeError, NotImplementedError)
SIZES, WIDTHS, ONE = st.integers(0, 5), st.integers(0, 40), st.just(1)
often = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def guarded(shape, strides, dtype, fill):
    """Return a view in the middle of its memory, and the memory. Strides are in elements and not negative."""
    extent = 1 + sum(stride * (size - 1) for size, stride in zip(shape, strides, strict=True) if size > 0)
    memory = (
        torch.zeros(extent + 2 * GUARD).uniform_(-4, 4)
        if fill is None
        else torch.full((extent + 2 * GUARD,), fill)
    )
    memory = memory.to(dtype)
    return memory.as_strided(shape, strides, GUARD), memory


def outside(view, memory):
    """Return the entries of the memory that the view does not reach."""
    reached = torch.zeros(len(memory), dtype=torch.bool)
    if view.numel():
        reached.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return memory[~reached].clone()


@st.composite
def strided(draw, dims, sizes=SIZES, last=WIDTHS):
    """Draw a shape and strides with gaps, zeros and transposed dimensions; the last is often contiguous."""
    shape = [draw(sizes) for _ in range(dims - 1)] + [draw(last)]
    strides, step = [0] * dims, 1
    order = draw(st.permutations(range(dims))) if draw(st.booleans()) else list(range(dims))[::-1]
    for dim in order:
        strides[dim] = step + draw(st.sampled_from([0, 0, 1, 3]))
        step = max(step, strides[dim] * max(1, shape[dim]))
        if draw(st.integers(0, 9)) == 0:
            strides[dim] = 0
    return shape, strides


@st.composite
def rows(draw):
    """Draw logits (..., V), their memory and labels (...), right and wrong as a caller may pass them."""
    dims = draw(st.integers(1, 4))
    shape, strides = draw(strided(dims))
    dtype = draw(st.sampled_from(FLOATS + FLOATS + LIES))
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    logits, memory = guarded(shape, strides, dtype, None)
    label_shape = shape[:-1] if draw(st.integers(0, 9)) else shape[:-1] + [2]
    vocab = max(1, shape[-1])
    labels = torch.randint(0, vocab, label_shape)
    kind = draw(
        st.sampled_from(["right", "right", "ignored", "beyond", "huge", "negative", "int32", "strided"])
    )
    if labels.numel():
        at = draw(st.integers(0, labels.numel() - 1))
        if kind in ("ignored", "beyond", "huge", "negative"):
            lie = {"ignored": -100, "beyond": vocab, "huge": 2**62, "negative": -(2**63)}[kind]
            labels.view(-1)[at] = lie
    if kind == "int32":
        labels = labels.int()
    if kind == "strided":
        labels = torch.stack([labels, labels + 2**40], -1)[..., 0]
    return logits, memory, labels


def outcome(function, *arguments, **keywords):
    """Return the result of a call, or its exception."""
    try:
        return function(*arguments, **keywords)
    except EXPECTED as error:
        assert str(error)
        return error


def usable(logits, labels):
    vocab = logits.shape[-1] if logits.dim() else 0
    return (
        logits.dtype in FLOATS + [torch.float64]
        and vocab >= 2
        and (logits.stride(-1) == 1 or logits.numel() == 0)
        and labels.shape == logits.shape[:-1]
        and labels.dtype == torch.int64
        and bool(((labels == -100) | ((labels >= 0) & (labels < vocab))).all())
    )


def by_reference(logits, labels):
    triplet, runner_up_id = reference.softmax_triplet(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    )
    return triplet.view(*labels.shape, 3), runner_up_id.view(labels.shape)


@often
@given(rows())
def test_softmax_triplet(case):
    logits, memory, labels = case
    before = memory.clone()
    result = outcome(loku_kernels.softmax_triplet, logits, labels)
    assert torch.equal(memory, before)
    assert isinstance(result, tuple) == usable(logits, labels), result
    if isinstance(result, tuple):
        expected = by_reference(logits, labels)
        torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(result[1], expected[1])


@often
@given(rows(), st.sampled_from(["mean", "sum", "none", "median"]))
def test_ihl_loss_in_place(case, reduction):
    logits, memory, labels = case
    if not logits.is_floating_point():
        return
    around, copy = outside(logits, memory), logits.clone()
    expanded = any(
        size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)
    )
    leaf = logits.detach().requires_grad_()
    overlapping = expanded or not _own_memory(logits)

    def both():
        loss = loku_kernels.ihl_loss(leaf, labels, inplace=True, reduction=reduction)
        loss.sum().backward()
        return loss.detach(), leaf.grad

    result = outcome(both)
    assert torch.equal(outside(logits, memory), around)
    if overlapping:
        return
    assert isinstance(result, tuple) == (usable(logits, labels) and reduction != "median"), result
    if isinstance(result, tuple):
        plain = copy.double().requires_grad_()
        loss = loku_kernels.ihl_loss(plain, labels, reduction=reduction)
        loss.sum().backward()
        torch.testing.assert_close(result[0].double(), loss.detach(), rtol=1e-4, atol=1e-4)
        rtol = 2**-7 if logits.dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(result[1].double(), plain.grad, rtol=rtol, atol=1e-4)


def _own_memory(tensor):
    """Whether no two entries of the tensor share memory."""
    places = torch.arange(tensor.untyped_storage().size() // tensor.element_size())
    entries = places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1)
    return len(entries.unique()) == tensor.numel()


@st.composite
def linear_operands(draw):
    n, d, v = draw(st.integers(0, 6)), draw(st.integers(0, 9)), draw(st.integers(0, 20))
    dtype = draw(st.sampled_from(FLOATS + [torch.float64, torch.int32]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    hidden, weight, bias = torch.randn(n, d), torch.randn(v, d), torch.randn(v)
    labels = torch.randint(0, max(1, v), (n,))
    lie = draw(st.sampled_from(["", "", "label", "width", "bias", "dtype", "meta", "expanded", "reversed"]))
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    if lie == "label" and n:
        labels[draw(st.integers(0, n - 1))] = draw(st.sampled_from([-1, v, 2**40, -100]))
    if lie == "width":
        weight = weight.new_zeros(v, d + 1)
    if lie == "bias":
        bias = bias.new_zeros(v + 1)
    if lie == "dtype":
        hidden = hidden.to(torch.float64 if dtype != torch.float64 else torch.float32)
    if lie == "meta":
        weight = weight.to("meta")
    if lie == "expanded":
        hidden, weight = hidden[:1].expand(n and len(hidden), d), weight[:, :1].expand(v, d)
    if lie == "reversed":
        hidden, weight = hidden.t().contiguous().t(), weight.t().contiguous().t()
    return hidden, weight, labels, draw(st.sampled_from([None, bias])), lie


@often
@given(linear_operands(), st.sampled_from([None, 3.0, 0.0, -1.0, float("nan")]), st.booleans())
def test_linear_ihl_loss(operands, softcap, trainable):
    hidden, weight, labels, bias, lie = operands
    if hidden.is_floating_point():
        hidden = hidden.detach().requires_grad_()
        weight = weight.detach().requires_grad_(trainable and weight.is_floating_point())

    def both():
        loss = loku_kernels.linear_ihl_loss(hidden, weight, labels, bias, softcap=softcap)
        loss.backward()
        return loss.detach(), hidden.grad

    result = outcome(both)
    right = (
        hidden.is_floating_point()
        and len(weight) >= 2
        and lie not in ("width", "dtype", "meta")
        and not (lie == "bias" and bias is not None)
        and bool(((labels == -100) | ((labels >= 0) & (labels < len(weight)))).all())
        and softcap in (None, 3.0)
    )
    assert isinstance(result, tuple) == right, result
    if right:
        eager = hidden.detach().double().requires_grad_()
        logits = torch.nn.functional.linear(
            eager, weight.detach().double(), None if bias is None else bias.double()
        )
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        loss = loku_kernels.ihl_loss(logits, labels)
        loss.backward()
        if hidden.dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(result[0].double(), loss.detach(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(result[1].double(), eager.grad, rtol=1e-3, atol=1e-4)
        assert torch.isfinite(result[0]) and torch.isfinite(result[1]).all()


@st.composite
def fisher_operands(draw):
    n, tokens, d, k = (draw(st.integers(0, 4)) for _ in range(4))
    if draw(st.booleans()):
        d, k = 9 * d + 1, 17 * k + 1
    dtype = draw(st.sampled_from(FLOATS + [torch.float64, torch.int32]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    views = []
    for width in (k, d):
        _, strides = draw(strided(3, ONE, ONE))
        strides = [strides[0] * tokens * width, strides[1] * width, draw(st.sampled_from([1, 1, 2, 0]))]
        views.append(guarded([n, tokens, width], strides, dtype, None))
    fisher, fisher_memory = guarded([d, k], [draw(st.sampled_from([k, k + 3, 0])), 1], torch.float32, 0.0)
    lie = draw(st.sampled_from(["", "", "", "shape", "dtype", "meta", "divisor"]))
    return views, fisher, fisher_memory, lie


@often
@given(fisher_operands(), st.booleans())
def test_accumulate_squared_grad_(operands, divided):
    ((inputs, inputs_memory), (deltas, deltas_memory)), fisher, fisher_memory, lie = operands
    divisor = torch.rand(fisher.shape) + 0.5 if divided else None
    if divided:
        fisher, fisher_memory = guarded([len(fisher)], [2], torch.float32, 0.0)
    if lie == "shape":
        fisher = fisher[..., :-1] if fisher.numel() else fisher[None]
    if lie == "dtype":
        deltas = deltas.to(torch.float64 if deltas.dtype != torch.float64 else torch.float32)
    if lie == "meta":
        deltas = deltas.to("meta")
    if lie == "divisor" and divided:
        divisor = divisor[:, :0]
    kept = [memory.clone() for memory in (inputs_memory, deltas_memory)]
    around = outside(fisher, fisher_memory)
    result = outcome(loku_kernels.accumulate_squared_grad_, fisher, inputs, deltas, divisor)
    for memory, before in zip((inputs_memory, deltas_memory), kept, strict=True):
        assert torch.equal(memory, before)
    assert torch.equal(outside(fisher, fisher_memory), around)
    if isinstance(result, Exception):
        assert lie or inputs.dtype == torch.int32 or not _own_memory(fisher), result
    elif not lie and _own_memory(fisher):
        grads = torch.einsum("ntd,ntk->ndk", deltas.double(), inputs.double()).square()
        expected = (grads / divisor.double()).sum((0, 2)) if divided else grads.sum(0)
        tolerance = 2**-6 if inputs.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(fisher.double(), expected, rtol=tolerance, atol=1e-3)


# The checks between the operators and the addresses


N, V = 3, 5


def _state():
    return OnlineState.start(torch.zeros(N, dtype=torch.int64))


def right_arguments(name):
    """Return right arguments, by name, of a function of ``native``."""
    labels, triplet = torch.zeros(N, dtype=torch.int64), torch.zeros(N, 3, dtype=torch.float64)
    logits, saved = torch.zeros(N, V), torch.zeros(7 * N, dtype=torch.float64)
    return {
        "triplet_forward": {"logits": logits, "labels": labels, "ignore_index": -100},
        "inverted_hinge_": {
            "logits": logits,
            "labels": labels,
            "ignore_index": -100,
            "scale": torch.ones((), dtype=torch.float64),
        },
        "triplet_backward": {
            "grad_triplet": triplet,
            "logits": logits,
            "labels": labels,
            "ignore_index": -100,
            "triplet": triplet,
            "runner_up_id": labels,
            "out": torch.zeros(N, V),
        },
        "triplet_columns_": {
            "logits": logits,
            "first_column": 0,
            "labels": labels,
            **_state()._asdict(),
            "softcap": 0.0,
            "store": True,
        },
        "rest_probabilities_": {"logits": logits, "labels": labels, "ignore_index": -100},
        "scale_rows_": {"logits": logits, "factor": torch.ones(N)},
        "mean_scale": {"labels": labels, "ignore_index": -100},
        "token_losses": {
            "loss": "inverted_hinge",
            "triplet": triplet,
            "labels": labels,
            "ignore_index": -100,
            "reduction": "none",
            "dtype": torch.float32,
            "want_grad": True,
        },
        "logits_loss": {
            "loss": "cross_entropy",
            "logits": logits,
            "labels": labels,
            "ignore_index": -100,
            "reduction": "none",
            "dtype": torch.float32,
        },
        "inverted_hinge_loss_": {
            "logits": logits,
            "labels": labels,
            "ignore_index": -100,
            "reduction": "mean",
            "dtype": torch.float32,
            "late": False,
        },
        "logits_loss_backward": {
            "saved": saved,
            "logits": logits,
            "labels": labels,
            "ignore_index": -100,
            "factor": torch.ones(N),
        },
        "hidden_loss_backward": {
            "saved": saved,
            "factor": torch.ones(N),
            "weight": torch.zeros(V, 2),
            "labels": labels,
            "direction": torch.zeros(N, 2),
            "softcap": 0.0,
            "logit_scale": 1.0,
        },
        "hidden_gradient": {
            "grad_triplet": triplet,
            "factor": torch.ones(N),
            "weight": torch.zeros(V, 2),
            "labels": labels,
            "triplet": triplet,
            "runner_up_id": labels,
            "direction": torch.zeros(N, 2),
            "softcap": 0.0,
            "logit_scale": 1.0,
        },
        "accumulate_squared_grad_": {
            "fisher": torch.zeros(4),
            "inputs": torch.zeros(2, N, V),
            "grad_outputs": torch.zeros(2, N, 4),
            "divisor": torch.ones(4, V),
        },
        "_add_squares": {
            "fisher": torch.zeros(N, V),
            "product": torch.zeros(N, V, dtype=torch.bfloat16),
            "scratch": None,
        },
    }[name]


def call_native(name, arguments):
    if name == "triplet_columns_":
        state = OnlineState(*(arguments.pop(field) for field in OnlineState._fields))
        arguments.update(state=state)
    getattr(one_call if hasattr(one_call, name) else native, name)(**arguments)


def lies_about(tensor):
    """Yield tensors that are smaller, larger, of another dtype or on meta; the first has no memory."""
    yield tensor.new_empty(0)
    yield tensor.to("meta")
    yield tensor.to(torch.float64 if tensor.dtype == torch.float32 else torch.float32)
    yield tensor[None]
    for dim in range(tensor.dim()):
        yield tensor.narrow(dim, 0, tensor.shape[dim] - 1)
        yield torch.cat([tensor, tensor], dim)


@pytest.mark.parametrize(
    "name",
    [
        *("triplet_forward", "inverted_hinge_", "rest_probabilities_", "triplet_backward"),
        *("triplet_columns_", "scale_rows_", "mean_scale", "token_losses", "hidden_gradient"),
        *("logits_loss", "inverted_hinge_loss_", "logits_loss_backward", "hidden_loss_backward"),
        *("accumulate_squared_grad_", "_add_squares"),
    ],
)
def test_no_address_without_its_size(name):
    call_native(name, right_arguments(name))
    right = right_arguments(name)
    for key in (key for key, value in right.items() if isinstance(value, torch.Tensor)):
        for lie in lies_about(right_arguments(name)[key]):
            same_place = lie.device == right[key].device
            if key == "logits" and "out" not in right and same_place:
                if lie.shape[:-1] == right[key].shape[:-1]:
                    continue  # logits of another width are right; backends.choose sends no float64 here
                if name == "scale_rows_" and lie.dim() == 3:
                    continue  # the factor is broadcast
            if key == "factor" and same_place and lie.shape == right[key].shape:
                continue  # another dtype is converted
            if name == "mean_scale" and same_place and lie.dtype == torch.int64:
                continue  # any number of labels is right
            if key == "weight" and same_place and lie.dtype == torch.float32 and lie.shape[1:] == (2,):
                if len(lie):
                    continue  # a vocabulary of any size is right
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                call_native(name, {**right_arguments(name), key: lie})


# Tensors whose shape, by a stride of 0, is larger than any memory


HUGE = 2**60


@pytest.mark.parametrize("dtype", FLOATS)
def test_sizes_that_no_machine_has(dtype):
    one = torch.zeros(1, 4, dtype=dtype)
    label = torch.zeros(1, dtype=torch.int64)
    calls = [
        lambda: loku_kernels.softmax_triplet(one.expand(HUGE, 4), label.expand(HUGE)),
        lambda: loku_kernels.ihl_loss(one.expand(HUGE, 4), label.expand(HUGE)),
        lambda: loku_kernels.linear_ihl_loss(one.expand(HUGE, 4), one.expand(8, 4), label.expand(HUGE)),
        lambda: loku_kernels.linear_kl_divergence_loss(
            one.expand(HUGE, 4), one.expand(8, 4), one.expand(HUGE, 4)
        ),
        lambda: loku_kernels.accumulate_squared_grad_(
            torch.zeros(1, 1).expand(HUGE, HUGE),
            one[None, :, :1].expand(1, 1, HUGE),
            one[None, :, :1].expand(1, 1, HUGE),
        ),
        lambda: loku_kernels.row_scaled_svd(
            one[None].expand(1, HUGE, 4), torch.ones(1, 1).expand(1, HUGE), 1
        ),
    ]
    for call in calls:
        assert isinstance(outcome(call), Exception)


@often
@given(st.data())
def test_the_core_refuses_arguments_that_are_no_addresses(data):
    """The core checks the types of its arguments; native.py vouches for addresses and sizes."""
    junk = st.one_of(st.none(), st.text(max_size=3), st.floats(), st.just(-1), st.just(2**70), st.just(()))
    functions = (
        *("triplet_forward", "triplet_backward", "inverted_hinge_", "rest_probabilities_"),
        *("triplet_columns_", "scale_rows_", "token_losses", "number_counted", "hidden_gradient"),
        *("logits_loss", "inverted_hinge_loss_", "logits_loss_backward", "hidden_loss_backward"),
        *("accumulate_squared_grad_", "add_squares_"),
    )
    name = data.draw(st.sampled_from(functions))
    with pytest.raises(TypeError):
        getattr(native._core, name)(*data.draw(st.lists(junk, max_size=14)))
