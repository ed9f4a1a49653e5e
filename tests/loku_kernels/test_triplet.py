"""``softmax_triplet`` on logits, forward and backward, against the float64 reference."""

import os
import sys
import threading
from unittest import mock

import pytest
import torch
from fresh_process import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import check_against_reference
from kernel_inputs import DTYPES, IGNORE, planted_logits

import loku_kernels
from loku_kernels import softmax_triplet
from loku_kernels.backends import choose, native, reference

needs_core = pytest.mark.skipif(native._core is None, reason="no compiled core")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("v", [2, 3, 17, 2047, 2048, 2049, 4100, 50257])
def test_planted(backend, dtype, v):
    check_against_reference(*planted_logits(24, v, dtype))


def test_llama3_vocabulary(backend):
    check_against_reference(*planted_logits(12, 128256, torch.bfloat16))


def untouched(*shape):
    """Make a bfloat16 tensor of more than 2^31 entries, of which only written ones take memory."""
    try:
        return torch.empty(shape, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("the system does not lend this much memory, even untouched")


def test_rows_more_than_2_31_entries_apart(backend):
    logits, labels = planted_logits(3, 3000, torch.bfloat16)
    far = untouched(2 * 2**31 + 3010).as_strided((3, 3000), (2**31 + 5, 1)).copy_(logits)
    check_against_reference(far, labels)

    far.requires_grad_()
    logits.requires_grad_()
    loku_kernels.ihl_loss(far, labels, inplace=True).backward()
    loku_kernels.ihl_loss(logits, labels, inplace=True).backward()
    assert torch.equal(far, logits) and far.count_nonzero(1).min() >= 2


@needs_core
def test_the_last_of_more_than_2_31_logits():
    logits, labels = planted_logits(2, 262144, torch.bfloat16)
    many = untouched(8300, 262144)
    many[-2:] = logits
    many_labels = torch.full((8300,), IGNORE)
    many_labels[-2:] = labels
    triplet, runner_up_id = softmax_triplet(many, many_labels)
    expected, expected_id = softmax_triplet(logits, labels)
    assert torch.equal(triplet[-2:], expected) and torch.equal(runner_up_id[-2:], expected_id)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 9),
    st.integers(2, 5000),
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
    st.sampled_from(["plain", "padded", "batched", "sliced", "one row", "expanded"]),
)
def test_any_shape_and_stride(n, v, dtype, seed, layout):
    logits, labels = planted_logits(max(n, 1) * 2, v, dtype, seed)
    match layout:
        case "padded":
            logits = torch.nn.functional.pad(logits, (3, 5))[:, 3:-5]
        case "batched":
            logits, labels = logits.view(2, -1, v), labels.view(2, -1)
        case "sliced":  # the usual shift by one token, which no view flattens
            padded = torch.nn.functional.pad(logits.view(2, -1, v), (0, 0, 0, 1))
            logits, labels = padded[:, :-1], labels.view(2, -1)
        case "one row":
            logits, labels = logits[0], labels[0]
        case "expanded":
            logits, labels = logits[:1].expand(4, v), labels[:1].expand(4)
        case _:
            logits, labels = logits[:n], labels[:n]
    check_against_reference(logits, labels, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 1, 5])
def test_nan_and_inf_never_give_a_plausible_number(backend, dtype, fill, position):
    for v in (2, 3000):
        logits = torch.randn(1, v).to(dtype)
        logits[0, position % v] = fill
        p = softmax_triplet(logits, torch.tensor([0]))[0].softmax(-1)
        assert p.isnan().any(-1).all()
    masked = torch.full((1, 3000), -torch.inf, dtype=dtype)
    masked[0, 2000] = torch.nan
    masked[0, 0] = 1.0
    assert softmax_triplet(masked, torch.tensor([0]))[0].softmax(-1).isnan().any()


def test_the_backward_of_the_reference_is_the_gradient_of_its_forward():
    logits, labels = planted_logits(24, 50, torch.float64)
    exact = logits.clone().requires_grad_()
    triplet, runner_up_id = reference.softmax_triplet(exact, labels)
    keep = triplet[:, 2] != -torch.inf
    upstream = torch.randn_like(triplet)
    triplet[keep].backward(upstream[keep])
    ours = reference.softmax_triplet_backward(
        upstream, logits, labels, IGNORE, triplet.detach(), runner_up_id
    )
    torch.testing.assert_close(ours[keep], exact.grad[keep])


def test_a_wrong_gradient_fails():
    logits, labels = planted_logits(24, 500, torch.float32)

    def broken(change):
        backend = choose("triplet_backward", logits)
        real = backend.triplet_backward
        return mock.patch.object(
            backend, "triplet_backward", lambda *args, **options: change(real(*args, **options))
        )

    check_against_reference(logits, labels)
    for change in (torch.zeros_like, torch.neg):
        with broken(change), pytest.raises(AssertionError):
            check_against_reference(logits, labels)


