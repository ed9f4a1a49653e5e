"""row_scaled_svd against a full SVD in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loku_kernels import row_scaled_svd

SPECTRA = {
    "i^-0.5": lambda i: i**-0.5,
    "i^-0.25": lambda i: i**-0.25,
    "steep": lambda i: 0.5**i,
    "spikes over a flat bulk": lambda i: torch.where(i <= 5, 10.0 / i, 1.0),
}


def planted(batch, d, k, spectrum, seed=0):
    """Weights (batch, d, k), float32, with the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    if spectrum == "gaussian":
        return torch.randn(batch, d, k, generator=generator)
    size = min(d, k)
    values = SPECTRA[spectrum](torch.arange(1, size + 1, dtype=torch.float64))
    left, right = (
        torch.linalg.qr(torch.randn(batch, n, size, generator=generator, dtype=torch.float64))[0]
        for n in (d, k)
    )
    return ((left * values) @ right.mT).float()


def log_normal(batch, d, seed=0):
    return torch.randn(batch, d, generator=torch.Generator().manual_seed(seed)).exp()


def check(weights, scales, rank, deficit=1e-3):
    """Captured energy, singular values, orthonormality."""
    S, V = row_scaled_svd(weights, scales, rank)
    k = weights[0].shape[1]
    assert S.shape == (len(weights), rank) and V.shape == (len(weights), k, rank)
    assert S.dtype == V.dtype == torch.float32
    for i, weight in enumerate(weights):
        scaled = scales[i].double()[:, None] * weight.double()
        exact = torch.linalg.svdvals(scaled)[:rank]
        v = V[i].double()
        assert (v.T @ v - torch.eye(rank, dtype=torch.float64)).abs().max() <= 1e-5
        assert (S[i].diff() <= 0).all()
        energy = exact.square().sum()
        if energy == 0:
            assert S[i].eq(0).all()
            continue
        missing = 1 - ((scaled @ v).square().sum() / energy).item()
        assert missing <= deficit, f"matrix {i} lacks {missing:.1e} of the energy"
        if deficit <= 1e-3:
            kept = exact > 1e-3 * exact[0]
            torch.testing.assert_close(S[i].double()[kept], exact[kept], rtol=1e-2, atol=0)


@pytest.mark.parametrize("spectrum", [*SPECTRA, "gaussian"])
@pytest.mark.parametrize("shape", [(96, 96), (384, 96), (96, 384)])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_log_normal_scales(spectrum, shape, rank):
    check(planted(3, *shape, spectrum), log_normal(3, shape[0]), rank)


@pytest.mark.parametrize("spectrum", ["i^-0.25", "gaussian"])
def test_flat_spectra(spectrum):
    check(planted(2, 384, 256, spectrum), torch.ones(2, 384), 16, deficit=1e-2)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(1, 60),
    st.data(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_any_shape(batch, d, k, data, dtype, seed):
    rank = data.draw(st.integers(1, min(d, k)))
    check(planted(batch, d, k, "i^-0.5", seed).to(dtype), log_normal(batch, d, seed), rank)


def test_a_sequence_is_a_batch():
    weights, scales = planted(3, 40, 200, "i^-0.5"), log_normal(3, 40)
    together = row_scaled_svd(weights, scales, 4)
    apart = row_scaled_svd(list(weights), list(scales), 4)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_zeros_and_low_rank():
    weights, scales = planted(3, 50, 40, "i^-0.5"), log_normal(3, 50)
    weights[0] = 0
    scales[1, ::2] = 0  # rows that do not count
    weights[2] = weights[2][:, :3] @ torch.randn(3, 40)  # rank 3
    check(weights, scales, 8)
    scales[1] = 0
    check(weights, scales, 8)


def test_scale_of_the_scales_does_not_matter():
    weights, scales = planted(2, 50, 40, "i^-0.5"), log_normal(2, 50)
    S, V = row_scaled_svd(weights, scales, 4)
    for factor in (1e-25, 1e25):
        scaled_S, scaled_V = row_scaled_svd(weights, scales * factor, 4)
        torch.testing.assert_close(scaled_S / factor, S, rtol=1e-3, atol=0)
        torch.testing.assert_close((scaled_V * V).sum(1).abs(), torch.ones(2, 4), rtol=1e-3, atol=0)


def test_deterministic_and_apart_from_torchs_random_state():
    weights, scales = planted(2, 80, 90, "gaussian"), log_normal(2, 80)
    state = torch.get_rng_state()
    first = row_scaled_svd(weights, scales, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    second = row_scaled_svd(weights, scales, 4)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_random_subspace_fails():
    weights, scales = planted(1, 96, 96, "i^-0.5"), log_normal(1, 96)
    scaled = scales[0].double()[:, None] * weights[0].double()
    v = torch.linalg.qr(torch.randn(96, 8, dtype=torch.float64))[0]
    energy = torch.linalg.svdvals(scaled)[:8].square().sum()
    assert 1 - (scaled @ v).square().sum() / energy > 0.5


def test_errors():
    weights, scales = torch.randn(2, 6, 5), torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"\(batch, d, k\), got \(6, 5\)"):
        row_scaled_svd(weights[0], scales, 2)
    with pytest.raises(ValueError, match=r"min\(d, k\) = 5, got 6"):
        row_scaled_svd(weights, scales, 6)
    with pytest.raises(ValueError, match="got 0"):
        row_scaled_svd(weights, scales, 0)
    with pytest.raises(ValueError, match=r"row_scales of shape \(2, 6\)"):
        row_scaled_svd(weights, scales[:, :5], 2)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        row_scaled_svd(weights.double(), scales, 2)
    with pytest.raises(ValueError, match="float32"):
        row_scaled_svd(weights, scales.double(), 2)
    with pytest.raises(ValueError, match="one shape"):
        row_scaled_svd([weights[0], weights[1].T], scales, 2)
    with pytest.raises(ValueError, match="empty batch"):
        row_scaled_svd(weights[:0], scales[:0], 2)
    for bad in (torch.nan, torch.inf):
        broken = weights.clone()
        broken[1, 2, 3] = bad
        with pytest.raises(ValueError, match="matrix 1"):
            row_scaled_svd(broken, scales, 2)
