"""Random right and wrong calls of the public functions and of the compiled core, and checks of what they do.

A check makes the call and returns its outcome: ``"right"``, or the name of the exception that refused the
arguments. It raises ``AssertionError`` for a wrong result, for a missing error and for an error without
cause. Operands lie between guards, which must not change.
"""

import random
from unittest import mock

import torch

import loku_kernels
from loku_kernels.backends import native, one_call, reference
from loku_kernels.backends.online_state import OnlineState

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LIES = [torch.float64, torch.int32, torch.bool, torch.complex64]
GUARD = 64  # elements before and after a tensor
EXPECTED = (ValueError, IndexError, TypeError, RuntimeError, NotImplementedError)
REDUCTIONS = [*3 * ["mean", "sum", "none"], "median"]
SOFTCAPS = [*10 * [None, 3.0], 0.0, -1.0, float("nan"), float("inf")]
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}


# --- memory and outcomes --------------------------------------------------------------------------


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


def own_memory(tensor):
    """Whether no two entries of the tensor share memory."""
    places = torch.arange(tensor.untyped_storage().size() // tensor.element_size())
    entries = places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1)
    return len(entries.unique()) == tensor.numel()


def outcome(function, *arguments, **keywords):
    """Return the result of a call, or its exception."""
    try:
        return function(*arguments, **keywords)
    except EXPECTED as error:
        assert str(error)
        return error


def name_of(result):
    """Return the outcome of a call: "right", or the name of its exception."""
    return type(result).__name__ if isinstance(result, Exception) else "right"


# --- logits ---------------------------------------------------------------------------------------


def strided(rng, dims, sizes=(0, 5), last=(0, 40), rows=False):
    """Draw a shape and strides with gaps, zeros and transposed dimensions; of rows the last is contiguous."""
    shape = [rng.randint(*sizes) for _ in range(dims - 1)] + [rng.randint(*last)]
    strides, step = [0] * dims, 1
    order = list(range(dims))[::-1]
    if not rows and rng.random() < 0.5:
        rng.shuffle(order)
    for dim in order:
        strides[dim] = step + (0 if rows and dim == dims - 1 else rng.choice([0, 0, 1, 3]))
        step = max(step, strides[dim] * max(1, shape[dim]))
        if rng.randint(0, 9) == 0 and not (rows and dim == dims - 1):
            strides[dim] = 0
    return shape, strides


def rows(rng):
    """Draw logits (..., V), their memory and labels (...), right and wrong as a caller may pass them."""
    dims = rng.randint(1, 4)
    shape, strides = strided(rng, dims, rows=rng.randint(0, 4) > 0)
    dtype = rng.choice(6 * FLOATS + LIES)
    seed = rng.randint(0, 2**31)
    torch.manual_seed(seed)
    logits, memory = guarded(shape, strides, dtype, None)
    label_shape = shape[:-1] if rng.randint(0, 9) else shape[:-1] + [2]
    vocab = max(1, shape[-1])
    labels = torch.randint(0, vocab, label_shape)
    kind = rng.choice(
        [*5 * ["right"], "ignored", "beyond", "huge", "negative", "int32", "strided", "strided"]
    )
    if labels.numel():
        at = rng.randint(0, labels.numel() - 1)
        if kind in ("ignored", "beyond", "huge", "negative"):
            lie = {"ignored": -100, "beyond": vocab, "huge": 2**62, "negative": -(2**63)}[kind]
            labels.view(-1)[at] = lie
    if kind == "int32":
        labels = labels.int()
    if kind == "strided":
        labels = torch.stack([labels, labels + 2**40], -1)[..., 0]
    return logits, memory, labels


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


def check_softmax_triplet(case):
    logits, memory, labels = case
    before = memory.clone()
    result = outcome(loku_kernels.softmax_triplet, logits, labels)
    assert torch.equal(memory, before)
    assert isinstance(result, tuple) == usable(logits, labels), result
    if isinstance(result, tuple):
        expected = by_reference(logits, labels)
        torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(result[1], expected[1])
    return name_of(result)


