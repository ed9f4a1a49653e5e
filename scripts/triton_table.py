"""Resources of every compiled Triton kernel, without a GPU: registers, spills, vector widths.

    python scripts/triton_table.py            # compile, compare with the committed table
    python scripts/triton_table.py --write    # compile, write the table

The launchers of ``loku_kernels.backends.triton`` are called on tensors without memory (device "meta"). Each
launch is compiled ahead of time, with the arguments, specialisations and options of a launch on a GPU.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from resource_table import Facts, Table, argument_parser, differences, report
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from loku_kernels.backends.triton import divergence, fisher, triplet

TABLE = Path(__file__).parent / "triton_table.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MULTIPROCESSORS = 132  # as on an H100; the launchers ask for the number
VOCAB = 50257  # odd, so rows begin at any alignment
LONG_VOCAB = 128256
MANY, FEW = 4096, 16  # numbers of rows
# kernels that read a few numbers a row, among them the combination of several parts
NO_WHOLE_ROWS = r"mean_scale .*|token_losses .*|triplet bf16 PARTS=(?!1$)\d+"

Launch = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, arguments by name, options


# --- launches -------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of_triplet(dtype: torch.dtype, vocab: int, rows: int, softcap: float = 0.0) -> None:
    """Launch all kernels on whole rows of logits."""
    logits, labels = meta(rows, vocab, dtype=dtype), meta(rows, dtype=torch.int64)
    scale = meta(dtype=torch.float64)
    found, ids = triplet.triplet_forward(logits, labels, -100, softcap=softcap)
    triplet.triplet_backward(found, logits, labels, -100, found, ids, factor=scale, softcap=softcap)
    triplet.rest_probabilities_(logits, labels, -100, softcap=softcap)
    divergence.divergence_(logits, meta(rows, vocab, dtype=dtype), softcap=softcap, store=True)
    if not softcap:
        triplet.inverted_hinge_(logits, labels, -100, scale)
        triplet.scale_rows_(logits, scale)


def launches_of_losses(dtype: torch.dtype) -> None:
    """Launch the kernels on the numbers of the rows, with losses in a dtype."""
    found, labels = meta(4096, 3, dtype=torch.float64), meta(4096, dtype=torch.int64)
    for loss in ("inverted_hinge", "cross_entropy"):
        for reduction in ("mean", "none"):
            triplet.token_losses(loss, found, labels, -100, reduction, dtype, True)


def launches_of_hidden(dtype: torch.dtype) -> None:
    """Launch the end of the linear operator's backward, with a softcap."""
    found, labels = meta(1024, 3, dtype=torch.float64), meta(1024, dtype=torch.int64)
    weight, direction = meta(VOCAB, 4096, dtype=dtype), meta(1024, 4096, dtype=dtype)
    factor = meta(dtype=torch.float32)
    triplet.hidden_gradient(
        found, factor, weight, labels, found, labels, direction, softcap=30.0, logit_scale=1.0
    )


def launches_of_fisher(dtype: torch.dtype, tokens: int = 512, whole: int = 0) -> None:
    """Launch the Fisher's kernel, with a divisor and without, by tensor descriptors if ``whole`` is not 0."""
    inputs, grad_outputs = meta(16, tokens, 4096, dtype=dtype), meta(16, tokens, 4096, dtype=dtype)
    weight = meta(4096, 4096, dtype=torch.float32)
    with mock.patch.object(fisher, "_longest_whole_sample", lambda device: whole):
        fisher.accumulate_squared_grad_(weight, inputs, grad_outputs, None)
        fisher.accumulate_squared_grad_(meta(4096, dtype=torch.float32), inputs, grad_outputs, weight)


