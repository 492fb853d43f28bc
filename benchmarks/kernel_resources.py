"""What the kernels take of a GPU: registers, spills, shared memory, blocks a multiprocessor.

The kernels are compiled for the GPU and nothing runs, so that none is needed. ptxas' report and the launch in Mosaic's
host code are printed by JAX's CUDA plugin on standard output, from C++, and read from there.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from ..cli.common import UsageError
from ..pallas_kernels.attention import decode_attention, prefill_attention
from ..pallas_kernels.matmul import matmul
from ..sharding.hlo import collectives, parse
from ..sharding.targets import compile_for_target, find_chip, target_mesh
from .harness import Table
from .limits import Figure
from .matmul_rows import LAYERS, Row, rows

ASK = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
"""Settings that make the plugin print what is read here; it looks at them when a process first compiles a kernel."""

MOST_REGISTERS = 255  # a thread
REGISTERS = 65536  # 32-bit, a multiprocessor; NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", 8.0 to 10.0
THREADS = 2048
BLOCKS = 32
RESERVED = 1024  # bytes of shared memory that the system takes for each block

FILLS = ("split_kernel", "matmul")  # launch as many blocks as the GPU is to hold at once; others, what the batch needs

DTYPES = {"bf16": "bfloat16", "f16": "float16", "int8": "int8", "fp8": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention op to compile: H head dim, G queries a KV head, K KV heads, T new tokens, S positions a page.

    `kv` is the pages' dtype, `q` the queries'; `tensor` the devices that the KV heads are split over; `every` a window,
    a soft cap and sinks together; `quick` whether the case is of the short list.
    """

    H: int = 128
    G: int = 4
    K: int = 8
    T: int = 1
    S: int = 64
    kv: str = "bf16"
    q: str = "bf16"
    tensor: int = 1
    every: bool = False
    op: str = "decode"
    quick: bool = False

    def __str__(self) -> str:
        split = f" tensor {self.tensor}" if self.tensor > 1 else ""
        options = " window cap sinks" if self.every else ""
        queries = "" if self.q == "bf16" or self.kv == "f16" else f" q {self.q}"
        return f"{self.op} {self.K}x{self.G}x{self.H} T {self.T} page {self.S} {self.kv}{queries}{split}{options}"


HEAD_DIMS = (64, 80, 96, 128, 192, 256)
prefill = functools.partial(Case, op="prefill", T=512)

CASES = [
    # Every head dim, with every dtype of pages. 8 KV heads of 4 queries and 128 dims are an 8B.
    *(Case(H=H, quick=H in (80, 128, 256)) for H in HEAD_DIMS),
    *(Case(H=H, kv="int8", quick=H == 128) for H in HEAD_DIMS),
    *(Case(H=H, kv="fp8", quick=H == 256) for H in HEAD_DIMS),
    *(Case(H=H, kv="f16", q="f16") for H in (64, 128, 256)),
    Case(kv="fp8", q="f16"),
    # Page sizes.
    *(Case(S=S, quick=S == 16) for S in (16, 32, 128)),
    *(Case(S=S, kv="int8", quick=S == 16) for S in (16, 32, 128)),
    # Queries a KV head: MHA, a 70B's, MQA.
    Case(K=32, G=1),
    Case(K=8, G=8),
    Case(K=1, G=16),
    Case(K=32, G=1, kv="int8"),
    Case(K=1, G=16, kv="fp8"),
    # Several new tokens.
    Case(T=4, quick=True),
    Case(T=16),
    Case(T=4, kv="fp8"),
    Case(T=16, kv="fp8", quick=True),
    Case(T=16, G=16, K=1),
    Case(T=16, H=256),
    # All that scores go through.
    Case(every=True, quick=True),
    Case(every=True, kv="int8", S=32),
    Case(every=True, kv="fp8", H=256, T=4),
    # An 8B and a 70B, split over devices.
    *(Case(G=4, tensor=n) for n in (2, 4, 8)),
    *(Case(G=8, tensor=n, quick=n == 8) for n in (2, 4, 8)),
    Case(G=8, tensor=8, kv="fp8"),
    # Prefill.
    *(prefill(H=H, quick=H in (128, 256)) for H in HEAD_DIMS),
    *(prefill(H=H, kv="int8", quick=H == 128) for H in (64, 80, 128, 192, 256)),
    *(prefill(H=H, kv="fp8", S=16) for H in (128, 256)),
    prefill(kv="f16", q="f16"),
    prefill(every=True, G=1, K=32, S=16),
    prefill(every=True, H=256, kv="fp8"),
    prefill(G=4, tensor=8),
    prefill(G=8),
    prefill(G=8, tensor=8, quick=True),
    # Products of a few rows, of every weight of a layer in every form.
    *rows(tuple(LAYERS), (1, 16, 64)),
]

