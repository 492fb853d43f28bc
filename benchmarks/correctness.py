"""Every kernel against its reference: right, the same bit for bit 200 times, and blind to what it must not read.

Keys, values and scales are NaN wherever nothing may be read. Cases run in several processes: one that hangs or crashes
costs itself alone. Without a Hopper GPU a few small cases run in Mosaic's interpreter, which watches for races; where
JAX has none for these kernels the reference stands in, which proves this program and no kernel.
"""

import argparse
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp

from ..pallas_kernels.dispatch import current_device
from . import attention, matmul, matmul_rows
from .attention_rows import Row, decode, prefill
from .environment import cores
from .harness import Table
from .kernel_resources import ATTENTION
from .kernel_rows import relative_error
from .limits import Figure
from .timing import elapsed
from .worker import Worker

REPEATS = 200
PATIENCE = 90  # seconds, after which a case counts as hung
BOUNDS = {"bf16": 2e-2, "f16": 2e-3, "matmul": 5e-3}  # relative errors, as norms; products round their result alone
LENGTHS = (4096, 0, 1, 64, 65, 1000, 2047, 333, 3001, 128, 17, 700, 1500, 16, 255, 2600)

Case = Row | matmul_rows.Row


def cases(small: bool) -> list[Case]:
    """The plainest first; then every case that is compiled for the table of resources, and most products."""
    if small:
        prefilled = Row((70, 20), T=32, shape=(1, 4, 64), kv="fp8", S=16, op="prefill")
        experts = matmul_rows.Row("tiny", 64, 128, 8, experts=4, top_k=2)
        products = [matmul_rows.Row("tiny", 64, 128, 3, "int4-32"), experts]
        return [Row((20, 0), shape=(1, 4, 64), window=10), prefilled, *products]
    plain = [decode(1, 512), decode(1, 512, (8, 4, 64)), prefill(1, 2048), Row((32768, *range(100, 115)))]
    products = matmul_rows.rows(("8b",), (1, 64))
    products += matmul_rows.rows(("1b", "70b tensor 8"), (16,), ("bf16", "int8", "int4"))
    products += matmul_rows.expert_rows(("qwen3-30b-a3b",), (1, 64, 256))
    return [*plain, *dict.fromkeys(map(ragged, ATTENTION)), *products]


def ragged(row: Row) -> Row:
    """The same attention over rows of many lengths."""
    lengths = LENGTHS[:1] + LENGTHS[5:8] if row.op == "prefill" else LENGTHS
    least = row.T if row.op == "decode" and row.T > 1 else 0
    return dataclasses.replace(row, lengths=tuple(max(length, least) for length in lengths))


def op_of(case: Case) -> str:
    return case.op if isinstance(case, Row) else "matmul"


def check(case: Case, repeats: int) -> dict[str, Any]:
    """Runs a case: its error, seconds to compile and to run, and "failed" if anything is wrong."""
    if isinstance(case, Row):
        bound, contender = BOUNDS[case.q], functools.partial(attention.paged, case)
        (x, *dirty), (_, *clean) = (attention.make_inputs(case, 1, garbage) for garbage in (math.nan, 0.0))
    else:
        bound, contender = BOUNDS["matmul"], functools.partial(matmul.product_of, case)
        x, *dirty = matmul.make_inputs(case, 1)
        clean = dirty
    dirty, clean = ({**shared, **first} for shared, [first] in (dirty, clean))
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(contender("reference"))(x.astype(jnp.float32), jax.tree.map(_widened, clean))
    implementation = kernel_here()
    operands = dirty if implementation == "mosaic" else clean  # the reference reads all of a page
    compiling, program = elapsed(lambda: jax.jit(contender(implementation)).lower(x, operands).compile())
    out = program(x, operands)
    differs = jax.jit(lambda a, b: (_bits(a) != _bits(b)).any())
    seconds, moved = elapsed(lambda: sum(differs(program(x, operands), out) for _ in range(repeats)).item())
    finite = jnp.isfinite(out).all()
    if isinstance(case, Row) and case.op == "prefill":  # queries past a row's end are nobody's
        within = jnp.arange(case.T) < jnp.asarray(case.lengths)[:, None]
        out, expected = (jnp.where(within[:, :, None, None, None], each, 0) for each in (out, expected))
    error, wrong = relative_error(out, expected), []
    if not finite:
        wrong.append("not finite: something is read that is not its own")
    if not error < bound:
        wrong.append(f"relative error {error:.2e}, bound {bound:.0e}, in rows {_rows_off(out, expected)}")
    if moved:
        wrong.append(f"{moved} of {repeats} repeats gave other bits: a race, or memory that nobody wrote")
    result = {"error": error, "bound": bound, "compile_seconds": compiling, "seconds": seconds / repeats}
    return result | ({"failed": "; ".join(wrong)} if wrong else {})


