"""Everything that needs a GPU, in one command: build, tests, measurements.

    python benchmarks/gpu.py --out DIR [--minutes 9] [--only STEP ...]
    python benchmarks/gpu.py --dry-run [--card "H100 SXM"]

Builds the compiled core for the card found, runs the tests marked ``gpu``, then measures, each kernel beside
its peers in one process and beside a floor measured there too: a device copy for kernels that move bytes, the
bare products for the others. Every case is written to DIR/gpu.json as soon as it is measured, a chart at the
end of each step. What does not fit into the minutes is left out, and said so; the same command with the same
DIR goes on there. A peer that is missing or fails, a case that is too large, an error after which the device
is of no use (the command then starts itself anew): each is noted, and costs nothing but itself. ``--dry-run``
needs no GPU: it prints the plan, and floors computed from a card's data sheet, which are no measurements.

Times are the device's own, by events; the launches of what is timed queue up behind a short wait.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from harness import environment, importable, lean_ihl, official_ihl, peak_extra_bytes

ROOT = Path(__file__).parent.parent
DEVICE = "cuda"
CARDS = {  # bytes a second, bfloat16 and float32 operations a second, of the data sheets
    "A100 SXM": (2.04e12, 312e12, 19.5e12),
    "H100 SXM": (3.35e12, 989e12, 67e12),
    "H200 SXM": (4.8e12, 989e12, 67e12),
    "B200": (8.0e12, 2250e12, 75e12),
}
LOGITS = [(n, v) for v in (32000, 50257, 128256, 262144) for n in (2048, 8192, 16384)]
LLAMA_7B = [(4096, 4096, 128), (11008, 4096, 64), (4096, 11008, 32)]  # outputs, inputs, how many: 224
SHAPES = {
    "forward": LOGITS,
    "fused": LOGITS,
    "linear": [(8192, 4096, 32000), (8192, 4096, 128256), (2048, 2304, 256000)],
    "fisher": [(n, t, 4096, k) for k in (4096, 11008) for t in (128, 512) for n in (1, 4, 16)],
    "fila": LLAMA_7B,
}
STEPS = {
    "build": "the compiled core, for the card found",
    "tests": "pytest -m gpu",
    "forward": "triplet forward, bfloat16 logits; target: 90% of the copy's bandwidth at 2 bytes a logit",
    "fused": "IHL forward and backward in place; target: 85% of the copy's bandwidth at 4 bytes a logit",
    "linear": "linear IHL and cross entropy, frozen head; target: two GEMMs + 1.2 x the elementwise bytes",
    "fisher": "accumulate_squared_grad_; target: 1.8 x max(compute, bytes) from 2048 tokens on",
    "fila": "row_scaled_svd of all 224 matrices of Llama-2-7B; target: 10 x faster than torch.svd_lowrank",
}
RANK = 32
LOWRANK_MATRICES = 4  # of those of a shape that torch.svd_lowrank is timed on
MAX_LOGITS_BYTES = 9 << 30  # of one tensor; eager peers need several of them
LEAD = 2_000_000  # cycles, about 1 ms, that the device waits while launches queue up
SECONDS = 0.4  # of measuring, for each function


# --- the plan -------------------------------------------------------------------------------------


def floors(step, shape, card):
    """(bytes, operations, seconds) that no version can go below, in bfloat16, by a card's data sheet."""
    bandwidth, bfloat16, _ = CARDS[card]
    if step in ("forward", "fused"):
        n, v = shape
        moved, operations = (2 if step == "forward" else 4) * n * v, 0
    elif step == "linear":
        n, d, v = shape
        moved, operations = 2 * (v * d + 3 * n * d), 4 * n * d * v
    elif step == "fisher":
        n, t, d, k = shape
        moved, operations = 2 * n * t * (d + k) + 8 * d * k, 2 * n * t * d * k
    else:  # three Krylov blocks and the values of V, from weights read once a product
        d, k, count = shape
        moved, operations = 8 * 2 * d * k * count, 8 * 2 * d * k * (RANK + 8) * count
    return moved, operations, max(moved / bandwidth, operations / bfloat16)


def label_of(shape):
    return "x".join(map(str, shape))


def dry_run(steps, card):
    print(f"floors by the data sheet of {card}, computed and not measured\n")
    for step in steps:
        print(f"{step}: {STEPS[step]}")
        for shape in SHAPES.get(step, ()):
            moved, operations, seconds = floors(step, shape, card)
            print(
                f"  {label_of(shape):20} {moved / 1e9:8.2f} GB {operations / 1e12:8.2f} TFLOP"
                f" {seconds * 1e3:9.3f} ms"
            )