QUICK_PRODUCTS = {
    *(("8b gate_up", 64, form) for form in ("bf16", "int8", "fp8", "fp8-block")),
    ("70b tensor 8 down", 64, "int4"),
    ("8b qkv", 16, "int4-32-zero"),
    ("1b out", 64, "int4-32"),
}


def quick(case: Case | Row) -> bool:
    """Whether a case is of the short list."""
    return (case.weight, case.M, case.form) in QUICK_PRODUCTS if isinstance(case, Row) else case.quick


# --- compiling ---


def resources(cases: Sequence[Case | Row], target: str = "h200", done: Callable[[], None] = lambda: None) -> list[dict]:
    """What the kernels of each case take, compiled for `target`.

    Args:
      cases: what to compile.
      target: a name of `ridgeline.sharding.targets`.
      done: called after each case.

    Returns:
      A dictionary a case: "case", "compile_seconds" (lowering and compiling), "collectives", and "kernels", or "error"
      where it does not compile. A kernel's: name, registers a thread, spill_stores and spill_loads in bytes, threads
      and shared_memory bytes a block, blocks launched, blocks_per_sm, and of the kernel that is to fill the GPU exactly
      "waves": blocks launched over those that it holds at once.

    Raises:
      RuntimeError: the process had compiled a kernel before it was told to report, or the plugin is not installed.
    """
    os.environ.update(ASK)
    chip = find_chip(target)
    target_mesh(target)  # says so at once if the plugin is missing
    results = []
    for number, case in enumerate(cases):
        result: dict[str, Any] = {"case": str(case), "op": "matmul", **dataclasses.asdict(case)}
        result.pop("quick", None)
        # A kernel that the process has compiled before is not reported again. Batch sizes that neither 2 nor 3 divides
        # make all attention kernels differ, whatever the number of heads; products differ in their weights.
        batch = 6 * number + 5
        started = time.perf_counter()
        try:
            with captured() as printed:
                text = compiled_text(case, target, batch)
        except Exception as error:  # of any kind: a table with a gap says more than none
            result["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            result |= {"compile_seconds": round(time.perf_counter() - started, 2), **text}
            kernels = kernels_in(printed[0])
            if len(kernels) != result.pop("custom_calls"):
                raise RuntimeError(
                    f"{case}: {len(kernels)} kernels were reported and another number compiled; "
                    f"set {' '.join(f'{k}={v}' for k, v in ASK.items())} before anything is compiled"
                )
            result["kernels"] = [kernel | occupancy(kernel, chip) for kernel in kernels]
        results.append(result)
        done()
    return results


def compiled_text(case: Case | Row, target: str, batch: int) -> dict[str, int]:
    """Compiles; returns how many Mosaic kernels the program has, and how many collectives."""
    if isinstance(case, Row):
        whole, mesh = PartitionSpec(), target_mesh(target)
        op, out_spec = product_op(case), whole
        shapes = {name: (*of, whole) for name, of in case.operands.items()}
    else:
        mesh = target_mesh(target, tensor=case.tensor)
        op, shapes, out_spec = attention_op(case, batch)
    arrays = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))
        for name, (shape, dtype, spec) in shapes.items()
    }
    specs = {name: spec for name, (_, _, spec) in shapes.items()}
    local = jax.shard_map(
        lambda arrays: op(**arrays), mesh=mesh, in_specs=(specs,), out_specs=out_spec, check_vma=False
    )
    text = compile_for_target(jax.jit(local).lower(arrays)).as_text()
    return {
        "custom_calls": len(re.findall(r'custom_call_target="mosaic_gpu', text)),
        "collectives": sum(found.count for found in collectives(parse(text))),
    }


