"""Everything that needs a GPU, in one command: build, tests, measurements.

    python benchmarks/gpu.py --out DIR [--minutes 9] [--only STEP ...]
    python benchmarks/gpu.py --dry-run [--card "H100 SXM"]

Builds the compiled core for the card found, runs the tests marked ``gpu``, then measures, each kernel beside
its peers in one process and beside a floor measured there too: a device copy for kernels that move bytes, the
two bare GEMMs for the linear losses, one GEMM for the Fisher. Every case is written to DIR as soon as it is
measured, a chart at the end of each step; a run that is cut off keeps what it has. What does not fit into the
minutes is left out, and said so. ``--dry-run`` needs no GPU: it prints the plan, and floors computed from a
card's data sheet, which are no measurements.
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
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
CARDS = {  # bytes a second, bfloat16 and float32 operations a second, of the data sheets
    "A100 SXM": (2.04e12, 312e12, 19.5e12),
    "H100 SXM": (3.35e12, 989e12, 67e12),
    "H200 SXM": (4.8e12, 989e12, 67e12),
    "B200": (8.0e12, 2250e12, 75e12),
}
LOGITS = [(n, v) for v in (32000, 50257, 128256, 262144) for n in (2048, 8192, 16384)]
LINEAR = [(8192, 4096, 32000), (8192, 4096, 128256), (2048, 2304, 256000)]
FISHER = [(n, t, 4096, k) for k in (4096, 11008) for t in (128, 512) for n in (1, 4, 16)]
LLAMA_7B = [(4096, 4096, 128), (11008, 4096, 64), (4096, 11008, 32)]  # outputs, inputs, how many: 224
RANK = 32
MAX_LOGITS_BYTES = 9 << 30  # of one tensor; eager peers need several of them


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


STEPS = {
    "build": "the compiled core, for the card found",
    "tests": "pytest -m gpu",
    "forward": "triplet forward, bfloat16 logits; target: 90% of the copy's bandwidth at 2 bytes a logit",
    "fused": "IHL forward and backward in place; target: 85% of the copy's bandwidth at 4 bytes a logit",
    "linear": "linear IHL and cross entropy, frozen head; target: two GEMMs + 1.2 x the elementwise bytes",
    "fisher": "accumulate_squared_grad_; target: 1.8 x max(compute, bytes) from 2048 tokens on",
    "fila": "row_scaled_svd of all 224 matrices of Llama-2-7B; target: 10 x faster than torch.svd_lowrank",
}
SHAPES = {"forward": LOGITS, "fused": LOGITS, "linear": LINEAR, "fisher": FISHER, "fila": LLAMA_7B}


def dry_run(card):
    print(f"floors by the data sheet of {card}, computed and not measured\n")
    for step, what in STEPS.items():
        print(f"{step}: {what}")
        for shape in SHAPES.get(step, ()):
            moved, operations, seconds = floors(step, shape, card)
            print(
                f"  {'x'.join(map(str, shape)):20} {moved / 1e9:8.2f} GB {operations / 1e12:8.2f} TFLOP"
                f" {seconds * 1e3:9.3f} ms"
            )


# --- one run --------------------------------------------------------------------------------------


class Run:
    """Where results go, and how much time is left."""

    def __init__(self, out, minutes):
        self.out, self.end = Path(out), time.monotonic() + 60 * minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows, self.skipped = [], []

    def left(self):
        return self.end - time.monotonic()

    def add(self, row):
        self.rows.append(row)
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        self.write()

    def skip(self, what, why):
        self.skipped.append({"what": what, "why": why})
        print(f"  skipped: {what}: {why}", flush=True)
        self.write()

    def write(self):
        from harness import environment

        facts = environment("cuda") | {"gpu_versions": package_versions()}
        result = {"environment": facts, "rows": self.rows, "skipped": self.skipped}
        path = self.out / "gpu.json.part"
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.replace(self.out / "gpu.json")

    def chart(self, step):
        """Time over the floor, by shape and name."""
        rows = [row for row in self.rows if row["step"] == step and row.get("times_floor")]
        if not rows or importlib.util.find_spec("matplotlib") is None:
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


def package_versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    import torch

    return found | {"cuda": torch.version.cuda}


def event_times(functions, prepare=None, seconds=0.4):
    """Median seconds of each function by device events, in turns; None, with the reason, where one fails."""
    import torch

    times, failed = {name: [] for name in functions}, {}

    def once(name):
        if prepare is not None:
            prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        functions[name]()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    for name in functions:
        try:
            once(name)
            once(name)  # compiled, allocated, warm
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            torch.cuda.empty_cache()
    alive = [name for name in functions if name not in failed]
    start = time.monotonic()
    for round_ in range(30):
        for name in alive:
            times[name].append(once(name))
        if round_ >= 4 and time.monotonic() - start > seconds * len(alive):
            break
    return {name: median(values) for name, values in times.items() if values}, failed


def peak_bytes(function, prepare):
    from harness import peak_extra_bytes

    prepare()
    return peak_extra_bytes(function, "cuda")


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
    from loku_kernels import native

    found = {}
    if importlib.util.find_spec("triton") and importlib.util.find_spec("loku_kernels.triton"):
        found[f"{name} [triton]"] = forced("triton", function)
    if native._core is not None and native._core.has_cuda:
        found[f"{name} [native]"] = forced("native", function)
    return found


def compare(run, step, shape, functions, floor, prepare=None, moved=None, operations=None):
    """Measure a case. floor: from the measured times, name -> seconds, the seconds of the floor."""
    label = "x".join(map(str, shape))
    if run.left() < 20:
        run.skip(f"{step} {label}", "no time left")
        return
    times, failed = event_times(functions, prepare)
    for name, why in failed.items():
        run.skip(f"{step} {label} {name}", why)
    base = floor(times)
    for name, seconds in times.items():
        row = {"step": step, "shape": label, "name": name, "milliseconds": seconds * 1e3}
        row["times_floor"] = seconds / base
        if moved:
            row["gigabytes_per_second"] = moved / seconds / 1e9
        if operations:
            row["teraflops"] = operations / seconds / 1e12
        if "[" in name:
            row["peak_extra_bytes"] = peak_bytes(functions[name], prepare or (lambda: None))
        run.add(row)
    gc.collect()


def liger(module, name):
    """A peer of Liger-Kernel, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module(module), name, None)