def check_loss_of_logits(case, name, reduction):
    """Check a loss of logits, and their gradient."""
    logits, memory, labels = case
    function, before = getattr(loku_kernels, name), memory.clone()
    leaf = logits.detach().requires_grad_(logits.is_floating_point())

    def both():
        loss = function(leaf, labels, reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaf)

    result = outcome(both)
    assert torch.equal(memory, before)
    assert isinstance(result, tuple) == (usable(logits, labels) and reduction != "median"), result
    if isinstance(result, tuple):
        compare_losses(result, logits, lambda x: function(x, labels, reduction=reduction))
    return name_of(result)


def check_ihl_loss_in_place(case, reduction):
    logits, memory, labels = case
    around, copy = outside(logits, memory), logits.clone()
    expanded = any(
        size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)
    )
    leaf = logits.detach().requires_grad_(logits.is_floating_point())

    def both():
        loss = loku_kernels.ihl_loss(leaf, labels, inplace=True, reduction=reduction)
        loss.sum().backward()
        return loss.detach(), leaf.grad

    result = outcome(both)
    assert torch.equal(outside(logits, memory), around)
    if logits.is_floating_point() and (expanded or not own_memory(logits)):
        assert not expanded or isinstance(result, Exception)
        return name_of(result)
    assert isinstance(result, tuple) == (usable(logits, labels) and reduction != "median"), result
    if isinstance(result, tuple):
        compare_losses(result, copy, lambda x: loku_kernels.ihl_loss(x, labels, reduction=reduction))
    return name_of(result)


def compare_losses(result, logits, function):
    """Compare a loss and its gradient with those of the float64 logits, which plain torch computes."""
    plain = logits.detach().double().requires_grad_()
    loss = function(plain)
    (gradient,) = torch.autograd.grad(loss.sum(), plain)
    torch.testing.assert_close(result[0].double(), loss.detach(), rtol=1e-4, atol=1e-4)
    rtol = TOLERANCES[logits.dtype]
    torch.testing.assert_close(result[1].double(), gradient, rtol=rtol, atol=1e-4)


def triplets(rng):
    """Draw triplets (..., 3), float64 or not, their memory and labels (...)."""
    last = rng.choice([3, 3, 3, 3, 2, 4])
    shape, strides = strided(rng, rng.randint(1, 3), last=(last, last))
    torch.manual_seed(rng.randint(0, 2**31))
    dtype = rng.choice([torch.float64] * 4 + [torch.float32])
    triplet, memory = guarded(shape, strides, dtype, None)
    labels = torch.randint(-100, 5, shape[:-1] if rng.randint(0, 9) else shape[:-1] + [2])
    labels = labels.where(labels >= 0, -100)
    return triplet, memory, labels.int() if rng.randint(0, 9) == 0 else labels


def check_triplet_loss(case, loss, reduction):
    triplet, memory, labels = case
    before, leaf = memory.clone(), triplet.detach().requires_grad_()

    def both():
        value = loku_kernels.triplet_loss(loss, leaf, labels, reduction=reduction)
        return value.detach(), *torch.autograd.grad(value.sum(), leaf)

    result = outcome(both)
    assert torch.equal(memory, before)
    right = (
        triplet.dtype == torch.float64
        and triplet.shape[-1:] == (3,)
        and labels.shape == triplet.shape[:-1]
        and labels.dtype == torch.int64
        and reduction != "median"
        and loss != "hinge"
    )
    assert isinstance(result, tuple) == right, result
    if right:
        plain = triplet.detach().requires_grad_()
        losses = getattr(loku_kernels, loss)(plain)
        value = loku_kernels.reduce_loss(losses, labels != -100, reduction)
        expected = value.detach(), *torch.autograd.grad(value.sum(), plain)
        torch.testing.assert_close(result, expected)
    return name_of(result)