def product_op(row: Row) -> Callable[..., Any]:
    return functools.partial(matmul, activation="silu" if row.gated else None, implementation="mosaic")


def attention_op(case: Case, batch: int) -> tuple[Callable[..., Any], dict[str, tuple[Any, ...]], Any]:
    """The op, the shape, dtype and partition of each operand, and the partition of the result."""
    pages = 8192 // case.S
    quantized = case.kv in ("int8", "fp8")
    heads, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    q_spec = PartitionSpec(None, None, "tensor")
    shapes = {
        "q": ((batch, case.T, case.K, case.G, case.H), DTYPES[case.q], q_spec),
        "k_pages": ((4096, case.K, case.S, case.H), DTYPES[case.kv], heads),
        "v_pages": ((4096, case.K, case.S, case.H), DTYPES[case.kv], heads),
        "block_tables": ((batch, pages), "int32", whole),
        "lengths": ((batch,), "int32", whole),
    }
    if case.op == "prefill":
        shapes["starts"] = ((batch,), "int32", whole)
    if quantized:
        shapes |= {f"{name}_scales": ((4096, case.K, case.S), "float32", heads) for name in "kv"}
    if case.every:
        shapes["sinks"] = ((case.K, case.G), "float32", PartitionSpec("tensor"))
    options = {"window": 1024, "soft_cap": 50.0} if case.every else {}
    op = {"decode": decode_attention, "prefill": prefill_attention}[case.op]
    return functools.partial(op, scale=case.H**-0.5, implementation="mosaic", **options), shapes, q_spec


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Everything written to file descriptor 1 meanwhile, by C++ too: one string, once the block has ended."""
    libc, printed = ctypes.CDLL(None), []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        libc.fflush(None)
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield printed
        finally:
            sys.stdout.flush()
            libc.fflush(None)
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))


# --- reading what was printed ---

_COMPILED = re.compile(
    r"Compiling entry function '(?P<name>\w+)_mosaic_gpu_kernel'.*?"
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_LAUNCHED = re.compile(
    r"define \w+ @(\w+)_mosaic_gpu\((?:(?!\ndefine ).)*?"
    r"call \w+ @mosaic_gpu_(?:launch_kernel|build_kernel_spec)\(ptr %\w+((?:, i32 \d+){10})",
    re.DOTALL,
)


def kernels_in(printed: str) -> list[dict[str, Any]]:
    """The kernels that ptxas and the host code speak of, in the order in which they were compiled."""
    launches = {}
    for name, numbers in _LAUNCHED.findall(printed):
        # Three numbers each of the grid, the cluster and the block, then bytes of shared memory.
        n = [int(number) for number in re.findall(r"i32 (\d+)", numbers)]
        launches[name] = {
            "threads": n[6] * n[7] * n[8],
            "shared_memory": n[9],
            "blocks": n[0] * n[1] * n[2],
        }
    kernels = []
    for match in _COMPILED.finditer(printed):
        fields = match.groupdict()
        name = fields.pop("name")
        if name not in launches:
            raise RuntimeError(f"{name}: no launch was found in the host code, which this JAX prints in another form")
        kernels.append({"kernel": name, **{key: int(value) for key, value in fields.items()}, **launches[name]})
    return kernels


def occupancy(kernel: dict[str, Any], chip: Any) -> dict[str, Any]:
    """How many blocks of a kernel a multiprocessor holds, and how many times over the launch fills the GPU if it is to.

    Registers are given out to warps, 8 a thread at a time, by four schedulers of which each has a quarter of them;
    shared memory to blocks, 128 bytes at a time (NVIDIA, CUDA Occupancy Calculator, compute capability 9.0).
    """
    warps = -(-kernel["threads"] // 32)
    warps_a_scheduler = REGISTERS // 4 // (-(-kernel["registers"] // 8) * 8 * 32)
    shared = -(-kernel["shared_memory"] // 128) * 128 + RESERVED
    held = min(4 * warps_a_scheduler // warps, chip.shared_memory // shared, THREADS // (32 * warps), BLOCKS)
    fills = held and kernel["kernel"] in FILLS
    waves = round(kernel["blocks"] / (held * chip.multiprocessors), 2) if fills else None
    return {"blocks_per_sm": held, "waves": waves}


def faults(result: dict[str, Any], chip: Any) -> list[str]:
    """What is wrong with a case; nothing if all is well."""
    if "error" in result:
        return [f"{result['case']}: {result['error']}"]
    found = []
    if result["collectives"]:
        found.append(f"{result['case']}: {result['collectives']} collectives; the heads of a device are its own")
    for kernel in result["kernels"]:
        where = f"{result['case']}, {kernel['kernel']}"
        if kernel["spill_stores"] or kernel["spill_loads"]:
            found.append(f"{where}: spills, {kernel['spill_stores']} bytes stored and {kernel['spill_loads']} loaded")
        if kernel["shared_memory"] > chip.shared_memory - RESERVED:
            most = chip.shared_memory - RESERVED
            found.append(f"{where}: {kernel['shared_memory']} bytes of shared memory a block; {chip.name} has {most}")
        if not kernel["blocks_per_sm"]:
            found.append(f"{where}: {kernel['registers']} registers a thread do not fit; no block can start")
        if kernel["waves"] and kernel["waves"] > 1:
            held = f"{kernel['blocks_per_sm']} blocks of {kernel['shared_memory']} bytes fit a multiprocessor"
            found.append(f"{where}: {kernel['waves']} waves, where one was meant; {held}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="h200", metavar="CHIP", help="the GPU (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the short list of cases alone")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    jax.config.update("jax_platforms", "cpu")  # no GPU is used, not even one that is there
    cases = [case for case in CASES if (not args.quick or quick(case)) and args.only in str(case)]
    if not cases:
        raise UsageError(f"--only is {args.only!r}, which no case has in its name; names look like {str(CASES[0])!r}")
    with tqdm(total=len(cases), unit="case", file=sys.stderr) as bar:
        results = resources(cases, args.target, bar.update)
    chip = find_chip(args.target)
    yield {
        "subject": " ".join([*["quick"] * args.quick, args.only]),
        "device": chip.name,
        "failures": [fault for result in results for fault in faults(result, chip)],
        "results": results,
    }


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """A line a kernel."""
    columns = ("case", "kernel", "registers", "spills", "shared memory", "threads", "blocks/SM", "waves", "compile s")
    rows = []
    for result in report["results"]:
        for i, kernel in enumerate(result.get("kernels", ())):
            spills = f"{kernel['spill_stores']}/{kernel['spill_loads']}"
            taken = (kernel[name] for name in ("shared_memory", "threads", "blocks_per_sm"))
            cells = [kernel["registers"], spills, *taken, kernel["waves"] or ""]
            first = (result["case"], result["compile_seconds"]) if i == 0 else ("", "")
            rows.append((first[0], kernel["kernel"], *map(str, cells), str(first[1])))
    yield Table("", columns, rows, names=2)
    if not report["failures"]:
        yield f"{len(report['results'])} cases compiled for {report['device']}: no spills, and all blocks fit."


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Registers a thread beside the most that an instruction can name."""
    for result in report["results"]:
        for kernel in result.get("kernels", ()):
            yield Figure(f"{result['case']}, {kernel['kernel']}", kernel["registers"], MOST_REGISTERS, "registers")