# --- steps ----------------------------------------------------------------------------------------


def build():
    """Compile for the card found, in place; True if that worked."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "LOKU_CUDA": "1", "LOKU_CUDA_ARCHS": f"{major}{minor}"}
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(f"  build: exit status {result.returncode}, {time.monotonic() - start:.0f} s", flush=True)
    if result.returncode:
        print((result.stdout + result.stderr)[-3000:])
    return result.returncode == 0


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
    run.add({"step": "tests", "name": "pytest -m gpu", "status": status, "seconds": time.monotonic() - start})


def random_logits(n, v):
    """Logits (N, V) in bfloat16 and labels (N,); in every second row the target is memorised, p_t = 0.98."""
    import torch

    torch.manual_seed(0)
    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16) * 3
    labels = torch.randint(0, v, (n,), device="cuda")
    for part, t in zip(logits.split(512), labels.split(512), strict=True):
        memorised = part.float().logsumexp(-1)[::2] + 4
        part[::2] = part[::2].scatter(1, t[::2, None], memorised[:, None].bfloat16())
    return logits, labels


def cross_entropy(logits, labels):
    import torch

    return torch.nn.functional.cross_entropy(logits.float(), labels)


def forward(run):
    import torch

    from loku_kernels import softmax_triplet

    for n, v in LOGITS:
        if 2 * n * v > MAX_LOGITS_BYTES:
            run.skip(f"forward {n}x{v}", "the logits are too large")
            continue
        logits, labels = random_logits(n, v)
        buffer = torch.empty_like(logits)
        functions = {
            "copy": lambda b=buffer, y=logits: b.copy_(y),
            **on_backends("softmax_triplet", lambda y=logits, t=labels: softmax_triplet(y, t)),
            "eager cross_entropy": lambda y=logits, t=labels: torch.nn.functional.cross_entropy(y, t),
            "torch.compile cross_entropy": lambda y=logits, t=labels: compiled(cross_entropy)(y, t),
        }
        # The copy reads and writes: at its bandwidth a read alone takes half its time.
        with torch.no_grad():
            compare(run, "forward", (n, v), functions, lambda times: times["copy"] / 2, moved=2 * n * v)
        del logits, labels, buffer, functions
        torch.cuda.empty_cache()


_compiled = {}


def compiled(function):
    import torch

    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=True)
    return _compiled[function]


def fused(run):
    import torch
    from harness import lean_ihl, official_ihl

    from loku_kernels import ihl_loss

    for n, v in LOGITS:
        if 2 * n * v > MAX_LOGITS_BYTES:
            run.skip(f"fused {n}x{v}", "the logits are too large")
            continue
        source, labels = random_logits(n, v)
        logits, buffer = source.clone(), torch.empty_like(source)

        def prepare(y=logits, x=source):  # untimed: an in-place kernel consumes the logits
            y.requires_grad_(False).copy_(x).requires_grad_()
            y.grad = None

        def peer(loss, y=logits, t=labels):
            return lambda: loss(y, t).backward()

        functions = {
            "copy": lambda b=buffer, x=source: b.copy_(x),
            **on_backends("ihl_loss in place", peer(lambda y, t: ihl_loss(y, t, inplace=True))),
            **on_backends("ihl_loss", peer(ihl_loss)),
            "eager cross_entropy": peer(torch.nn.functional.cross_entropy),
        }
        if 2 * n * v <= MAX_LOGITS_BYTES // 4:  # these hold several float or int64 tensors of that shape
            functions["lean eager IHL"] = peer(lean_ihl)
            functions["torch.compile IHL"] = peer(lambda y, t: compiled(lean_ihl)(y, t))
        if 2 * n * v <= MAX_LOGITS_BYTES // 16:
            functions["official formula"] = peer(official_ihl)
        if loss := liger("liger_kernel.transformers", "LigerCrossEntropyLoss"):
            functions["Liger cross entropy"] = peer(loss())
        compare(run, "fused", (n, v), functions, lambda times: times["copy"], prepare, moved=4 * n * v)
        del source, labels, logits, buffer, functions, prepare, peer
        torch.cuda.empty_cache()


def linear(run):
    import torch

    from loku_kernels import linear_cross_entropy_loss, linear_ihl_loss

    for n, d, v in LINEAR:
        torch.manual_seed(0)
        hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) / d**0.5
        labels = torch.randint(0, v, (n,), device="cuda")
        plain, logits = hidden.detach(), torch.empty(n, v, device="cuda", dtype=torch.bfloat16)

        def gemms(h=plain, w=weight, y=logits):
            torch.mm(h, w.t(), out=y)
            torch.mm(y, w)

        def prepare(h=hidden):
            h.grad = None

        def peer(loss, h=hidden, w=weight, t=labels):
            return lambda: loss(h, w, t).backward()

        functions = {
            "two GEMMs": gemms,
            "copy of the logits": lambda y=logits: y.clone(),
            **on_backends("linear_ihl_loss", peer(linear_ihl_loss)),
            **on_backends("linear_cross_entropy_loss", peer(linear_cross_entropy_loss)),
            "eager cross_entropy": peer(lambda h, w, t: torch.nn.functional.cross_entropy(h @ w.t(), t)),
            "torch.compile cross_entropy": peer(lambda h, w, t: compiled(eager_linear)(h, w, t)),
        }
        if loss := liger("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"):
            instance = loss()
            functions["Liger fused linear cross entropy"] = peer(lambda h, w, t, f=instance: f(w, h, t))
        if importlib.util.find_spec("cut_cross_entropy"):
            from cut_cross_entropy import linear_cross_entropy

            functions["Cut Cross Entropy"] = peer(linear_cross_entropy)
        compare(
            run,
            "linear",
            (n, d, v),
            functions,
            lambda times: times["two GEMMs"],
            prepare,
            operations=4 * n * d * v,
        )
        del hidden, weight, labels, plain, logits, functions, gemms, prepare, peer
        torch.cuda.empty_cache()


def eager_linear(hidden, weight, labels):
    import torch

    return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels)


def fisher(run):
    import torch

    from loku_kernels import accumulate_squared_grad_

    for n, t, d, k in FISHER:
        torch.manual_seed(0)
        inputs = torch.randn(n, t, k, device="cuda", dtype=torch.bfloat16)
        grads = torch.randn(n, t, d, device="cuda", dtype=torch.bfloat16) * 1e-2
        total, rows = torch.zeros(d, k, device="cuda"), torch.zeros(d, device="cuda")
        divisor = torch.rand(d, k, device="cuda") + 0.1
        product = torch.empty(d, k, device="cuda", dtype=torch.bfloat16)
        copy = torch.empty_like(total)

        def accumulate(x=inputs, g=grads, f=total):
            accumulate_squared_grad_(f, x, g)

        def with_divisor(x=inputs, g=grads, f=rows, q=divisor):
            accumulate_squared_grad_(f, x, g, q)

        def batched(x=inputs, g=grads, f=total):
            f.add_(torch.bmm(g.mT, x).float().square_().sum(0))

        functions = {
            "weight-gradient GEMM": lambda x=inputs, g=grads, p=product: torch.mm(
                g.flatten(0, 1).t(), x.flatten(0, 1), out=p
            ),
            "copy of the Fisher": lambda f=total, c=copy: c.copy_(f),
            **on_backends("accumulate_squared_grad_", accumulate),
            **on_backends("with divisor", with_divisor),
            "bmm, square, sum": batched,
        }
        compare(
            run,
            "fisher",
            (n, t, d, k),
            functions,
            lambda times: max(times["weight-gradient GEMM"], times["copy of the Fisher"]),
            operations=2 * n * t * d * k,
        )
        del inputs, grads, total, rows, divisor, product, copy, functions, accumulate, with_divisor, batched
        torch.cuda.empty_cache()


def fila(run):
    """All matrices of a shape at once; ``svd_lowrank`` on four of them, times how many there are."""
    import torch

    from loku_kernels import row_scaled_svd

    for d, k, count in LLAMA_7B:
        label = f"{d}x{k}x{count}"
        if run.left() < 30:
            run.skip(f"fila {label}", "no time left")
            continue
        torch.manual_seed(0)
        weights = [torch.randn(d, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        scales = torch.randn(count, d, device="cuda").exp()

        def lowrank(weights=weights[:4], scales=scales[:4]):
            for w, s in zip(weights, scales, strict=True):
                torch.svd_lowrank(s[:, None] * w.float(), q=RANK)

        functions = {
            "row_scaled_svd": lambda w=weights, s=scales: row_scaled_svd(w, s, RANK),
            "svd_lowrank": lowrank,
        }
        times, failed = event_times(functions, seconds=1.0)
        for name, why in failed.items():
            run.skip(f"fila {label} {name}", why)
        if "svd_lowrank" in times:
            times["svd_lowrank"] *= count / 4
        _, operations, _ = floors("fila", (d, k, count), "H100 SXM")
        for name, seconds in times.items():
            run.add(
                {
                    "step": "fila",
                    "shape": label,
                    "name": name,
                    "milliseconds": seconds * 1e3,
                    "times_floor": seconds / min(times.values()),
                    "teraflops": operations / seconds / 1e12 if name == "row_scaled_svd" else None,
                }
            )
        del weights, scales, functions, lowrank
        torch.cuda.empty_cache()


def main():
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
    options = parser.parse_args()
    if options.dry_run:
        dry_run(options.card)
        return
    if options.out is None:
        parser.error("--out is needed, or --dry-run")

    run = Run(options.out, options.minutes)
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --dry-run prints the plan without one")
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", flush=True)
    if "build" in options.only and not build():
        run.skip("native", "the build failed")
    sys.path.insert(0, str(ROOT))  # the checkout, with what was built in place
    steps = {"forward": forward, "fused": fused, "linear": linear, "fisher": fisher, "fila": fila}
    if "tests" in options.only:
        tests(run)
    for name in options.only:
        if name not in steps:
            continue
        print(f"{name}: {STEPS[name]}", flush=True)
        try:
            steps[name](run)
        except Exception as error:  # one step must not take the others' results with it
            run.skip(name, f"{type(error).__name__}: {error}")
            torch.cuda.empty_cache()
        run.chart(name)
    print("written:", run.out / "gpu.json")


if __name__ == "__main__":
    main()
