"""The checks that public functions share raise for each wrong argument, and name it."""

import pytest
import torch

import loku_kernels
from loku_kernels.checks import (
    bad_label_error,
    check_label_tensor,
    check_label_values,
    check_linear_operands,
    check_logits,
)


def test_the_first_bad_label_is_named():
    labels = torch.tensor([[3, -100, 0], [8, 9, -1]])
    with pytest.raises(
        IndexError, match=r"label 9 at position 4 is neither in \[0, 9\) nor ignore_index \(-100\)"
    ):
        check_label_values(labels, 9, -100)
    labels[1, 1] = 8
    with pytest.raises(IndexError, match="label -1 at position 5"):
        check_label_values(labels, 9, -100)


def test_right_labels_pass():
    check_label_values(torch.tensor([0, 8, -100]), 9, -100)
    check_label_values(torch.tensor([0, 8, -1]), 9, -1)
    check_label_values(torch.tensor([0, 42]), 9, 42)
    check_label_values(torch.zeros(0, dtype=torch.int64), 9, -100)


def test_the_error_of_a_bad_label_counts_positions_in_flattened_labels():
    error = bad_label_error(torch.tensor([[1, 2], [30, 4]]), 2, 9, -100)
    assert isinstance(error, IndexError)
    assert str(error) == "label 30 at position 2 is neither in [0, 9) nor ignore_index (-100)"


def test_logits():
    logits, labels = torch.zeros(2, 4, 9), torch.zeros(2, 4, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check_logits(logits.to(dtype), labels)
    check_logits(logits[:0].transpose(1, 2), labels[:0].new_zeros(0, 9))  # no entry, so any strides are right
    for wrong, message in [
        (torch.zeros(()), "V >= 2"),
        (logits[..., :1], r"V >= 2, got \(2, 4, 1\)"),
        (logits.int(), "got torch.int32"),
        (logits.transpose(1, 2), "last dimension of logits must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_logits(wrong, labels)


def test_label_tensors():
    tensor, labels = torch.zeros(2, 4, 9), torch.zeros(2, 4, dtype=torch.int64)
    check_label_tensor(labels, tensor, "hidden")
    for wrong, message in [
        (labels[0], r"the shape of hidden without its last dimension, \(2, 4\), got \(4,\)"),
        (labels.int(), r"must be int64, got torch.int32; convert them by labels.long\(\)"),
        (labels.to("meta"), "on the device of hidden, cpu, got meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_label_tensor(wrong, tensor, "hidden")


def test_linear_operands():
    hidden, weight, bias = torch.zeros(2, 4, 3), torch.zeros(9, 3), torch.zeros(9)
    labels = torch.zeros(2, 4, dtype=torch.int64)
    check_linear_operands(hidden, weight, labels, None, None)
    check_linear_operands(hidden, weight, labels, bias, 30.0)
    for wrong in [
        (hidden, weight[0], labels, None, None),
        (hidden, weight[:1], labels, None, None),
        (hidden[..., :2], weight, labels, None, None),
        (hidden, weight.double(), labels, None, None),
        (hidden, weight.to("meta"), labels, None, None),
        (hidden, weight, labels[0], None, None),
        (hidden, weight, labels, bias[:8], None),
        (hidden, weight, labels, bias, 0.0),
        (hidden, weight, labels, bias, float("nan")),
    ]:
        with pytest.raises(ValueError):
            check_linear_operands(*wrong)


HIDDEN, WEIGHT = torch.zeros(4, 3), torch.zeros(9, 3)
OF_LABELS = {
    "softmax_triplet": lambda labels: loku_kernels.softmax_triplet(torch.zeros(4, 9), labels),
    "ihl_loss": lambda labels: loku_kernels.ihl_loss(torch.zeros(4, 9), labels),
    "cross_entropy_loss": lambda labels: loku_kernels.cross_entropy_loss(torch.zeros(4, 9), labels),
    "triplet_loss": lambda labels: loku_kernels.triplet_loss(
        "cross_entropy", torch.zeros(4, 3, dtype=torch.float64), labels
    ),
    "linear_softmax_triplet": lambda labels: loku_kernels.linear_softmax_triplet(HIDDEN, WEIGHT, labels),
    "linear_ihl_loss": lambda labels: loku_kernels.linear_ihl_loss(HIDDEN, WEIGHT, labels),
    "linear_cross_entropy_loss": lambda labels: loku_kernels.linear_cross_entropy_loss(
        HIDDEN, WEIGHT, labels
    ),
    "linear_kl_divergence_loss": lambda labels: loku_kernels.linear_kl_divergence_loss(
        HIDDEN, WEIGHT, HIDDEN, labels
    ),
}


@pytest.mark.parametrize("name", OF_LABELS)
def test_labels_of_other_integers_are_refused(name):
    """torch's cross entropy refuses them, too."""
    OF_LABELS[name](torch.ones(4, dtype=torch.int64))
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32):
        with pytest.raises(ValueError, match=rf"must be int64, got {dtype}; convert them by labels.long\(\)"):
            OF_LABELS[name](torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_operands_of_two_dtypes_are_refused(dtypes):
    """torch's ``linear`` refuses them, too. Under autocast both multiply them."""
    hidden, weight = HIDDEN.to(dtypes[0]), WEIGHT.to(dtypes[1])
    labels = torch.ones(4, dtype=torch.int64)
    calls = {
        "triplet": lambda: loku_kernels.linear_softmax_triplet(hidden, weight, labels)[0],
        "ihl": lambda: loku_kernels.linear_ihl_loss(hidden, weight, labels),
        "cross entropy": lambda: loku_kernels.linear_cross_entropy_loss(hidden, weight, labels),
        "kl": lambda: loku_kernels.linear_kl_divergence_loss(hidden, weight, hidden, labels),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"weight must have the dtype of hidden, .* convert one of them"):
            call()
        with torch.autocast("cpu", torch.bfloat16):
            assert call().isfinite().all()