# --- hidden states --------------------------------------------------------------------------------


def linear_operands(rng):
    n, d, v = rng.randint(0, 6), rng.randint(0, 9), rng.randint(0, 20)
    dtype = rng.choice(3 * [*FLOATS, torch.float64] + [torch.int32])
    torch.manual_seed(rng.randint(0, 2**31))
    hidden, weight, bias = torch.randn(n, d), torch.randn(v, d), torch.randn(v)
    labels = torch.randint(0, max(1, v), (n,))
    lie = rng.choice([*8 * [""], "label", "width", "bias", "dtype", "meta", "expanded", "reversed"])
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    if lie == "label" and n:
        labels[rng.randint(0, n - 1)] = rng.choice([-1, v, 2**40, -100])
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
    return hidden, weight, labels, rng.choice([None, bias]), lie


def check_linear(operands, name, softcap, trainable, block_bytes):
    """Check a linear function, and the gradients of its operands, with one block of logits or with many."""
    hidden, weight, labels, bias, lie = operands
    hidden, weight = hidden.detach(), weight.detach()
    if hidden.is_floating_point():
        hidden.requires_grad_()
        weight.requires_grad_(trainable and weight.is_floating_point())
    leaves = [x for x in (hidden, weight) if x.requires_grad]

    def both():
        with mock.patch("loku_kernels.logits_blocks.BLOCK_BYTES", block_bytes):
            loss = value_of(name, hidden, weight, labels, bias, softcap)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

    result = outcome(both)
    right = (
        hidden.is_floating_point()
        and len(weight) >= 2
        and lie not in ("width", "dtype", "meta")
        and not (lie == "bias" and bias is not None)
        and softcap in (None, 3.0)
    )
    if name != "linear_kl_divergence_loss":  # there a label only tells whether its row counts
        right = right and bool(((labels == -100) | ((labels >= 0) & (labels < len(weight)))).all())
    assert isinstance(result, tuple) == right, result
    if right:
        assert all(x.isfinite().all() for x in result)
        if hidden.dtype in (torch.float32, torch.float64):
            wide = [None if x is None else x.detach().double() for x in (hidden, weight, bias)]
            plain = [x.requires_grad_() for x in wide[: len(leaves)]]
            loss = plain_value_of(name, *wide[:2], labels, wide[2], softcap)
            expected = loss.detach(), *torch.autograd.grad(loss, plain)
            for x, y in zip(result, expected, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-4)
    return name_of(result)


def value_of(name, hidden, weight, labels, bias, softcap):
    """Call a linear function and return a scalar. The reference of KL is the model with reversed rows."""
    if name == "linear_softmax_triplet":
        triplet, _ = loku_kernels.linear_softmax_triplet(hidden, weight, labels, bias, softcap=softcap)
        return triplet.where(triplet.isfinite(), 0.0).sum()  # two words have no rest
    if name == "linear_kl_divergence_loss":
        reference_hidden = hidden.detach().flip(0)
        return loku_kernels.linear_kl_divergence_loss(
            hidden, weight, reference_hidden, labels, bias, softcap=softcap
        )
    return getattr(loku_kernels, name)(hidden, weight, labels, bias, softcap=softcap)


def plain_value_of(name, hidden, weight, labels, bias, softcap):
    """Compute ``value_of`` by plain torch, from whole logits."""

    def logits_of(hidden):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    logits = logits_of(hidden)
    if name == "linear_softmax_triplet":
        triplet, _ = loku_kernels.softmax_triplet(logits, labels)
        return triplet.where(triplet.isfinite(), 0.0).sum()
    if name == "linear_kl_divergence_loss":
        log_p, log_q = logits.log_softmax(-1), logits_of(hidden.detach().flip(0)).log_softmax(-1).detach()
        return loku_kernels.reduce_loss((log_q.exp() * (log_q - log_p)).sum(-1), labels != -100, "mean")
    return getattr(loku_kernels, name.removeprefix("linear_"))(logits, labels)