# --- one run --------------------------------------------------------------------------------------


class Run:
    """Where results go, what is there already, and how much time is left."""

    def __init__(self, out, minutes):
        self.out, self.end = Path(out), time.monotonic() + 60 * minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / "gpu.json"
        self.environment = environment(DEVICE)
        self.rows, self.failed, self.left_out = [], [], []
        if self.path.exists():
            earlier = json.loads(self.path.read_text())
            for fact in ("device", "versions", "commit"):
                if earlier["environment"][fact] != self.environment[fact]:
                    raise SystemExit(f"{self.path} is of another {fact}: give another folder")
            self.rows, self.failed = earlier["rows"], earlier["failed"]

    def left(self):
        return self.end - time.monotonic()

    def done(self, step, shape=None):
        return any((entry["step"], entry.get("shape")) == (step, shape) for entry in self.rows + self.failed)

    def add(self, rows, failed=()):
        """A case's results at once: a run that is cut off has it whole or not at all."""
        self.rows += rows
        self.failed += failed
        for row in rows:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        for entry in failed:
            print(f"  failed: {entry}", flush=True)
        self.write()

    def leave_out(self, step, shape):
        self.left_out.append({"step": step, "shape": shape})
        print(f"  no time left: {step} {shape}", flush=True)
        self.write()

    def write(self):
        result = {
            "environment": self.environment,
            "rows": self.rows,
            "failed": self.failed,
            "left_out": self.left_out,
        }
        part = self.path.with_suffix(".json.part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(self.path)

    def chart(self, step):
        """Time over the floor, by shape and name."""
        rows = [row for row in self.rows if row["step"] == step and row.get("times_floor")]
        if not rows or not importable("matplotlib"):
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        shapes, names = ([*dict.fromkeys(row[key] for row in rows)] for key in ("shape", "name"))
        figure, axes = pyplot.subplots(figsize=(4 + 1.2 * len(shapes), 4))
        for i, name in enumerate(names):
            found = {row["shape"]: row["times_floor"] for row in rows if row["name"] == name}
            positions = [j + 0.8 * i / len(names) for j, shape in enumerate(shapes) if shape in found]
            axes.bar(positions, [found[s] for s in shapes if s in found], 0.8 / len(names), label=name)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks([j + 0.4 for j in range(len(shapes))], shapes, rotation=30, ha="right")
        axes.set_yscale("log")
        axes.set_ylabel("time / floor")
        axes.set_title(STEPS[step], fontsize=8)
        axes.legend(fontsize=7)
        figure.savefig(self.out / f"gpu_{step}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)


class Case(NamedTuple):
    """What is measured on a shape, and what it is held against."""

    functions: dict[str, Callable]
    floor: Callable  # of the measured seconds, by name: the seconds of the floor
    target: Callable = lambda times: None  # likewise: what our function should take at most
    over: tuple[str, ...] = ()  # peers
    prepare: Callable = lambda: None  # called, untimed, before each call
    repeats: dict[str, float] = {}  # noqa: RUF012 - how many calls do the work of one of the others
    rates: dict[str, float] = {}  # noqa: RUF012 - amounts, kept a second
    columns: dict[str, dict] = {}  # noqa: RUF012 - what else belongs into a function's row


def reason(error):
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def release():
    gc.collect()
    if DEVICE == "cuda" and usable():
        torch.cuda.empty_cache()


def usable():
    """Whether the device still computes: after an assertion or a bad address it refuses everything."""
    try:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def seconds_of(function):
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LEAD)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measured(case):
    """Median seconds of each function, taken in turns; its peak extra bytes; and why others failed."""
    times, peaks, failed = {name: [] for name in case.functions}, {}, {}

    def attempt(name, call):
        case.prepare()
        try:
            return call(case.functions[name])
        except Exception as error:
            failed[name] = reason(error)
            times.pop(name)
            release()

    for name in case.functions:
        attempt(name, seconds_of)  # compiles
    for name in list(times):
        peaks[name] = attempt(name, partial(peak_extra_bytes, device=DEVICE))
    start, budget = time.monotonic(), SECONDS * len(times)
    for round_ in range(30):
        for name in list(times):
            value = attempt(name, seconds_of)
            if name in times:
                times[name].append(value)
        if round_ >= 4 and time.monotonic() - start > budget:
            break
    return {name: case.repeats.get(name, 1) * median(values) for name, values in times.items()}, peaks, failed


def ratio(seconds, base):
    return None if base is None else seconds / base


def base_of(function, times):
    """The seconds of a floor or a target; None where one of those that make it was not measured."""
    try:
        return function(times)
    except KeyError:
        return None


def measure(run, step, shape):
    """Add a case to the results, or why it has none."""
    here = {"step": step, "shape": label_of(shape)}
    try:
        case = CASES[step](*shape)
        times, peaks, failed = measured(case)
    except Exception as error:
        run.add([], [{**here, "why": reason(error)}])
        return
    floor, target = base_of(case.floor, times), base_of(case.target, times)
    rows = [
        {
            **here,
            "name": name,
            "milliseconds": seconds * 1e3,
            "times_floor": ratio(seconds, floor),
            "times_target": ratio(seconds, target),
            "over": {peer: times[peer] / seconds for peer in case.over if peer in times},
            "peak_extra_bytes": peaks[name],
            **{key: amount / seconds for key, amount in case.rates.items()},
            **case.columns.get(name, {}),
        }
        for name, seconds in times.items()
    ]
    run.add(rows, [{**here, "name": name, "why": why} for name, why in failed.items()])


def forced(backend, function):
    """The function, with LOKU_BACKEND set during its calls."""

    def call():
        before = os.environ.get("LOKU_BACKEND")
        os.environ["LOKU_BACKEND"] = backend
        try:
            return function()
        finally:
            if before is None:
                del os.environ["LOKU_BACKEND"]
            else:
                os.environ["LOKU_BACKEND"] = before

    return call


def on_backends(name, function):
    """name [triton], name [native], as far as they are there."""
    from loku_kernels.backends import native

    found = {}
    if DEVICE == "cuda" and importlib.util.find_spec("triton"):
        found[f"{name} [triton]"] = forced("triton", function)
    if native._core is not None and (DEVICE == "cpu" or native._core.has_cuda):
        found[f"{name} [native]"] = forced("native", function)
    return found


def peer(name, module, attribute, make=lambda found: found):
    """{name: function} of another library, {} where it is not installed or does not import."""
    if not importable(module.split(".")[0]):
        return {}
    try:
        return {name: make(getattr(importlib.import_module(module), attribute))}
    except Exception as error:
        print(f"  skipped: {name}: {reason(error)}", flush=True)
        return {}


@cache
def compiled(function):
    return torch.compile(function, dynamic=True)


# --- build and tests ------------------------------------------------------------------------------


def build(run):
    """Compile for the card found, in place."""
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "LOKU_CUDA": "1", "LOKU_CUDA_ARCHS": f"{major}{minor}"}
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    seconds = time.monotonic() - start
    if result.returncode:
        print((result.stdout + result.stderr)[-3000:])
    run.add([{"step": "build", "name": "setup.py", "status": result.returncode, "seconds": seconds}])


