"""``row_scaled_svd`` against a full SVD in float64, on planted spectra."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DTYPES

from loku_kernels import krylov, lowrank, row_scaled_svd

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


# What a GPU does otherwise, on the CPU: products by parts, whole groups, the host's eigenproblems


@pytest.fixture
def by_parts(monkeypatch):
    """Multiply bfloat16 weights as a GPU does, with a product that the CPU has."""
    shapes = []

    def product(a, b):
        assert a.dtype == b.dtype == torch.bfloat16
        shapes.append((tuple(a.shape), tuple(b.shape)))
        return a.float() @ b.float()

    monkeypatch.setattr(lowrank, "product_dtype", lambda operand: torch.float32)
    monkeypatch.setattr(lowrank, "_wide_product", product)
    return shapes


@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
def test_products_by_parts_are_as_exact_as_in_float32(by_parts, factor):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 48, 256, generator=generator).bfloat16()
    scales = log_normal(2, 48, generator=generator)
    x, y = (torch.randn(2, 5, n, generator=generator) * factor for n in (256, 48))
    matrix, exact = lowrank._ScaledRows(weights, scales), scales.double()[..., None] * weights.double()
    exact = exact / scales.amax(1).double()[:, None, None]
    cases = [
        (matrix.times(x), x.double() @ exact.mT, x.double().abs() @ exact.mT.abs()),
        (matrix.transpose_times(y), y.double() @ exact, y.double().abs() @ exact.abs()),
    ]
    for ours, expected, size in cases:
        assert ((ours - expected).abs() <= 2**-22 * size).all()  # two parts alone are off by up to 2^-17
    assert by_parts == [((15, 256), (256, 48))] * 2 + [((15, 48), (48, 256))] * 2


@pytest.mark.parametrize("d, k", [(384, 384), (768, 256), (256, 768), (30, 40)])
@pytest.mark.parametrize("as_list", [False, True])
def test_decomposition_by_parts(by_parts, d, k, as_list):
    generator = torch.Generator().manual_seed(0)
    weights = torch.stack([planted(d, k, SPECTRA["i^-0.5"], generator) for _ in range(2)]).bfloat16()
    scales = log_normal(2, d, generator=generator)
    check(list(weights) if as_list else weights, scales, 8)
    assert by_parts


class EigenCalls:
    """Counts the calls of torch's solvers for symmetric eigenproblems, by the shapes of their batches."""

    def __init__(self, monkeypatch):
        self.vectors, self.values = [], []
        for name, shapes in (("eigh", self.vectors), ("eigvalsh", self.values)):
            monkeypatch.setattr(torch.linalg, name, self.counting(getattr(torch.linalg, name), shapes))

    @staticmethod
    def counting(solve, shapes):
        def counted(x):
            shapes.append(tuple(x.shape))
            return solve(x)

        return counted


def test_one_batched_eigenproblem_a_depth_for_all_matrices(monkeypatch):
    monkeypatch.setattr(lowrank, "GROUP_BYTES", 1 << 30)
    generator = torch.Generator().manual_seed(0)
    weights, scales = torch.randn(7, 96, 128, generator=generator), log_normal(7, 96, generator=generator)
    calls = EigenCalls(monkeypatch)
    check(weights, scales, 4)
    assert calls.values == [(7, 12, 12), (7, 24, 24)]
    assert calls.vectors == [(7, 36, 36), (7, 4, 4)]


def test_a_card_decomposes_all_matrices_of_a_llama_7b_shape_together():
    card = torch.device("cuda")
    for d, k, matrices in ((4096, 4096, 128), (11008, 4096, 64), (4096, 11008, 32)):
        group = lowrank._group_size(card, d, k, 32)
        assert matrices <= group
        held = 40 * (lowrank.CAPACITY * (4 * d + 8 * k) + 24 * (d + k))
        assert group * held <= 3 << 30 < (group + 1) * held
        assert lowrank._group_size(torch.device("cpu"), d, k, 32) == 1
    assert lowrank._group_size(card, 1 << 20, 1 << 20, 64) == 1


def test_each_matrix_of_a_group_stops_by_itself(monkeypatch):
    """On a card, a matrix with a flat spectrum does not hold up the others."""
    assert lowrank._stops_alone(torch.device("cuda")) and not lowrank._stops_alone(torch.device("cpu"))
    monkeypatch.setattr(lowrank, "_stops_alone", lambda device: True)
    monkeypatch.setattr(lowrank, "GROUP_BYTES", 1 << 30)
    generator = torch.Generator().manual_seed(0)
    weights, scales = torch.randn(4, 300, 280, generator=generator), torch.ones(4, 300)
    for i in (0, 1, 3):
        weights[i] = planted(300, 280, SPECTRA["0.9^i"], generator)
    calls = EigenCalls(monkeypatch)
    s, v = row_scaled_svd(weights, scales, 4)
    batches = [shape[0] for shape in calls.vectors]
    assert batches[:2] == [4, 3] and set(batches[2:]) == {1} and len(batches) > 4
    again, vectors = row_scaled_svd(list(weights), scales, 4)
    for i in range(4):
        bounds = (1e-2, 2e-2) if i == 2 else (1e-3, 1e-2)
        for measured in (quality(weights[i], scales[i], s[i], v[i]) for s, v in ((s, v), (again, vectors))):
            assert measured[0] <= bounds[0] and measured[1] <= bounds[1] and measured[2] <= 1e-5
        alone, _ = row_scaled_svd(weights[i : i + 1], scales[i : i + 1], 4)
        torch.testing.assert_close(alone[0], s[i], rtol=1e-3, atol=0)


