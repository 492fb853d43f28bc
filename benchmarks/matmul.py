"""How fast products of a few rows are: the kernel against measured bandwidth, and quantized forms against bf16.

A row is the product of 1 to 64 rows with one weight of a layer, in one form, with its bias-free epilogue: the gate of
gate_up, the residual of out and down. It is checked before it is timed: within 2e-2 of the reference, which dequantizes
and multiplies in float32. Beside bf16 runs XLA's own product, epilogue included.

A timed program makes many calls, one after the other: each adds a zero times the last result to its activations. The
weights take turns over several sets, several times the L2 cache together. Figures are medians, with the smallest and
the largest; speed over bf16 is the time of the bf16 row of the same product over that of this row.

On a CPU tiny shapes prove that the program works, and nothing else; --implementation reference is what runs there.
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
from jax import lax
from tqdm import tqdm

from ..cli.common import FAILURE, OK, UsageError
from ..pallas_kernels.matmul import matmul
from .attention import BOUND, CPU_LABEL, MOST_SETS, PROGRAM_SECONDS, ROTATED, compiled, reason, relative_error
from .environment import RESULTS, hardware, now, store, versions
from .matmul_rows import QUICK, TINY, Row, full
from .timing import ceilings, in_turns

CALLS = 16  # a step of the timed program
BANDWIDTH_TARGET = 0.90  # share that bf16 reaches at one row
SPEED_TARGETS = {"int8": 1.85, "int4": 3.3}  # over bf16, up to as many rows as follow
SPEED_ROWS = 16
TARGETED = ("8b gate_up", "8b down")

Operands = dict[str, jax.Array]
Product = Callable[[jax.Array, Operands], jax.Array]


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Weights of any bits, and floats of a size that keeps results near one."""
    if dtype in ("int8", "uint8"):
        return jax.random.bits(key, shape, jnp.uint8).astype(dtype)
    return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)


def make_inputs(row: Row, sets: int) -> tuple[jax.Array, list[Operands]]:
    """Activations, and `sets` weights with what goes with them."""
    size = {"bf16": 1.0, "int8": 74.0, "fp8": 1.0, "fp8-block": 1.0}.get(row.form, 4.6) * row.K**0.5
    keys = iter(jax.random.split(jax.random.key(0), 1 + 5 * sets))
    x = drawn(next(keys), *row.operands["x"])

    def one() -> Operands:
        found = {name: drawn(next(keys), *of) for name, of in row.operands.items() if name != "x"}
        if "scales" in found:
            shape, dtype = row.operands["scales"]
            found["scales"] = (jax.random.uniform(next(keys), shape, minval=0.5, maxval=1.5) / size).astype(dtype)
        else:
            found["values"] = found["values"] * jnp.asarray(1 / size, jnp.bfloat16)
        if "zeros" in found:
            found["zeros"] = found["zeros"] & 15
        return found

    return x, [one() for _ in range(sets)]


def product_of(row: Row, implementation: str) -> Product:
    activation = "silu" if row.gated else None
    return lambda x, operands: matmul(x, **operands, activation=activation, implementation=implementation)


def xla(row: Row) -> Product:
    """XLA's own product of bf16, with the same epilogue."""

    def product(x, operands):
        y = jnp.einsum("mk,...nk->...mn", x, operands["values"], preferred_element_type=jnp.float32)
        y = jax.nn.silu(y[0]) * y[1] if row.gated else y
        return (y + operands["residual"] if row.residual else y).astype(x.dtype)

    return product


def chained(product: Product, steps: int, calls: int) -> Callable[[jax.Array, Sequence[Operands]], jax.Array]:
    """So many steps of so many calls, each of which waits for the one before."""
    product = jax.jit(product)

    def program(x, sets):
        def step(x, _):
            for call in range(calls):
                x = x + 0 * product(x, sets[call % len(sets)])[:, :1]
            return x, None

        return lax.scan(step, x, None, length=steps)[0]

    return program