def tests(run):
    log = run.out / "gpu_tests.txt"
    limit = min(240.0, run.left() - 60)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=10", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    with open(log, "w") as file:
        # Files that cannot be imported here (a missing test dependency) must not stop the others.
        command += ["--continue-on-collection-errors", "tests"]
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = "cut off"
    print(log.read_text()[-3000:], flush=True)
    seconds = time.monotonic() - start
    run.add([{"step": "tests", "name": "pytest -m gpu", "status": status, "seconds": seconds}])


# --- cases ----------------------------------------------------------------------------------------


def random_logits(n, v):
    """Logits (N, V) in bfloat16 and labels (N,); in every second row the target is memorised, p_t = 0.98."""
    if 2 * n * v > MAX_LOGITS_BYTES:
        raise ValueError("the logits are too large")
    torch.manual_seed(0)
    logits = torch.randn(n, v, device=DEVICE, dtype=torch.bfloat16) * 3
    labels = torch.randint(0, v, (n,), device=DEVICE)
    for part, t in zip(logits.split(512), labels.split(512), strict=True):
        memorised = part.float().logsumexp(-1)[::2] + 4
        part[::2] = part[::2].scatter(1, t[::2, None], memorised[:, None].bfloat16())
    return logits, labels


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits.float(), labels)


def linear_cross_entropy(hidden, weight, labels):
    return cross_entropy(hidden @ weight.t(), labels)


