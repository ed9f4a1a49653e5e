"""``row_scaled_svd`` against a full SVD in float64, on planted spectra."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DTYPES

from loku_kernels import lowrank, row_scaled_svd

SPECTRA = {
    "i^-0.5": lambda i: i**-0.5,
    "i^-0.25": lambda i: i**-0.25,
    "spikes": lambda i: torch.where(i <= 12, 3.0, 1.0),  # twelve equal spikes over a flat bulk
    "0.9^i": lambda i: 0.9**i,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def planted(d, k, spectrum, generator):
    """Make a matrix (d, k) with singular values ``spectrum(1)``, ``spectrum(2)``, ... and random vectors."""
    rank = min(d, k)
    left, right = (
        torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0] for n in (d, k)
    )
    return (left * spectrum(torch.arange(1, rank + 1, dtype=torch.float64)) @ right.T).float()


def log_normal(*shape, generator):
    return torch.randn(*shape, generator=generator).exp()


def quality(weight, scales, s, v):
    """Return the captured-energy deficit, the largest relative error of S, and ||V^T V - I||, in float64."""
    scaled = scales.double()[:, None] * weight.double()
    exact = torch.linalg.svdvals(scaled)[: len(s)]
    v = v.double()
    deficit = 1 - (scaled @ v).square().sum() / exact.square().sum()
    identity = torch.eye(len(s), dtype=torch.float64)
    error = ((s.double() - exact) / exact).abs().max()
    return deficit.item(), error.item(), torch.linalg.matrix_norm(v.T @ v - identity, 2).item()


def check(weights, scales, rank, deficit=1e-3, error=1e-2):
    s, v = row_scaled_svd(weights, scales, rank)
    count, k = len(weights), weights[0].shape[1]
    assert s.shape == (count, rank) and v.shape == (count, k, rank)
    assert s.dtype == v.dtype == torch.float32
    assert (s.diff(dim=1) <= 0).all() and (s >= 0).all()
    for measured in map(quality, weights, scales, s, v):
        assert measured[0] <= deficit and measured[1] <= error and measured[2] <= 1e-5, measured
    return s, v


@pytest.mark.parametrize("rank", [1, 4, 16, 32])
@pytest.mark.parametrize("d, k", [(384, 384), (768, 256), (256, 768)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_planted_spectra(spectrum, d, k, rank):
    generator = torch.Generator().manual_seed(rank)
    weight = planted(d, k, SPECTRA[spectrum], generator)
    check(weight[None], log_normal(1, d, generator=generator), rank)
    # With uniform scales, slowly decaying spectra are flat at the rank.
    check(weight[None], torch.ones(1, d), rank, *((1e-2, 2e-2) if spectrum == "i^-0.25" else ()))


@pytest.mark.parametrize("rank", [1, 4, 16, 32])
@pytest.mark.parametrize("d, k", [(384, 384), (768, 256), (256, 768)])
def test_gaussian(d, k, rank):
    generator = torch.Generator().manual_seed(rank)
    weight = torch.randn(1, d, k, generator=generator)
    check(weight, log_normal(1, d, generator=generator), rank)
    check(weight, torch.ones(1, d), rank, 1e-2, 2e-2)  # a flat spectrum


def test_the_measure_rejects_a_plain_sketch():
    """The bounds rule out a wrong V, and torch's own randomised SVD at q = rank."""
    generator = torch.Generator().manual_seed(0)
    weight = planted(384, 384, SPECTRA["i^-0.25"], generator)
    scales = log_normal(384, generator=generator)
    _, s, v = torch.svd_lowrank(scales[:, None] * weight, q=16)
    assert quality(weight, scales, s, v)[0] > 3e-3
    _, s, vh = torch.linalg.svd(weight, full_matrices=False)  # without the scales
    assert quality(weight, scales, s[:16], vh[:16].T)[0] > 0.1


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 90),
    st.integers(1, 90),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape(count, d, k, share, dtype, as_list, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = 1 + int(share * (min(d, k) - 1))
    weights = torch.randn(count, d, k, generator=generator).to(dtype)
    scales = log_normal(count, d, generator=generator)
    s, v = row_scaled_svd(list(weights) if as_list else weights, scales, rank)
    for measured in map(quality, weights, scales, s, v):
        # The smallest singular value of a square Gaussian may be lost in rounding.
        assert measured[0] <= 5e-3 and measured[2] <= 1e-5, measured
    exact = torch.linalg.svdvals(scales.double()[..., None] * weights.double())[:, :rank]
    assert ((s - exact).abs() <= 2e-2 * exact + 1e-5 * exact[:, :1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_result_however_the_weights_come(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 160, 224, generator=generator).to(dtype)
    scales = log_normal(5, 160, generator=generator)
    s, v = check(weights, scales, 4)
    projector = v @ v.mT
    strided = weights.mT.contiguous().mT
    cases = [
        (list(weights), scales, {"MIN_DEPTH": 3}),  # the default constants
        (weights, list(scales), {"MIN_DEPTH": 3}),
        (strided, scales, {"MIN_DEPTH": 3}),
        (weights, scales, {"GROUP_BYTES": 1}),  # one matrix at a time
        (weights, scales, {"FLOAT32_BYTES": 50_000}),  # some rows are converted at a time
    ]
    for w, x, constants in cases:
        with mock.patch.multiple(lowrank, **constants):
            again, vectors = row_scaled_svd(w, x, 4)
        torch.testing.assert_close(again, s, rtol=1e-4, atol=0)
        torch.testing.assert_close(vectors @ vectors.mT, projector, rtol=0, atol=1e-2)
    for i in range(5):
        alone, _ = row_scaled_svd(weights[i : i + 1], scales[i : i + 1], 4)
        torch.testing.assert_close(alone[0], s[i], rtol=1e-3, atol=0)


def test_whole_rank_is_the_whole_svd():
    generator = torch.Generator().manual_seed(0)
    for d, k in ((40, 40), (90, 20), (20, 90)):
        weights, scales = (
            torch.randn(2, d, k, generator=generator),
            torch.rand(2, d, generator=generator) + 0.5,
        )
        check(weights, scales, 20, deficit=1e-6, error=1e-4)


def test_deterministic_and_silent_on_the_global_generator():
    weights, scales = torch.randn(2, 200, 150), torch.rand(2, 200)
    state = torch.get_rng_state()
    first = row_scaled_svd(weights, scales, 5)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(123)
    for a, b in zip(first, row_scaled_svd(weights, scales, 5), strict=True):
        assert a.equal(b)


def test_zero_matrix_and_zero_rows():
    generator = torch.Generator().manual_seed(0)
    weights, scales = torch.randn(3, 200, 150, generator=generator), torch.ones(3, 200)
    weights[0], scales[1] = 0, 0
    scales[2, 5:] = 0  # five rows are left, so the rank is 5
    s, v = row_scaled_svd(weights, scales, 8)
    identity = torch.eye(8).expand(3, 8, 8)
    torch.testing.assert_close(v.mT @ v, identity, rtol=0, atol=1e-5)
    assert s[:2].eq(0).all()
    assert (s[2, 5:] <= 1e-6 * s[2, 0]).all()
    exact = torch.linalg.svdvals(weights[2, :5].double()).float()
    torch.testing.assert_close(s[2, :5], exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("d, k", [(300, 200), (200, 300), (30, 20)])
def test_low_rank_and_equal_values(d, k):
    """Krylov spaces end early for three distinct singular values, and for rank 3 below the wanted rank."""
    generator = torch.Generator().manual_seed(0)
    steps = planted(d, k, lambda i: torch.where(i <= 6, 5.0, torch.where(i <= 20, 2.0, 1.0)), generator)
    check(steps[None], torch.ones(1, d), 6, deficit=1e-6, error=1e-5)
    low = planted(d, k, lambda i: torch.where(i <= 3, 1.0, 0.0), generator)
    s, v = row_scaled_svd(low[None], torch.ones(1, d), 6)
    torch.testing.assert_close(s[0, :3], torch.ones(3), rtol=1e-5, atol=0)
    assert (s[0, 3:] <= 1e-6).all()
    torch.testing.assert_close(v[0].T @ v[0], torch.eye(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-18, 1e12])
def test_extreme_units(factor):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 300, 200, generator=generator)
    scales = log_normal(1, 300, generator=generator)
    s, _ = check(weights, scales, 4)
    scaled, _ = row_scaled_svd(weights, scales * factor, 4)
    torch.testing.assert_close(scaled, s * factor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(3, 300, 200), (3, 20, 10)])
def test_not_finite_raises(shape, bad):
    weights, scales = torch.randn(shape), torch.ones(shape[:2])
    for tensor in (weights[1], scales[1]):
        kept, tensor[-1] = tensor[-1].clone(), bad
        with pytest.raises(ValueError, match=r"finite .* matrix 1"):
            row_scaled_svd(weights, scales, 2)
        tensor[-1] = kept
    scales[1, 0], weights[1, 0] = 0, bad  # even where a scale of 0 would hide it
    with pytest.raises(ValueError, match=r"finite .* matrix 1"):
        row_scaled_svd(weights, scales, 2)


def test_errors():
    weights, scales = torch.randn(2, 6, 5), torch.ones(2, 6)
    cases = [
        (weights[0], scales, 2, r"\(batch, d, k\), got \(6, 5\)"),
        ([], scales, 2, "empty"),
        ([weights[0], weights[1, :5]], scales, 2, r"\(6, 5\) and \(5, 5\)"),
        (weights.double(), scales, 2, r"got torch\.float64"),
        ([weights[0], weights[1].bfloat16()], scales, 2, r"torch\.float32 and torch\.bfloat16"),
        (weights, scales[:, :5], 2, r"\(2, 6\), got 2 of \[\(5,\)\]"),
        (weights, scales[:1], 2, r"\(2, 6\), got 1"),
        (weights, scales.double(), 2, r"float32 on cpu, got torch\.float64"),
        (weights, scales.to("meta"), 2, "float32 on cpu, got torch.float32 on meta"),
        (weights, scales, 0, "got 0"),
        (weights, scales, 6, r"min\(d, k\) = 5, got 6"),
        (weights, scales, 2.0, r"got 2\.0"),
        (None, scales, 2, "weights to be a tensor or a sequence of tensors, got NoneType"),
    ]
    for *arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            row_scaled_svd(*arguments)


def test_takes_parameters_and_leaves_them_alone():
    weight = torch.nn.Parameter(torch.randn(300, 200))
    before = weight.detach().clone()
    s, v = row_scaled_svd([weight], torch.ones(1, 300), 3)
    assert not s.requires_grad and not v.requires_grad
    assert weight.detach().equal(before) and weight.grad is None