def record(launcher: Callable[..., Any], *args: Any, **options: Any) -> list[Launch]:
    """Return the launches of a launcher, which is called with the other arguments."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def note(*args: Any, **options: Any) -> None:
                names = self.kernel.arg_names
                arguments = dict(zip(names, args, strict=False))
                arguments |= {name: options.pop(name) for name in names if name in options}
                launches.append((self.kernel, arguments, options))

            return note

    patches: list[Any] = [
        mock.patch.object(module, name, Recorder(kernel))
        for module in (triplet, fisher, divergence)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and isinstance(kernel, triton.JITFunction)
    ]
    patches.append(mock.patch.object(triplet, "_multiprocessors", lambda device: MULTIPROCESSORS))
    for patch in patches:
        patch.start()
    try:
        launcher(*args, **options)
    finally:
        for patch in patches:
            patch.stop()
    return launches


def all_launches() -> dict[str, Launch]:
    """Return name -> launch, each once."""
    named: dict[str, Launch] = {}

    def add(name: str, launches: Iterable[Launch]) -> None:
        for kernel, arguments, options in launches:
            keys = ("PARTS", "WRITE", "LOSS", "REDUCTION", "DESCRIBED", "DIVIDE")
            detail = [f"{key}={arguments[key]}" for key in keys if arguments.get(key, "") != ""]
            full = " ".join([kernel.__name__.removesuffix("_kernel"), name, *detail])
            named.setdefault(full, (kernel, arguments, options))

    for short, dtype in DTYPES.items():
        add(short, record(launches_of_triplet, dtype, VOCAB, MANY))
        add(f"{short} softcap", record(launches_of_triplet, dtype, VOCAB, MANY, 30.0))
        add(short, record(launches_of_hidden, dtype))
        add(short, record(launches_of_fisher, dtype))
    # The following do not depend on the dtype.
    few = record(launches_of_triplet, torch.bfloat16, VOCAB, FEW)
    add(
        "bf16",
        [launch for launch in few if "PARTS" in launch[1] and launch[0].__name__ != "scale_rows_kernel"],
    )
    long = record(launches_of_triplet, torch.bfloat16, LONG_VOCAB, MANY)
    add("bf16 long", [launch for launch in long if launch[1].get("WRITE")])
    add("int64", record(triplet.mean_scale, meta(4096, dtype=torch.int64), -100))
    add("fp32", record(launches_of_losses, torch.float32))
    add("fp64", record(launches_of_losses, torch.float64))
    with mock.patch.object(fisher, "_precision", lambda dtype: "tf32"):
        add("tf32", record(launches_of_fisher, torch.float32))
    add("bf16 short", record(launches_of_fisher, torch.bfloat16, 200))
    for tokens in (128, 200, 512):
        add(f"bf16 T={tokens}", record(launches_of_fisher, torch.bfloat16, tokens, whole=208))
    add("fp16", record(launches_of_fisher, torch.float16, whole=208))
    return named


def serves(launch: Launch, target: GPUTarget) -> bool:
    """Say whether a target can have a launch. Tensor descriptors need an NVIDIA GPU of capability 9 or 10."""
    arguments = launch[1]
    if not arguments.get("DESCRIBED"):
        return True
    whole = {90: 208, 100: 128}.get(target.arch, -1)
    return bool(arguments["STEPS"] * arguments["BLOCK_T"] + arguments["TAIL"] <= whole)


# --- compilation ----------------------------------------------------------------------------------

POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def source(kernel: Any, arguments: Mapping[str, Any]) -> ASTSource:
    """Return the source that Triton's own launch compiles: types, constants, multiples of 16.

    Args:
        kernel: The kernel.
        arguments: The arguments by name.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            block = POINTERS[value.base.dtype].removeprefix("*") + str(value.block_shape)
            signature[parameter.name], aligned = f"tensordesc<{block}>", False
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = specialised and value % 16 == 0
        else:
            signature[parameter.name], aligned = "fp32", False
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def widest(code: str, pattern: str) -> int:
    """Return the bytes of the widest access. The groups of the pattern are its lanes and bits."""
    return max((int(lanes or 1) * int(bits) // 8 for lanes, bits in re.findall(pattern, code)), default=0)


def found(pattern: str, text: str) -> int:
    """Return the number in the first group of a pattern's first match, which must be there."""
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in the compiler's output"
    return int(match[1])


def compile_nvidia(
    kernel: Any, arguments: dict[str, Any], options: dict[str, Any], target: GPUTarget
) -> Facts:
    """Compile a launch for an NVIDIA GPU and return its facts."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source(kernel, arguments), target=target, options=options)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    ptx = compiled.asm["ptx"]
    copies = [int(size) for size in re.findall(r"cp\.async\S* \[[^]]*\], \[[^]]*\], (?:0x)?(\w+)", ptx)]
    copies += [16] * ptx.count("cp.async.bulk.tensor")  # at least
    additions = widest(ptx, r"(?:red|atom)\.global\S*?\.add(?:\.v(\d))?\.f(\d+)")
    return {
        "registers": found(r"Used (\d+) registers", log.getvalue()),
        "spilled_bytes": sum(map(int, spills)),
        "shared_bytes": compiled.metadata.shared,
        "widest_load": max(copies + [widest(ptx, r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)")]),
        "widest_store": max(additions, widest(ptx, r"st\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)")),
    }


def compile_amd(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], target: GPUTarget) -> Facts:
    """Compile a launch for an AMD GPU and return its facts."""
    options = {key: value for key, value in options.items() if key != "maxnreg"}  # an option of NVIDIA
    compiled = triton.compile(source(kernel, arguments), target=target, options=options)
    assembly = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return found(rf"\.{field}:\s+(\d+)", assembly)

    words = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
    widths = {
        kind: [words.get(name, 2) for name in re.findall(rf"(?:global|buffer)_{kind}_(\w+)", assembly)]
        for kind in ("load", "store")
    }
    return {
        "registers": number("vgpr_count"),
        "spilled_bytes": 4 * number("vgpr_spill_count"),
        "shared_bytes": compiled.metadata.shared,
        "widest_load": max(widths["load"], default=0),
        "widest_store": max(widths["store"], default=0),
    }


def table(targets: Iterable[str]) -> Table:
    """Compile all launches for some architectures and return their table."""
    rows: dict[str, dict[str, Facts]] = {}
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache  # a cached kernel has no report of ptxas
        triton.knobs.nvidia.dump_ptxas_log = True
        for architecture in targets:
            target = TARGETS[architecture]
            amd = target.backend == "hip"
            with mock.patch.object(triplet, "FUSED_MOST_WARPS", 16 if amd else 32):
                launches = all_launches()
            for name, launch in launches.items():
                if serves(launch, target):
                    facts = (compile_amd if amd else compile_nvidia)(*launch, target)
                    rows.setdefault(name, {})[architecture] = facts
    return {"triton": triton.__version__, "kernels": rows}


# --- comparison -----------------------------------------------------------------------------------


def problems(ours: Table, committed: Table) -> list[str]:
    """Return a line for each problem of a table: spills, narrow loads, differences from the committed."""
    lines = []
    for name, row in ours["kernels"].items():
        for architecture, cell in row.items():
            place = f"{name} on {architecture}: {cell}"
            if cell["spilled_bytes"]:
                lines.append(f"spills: {place}")
            if cell["widest_load"] < 16 and not re.fullmatch(NO_WHOLE_ROWS, name):
                lines.append(f"narrow loads: {place}")
    return lines + differences(ours, committed, "triton")


def main() -> None:
    """Run the command."""
    parser = argument_parser(__doc__, TABLE)
    parser.add_argument("--target", action="append", choices=TARGETS, help="one architecture (repeatable)")
    options = parser.parse_args()
    report(table(options.target or TARGETS), TABLE, problems, options.write)


if __name__ == "__main__":
    main()