def forward(n, v):
    from loku_kernels import softmax_triplet

    logits, labels = random_logits(n, v)
    buffer = torch.empty_like(logits)
    losses = {
        "eager cross_entropy": torch.nn.functional.cross_entropy,
        "torch.compile cross_entropy": compiled(cross_entropy),
        **peer("quack cross_entropy", "quack.cross_entropy", "cross_entropy"),
    }
    return Case(
        {
            "copy": lambda: buffer.copy_(logits),
            **on_backends("softmax_triplet", lambda: softmax_triplet(logits, labels)),
            **{name: partial(loss, logits, labels) for name, loss in losses.items()},
        },
        # The copy reads and writes: at its bandwidth a read alone takes half its time.
        floor=lambda times: times["copy"] / 2,
        target=lambda times: times["copy"] / 2 / 0.9,
        over=tuple(losses),
        rates={"gigabytes_per_second": 2 * n * v / 1e9},
    )


def fused(n, v):
    from loku_kernels import ihl_loss

    source, labels = random_logits(n, v)
    logits, buffer = source.clone().requires_grad_(), torch.empty_like(source)
    size = 2 * n * v
    losses = {
        "eager cross_entropy": torch.nn.functional.cross_entropy,
        **peer("quack cross_entropy", "quack.cross_entropy", "cross_entropy",
               lambda loss: partial(loss, inplace_backward=True)),
        **peer("Liger cross entropy", "liger_kernel.transformers", "LigerCrossEntropyLoss",
               lambda loss: loss()),
    }  # fmt: skip
    if size <= MAX_LOGITS_BYTES // 4:  # these hold several float or int64 tensors of that shape
        losses |= {"lean eager IHL": lean_ihl, "torch.compile IHL": compiled(lean_ihl)}
    if size <= MAX_LOGITS_BYTES // 16:
        losses["official formula"] = official_ihl

    def gradient(loss):
        return lambda: torch.autograd.grad(loss(logits, labels), logits)

    return Case(
        {
            "copy": lambda: buffer.copy_(source),
            **on_backends("ihl_loss in place", gradient(partial(ihl_loss, inplace=True))),
            **on_backends("ihl_loss", gradient(ihl_loss)),
            **{name: gradient(loss) for name, loss in losses.items()},
        },
        floor=lambda times: times["copy"],
        target=lambda times: times["copy"] / 0.85,
        over=tuple(losses),
        prepare=lambda: logits.detach().copy_(source),  # an in-place kernel consumes the logits
        rates={"gigabytes_per_second": 2 * size / 1e9},
    )