def _widened(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) if leaf.dtype in (jnp.bfloat16, jnp.float16) else leaf


def _bits(x: jax.Array) -> jax.Array:
    return x.view(f"uint{8 * x.dtype.itemsize}")


def _rows_off(out: jax.Array, expected: jax.Array) -> list[int]:
    far = ~(jnp.abs(out.astype(jnp.float32) - expected) < 0.1 * jnp.abs(expected).max())
    return jnp.flatnonzero(far.reshape(len(out), -1).any(axis=1))[:8].tolist()


def kernel_here() -> str:
    """What stands for the kernel on this machine."""
    device = current_device()
    interpreted = device.platform == "cpu" and jax.__version_info__ >= (0, 12)
    return "mosaic" if device.is_hopper or interpreted else "reference"


def interpret() -> None:
    """From now on this process runs kernels in Mosaic's interpreter, on a few blocks where they would fill a GPU."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from ..pallas_kernels import decode_mosaic, grouped_mosaic, matmul_mosaic, prefill_mosaic

    options = {"interpret": plgpu.InterpretGPUParams(detect_races=True)}
    few = options | {"blocks": 3}
    decode_mosaic.decode_attention_mosaic = functools.partial(decode_mosaic.decode_attention_mosaic, **few)
    prefill_mosaic.prefill_attention_mosaic = functools.partial(prefill_mosaic.prefill_attention_mosaic, **options)
    matmul_mosaic.matmul_mosaic = functools.partial(matmul_mosaic.matmul_mosaic, **few)
    grouped_mosaic.grouped_matmul_mosaic = functools.partial(grouped_mosaic.grouped_matmul_mosaic, **few)


# --- processes ---


def checker() -> Callable[[int], dict[str, Any]]:
    """Answers the number of a case with what `check` finds."""
    small = not current_device().is_hopper
    if small and kernel_here() == "mosaic":
        interpret()
    return lambda number: check(cases(small)[number], 2 if small else REPEATS)


def supervise(numbers: Sequence[int], until: float, results: dict[int, dict[str, Any]]) -> None:
    """Has cases run in a process; one that fails there fails alone, and the next case begins a new process, since an
    error of CUDA's takes the device from the old one."""
    worker = None
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # the reference need not be fast
    for number in numbers:
        if time.monotonic() > until:
            break
        try:
            worker = worker or Worker(checker, environment={"XLA_FLAGS": flags.strip()})
            results[number] = worker.ask(number, PATIENCE)
        except RuntimeError as error:
            results[number] = {"failed": str(error)}
            worker = worker and worker.close()
    if worker is not None:
        worker.close()


# --- the benchmark ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--minutes", type=float, default=10, metavar="M", help="begin no case later (default: %(default)s)")
    add("--only", default="", metavar="TEXT", help="cases whose name contains this")
    add("--processes", type=int, default=min(cores(), 16), metavar="N", help="that share the cases (default: cores)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # many processes share a device
    device = current_device()
    listed = cases(small=not device.is_hopper)
    numbers = [number for number, case in enumerate(listed) if args.only in str(case)]
    until, results = time.monotonic() + 60 * args.minutes, {}
    shares = [numbers[first :: args.processes] for first in range(args.processes)]
    with ThreadPoolExecutor(args.processes) as pool:
        running = [pool.submit(supervise, share, until, results) for share in shares if share]
        while running:
            running = list(wait(running, timeout=5).not_done)
            rows = [{"case": str(listed[n]), "op": op_of(listed[n]), **results[n]} for n in sorted(results)]
            yield {
                "kernel": kernel_here(),
                "on_hopper": device.is_hopper,
                "rows": rows,
                "failures": [f"{row['case']}: {row['failed']}" for row in rows if "failed" in row],
                "not_reached": len(numbers) - len(rows),
            }


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    rows = []
    for op in ("decode", "prefill", "matmul"):
        ran = [row for row in report["rows"] if row["op"] == op]
        errors = [row["error"] / row["bound"] for row in ran if "error" in row]
        compiling = [row["compile_seconds"] for row in ran if "compile_seconds" in row]
        right = sum("failed" not in row for row in ran)
        cells = (f"{max(errors, default=0):.2f}", f"{sum(compiling) / max(1, len(compiling)):.1f}")
        rows.append((op, str(len(ran)), str(right), *cells))
    yield Table("Kernels against their references", ("op", "cases", "right", "of bound", "compile s"), rows)
    if not report["on_hopper"]:
        how = "interpreted" if report["kernel"] == "mosaic" else "replaced by their reference"
        yield f"There is no Hopper GPU here: the kernels were {how}."
    if report["not_reached"]:
        yield f"{report['not_reached']} cases were not reached."


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Each error beside its bound; none is better than a hundredth of it."""
    for row in report["rows"]:
        if "error" in row:
            yield Figure(row["case"], max(row["error"], row["bound"] / 100), row["bound"], "relative error")
