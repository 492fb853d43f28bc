"""How fast the attention kernels are: decode against memory bandwidth, prefill against matrix products, both measured.

Beside the kernel run the plain-jnp reference and, on dense K and V of the same values, XLA's attention and cuDNN's
(`jax.nn.dot_product_attention`). Each row is checked before it is timed: outputs within 2e-2 of the reference.

A timed program makes many calls, each of whose queries are the output of the one before, on K and V that are several
times the L2 cache (in turns over several sets where one is smaller). A barrier ties block tables, or dense K and V, to
the queries, so that nothing is gathered, transposed or converted once for all calls. The kernel's calls come in steps
of 32, like the layers of a model, which share what follows from the lengths alone: the schedule, once a step.

Contenders take turns, in rounds; figures are medians, with the smallest and the largest. On a CPU tiny shapes prove
that the program works, and nothing else.
"""

import argparse
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from ..cli.common import FAILURE, OK, UsageError
from ..pallas_kernels.attention import decode_attention, prefill_attention
from ..pallas_kernels.dispatch import current_device
from .attention_rows import EVEN, ITEMSIZE, LEVEL, QUICK, SKEW_TARGET, SKEWED, TINY, Row, full
from .environment import RESULTS, hardware, now, store, versions
from .timing import ceilings, in_turns