def linear(n, d, v):
    from linear import operator_gemms

    from loku_kernels import linear_cross_entropy_loss, linear_ihl_loss

    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, d, device=DEVICE, dtype=torch.bfloat16) / d**0.5
    labels = torch.randint(0, v, (n,), device=DEVICE)
    plain = hidden.detach()
    logits, buffer, out = (
        torch.empty(shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((n, v), (n, v), (n, d))
    )
    losses = {
        "eager cross_entropy": lambda h, w, t: torch.nn.functional.cross_entropy(h @ w.t(), t),
        "torch.compile cross_entropy": compiled(linear_cross_entropy),
        **peer("Liger fused linear cross entropy", "liger_kernel.transformers",
               "LigerFusedLinearCrossEntropyLoss", lambda loss: lambda h, w, t: loss()(w, h, t)),
        **peer("Cut Cross Entropy", "cut_cross_entropy", "linear_cross_entropy"),
    }  # fmt: skip

    def gradient(loss):
        return lambda: torch.autograd.grad(loss(hidden, weight, labels), hidden)

    def gemms(times):
        return min(times["two GEMMs, whole"], times["two GEMMs, by block"])

    return Case(
        {
            "two GEMMs, whole": lambda: torch.mm(torch.mm(plain, weight.t(), out=logits), weight, out=out),
            "two GEMMs, by block": operator_gemms(plain, weight),
            "copy of the logits": lambda: buffer.copy_(logits),
            **on_backends("linear_ihl_loss", gradient(linear_ihl_loss)),
            **on_backends("linear_cross_entropy_loss", gradient(linear_cross_entropy_loss)),
            **{name: gradient(loss) for name, loss in losses.items()},
        },
        floor=gemms,
        target=lambda times: gemms(times) + 1.2 * times["copy of the logits"],
        over=tuple(losses),
        rates={"teraflops": 4 * n * d * v / 1e12},
    )


def fisher(n, t, d, k):
    from loku_kernels import accumulate_squared_grad_

    torch.manual_seed(0)
    inputs = torch.randn(n, t, k, device=DEVICE, dtype=torch.bfloat16)
    grads = torch.randn(n, t, d, device=DEVICE, dtype=torch.bfloat16) * 1e-2
    total, rows = torch.zeros(d, k, device=DEVICE), torch.zeros(d, device=DEVICE)
    divisor = torch.rand(d, k, device=DEVICE) + 0.1
    product = torch.empty(d, k, device=DEVICE, dtype=torch.bfloat16)
    buffer = torch.empty_like(total)

    def floor(times):
        return max(times["weight-gradient GEMM"], times["copy of the Fisher"])

    return Case(
        {
            "weight-gradient GEMM": lambda: torch.mm(
                grads.flatten(0, 1).t(), inputs.flatten(0, 1), out=product
            ),
            "copy of the Fisher": lambda: buffer.copy_(total),
            **on_backends("accumulate_squared_grad_", lambda: accumulate_squared_grad_(total, inputs, grads)),
            **on_backends("with divisor", lambda: accumulate_squared_grad_(rows, inputs, grads, divisor)),
            "bmm, square, sum": lambda: total.add_(torch.bmm(grads.mT, inputs).float().square_().sum(0)),
        },
        floor=floor,
        target=lambda times: 1.8 * floor(times) if n * t >= 2048 else None,
        over=("bmm, square, sum",),
        rates={"teraflops": 2 * n * t * d * k / 1e12},
    )


def fila(d, k, count):
    """All matrices of a shape at once; ``svd_lowrank`` on a few of them, times how many there are."""
    from fila import thin_products

    from loku_kernels import row_scaled_svd

    torch.manual_seed(0)
    weights = [torch.randn(d, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(count)]
    scales = torch.randn(count, d, device=DEVICE).exp()
    few = min(LOWRANK_MATRICES, count)

    def lowrank():
        for w, s in zip(weights[:few], scales, strict=False):
            torch.svd_lowrank(s[:, None] * w.float(), q=RANK)

    _, v = row_scaled_svd(weights[:1], scales[:1], RANK)
    scaled = scales[0].double()[:, None] * weights[0].double()
    gram = scaled @ scaled.T if d < k else scaled.T @ scaled
    captured, most = (scaled @ v[0].double()).square().sum(), torch.linalg.eigvalsh(gram)[-RANK:].sum()
    return Case(
        {
            "thin products": partial(thin_products, weights, RANK),
            "row_scaled_svd": lambda: row_scaled_svd(weights, scales, RANK),
            "torch.svd_lowrank": lowrank,
        },
        floor=lambda times: times["thin products"],
        target=lambda times: times["torch.svd_lowrank"] / 10,
        over=("torch.svd_lowrank",),
        repeats={"torch.svd_lowrank": count / few},
        columns={"row_scaled_svd": {"deficit": (1 - captured / most).item()}},
    )


CASES = {
    "forward": forward,
    "fused": fused,
    "linear": linear,
    "fisher": fisher,
    "fila": fila,
}


def start_anew(run, steps):
    """This command in a new process: a device that has failed in this one computes there."""
    command = [__file__, "--out", str(run.out), "--minutes", f"{run.left() / 60:.3f}", "--only", *steps]
    print("the device has failed: starting anew", flush=True)
    os.execv(sys.executable, [sys.executable, *command])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", help="where results go")
    parser.add_argument(
        "--minutes", type=float, default=9, help="after which nothing new is begun (default 9)"
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="steps")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and floors; needs no GPU")
    parser.add_argument("--card", choices=CARDS, default="H100 SXM", help="whose data sheet --dry-run takes")
    options = parser.parse_args(argv)
    if options.dry_run:
        dry_run(options.only, options.card)
        return
    if options.out is None:
        parser.error("--out is needed, or --dry-run")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --dry-run prints the plan without one")

    run = Run(options.out, options.minutes)
    print(f"{run.environment['device']}, torch {torch.__version__}", flush=True)
    sys.path.insert(0, str(ROOT))  # the checkout, with what is built in place
    for step, first in (("build", build), ("tests", tests)):
        if step in options.only and not run.done(step):
            print(f"{step}: {STEPS[step]}", flush=True)
            try:
                first(run)
            except Exception as error:
                run.add([], [{"step": step, "why": reason(error)}])
    for step in CASES:
        if step not in options.only:
            continue
        print(f"{step}: {STEPS[step]}", flush=True)
        before = len(run.rows)
        for shape in SHAPES[step]:
            if run.done(step, label_of(shape)):
                continue
            if run.left() < 20:
                run.leave_out(step, label_of(shape))
                continue
            measure(run, step, shape)
            release()
            if not usable():
                start_anew(run, options.only)
        if len(run.rows) > before:
            run.chart(step)
    print("written:", run.path)


if __name__ == "__main__":
    main()
