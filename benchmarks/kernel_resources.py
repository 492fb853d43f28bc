"""What the kernels take of a GPU: registers, spills, shared memory, blocks a multiprocessor.

The kernels are compiled for the GPU and nothing runs, so that none is needed.
"""

import argparse
import dataclasses
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from ..cli.common import UsageError
from ..sharding.targets import compile_for_target, find_chip, target_mesh
from . import attention, matmul
from .attention_rows import Row
from .harness import Table
from .limits import Figure
from .matmul_rows import EXPERTS, LAYERS, MEASURED_TOKENS, expert_rows, rows
from .matmul_rows import Row as Product
from .mosaic_dump import ASK, captured, kernels_in
from .timing import reason

MOST_REGISTERS = 255  # a thread
REGISTERS = 65536  # 32-bit, a multiprocessor; NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", 8.0 to 10.0
THREADS = 2048
BLOCKS = 32
RESERVED = 1024  # bytes of shared memory that the system takes for each block

# These launch as many blocks as the GPU is to hold at once; others, what the batch needs.
FILLS = ("split_kernel", "matmul", "grouped_matmul")

CONTEXT = 8192
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


def decode(H: int = 128, G: int = 4, K: int = 8, *, every: bool = False, **options: Any) -> Row:
    """8 KV heads of 4 queries and 128 dims are an 8B; `every` is a window, a soft cap and sinks together."""
    together = {"window": 1024, "soft_cap": 50.0, "sinks": True} if every else {}
    return Row((CONTEXT,), shape=(K, G, H), **together, **options)


prefill = functools.partial(decode, op="prefill", T=512)

QUICK: list[Row | Product] = [
    *map(decode, (80, 128, 256)),
    decode(kv="int8"),
    decode(256, kv="fp8"),
    decode(S=16),
    decode(S=16, kv="int8"),
    decode(T=4),
    decode(T=16, kv="fp8"),
    decode(every=True),
    decode(G=8, K=1),  # a 70B's, split over 8 devices
    *map(prefill, (128, 256)),
    prefill(kv="int8"),
    prefill(G=8, K=1),
    *(row for row in rows(("8b",), (64,), ("bf16", "int8", "fp8", "fp8-block")) if row.gated),
    *(row for row in rows(("70b tensor 8",), (64,), ("int4",)) if row.weight.endswith("down")),
    *(row for row in rows(("8b",), (16,), ("int4-32-zero",)) if row.weight.endswith("qkv")),
    *(row for row in rows(("1b",), (64,), ("int4-32",)) if row.weight.endswith("out")),
    *(row for row in expert_rows(tuple(EXPERTS), (4096,), ("bf16",)) if row.weight.endswith("down")),
    *(row for row in expert_rows(("deepseek-v3",), (64, 4096), ("int8", "int4")) if row.weight.endswith("down")),
]
ATTENTION = [
    # Every head dim, with every dtype of pages.
    *(decode(H, kv=kv) for kv in ("bf16", "int8", "fp8") for H in HEAD_DIMS),
    *(decode(H, kv="f16", q="f16") for H in (64, 128, 256)),
    decode(kv="fp8", q="f16"),
    # Page sizes; queries a KV head: MHA, a 70B's, MQA; several new tokens; all that scores go through.
    *(decode(S=S, kv=kv) for kv in ("bf16", "int8") for S in (16, 32, 128)),
    *(decode(G=G, K=K) for G, K in ((1, 32), (8, 8), (16, 1))),
    decode(G=1, K=32, kv="int8"),
    decode(G=16, K=1, kv="fp8"),
    *(decode(T=T, kv=kv) for T in (4, 16) for kv in ("bf16", "fp8")),
    decode(T=16, G=16, K=1),
    decode(256, T=16),
    decode(every=True),
    decode(every=True, kv="int8", S=32),
    decode(256, every=True, kv="fp8", T=4),
    # An 8B and a 70B, split over 2, 4 and 8 devices.
    *(decode(G=G, K=K) for G in (4, 8) for K in (4, 2, 1)),
    decode(G=8, K=1, kv="fp8"),
    *(prefill(H) for H in HEAD_DIMS),
    *(prefill(H, kv="int8") for H in (64, 80, 128, 192, 256)),
    *(prefill(H, kv="fp8", S=16) for H in (128, 256)),
    prefill(kv="f16", q="f16"),
    prefill(G=1, K=32, every=True, S=16),
    prefill(256, every=True, kv="fp8"),
    *(prefill(G=G, K=K) for G, K in ((4, 1), (8, 8), (8, 1))),
]
CASES = [*ATTENTION, *rows(tuple(LAYERS), (1, 16, 64)), *expert_rows(tuple(EXPERTS), MEASURED_TOKENS)]
"""Attention, and products of every weight of a layer in every form: of a few rows, and of experts."""


# --- compiling ---