def measure(row: Row, implementation: str, limits: dict[str, Any], rounds: int, seconds: float) -> dict[str, Any]:
    """One row's figures: its times, GB/s and share of the measured bandwidth, and XLA's beside bf16."""
    tiny = jax.default_backend() == "cpu"
    sets = 2 if tiny else min(MOST_SETS, math.ceil(ROTATED / row.bytes))
    x, operands = make_inputs(row, sets)
    contenders = {implementation: product_of(row, implementation)}
    if row.form == "bf16":
        contenders["xla"] = xla(row)
    truth = compiled(product_of(row, "reference"), x, operands[0])()
    least = max(row.bytes / limits["gb_per_s"] / 1e9, 2e-6)
    steps = 1 if tiny else math.ceil(PROGRAM_SECONDS / least / CALLS)
    calls = sets if tiny else -(-CALLS // sets) * sets
    errors, programs = {}, {}
    for name, product in contenders.items():
        errors[name] = relative_error(compiled(product, x, operands[0])(), truth)
        if not errors[name] < BOUND:
            raise ArithmeticError(f"{name}'s relative error is {errors[name]:.2e}; the bound is {BOUND:.0e}")
        programs[name] = compiled(chained(product, steps, calls), x, operands)
    found: dict[str, Any] = {}
    for name, timing in in_turns(
        programs, dict.fromkeys(programs, steps * calls), rounds=rounds, seconds=seconds
    ).items():
        gb_per_s = row.bytes / timing["us"] / 1e3
        share = round(gb_per_s / limits["gb_per_s"], 4)
        found[name] = timing | {"gb_per_s": round(gb_per_s, 2), "of_limit": share}
    return {
        "row": str(row),
        "weight": row.weight,
        "rows": row.M,
        "form": row.form,
        "bytes": row.bytes,
        "sets": sets,
        "errors": errors,
        "implementations": found,
    }


def compare(results: Sequence[dict[str, Any]], implementation: str) -> None:
    """Adds to each row its speed over the bf16 row of the same product: this implementation's, and XLA's."""
    base = {(r["weight"], r["rows"]): r["implementations"] for r in results if r.get("form") == "bf16"}
    for result in results:
        against = base.get((result.get("weight"), result.get("rows")))
        if against is not None:
            us = result["implementations"][implementation]["us"]
            result["over_bf16"] = round(against[implementation]["us"] / us, 3)
            result["over_xla_bf16"] = round(against["xla"]["us"] / us, 3)


def targets(results: Sequence[dict[str, Any]], implementation: str) -> list[dict[str, Any]]:
    """The targets that the measured rows speak to: what was wanted, what was found, whether it is met."""
    found = []
    for result in results:
        if result.get("weight") not in TARGETED:
            continue
        what = None
        if result["form"] == "bf16" and result["rows"] == 1:
            what, wanted = "share of bandwidth", BANDWIDTH_TARGET
            value = result["implementations"][implementation]["of_limit"]
        elif result["form"] in SPEED_TARGETS and result["rows"] <= SPEED_ROWS and "over_bf16" in result:
            what, wanted, value = "speed over bf16", SPEED_TARGETS[result["form"]], result["over_bf16"]
        if what is not None:
            found.append({"row": result["row"], "what": what, "wanted": wanted, "found": value, "met": value >= wanted})
    return found


COLUMNS = ("row", "limit µs", "µs", "min - max", "GB/s", "of limit", "over bf16", "over XLA's bf16", "error")


def describe(result: dict[str, Any], implementation: str, limits: dict[str, Any]) -> str:
    """A line of the table."""
    if "failed" in result or "not_run" in result:
        return f"| {result['row']} | {result.get('not_run') or result['failed']}" + " |" * (len(COLUMNS) - 1)
    found = result["implementations"][implementation]
    cells = [
        result["row"],
        f"{result['bytes'] / limits['gb_per_s'] / 1e3:.1f}",
        f"{found['us']:.1f}",
        f"{found['us_min']:.1f} - {found['us_max']:.1f}",
        f"{found['gb_per_s']:.0f}",
        f"{found['of_limit']:.3f}",
        *(f"{result[name]:.2f}" if name in result else "-" for name in ("over_bf16", "over_xla_bf16")),
        f"{result['errors'][implementation]:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the most telling rows alone")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="begin no row later")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--implementation", choices=("mosaic", "reference"), default="mosaic", help="default: %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to store results (default: results/matmul-DEVICE.json)"
    )


def run(args: argparse.Namespace) -> int:
    device = jax.devices()[0]
    tiny = device.platform == "cpu"
    rows = [row for row in (TINY if tiny else QUICK if args.quick else full()) if args.only in str(row)]
    if not rows:
        raise UsageError(f"--only is {args.only!r}, which no row has in its name; names look like {str(TINY[0])!r}")
    if tiny and args.implementation == "mosaic":
        raise UsageError(
            f"the kernel needs a Hopper GPU and this is {device.device_kind}; pass --implementation reference"
        )
    kind = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower().removeprefix("nvidia ")).strip("-")
    out = args.output or RESULTS / f"matmul-{kind}.json"
    if measure_rows(
        rows, out, args.command, args.implementation, rounds=args.rounds, until=time.perf_counter() + 60 * args.minutes
    ):
        return FAILURE
    return OK


def measure_rows(
    rows: Sequence[Row], out: Path, command: str, implementation: str, *, rounds: int, until: float
) -> int:
    """Measures and prints row by row, stores after each; returns how many failed."""
    device = jax.devices()[0]
    tiny = device.platform == "cpu"
    seconds = 0.0 if tiny else 0.15
    limits = ceilings(tiny=tiny, rounds=rounds, seconds=seconds)
    report: dict[str, Any] = {
        "benchmark": "matmul",
        "date": now(),
        "command": command,
        "device": device.device_kind,
        "implementation": implementation,
        "hardware": hardware(),
        "versions": versions("ridgeline", "jax", "jaxlib", "jax-cuda13-plugin", "numpy"),
        "ceilings": limits,
        "targets": [],
        "results": [],
    }
    if tiny:
        report["label"] = CPU_LABEL
        print(CPU_LABEL)
    print(f"{device.device_kind}: the limit is {limits['gb_per_s']:.0f} GB/s, the larger of a copy's and a read's")
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    results = report["results"]
    for row in tqdm(rows, unit="row", file=sys.stderr):
        if time.perf_counter() > until:
            result = {"row": str(row), "not_run": "not run: out of time"}
        else:
            try:
                result = measure(row, implementation, limits, rounds, seconds)
            except Exception as error:  # the rows after it may still run
                result = {"row": str(row), "failed": reason(error)}
        results.append(result)
        compare(results, implementation)
        report["targets"] = targets(results, implementation)
        store(report, out)
        tqdm.write(describe(result, implementation, limits), file=sys.stdout)
    for target in report["targets"]:
        met = "met" if target["met"] else "NOT MET"
        print(f"{met}: {target['row']}: {target['what']} {target['found']}, wanted {target['wanted']}")
    print(f"stored in {out}")
    return sum("failed" in result for result in results)