@pytest.mark.parametrize("capacity", [3, 4, 6])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_restarted_basis_is_bounded_and_as_good(capacity, rank, monkeypatch):
    monkeypatch.setattr(lowrank, "CAPACITY", capacity)
    generator = torch.Generator().manual_seed(rank)
    weights, scales = torch.randn(2, 400, 300, generator=generator), torch.ones(2, 400)
    calls = EigenCalls(monkeypatch)
    s, v = row_scaled_svd(weights, scales, rank)
    width = rank + lowrank.OVERSAMPLING
    sizes = [shape[1] for shape in calls.vectors if shape[1] > rank]
    assert max(sizes) <= capacity * width
    assert capacity == 6 or sizes.count(capacity * width) > 1  # it was restarted
    for measured in map(quality, weights, scales, s, v):
        assert measured[0] <= 2e-3 and measured[1] <= 5e-3 and measured[2] <= 1e-5, measured


@pytest.mark.parametrize("capacity", [3, 4])
def test_a_restart_in_a_space_that_is_nearly_used_up(capacity, monkeypatch):
    monkeypatch.setattr(lowrank, "CAPACITY", capacity)
    generator = torch.Generator().manual_seed(0)
    for side in (37, 40, 49):  # the width is 12, so the last block is narrower
        for low_rank in (2, side):
            weight = torch.randn(1, side, low_rank, generator=generator) @ torch.eye(low_rank, side)
            s, v = row_scaled_svd(weight, torch.ones(1, side), 4)
            exact = torch.linalg.svdvals(weight.double())[:, :4]
            assert ((s - exact).abs() <= 2e-2 * exact + 1e-5 * exact[:, :1]).all()
            torch.testing.assert_close(v[0].T @ v[0], torch.eye(4), rtol=0, atol=1e-5)


def test_the_solver_of_eigenproblems(monkeypatch):
    """The host solves the batches that torch would solve one by one on a card."""
    card, host = torch.device("cuda", 1), torch.device("cpu")
    for one_by_one in (False, True):
        monkeypatch.setattr(krylov, "_SOLVES_ONE_BY_ONE", one_by_one)
        assert krylov.solver_device(card, 32) == card
        assert krylov.solver_device(card, 33) == (host if one_by_one else card)
        assert krylov.solver_device(host, 33) == host


def test_reduced_precision_of_float32_products_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    weights, scales = torch.randn(2, 300, 200, generator=generator), log_normal(2, 300, generator=generator)
    expected = row_scaled_svd(weights, scales, 4)
    libraries = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        reduced = [library.fp32_precision for library in libraries]
        assert reduced == ["tf32", "bf16"]
        inside = []
        real = torch.linalg.cholesky

        def cholesky(x):
            inside.append([library.fp32_precision for library in libraries])
            return real(x)

        with mock.patch.object(torch.linalg, "cholesky", cholesky):
            ours = row_scaled_svd(weights, scales, 4)
        with pytest.raises(ValueError, match="finite"):
            row_scaled_svd(weights * torch.nan, scales, 4)
        assert [library.fp32_precision for library in libraries] == reduced
        assert all(precision == ["ieee", "ieee"] for precision in inside) and inside
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(ours, expected, strict=True):
        assert a.equal(b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_on_a_card(dtype, one_by_one, monkeypatch):
    monkeypatch.setattr(krylov, "_SOLVES_ONE_BY_ONE", one_by_one)
    generator = torch.Generator().manual_seed(0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        for d, k in ((384, 384), (768, 256), (256, 768), (60, 40)):
            for spectrum in SPECTRA:
                weight = planted(d, k, SPECTRA[spectrum], generator).to(dtype)
                scales = log_normal(2, d, generator=generator)
                s, v = row_scaled_svd(weight.cuda().expand(2, -1, -1), scales.cuda(), 8)
                for measured in map(quality, [weight] * 2, scales, s.cpu(), v.cpu()):
                    assert measured[0] <= 1e-3 and measured[1] <= 1e-2 and measured[2] <= 1e-5, measured
    finally:
        torch.set_float32_matmul_precision(before)