def resources(
    cases: Sequence[Row | Product],
    target: str = "h200",
    ptx: Path | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[dict]:
    """What the kernels of each case take, compiled for `target`.

    Args:
      cases: what to compile.
      target: a name of `ridgeline.sharding.targets`.
      ptx: a directory for the PTX of every kernel.
      done: called after each case.

    Returns:
      A dictionary a case: "case", "op", "compile_seconds" (lowering and compiling), and "kernels", or "error" where it
      does not compile. A kernel's: what `mosaic_dump.kernels_in` reads, the PTX apart; blocks_per_sm; and of the kernel
      that is to fill the GPU exactly "waves": blocks launched over those that it holds at once.

    Raises:
      RuntimeError: the process had compiled a kernel before it was told to report, or the plugin is not installed.
    """
    os.environ.update(ASK)
    chip, mesh = find_chip(target), target_mesh(target)
    results = []
    for number, case in enumerate(cases):
        result: dict[str, Any] = {"case": name_of(case), "op": getattr(case, "op", "matmul")}
        started = time.perf_counter()
        try:
            with captured() as printed:
                text = compile_for_target(lowered(case, number, mesh)).as_text()
        except Exception as error:  # of any kind: a table with a gap says more than none
            results.append(result | {"error": reason(error)})
            continue
        finally:
            done()
        kernels = kernels_in(printed[0])
        if len(kernels) != len(re.findall(r'custom_call_target="mosaic_gpu', text)):
            raise RuntimeError(
                f"{case}: {len(kernels)} kernels were reported and another number compiled; "
                f"set {' '.join(f'{k}={v}' for k, v in ASK.items())} before anything is compiled"
            )
        for kernel in kernels:
            text = kernel.pop("ptx")
            if ptx is not None:
                (ptx / f"{number:03}-{kernel['kernel']}.ptx").write_text(text)
        result["compile_seconds"] = round(time.perf_counter() - started, 2)
        results.append(result | {"kernels": [kernel | occupancy(kernel, chip) for kernel in kernels]})
    return results


def name_of(case: Row | Product) -> str:
    if isinstance(case, Product):
        return str(case)
    queries = "" if case.q == "bf16" or case.kv == "f16" else f" q {case.q}"
    options = " window cap sinks" if case.sinks else ""
    return f"{case.op} {'x'.join(map(str, case.shape))} T {case.T} page {case.S} {case.kv}{queries}{options}"


def lowered(case: Row | Product, number: int, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The kernel's op, lowered for the device of a mesh.

    A kernel that the process has compiled before is not reported again. Batch sizes that neither 2 nor 3 divides make
    all attention kernels differ, whatever the number of heads; products differ in their weights.
    """
    if isinstance(case, Product):
        contender, make = matmul.product_of(case, "mosaic"), matmul.make_inputs
    else:
        case = dataclasses.replace(case, lengths=case.lengths * (6 * number + 5))
        contender, make = attention.paged(case, "mosaic"), attention.make_inputs
    x, shared, [first] = jax.eval_shape(lambda: make(case, 1))
    placed = NamedSharding(mesh, PartitionSpec())
    operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), (x, shared | first))
    return jax.jit(contender).lower(*operands)


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
    wrong = []
    for kernel in result["kernels"]:
        where = f"{result['case']}, {kernel['kernel']}"
        if kernel["spill_stores"] or kernel["spill_loads"]:
            wrong.append(f"{where}: spills, {kernel['spill_stores']} bytes stored and {kernel['spill_loads']} loaded")
        wrong += [f"{where}: {line}" for line in kernel["serialized"]]
        if kernel["shared_memory"] > chip.shared_memory - RESERVED:
            most = chip.shared_memory - RESERVED
            wrong.append(f"{where}: {kernel['shared_memory']} bytes of shared memory a block; {chip.name} has {most}")
        if not kernel["blocks_per_sm"]:
            wrong.append(f"{where}: {kernel['registers']} registers a thread do not fit; no block can start")
        if kernel["waves"] and kernel["waves"] > 1:
            held = f"{kernel['blocks_per_sm']} blocks of {kernel['shared_memory']} bytes fit a multiprocessor"
            wrong.append(f"{where}: {kernel['waves']} waves, where one was meant; {held}")
    return wrong


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="h200", metavar="CHIP", help="the GPU (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the short list of cases alone")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--ptx", type=Path, metavar="DIR", help="write every kernel's PTX there")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    jax.config.update("jax_platforms", "cpu")  # no GPU is used, not even one that is there
    cases = [case for case in (QUICK if args.quick else dict.fromkeys(CASES)) if args.only in name_of(case)]
    if not cases:
        raise UsageError(
            f"--only is {args.only!r}, which no case has in its name; names look like {name_of(CASES[0])!r}"
        )
    with tqdm(total=len(cases), unit="case", file=sys.stderr) as bar:
        results = resources(cases, args.target, args.ptx, bar.update)
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