# --- Fisher and SVD -------------------------------------------------------------------------------


def fisher_operands(rng):
    n, tokens, d, k = (rng.randint(0, 4) for _ in range(4))
    if rng.random() < 0.5:
        d, k = 9 * d + 1, 17 * k + 1
    dtype = rng.choice(FLOATS + [torch.float64, torch.int32])
    torch.manual_seed(rng.randint(0, 2**31))
    views = []
    for width in (k, d):
        _, strides = strided(rng, 3, (1, 1), (1, 1))
        strides = [strides[0] * tokens * width, strides[1] * width, rng.choice([1, 1, 2, 0])]
        views.append(guarded([n, tokens, width], strides, dtype, None))
    fisher, fisher_memory = guarded([d, k], [rng.choice([k, k + 3, 0]), 1], torch.float32, 0.0)
    lie = rng.choice(["", "", "", "shape", "dtype", "meta", "divisor"])
    return views, fisher, fisher_memory, lie


def check_accumulate_squared_grad_(operands, divided):
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
        assert lie or inputs.dtype == torch.int32 or not own_memory(fisher), result
    elif not lie and own_memory(fisher):
        grads = torch.einsum("ntd,ntk->ndk", deltas.double(), inputs.double()).square()
        expected = (grads / divisor.double()).sum((0, 2)) if divided else grads.sum(0)
        tolerance = 2**-6 if inputs.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(fisher.double(), expected, rtol=tolerance, atol=1e-3)
    return name_of(result)


RANKS = [*3 * [1, 2, 3], 0, -1, 10**12, 2.0, True, None]


def scaled_weights(rng):
    """Draw weights (batch, d, k) and row scales (batch, d), right and wrong."""
    shape, strides = strided(rng, 3, last=(0, 9))
    torch.manual_seed(rng.randint(0, 2**31))
    weights, memory = guarded(shape, strides, rng.choice(FLOATS + [torch.float64]), None)
    scales = torch.rand(shape[:2] if rng.randint(0, 9) else shape[:1]) + 0.5
    return weights, memory, scales.double() if rng.randint(0, 9) == 0 else scales


def check_row_scaled_svd(case, rank):
    weights, memory, scales = case
    before = memory.clone()
    result = outcome(loku_kernels.row_scaled_svd, weights, scales, rank)
    assert torch.equal(memory, before)
    right = (
        weights.dtype in FLOATS
        and len(weights) > 0
        and scales.shape == weights.shape[:2]
        and scales.dtype == torch.float32
        and type(rank) is int
        and 1 <= rank <= min(weights.shape[1:])
    )
    assert isinstance(result, tuple) == right, result
    if right:
        singular = torch.linalg.svdvals(scales[..., None].double() * weights.double())[:, :rank]
        largest = singular[:, :1]
        assert ((result[0] - singular).abs() <= 0.02 * largest + 1e-5).all(), (result[0], singular)
    return name_of(result)


# --- the checks between the operators and the addresses -------------------------------------------


N, V = 3, 5


def state_of_rows():
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
            **state_of_rows()._asdict(),
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


FUNCTIONS = (
    *("triplet_forward", "inverted_hinge_", "rest_probabilities_", "triplet_backward"),
    *("triplet_columns_", "scale_rows_", "mean_scale", "token_losses", "hidden_gradient"),
    *("logits_loss", "inverted_hinge_loss_", "logits_loss_backward", "hidden_loss_backward"),
    *("accumulate_squared_grad_", "_add_squares"),
)


def tensors_of(name):
    """Return the names of a function's arguments that are tensors."""
    return [key for key, value in right_arguments(name).items() if isinstance(value, torch.Tensor)]