def test_gradcheck_and_opcheck():
    logits = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, IGNORE, 3, 2, 2])
    assert torch.autograd.gradcheck(lambda y: softmax_triplet(y, labels)[0], logits)
    for dtype in DTYPES:
        logits, labels = planted_logits(12, 33, dtype)
        logits.requires_grad_()
        torch.library.opcheck(torch.ops.loku_kernels.softmax_triplet.default, (logits, labels, IGNORE))
        triplet, runner_up_id = softmax_triplet(logits.detach(), labels)
        torch.library.opcheck(
            torch.ops.loku_kernels.softmax_triplet_backward.default,
            (torch.randn_like(triplet), logits.detach(), labels, IGNORE, triplet, runner_up_id),
        )


def test_errors(backend):
    logits, labels = torch.randn(4, 9), torch.tensor([0, 1, 8, 2])
    with pytest.raises(ValueError, match=r"V >= 2, got \(4, 1\)"):
        softmax_triplet(logits[:, :1], labels)
    with pytest.raises(ValueError, match=r"\(4,\), got \(3,\)"):
        softmax_triplet(logits, labels[:3])
    with pytest.raises(ValueError, match=r"int64, got torch\.int32"):
        softmax_triplet(logits, labels.int())
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        softmax_triplet(logits.long(), labels)
    with pytest.raises(ValueError, match="contiguous"):
        softmax_triplet(logits.t(), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="device"):
        softmax_triplet(logits, labels.to("meta"))
    for bad in (9, -1):
        labels[2] = bad
        with pytest.raises(IndexError, match=f"label {bad} at position 2"):
            softmax_triplet(logits, labels)
    labels[2] = -1
    assert softmax_triplet(logits, labels, ignore_index=-1)[1][2] == -1


@needs_core
def test_the_native_kernel_runs_by_default(monkeypatch):
    monkeypatch.delenv("LOKU_BACKEND", raising=False)
    logits, labels = planted_logits(12, 100, torch.float32)
    with mock.patch.object(native, "_core", wraps=native._core) as core:
        softmax_triplet(logits.requires_grad_(), labels)[0].sum().backward()
    assert core.triplet_forward.call_count == 1 and core.triplet_backward.call_count == 1


@needs_core
def test_number_of_threads_changes_nothing():
    logits, labels = planted_logits(50, 3000, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(softmax_triplet(logits, labels)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_core
def test_several_python_threads():
    logits, labels = planted_logits(50, 3000, torch.float32)
    expected = softmax_triplet(logits, labels)[0]
    results = []

    def work():
        for _ in range(20):
            results.append(softmax_triplet(logits, labels)[0])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80 and all(torch.equal(result, expected) for result in results)


@needs_core
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork():
    code = """if True:
        import os, torch
        from loku_kernels import softmax_triplet
        from loku_kernels.backends import native
        assert native._core is not None
        logits, labels = torch.randn(64, 5000), torch.randint(0, 5000, (64,))
        expected = softmax_triplet(logits, labels)[0]
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(softmax_triplet(logits, labels)[0], expected) else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_python(code).returncode == 0


@needs_core
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime():
    code = """if True:
        import loku_kernels, torch
        assert loku_kernels.backends.native._core is not None
        loku_kernels.softmax_triplet(torch.randn(64, 5000), torch.zeros(64, dtype=torch.int64))
        maps = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
        print(sum("libgomp" in path or "libiomp" in path or "libomp" in path for path in maps))
    """
    assert run_python(code).stdout.strip() == "1"


def test_import_needs_torch_alone():
    code = """if True:
        import sys, loku_kernels
        heavy = {"transformers", "peft", "triton", "datasets", "accelerate", "scipy"} & set(sys.modules)
        raise SystemExit(str(heavy) if heavy else 0)
    """
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_without_the_core_it_says_so_once_and_works():
    code = """if True:
        import sys, warnings
        sys.modules["loku_kernels._core"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, loku_kernels
            logits = torch.randn(8, 50, requires_grad=True)
            loku_kernels.ihl_loss(logits, torch.arange(8), inplace=True).backward()
            loku_kernels.linear_ihl_loss(torch.randn(8, 4), torch.randn(50, 4), torch.arange(8))
        messages = [str(w.message) for w in caught if "loku_kernels" in str(w.message)]
        assert len(messages) == 1 and "reference implementation" in messages[0], messages
    """
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_public_names_are_documented():
    for name in loku_kernels.__all__:
        assert getattr(loku_kernels, name).__doc__, name
