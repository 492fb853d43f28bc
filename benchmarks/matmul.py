"""How fast products of a few rows are: the kernel against measured bandwidth, and quantized forms against bf16.

A row is the product of 1 to 64 rows with one weight of a layer, in one form, with its bias-free epilogue: the gate of
gate_up, the residual of out and down; or that of 1 to 4,096 tokens with their experts, without one. It is checked
before it is timed: within 2e-2 of the reference, which dequantizes and multiplies in float32. Beside bf16 runs XLA's
own product, epilogue included. Speed over bf16 is the time of the bf16 row of the same product over that of this row.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..pallas_kernels.grouped import grouped_matmul
from ..pallas_kernels.matmul import matmul
from . import kernel_rows
from .harness import Table
from .kernel_rows import Contender, Inputs, Kind, Operands, kernel_reason, timed_rows
from .limits import Figure
from .matmul_rows import QUICK, TINY, Row, full

CALLS = 16  # a step of the timed program
BANDWIDTH_TARGET = 0.90  # share that bf16 reaches at one row
SPEED_TARGETS = {"int8": 1.85, "int4": 3.3}  # over bf16, up to as many rows as follow
SPEED_ROWS = 16
TARGETED = ("8b gate_up", "8b down")

add_arguments = kernel_rows.add_arguments


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Weights of any bits, and floats of a size that keeps results near one."""
    if dtype in ("int8", "uint8"):
        return jax.random.bits(key, shape, jnp.uint8).astype(dtype)
    return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)


def make_inputs(row: Row, sets: int) -> Inputs:
    """Activations, and `sets` weights with what goes with them."""
    size = {"bf16": 1.0, "int8": 74.0, "fp8": 1.0, "fp8-block": 1.0}.get(row.form, 4.6) * row.K**0.5
    keys = iter(jax.random.split(jax.random.key(0), 1 + 5 * sets))
    x = drawn(next(keys), *row.operands["x"])

    def one() -> Operands:
        operands = {name: drawn(next(keys), *of) for name, of in row.operands.items() if name != "x"}
        if "scales" in operands:
            shape, dtype = row.operands["scales"]
            operands["scales"] = (jax.random.uniform(next(keys), shape, minval=0.5, maxval=1.5) / size).astype(dtype)
        else:
            operands["values"] = operands["values"] * jnp.asarray(1 / size, jnp.bfloat16)
        if "zeros" in operands:
            operands["zeros"] = operands["zeros"] & 15
        if row.experts:
            operands["sizes"] = jnp.asarray(row.sizes, jnp.int32)
        return operands

    return x, {}, [one() for _ in range(sets)]


def product_of(row: Row, implementation: str) -> Contender:
    activation = "silu" if row.gated else None

    def product(x, operands):
        if not row.experts:
            return matmul(x, **operands, activation=activation, implementation=implementation)
        others = {name: part for name, part in operands.items() if name != "values"}
        return grouped_matmul(x, operands["values"], **others, implementation=implementation)

    return product


def xla(row: Row) -> Contender:
    """XLA's own product of bf16, with the same epilogue."""

    def product(x, operands):
        y = jnp.einsum("mk,...nk->...mn", x, operands["values"], preferred_element_type=jnp.float32)
        y = jax.nn.silu(y[0]) * y[1] if row.gated else y
        return (y + operands["residual"] if row.residual else y).astype(x.dtype)

    return product


def contenders(row: Row) -> dict[str, Contender | str]:
    kernel = kernel_reason() or product_of(row, "mosaic")
    peers = {"xla": xla(row)} if row.form == "bf16" and not row.experts else {}
    return {"mosaic": kernel, "reference": product_of(row, "reference"), **peers}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    def advance(x: jax.Array, out: jax.Array) -> jax.Array:  # the next call waits for this one
        return x + 0 * out[:, :1]

    kind = Kind(QUICK, full, TINY, contenders, make_inputs, advance, lambda row, name: CALLS)
    return kernel_rows.measure(kind, args)


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    yield from kernel_rows.show(report, ("reference", "xla"))
    rows = [
        (row["row"], f"{bf16 / ours:.2f}", "-" if theirs is None else f"{theirs / ours:.2f}")
        for row, ours, bf16, theirs in over_bf16(report)
    ]
    if rows:
        yield Table("Times as fast as bf16", ("row", "ours", "XLA's"), rows)


def over_bf16(report: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], float, float, float | None]]:
    """Rows that are not in bf16: their seconds, those of the same product in bf16, and those of XLA's product."""
    rows = list(timed_rows(report))
    base = {(row["weight"], row["M"]): medians for row, _, medians, _ in rows if row["form"] == "bf16"}
    for row, name, medians, _ in rows:
        bf16 = base.get((row["weight"], row["M"]), {})
        if row["form"] != "bf16" and name in bf16:
            yield row, medians[name], bf16[name], bf16.get("xla")


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Each row against the roof, and against the bf16 row of the same product."""
    for row, name, medians, least in timed_rows(report):
        targeted = row["weight"] in TARGETED and (row["form"], row["M"], name) == ("bf16", 1, "mosaic")
        wanted = BANDWIDTH_TARGET if targeted else None
        yield Figure(f"{row['row']}, {name}", medians[name] * 1e6, least * 1e6, "us", wanted)
    for row, ours, bf16, _ in over_bf16(report):
        targeted = row["weight"] in TARGETED and row["M"] <= SPEED_ROWS and "mosaic" in row["seconds"]
        wanted = SPEED_TARGETS.get(row["form"]) if targeted else None
        yield Figure(f"{row['row']} beside bf16", ours * 1e6, bf16 * 1e6, "us", wanted)
