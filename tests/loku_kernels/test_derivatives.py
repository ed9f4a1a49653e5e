"""Every public function by every way to a derivative: the formula's in float64, or an error by name."""

import itertools

import pytest
import torch
from derivatives import TOLERANCES, WAYS, check, flat, functions, leaves_of, operands_of


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("way", WAYS)
def test_every_function(way):
    for name in functions():
        check(way, name)


@pytest.mark.parametrize(
    "way", ["grad", "penalty", "func.hessian", "functional.hessian", "dual over reverse"]
)
def test_reductions_and_dtypes(way):
    for name, dtype in itertools.product(functions(), TOLERANCES):
        if not name.startswith("triplet_loss") or dtype == torch.float64:
            for reduction in ("sum", "none"):
                check(way, name, dtype, reduction)


@pytest.mark.parametrize("way", ["grad", "penalty", "functional.hessian", "jacfwd of jacfwd", "dual"])
def test_frozen_operands(way):
    parts = [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")]
    for name, (leaf_names, _, _) in functions().items():
        for trained in parts if len(leaf_names) == 3 else ():
            check(way, name, trained=trained)


@pytest.mark.parametrize("way", ["grad", "penalty", "functional.hvp", "dual over reverse"])
def test_backends(way, backend):
    for name in functions():
        if not name.startswith("triplet_loss"):
            check(way, name, torch.float32)


@pytest.mark.parametrize("block_bytes", [16 << 20, 120, 16])  # one block, three columns, one column
def test_float64_keeps_its_digits(block_bytes, backend, monkeypatch):
    """The error is relative to the largest entry of a gradient."""
    monkeypatch.setattr("loku_kernels.logits_blocks.BLOCK_BYTES", block_bytes)
    for name in functions():
        check("grad", name, tolerance=1e-13)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradcheck():
    """torch's own differences agree, in both modes and for second derivatives."""
    for name, (leaf_names, function, _) in functions().items():
        if name not in ("ihl_loss in place", "linear_kl_divergence_loss capped"):  # its reference moves along
            leaves = leaves_of(operands_of(leaf_names).values())
            assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True)


COMPILED = ["ihl_loss", "ihl_loss in place", "linear_cross_entropy_loss capped", "linear_kl_divergence_loss"]
COMPILED.append("linear_kl_divergence_loss lowered")


@pytest.mark.parametrize("name", [*COMPILED, "softmax_triplet", "linear_softmax_triplet"])
def test_compiled(name):
    leaf_names, function, formula = functions()[name]
    leaves = list(operands_of(leaf_names).values())

    def compiled(backend):
        torch.compiler.reset()
        return torch.compile(function, backend=backend, fullgraph=True)

    for backend in ("eager", "aot_eager"):
        expected = flat(WAYS["grad"](formula, leaves))
        torch.testing.assert_close(flat(WAYS["grad"](compiled(backend), leaves)), expected)
    if name == "ihl_loss in place":
        return  # torch.compile loses the second derivative of any function whose backward needs no leaf
    expected = flat(WAYS["penalty"](formula, leaves))
    torch.testing.assert_close(flat(WAYS["penalty"](compiled("eager"), leaves)), expected)
    with pytest.raises(RuntimeError, match="double backward"):  # torch's own refusal
        WAYS["penalty"](compiled("aot_eager"), leaves)