BOUND = 2e-2  # relative error, as norms
DTYPES = {"bf16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LARGEST = {"bf16": math.inf, "int8": 127.0, "fp8": 448.0}
UNIT = 40.0  # stored where one is meant, in quantized pages
ROTATED = 256e6  # bytes of K and V that a program goes through before it meets the first again: five L2 caches
MOST_SETS = 32
MOST_BYTES = 60e9  # of a program, in and out and between
LAYERS = 32  # calls a step, of the kernel in decode
FEWER_LAYERS = 8  # of all else, which has nothing to share in a step and compiles sooner
PROGRAM_SECONDS = 0.04  # so that what it takes to start one is lost in it
PEERS = ("reference", "xla", "cudnn")
CPU_LABEL = "cpu, tiny shapes: proves the program, not the kernel"

Operands = dict[str, Any]
Attend = Callable[[jax.Array, Operands], jax.Array]


# --- inputs ---


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_pages(key: jax.Array, shape: tuple[int, ...], kv: str) -> jax.Array:
    values = jax.random.normal(key, shape, jnp.bfloat16)
    if kv == "bf16":
        return values
    values = (values * UNIT).clip(-LARGEST[kv], LARGEST[kv])
    return (jnp.round(values) if kv == "int8" else values).astype(DTYPES[kv])


def make_inputs(row: Row, sets: int) -> tuple[jax.Array, Operands, list[Operands]]:
    """Queries, what all calls share, and `sets` block tables: each leads to pages of its own, in random order."""
    K, G, H = row.shape
    B = len(row.lengths)
    used = [-(-length // row.S) for length in row.lengths]
    order = np.random.default_rng(0).permutation(sets * sum(used)).astype(np.int32)
    tables = np.zeros((sets, B, max(used)), np.int32)
    for table in tables:
        for entries, count in zip(table, used, strict=True):
            entries[:count], order = order[:count], order[count:]
    keys = jax.random.split(jax.random.key(0), 5)
    pool = (sets * sum(used), K, row.S, H)
    shared: Operands = {f"{name}_pages": random_pages(keys[i], pool, row.kv) for i, name in enumerate("kv")}
    if row.kv != "bf16":
        for i, name in enumerate("kv"):
            shared[f"{name}_scales"] = jax.random.uniform(keys[2 + i], pool[:3], minval=0.5 / UNIT, maxval=1.5 / UNIT)
    shared["lengths"] = jnp.asarray(row.lengths, jnp.int32)
    tokens = ()
    if row.op == "prefill":
        shared["starts"] = shared["lengths"] - row.T
        tokens = (row.T,)
    q = jax.random.normal(keys[4], (B, *tokens, K, G, H), jnp.bfloat16)
    return q, shared, [{"block_tables": jnp.asarray(table)} for table in tables]


def make_dense(row: Row, shared: Operands, sets: Sequence[Operands]) -> tuple[Operands, list[Operands]]:
    """K and V as [B, S, K, H], for those that know no pages; lengths only where rows differ."""

    @jax.jit
    def dense(pages, tables):
        taken = jnp.moveaxis(pages[tables], 2, 3)
        return taken.reshape(len(row.lengths), -1, *taken.shape[3:])[:, : max(row.lengths)]

    found = [{name: dense(shared[f"{name}_pages"], each["block_tables"]) for name in "kv"} for each in sets]
    return {} if row.even else {"lengths": shared["lengths"]}, found


# --- contenders ---


def paged(row: Row, implementation: str) -> Attend:
    op = decode_attention if row.op == "decode" else prefill_attention
    scale = row.shape[2] ** -0.5
    return lambda q, operands: op(q, **operands, scale=scale, implementation=implementation)


def over_dense(row: Row, implementation: str) -> Attend:
    K, G, H = row.shape
    B, S, T = len(row.lengths), max(row.lengths), row.T
    causal = {"is_causal": True} if S == T > 1 else {}

    def attend(q, operands):
        options = dict(causal)
        if S > T > 1:  # JAX's causal mask aligns the first query with the first key
            options["mask"] = (jnp.arange(S) <= S - T + jnp.arange(T)[:, None])[None, None]
        if "lengths" in operands:
            options["key_value_seq_lengths"] = operands["lengths"]
        k, v = operands["k"], operands["v"]
        out = jax.nn.dot_product_attention(
            q.reshape(B, T, K * G, H), k, v, scale=H**-0.5, implementation=implementation, **options
        )
        return out.reshape(q.shape)

    return attend


def contenders(row: Row) -> dict[str, Attend | str]:
    """Each one's function, or why there is none."""
    device, found = current_device(), {}
    unfit = f"not run: needs a Hopper GPU, and this is {device.kind}"
    found["mosaic"] = paged(row, "mosaic") if device.is_hopper else unfit
    found["reference"] = paged(row, "reference")
    for name in ("xla", "cudnn"):
        found[name] = over_dense(row, name)
        if ITEMSIZE[row.kv] != 2:
            found[name] = f"not run: knows no {row.kv} with scales"
    return found


def chained(attend: Attend, steps: int, calls: int) -> Callable[[jax.Array, Operands, Sequence[Operands]], jax.Array]:
    """So many steps of so many calls, one after the other, on each set in turn."""
    attend = jax.jit(attend)  # traced once, and not at every call

    def program(q, shared, sets):
        def step(q, _):
            for call in range(calls):
                q, tied = lax.optimization_barrier((q, sets[call % len(sets)]))
                q = attend(q, shared | tied)
            return q, None

        return lax.scan(step, q, None, length=steps)[0]

    return program


def compiled(function: Callable[..., jax.Array], *operands: Any) -> Callable[[], jax.Array]:
    """The program, with its operands; it has run. MemoryError, before it does, where it would take too much."""
    program = jax.jit(function).lower(*operands).compile()
    sizes = program.memory_analysis()
    size = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    if size > MOST_BYTES:
        raise MemoryError(f"it would take {size / 1e9:.0f} GB; a program may take {MOST_BYTES / 1e9:.0f} GB here")
    ready = functools.partial(program, *operands)
    jax.block_until_ready(ready())
    return ready


# --- a row ---


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:300]}"


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm((out - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def measure(row: Row, limits: dict[str, Any], rounds: int, seconds: float) -> dict[str, Any]:
    """One row's figures; see `describe` for what they come to."""
    tiny = jax.default_backend() == "cpu"
    sets = 2 if tiny else min(MOST_SETS, math.ceil(ROTATED / (sum(row.lengths) * row.position_bytes)))
    q, *operands = make_inputs(row, sets)
    found, attends, inputs, outs = {}, {}, {}, {}
    for name, attend in contenders(row).items():
        if isinstance(attend, str):
            found[name] = {"reason": attend}
            continue
        try:
            if name in ("mosaic", "reference"):
                inputs[name] = operands
            else:  # made once, for both
                inputs[name] = inputs.get("xla") or make_dense(row, *operands)
            shared, [first, *_] = inputs[name]
            outs[name] = compiled(attend, q, shared | first)()
            attends[name] = attend
        except Exception as error:  # whatever keeps a contender from running is a result
            found[name] = {"reason": reason(error)}
    truth = next((outs[name] for name in ("reference", "cudnn", "xla") if name in outs), None)
    errors = {name: relative_error(out, truth) for name, out in outs.items() if out is not truth}
    for name in set(errors) - {"mosaic"}:
        if not errors[name] < BOUND:  # what computes something else is no peer
            del attends[name]
            found[name] = {"reason": f"failed: its relative error is {errors[name]:.2e}"}
    result: dict[str, Any] = {
        "row": str(row),
        "op": row.op,
        "lengths": [row.lengths[0]] if row.even else list(row.lengths),
        "batch": len(row.lengths),
        "new_tokens": row.T,
        "shape": dict(zip(("kv_heads", "queries_per_kv_head", "head_dim"), row.shape, strict=True)),
        "kv": row.kv,
        "page_size": row.S,
        "bytes": row.bytes,
        "flops": row.flops,
        "sets": sets,
        "errors": errors,
    }
    wrong = failure_of(found, errors, kernel="mosaic" in outs)
    if wrong is not None:
        return result | {"implementations": found, "failed": wrong}

    least = max(row.bytes / limits["gb_per_s"] / 1e9, row.flops / limits["tflop_per_s"] / 1e12, 5e-6)
    programs, calls = {}, {}
    for name, attend in attends.items():
        layers = LAYERS if name == "mosaic" and row.op == "decode" else FEWER_LAYERS
        layers = sets if tiny else -(-layers // sets) * sets
        steps = 1 if tiny else math.ceil(PROGRAM_SECONDS / least / layers)
        try:
            programs[name] = compiled(chained(attend, steps, layers), q, *inputs[name])
            calls[name] = steps * layers
        except Exception as error:
            found[name] = {"reason": reason(error)}
    for name, timing in in_turns(programs, calls, rounds=rounds, seconds=seconds).items():
        gb_per_s, tflop_per_s = row.bytes / timing["us"] / 1e3, row.flops / timing["us"] / 1e6
        share = gb_per_s / limits["gb_per_s"] if row.op == "decode" else tflop_per_s / limits["tflop_per_s"]
        found[name] = timing | {
            "calls": calls[name],
            "gb_per_s": round(gb_per_s, 2),
            "tflop_per_s": round(tflop_per_s, 3),
            "of_limit": round(share, 4),
        }
    if "mosaic" in attends and "us" not in found["mosaic"]:
        return result | {"implementations": found, "failed": found["mosaic"]["reason"]}
    for name in attends if "mosaic" in attends else ():
        if "us" in found[name]:
            found[name]["over_kernel"] = round(found[name]["us"] / found["mosaic"]["us"], 3)
    return result | {"implementations": {name: found[name] for name in ("mosaic", *PEERS)}}


def failure_of(found: dict[str, dict[str, Any]], errors: dict[str, float], *, kernel: bool) -> str | None:
    """Why a row counts as failed: nothing to hold the kernel against, or it did not run, or not to the same result."""
    why = found.get("mosaic", {}).get("reason", "")
    if why.startswith("failed"):
        return why
    if kernel and "mosaic" not in errors:
        return "nothing ran that the kernel can be held against"
    if kernel and not errors["mosaic"] < BOUND:
        return f"the kernel's relative error is {errors['mosaic']:.2e}; the bound is {BOUND:.0e}"
    return None


# --- what it comes to ---


def targets(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets that the measured rows speak to: what was wanted, what was found, whether it is met."""
    rows = {str(row): row for row in (*full(), *TINY)}
    found, timed = [], {}
    for result in results:
        row, kernel = rows[result["row"]], result.get("implementations", {}).get("mosaic", {})
        if "us" not in kernel:
            continue
        timed[row] = kernel["us"]
        if row.target is not None:
            share = kernel["of_limit"]
            met = share >= row.target
            found.append(
                {"row": str(row), "what": "share of bandwidth", "wanted": row.target, "found": share, "met": met}
            )
        rival = result["implementations"]["cudnn"].get("us")
        if row.op == "prefill" and rival is not None:
            speed = round(rival / kernel["us"], 3)
            met = speed >= LEVEL
            found.append({"row": str(row), "what": "speed over cuDNN's", "wanted": LEVEL, "found": speed, "met": met})
    if SKEWED in timed and EVEN in timed:
        ratio = round(timed[SKEWED] / timed[EVEN], 3)
        what = "time over an even batch's of equal bytes"
        met = ratio <= SKEW_TARGET
        found.append({"row": str(SKEWED), "what": what, "wanted": SKEW_TARGET, "found": ratio, "met": met})
    return found


MEASURED = ("limit µs", "kernel µs", "min - max", "rate", "of limit")
COLUMNS = ("row", *MEASURED, "reference µs (over kernel)", "XLA µs", "cuDNN µs", "error")


def describe(result: dict[str, Any], limits: dict[str, Any]) -> str:
    """A line of the table. Beside a peer's time stands, in brackets, how often the kernel's fits in it."""
    if "not_run" in result or "failed" in result:
        return f"| {result['row']} | {result.get('not_run') or 'FAILED: ' + result['failed']}" + " |" * (
            len(COLUMNS) - 1
        )
    found = result["implementations"]
    kernel = found["mosaic"]
    decode = result["op"] == "decode"
    limit = result["bytes"] / limits["gb_per_s"] / 1e3 if decode else result["flops"] / limits["tflop_per_s"] / 1e6
    cells = [result["row"], f"{limit:.1f}"]
    if "us" in kernel:
        rate = f"{kernel['gb_per_s']:.0f} GB/s" if decode else f"{kernel['tflop_per_s']:.0f} TFLOP/s"
        spread = f"{kernel['us_min']:.1f} - {kernel['us_max']:.1f}"
        cells += [f"{kernel['us']:.1f}", spread, rate, f"{kernel['of_limit']:.3f}"]
    else:
        cells += ["-"] * 4
    for name in PEERS:
        us, over = found[name].get("us"), found[name].get("over_kernel")
        cells.append("-" if us is None else f"{us:.1f}" if over is None else f"{us:.1f} ({over:.2f})")
    error = result["errors"].get("mosaic")
    cells.append("-" if error is None else f"{error:.1e}")
    return "| " + " | ".join(cells) + " |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the most telling rows, within 5 minutes of an H200")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no row later (default: 4.5 with --quick)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to store results (default: results/attention-DEVICE.json)"
    )


def run(args: argparse.Namespace) -> int:
    if args.rounds < 2:
        raise UsageError(f"--rounds is {args.rounds}; from 2 on the rounds show how far timings agree")
    device = jax.devices()[0]
    tiny = device.platform == "cpu"
    rows = [row for row in (TINY if tiny else QUICK if args.quick else full()) if args.only in str(row)]
    if not rows:
        raise UsageError(f"--only is {args.only!r}, which no row has in its name; names look like {str(TINY[0])!r}")
    kind = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower().removeprefix("nvidia ")).strip("-")
    out = args.output or RESULTS / f"attention-{kind}.json"
    minutes = args.minutes if args.minutes is not None else 4.5 if args.quick else math.inf
    if measure_rows(rows, out, args.command, rounds=args.rounds, until=time.perf_counter() + 60 * minutes):
        return FAILURE
    return OK


def measure_rows(rows: Sequence[Row], out: Path, command: str, *, rounds: int, until: float) -> int:
    """Measures and prints row by row, stores after each; returns how many failed."""
    device = jax.devices()[0]
    tiny = device.platform == "cpu"
    seconds = 0.0 if tiny else 0.15
    limits = ceilings(tiny=tiny, rounds=rounds, seconds=seconds)
    report: dict[str, Any] = {
        "benchmark": "attention",
        "date": now(),
        "command": command,
        "device": device.device_kind,
        "hardware": hardware(),
        "versions": versions("ridgeline", "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "numpy"),
        "ceilings": limits,
        "targets": [],
        "results": [],
    }
    if tiny:
        report["label"] = CPU_LABEL
        print(CPU_LABEL)
    print(
        f"{device.device_kind}: copy {limits['copy']['gb_per_s']:.0f} GB/s, read {limits['read']['gb_per_s']:.0f} GB/s "
        f"(the limit is the larger), bf16 product {limits['tflop_per_s']:.1f} TFLOP/s"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for row in tqdm(rows, unit="row", file=sys.stderr):
        if time.perf_counter() > until:
            result = {"row": str(row), "not_run": "not run: out of time"}
        else:
            try:
                result = measure(row, limits, rounds, seconds)
            except Exception as error:  # the rows after it may still run
                result = {"row": str(row), "failed": reason(error)}
        report["results"].append(result)
        report["targets"] = targets(report["results"])
        store(report, out)
        tqdm.write(describe(result, limits), file=sys.stdout)
    if not tiny:
        report["ceilings_after"] = ceilings(tiny=tiny, rounds=rounds, seconds=seconds)
        store(report, out)
    for target in report["targets"]:
        met = "met" if target["met"] else "NOT MET"
        print(f"{met}: {target['row']}: {target['what']} {target['found']}, wanted {target['wanted']}")
    print(f"stored in {out}")
    return sum("failed" in result for result in report["results"])