def is_right(name, key, lie):
    """Say whether a function of ``native`` takes such a tensor all the same."""
    right = right_arguments(name)
    tensor = right[key]
    if lie.device != tensor.device:
        return False
    if key == "logits" and "out" not in right:
        # Logits of another width are right, and backends.choose sends no float64 here. A factor is broadcast.
        return lie.shape[:-1] == tensor.shape[:-1] or (name == "scale_rows_" and lie.dim() == 3)
    if key == "factor":
        return lie.shape == tensor.shape  # another dtype is converted
    if name == "mean_scale":
        return lie.dtype == torch.int64  # any number of labels is right
    if key == "weight":  # a vocabulary of any size is right
        return lie.dtype == torch.float32 and lie.shape[1:] == (2,) and len(lie) > 0
    return False


def native_lies(rng):
    """Draw a function of ``native`` and tensors, by their argument, that are not what the core would read."""
    name = rng.choice(FUNCTIONS)
    tensors = tensors_of(name)
    keys = rng.sample(tensors, min(len(tensors), rng.randint(1, 3)))
    right = right_arguments(name)
    return name, {key: rng.choice(list(lies_about(right[key]))) for key in keys}


def check_native(case):
    """Check that a function refuses a wrong tensor. Several may fit together."""
    name, lies = case
    result = outcome(call_native, name, right_arguments(name) | lies)
    if len(lies) == 1:
        assert isinstance(result, Exception) or is_right(name, *lies.popitem())
    return name_of(result)


JUNK = [None, "", "0", 0.5, float("nan"), -1, 2**70, (), (1, 2)]
CORE_FUNCTIONS = (*FUNCTIONS[:6], *FUNCTIONS[7:-1], "number_counted", "add_squares_")


def check_core(name, arguments):
    """Check that the core refuses what is no address. native.py vouches for addresses and sizes."""
    result = outcome(getattr(native._core, name), *arguments)
    assert isinstance(result, TypeError), result
    return name_of(result)


ON_LOGITS = ["ihl_loss", "cross_entropy_loss"]
LINEAR = [
    *("linear_ihl_loss", "linear_cross_entropy_loss"),
    *("linear_softmax_triplet", "linear_kl_divergence_loss"),
]
TRIPLET_LOSSES = ["inverted_hinge", "cross_entropy", "hinge"]
YES_OR_NO, BLOCKS = [False, True], [16 << 20, 64]


def one_of(draw, *choices):
    """Return a function that draws a case and one of each list of choices."""
    return lambda rng: (draw(rng), *map(rng.choice, choices))


def junk(rng):
    return rng.choice(CORE_FUNCTIONS), rng.choices(JUNK, k=rng.randint(0, 14))


# name of the calls -> the check, the function that draws its arguments, and the share of the calls of a run
CALLS = {
    "softmax_triplet": (check_softmax_triplet, one_of(rows), 0.15),
    "losses of logits": (check_loss_of_logits, one_of(rows, ON_LOGITS, REDUCTIONS), 0.15),
    "ihl_loss in place": (check_ihl_loss_in_place, one_of(rows, REDUCTIONS), 0.15),
    "triplet_loss": (check_triplet_loss, one_of(triplets, TRIPLET_LOSSES, REDUCTIONS), 0.1),
    "linear functions": (check_linear, one_of(linear_operands, LINEAR, SOFTCAPS, YES_OR_NO, BLOCKS), 0.2),
    "accumulate_squared_grad_": (check_accumulate_squared_grad_, one_of(fisher_operands, YES_OR_NO), 0.1),
    "row_scaled_svd": (check_row_scaled_svd, one_of(scaled_weights, RANKS), 0.02),
    "wrong sizes": (check_native, one_of(native_lies), 0.08),
    "no addresses": (check_core, junk, 0.05),
}


def make_call(name, seed):
    """Make the call of a seed and return its outcome."""
    check, draw, _ = CALLS[name]
    return check(*draw(random.Random(f"{name} {seed}")))
