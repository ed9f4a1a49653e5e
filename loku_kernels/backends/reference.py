"""Plain torch: the formulas that every kernel is tested against, and the backend that serves every tensor.

With target t and runner-up r = argmax over v != t of y_v, a row of logits y becomes

    target = y_t        runner_up = y_r        rest = log sum over v not in {t, r} of exp(y_v)

``softmax_triplet`` is differentiable. The gradients of the kernels are tested against autograd through it, in
float64. ``inverted_hinge_loss`` is the formula of the paper, with no triplet in it.

The functions of the backend come after the formulas. They apply the formulas to a few rows at a time, so that
the float64 copies stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loku_kernels.backends.online_state import OnlineState
from loku_kernels.checks import check_label_values

PIECE_ENTRIES = 1 << 22  # entries of logits that are in float64 at a time: 32 MiB
TILE_BYTES = 6 << 20  # bytes of a tile of one sample's gradient, and of the scratch that its squaring needs
TILE_COLUMNS = 1024
TOKEN_BYTES = 1 << 20  # bytes of inputs that are converted to the dtype of the product at a time


# --- formulas -------------------------------------------------------------------------------------


def softmax_triplet(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
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
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    first_column: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Gradient (N, C), float64, of the logits of the columns [first_column, first_column + C).

    It is g_target at the label, g_runner_up at the runner-up and g_rest * exp(y - rest) elsewhere. With a
    softcap it is the gradient of the argument of tanh, and ``logits`` are the tanh.
    """
    counted = (labels != ignore_index)[:, None]
    rest = triplet[:, 2:]
    entries = logits.double()
    logits = entries * (softcap or 1.0)
    grad = grad_triplet[:, 2:] * (logits - rest).exp()
    grad = grad.where(rest != -torch.inf, 0.0)
    column = torch.arange(first_column, first_column + logits.shape[1], device=logits.device)
    grad = grad_triplet[:, :1].where(column == labels[:, None], grad)
    grad = grad_triplet[:, 1:2].where(column == runner_up_id[:, None], grad)
    if softcap:
        grad = grad * (1 - entries**2)
    return grad.where(counted, 0.0)


def triplet_columns(
    logits: Tensor,
    first_column: int,
    labels: Tensor,
    numbers: Tensor,
    runner_up_id: Tensor,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    """Take the logits (N, C) of the next columns, from ``first_column`` on, into the numbers of the rows.

    Args:
        logits: The logits (N, C), or their tanh where there is a softcap.
        first_column: The column of the vocabulary at which the block begins.
        labels: The labels (N,), int64.
        numbers: Target, runner_up, rest_max and the sum over the rest of exp(y - rest_max), (N, 4), float64.
        runner_up_id: The runner-up (N,), int64, of the columns so far.
        softcap: The softcap, 0 for none.

    Returns:
        The terms exp(y - rest_max) (N, C), which are 0 at target and runner-up and multiplied by the slope of
        the softcap; the new numbers and runner_up_id; and rescale, demoted_id and demoted_share (N,), see
        ``OnlineState``.
    """
    target, runner_up, rest_max, rest_sum = numbers.unbind(1)
    entries = logits.double()
    logits = entries * (softcap or 1.0)
    slope = 1 - entries**2 if softcap else torch.ones_like(entries)
    column = torch.arange(first_column, first_column + logits.shape[1], device=logits.device)
    is_target = column == labels[:, None]
    target = target.where(~is_target.any(1), logits.masked_fill(~is_target, 0).sum(1))
    others = logits.masked_fill(is_target, -torch.inf)
    best, best_index = others.max(1)
    better = best > runner_up
    demoted = better & (runner_up != -torch.inf)
    demoted_logit = runner_up.where(demoted, -torch.inf)
    demoted_id = runner_up_id.where(demoted, -1)
    runner_up = best.where(better, runner_up)
    runner_up_id = (first_column + best_index).where(better, runner_up_id)
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


def inverted_hinge_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """IHL (N,) of logits (N, V) and labels (N,): 1 + p_target - max over other tokens of p (Eq. 3).

    On ties the maximum, and with it the gradient, is the lowest index's.
    """
    p = logits.softmax(-1)
    is_target = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    runner_up_id = p.detach().masked_fill(is_target, -torch.inf).argmax(-1, keepdim=True)
    return 1 + p[is_target] - p.gather(-1, runner_up_id)[..., 0]


# --- the backend: triplet -------------------------------------------------------------------------


def _row_pieces(logits: Tensor, *per_row: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows each, of the logits and of tensors with one entry, or a few, for each row."""
    tensors = (logits, *per_row)
    if logits.dim() == 1:
        yield tuple(x.unsqueeze(0) for x in tensors)
    elif logits.dim() == 2:
        rows = max(1, PIECE_ENTRIES // logits.shape[-1])
        yield from zip(*(x.split(rows) for x in tensors), strict=True)
    else:
        for parts in zip(*(x.unbind(0) for x in tensors), strict=True):
            yield from _row_pieces(*parts)


def triplet_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Compute triplet (..., 3), float64, and runner_up_id (...), int64, of logits (..., V) and labels (...).

    Raises:
        IndexError: A label is neither in [0, V) nor ``ignore_index``. On CUDA a device-side assert fails.
    """
    check_label_values(labels, logits.shape[-1], ignore_index)
    triplet = torch.empty(*labels.shape, 3, dtype=torch.float64, device=logits.device)
    runner_up_id = torch.empty_like(labels, memory_format=torch.contiguous_format)
    for y, t, out, out_id in _row_pieces(logits, labels, triplet, runner_up_id):
        piece, piece_id = softmax_triplet(y, t, ignore_index)
        out.copy_(piece)
        out_id.copy_(piece_id)
    return triplet, runner_up_id


def triplet_backward(
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    *,
    first_column: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the logits (..., C) from that of the triplet (..., 3).

    ``out`` receives it: the logits themselves, or a tensor of another dtype, and then the logits may be
    overwritten too. Without ``out`` it is a new contiguous tensor in the dtype of the logits.
    """
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for y, t, saved, r, g, target in _row_pieces(logits, labels, triplet, runner_up_id, grad_triplet, out):
        target.copy_(softmax_triplet_backward(g, y, t, ignore_index, saved, r, first_column, softcap))
    return out


def inverted_hinge_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrite the logits (..., V) with ``scale`` times the gradient of the sum of the rows' IHL.

    ``scale`` is a float64 tensor (). Returns triplet and runner_up_id, and raises, as ``triplet_forward``.
    """
    triplet, runner_up_id = triplet_forward(logits, labels, ignore_index)
    p0, p1, p2 = triplet.softmax(-1).unbind(-1)
    # d IHL = p_j (g_j - sum_i g_i p_i) with g = (1, -1, 0), written as sums of probabilities: nothing
    # cancels.
    grad = torch.stack([p0 * (2 * p1 + p2), -p1 * (2 * p0 + p2), p2 * (p1 - p0)], -1) * scale
    triplet_backward(grad, logits, labels, ignore_index, triplet, runner_up_id, out=logits)
    return triplet, runner_up_id


def triplet_columns_(
    logits: Tensor,
    labels: Tensor,
    state: OnlineState,
    *,
    first_column: int,
    softcap: float,
    out: Tensor | None = None,
) -> None:
    """Take the logits (N, C) of the columns from ``first_column`` on into ``state``, in place.

    ``out`` (N, C) receives exp(y - rest_max), 0 at target and runner-up, times the slope of the softcap. It
    may be the logits, or a tensor of another dtype, and then the logits may be overwritten too. No label (N,)
    is ignored here: the loop over blocks has dropped those.
    """
    for y, t, target, *piece in _row_pieces(logits, labels, logits if out is None else out, *state):
        terms, *new = triplet_columns(y, first_column, t, *piece[:2], softcap)
        for old, value in zip(piece, new, strict=True):
            old.copy_(value)
        if out is not None:
            target.copy_(terms)


def scale_rows_(logits: Tensor, factor: Tensor) -> None:
    """Multiply the rows of logits (..., V) by ``factor``, () or (...), in place."""
    logits.mul_(factor.unsqueeze(-1))


# --- the backend: Fisher --------------------------------------------------------------------------


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16; elsewhere such a product is slow."""
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda"


def accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
) -> None:
    """Add the squared per-sample gradients of a linear layer's weight to ``fisher``, in place.

    Args:
        fisher: The sums (d, k), or (d,) with a divisor; float32 or float64.
        inputs: The layer's inputs (n, T, k). bfloat16 is multiplied as it is where the device can.
        grad_outputs: The gradients (n, T, d) of the layer's output, in the dtype of the inputs.
        divisor: The divisor (d, k) of the squares, in the dtype of ``fisher``, or None.
    """
    narrow = inputs.dtype == torch.bfloat16 and multiplies_bfloat16(inputs.device)
    dtype = torch.bfloat16 if narrow else fisher.dtype
    accumulate_by_products_(fisher, inputs, grad_outputs, divisor, dtype, _add_squares)


def _add_squares(total: Tensor, product: Tensor, scratch: Tensor) -> None:
    """total += product^2, where the product is rounded to fewer bits than the total has."""
    total.addcmul_(scratch.copy_(product), scratch)


def _even(size: int, limit: int) -> int:
    """The largest of the fewest nearly equal parts of ``size`` that are at most ``limit``."""
    parts = -(-size // max(1, limit))
    return -(-size // parts)


def accumulate_by_products_(
    fisher: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    divisor: Tensor | None,
    product_dtype: torch.dtype,
    add_squares: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """``accumulate_squared_grad_`` by the library's matrix products, one tile of the Fisher at a time.

    Args:
        product_dtype: The dtype of the products: that of ``fisher``, or bfloat16. Then the sum over the
            tokens is in float32, and its result is rounded once.
        add_squares: A function (total, product, scratch) for products in bfloat16: it adds their squares to
            ``total`` and may overwrite ``scratch``, which is like the total.
    """
    n, tokens, k = inputs.shape
    d, dtype = grad_outputs.shape[2], fisher.dtype
    if 0 in (n, tokens, k, d):
        return
    rounded = product_dtype != dtype
    entry_bytes = dtype.itemsize * (1 if divisor is None else 2) + (product_dtype.itemsize if rounded else 0)
    columns = _even(k, min(TILE_COLUMNS, TILE_BYTES // entry_bytes))
    rows = _even(d, TILE_BYTES // (entry_bytes * columns))
    span = tokens
    if inputs.dtype != product_dtype:
        span = max(1, TOKEN_BYTES // (product_dtype.itemsize * (rows + columns)))

    def scratch_of(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows * columns, dtype=dtype, device=fisher.device)

    square_scratch = scratch_of(dtype)
    product_scratch = scratch_of(product_dtype) if rounded else square_scratch
    sum_scratch = None if divisor is None else scratch_of(dtype)
    # Tiles outside, samples inside: a tile of the Fisher, and of the divisor, is read once a call.
    for top in range(0, d, rows):
        height = slice(top, top + rows)
        for left in range(0, k, columns):
            width = slice(left, left + columns)
            shape = (min(rows, d - top), min(columns, k - left))
            scratch, product = (
                x[: shape[0] * shape[1]].view(shape) for x in (square_scratch, product_scratch)
            )
            if sum_scratch is None:
                total = fisher[height, width]
            else:
                total = sum_scratch[: shape[0] * shape[1]].view(shape).zero_()
            for x, delta in zip(inputs[:, :, width], grad_outputs[:, :, height], strict=True):
                for begin in range(0, tokens, span):
                    part = slice(begin, begin + span)
                    x_part, delta_part = x[part].to(product_dtype), delta[part].to(product_dtype)
                    if begin:
                        product.addmm_(delta_part.t(), x_part)
                    else:
                        torch.mm(delta_part.t(), x_part, out=product)
                if rounded:
                    add_squares(total, product, scratch)
                else:
                    total.addcmul_(product, product)
            if divisor is not None:
                fisher[height] += total.div_(divisor[height, width]).sum(1)
