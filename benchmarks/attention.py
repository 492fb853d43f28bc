"""How fast the attention kernels are: decode against memory bandwidth, prefill against matrix products.

Beside the kernel run the plain-jnp reference and, on dense K and V of the same values, XLA's attention and cuDNN's
(`jax.nn.dot_product_attention`). Each row is checked before it is timed: outputs within 2e-2 of the reference. In
decode the kernel's calls come in steps of 32, like the layers of a model, which share what follows from the lengths
alone: the schedule, once a step.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..pallas_kernels.attention import decode_attention, prefill_attention
from ..pallas_kernels.pages import AttentionOptions, Pages
from . import kernel_rows
from .attention_rows import EVEN, ITEMSIZE, LEVEL, QUICK, SKEW_TARGET, SKEWED, TINY, Row, full, target_of
from .harness import Table
from .kernel_rows import Contender, Inputs, Kind, Operands, kernel_reason, timed_rows
from .limits import Figure

DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
UNIT = 40.0  # stored where one is meant, in quantized pages
PEERS = ("reference", "xla", "cudnn")
SPARE = 3  # pages of nobody, where garbage is wanted

add_arguments = kernel_rows.add_arguments


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_pages(key: jax.Array, shape: tuple[int, ...], kv: str) -> jax.Array:
    values = jax.random.normal(key, shape, jnp.bfloat16)
    if kv not in LARGEST:
        return values.astype(DTYPES[kv])
    values = (values * UNIT).clip(-LARGEST[kv], LARGEST[kv])
    return (jnp.round(values) if kv == "int8" else values).astype(DTYPES[kv])


def make_inputs(row: Row, sets: int, garbage: float | None = None) -> Inputs:
    """Queries, what all calls share, and `sets` block tables: each leads to pages of its own, in random order.

    With `garbage` that stands wherever nothing may be read: in pages of nobody, past a row's end, and before what its
    window reaches; and entries of tables past a row's end are out of range.
    """
    K, G, H = row.shape
    B, S = len(row.lengths), row.S
    used = [-(-length // S) for length in row.lengths]
    spare = 0 if garbage is None else SPARE
    order = np.random.default_rng(0).permutation(sets * sum(used) + spare).astype(np.int32)
    tables = np.full((sets, B, max(1, *used)), 0 if garbage is None else 2**30, np.int32)
    for table in tables:
        for entries, count in zip(table, used, strict=True):
            entries[:count], order = order[:count], order[count:]
    keys = jax.random.split(jax.random.key(0), 6)
    pool = (sets * sum(used) + spare, K, S, H)
    pages = Pages(*(random_pages(key, pool, row.kv) for key in keys[:2]))
    if row.kv in LARGEST:
        scales = [jax.random.uniform(key, pool[:3], minval=0.5 / UNIT, maxval=1.5 / UNIT) for key in keys[2:4]]
        pages = Pages(*pages[:2], *scales)
    if garbage is not None:
        read = _read_positions(row, pool[0], tables)[:, None, :]

        def soiled(leaf: jax.Array) -> jax.Array:
            where = read[..., None] if leaf.ndim == 4 else read
            return leaf if leaf.dtype == jnp.int8 else jnp.where(where, leaf, garbage).astype(leaf.dtype)

        pages = jax.tree.map(soiled, pages)
    shared: Operands = {"pages": pages, "lengths": jnp.asarray(row.lengths, jnp.int32)}
    if row.op == "prefill":
        shared["starts"] = jnp.maximum(shared["lengths"] - row.T, 0)
    if row.sinks:
        shared["sinks"] = 2 * jax.random.normal(keys[5], (K, G), jnp.float32)
    tokens = () if row.op == "decode" and row.T == 1 else (row.T,)
    q = jax.random.normal(keys[4], (B, *tokens, K, G, H), DTYPES[row.q])
    return q, shared, [{"block_tables": jnp.asarray(table)} for table in tables]


def _read_positions(row: Row, pages: int, tables: np.ndarray) -> jax.Array:
    """[P, S]: which positions of the pool some query may see."""
    read = np.zeros((pages, row.S), bool)
    for table in tables:
        for entries, length in zip(table, row.lengths, strict=True):
            oldest = 0 if row.window is None else max(0, max(length - row.T, 0) + 1 - row.window)
            for n in range(-(-length // row.S)):
                read[entries[n], max(0, oldest - n * row.S) : max(0, length - n * row.S)] = True
    return jnp.asarray(read)


def dense(row: Row, paged: Inputs) -> Inputs:
    """K and V as [B, S, K, H], for those that know no pages; lengths only where rows differ."""
    q, shared, sets = paged

    @jax.jit
    def gathered(pages, tables):
        taken = jnp.moveaxis(pages[tables], 2, 3)
        return taken.reshape(len(row.lengths), -1, *taken.shape[3:])[:, : max(row.lengths)]

    pages = shared["pages"]
    pairs = [{name: gathered(getattr(pages, name), each["block_tables"]) for name in "kv"} for each in sets]
    return q, {} if row.even else {"lengths": shared["lengths"]}, pairs


def paged(row: Row, implementation: str) -> Contender:
    op = decode_attention if row.op == "decode" else prefill_attention
    options = AttentionOptions(row.shape[2] ** -0.5, row.window, row.soft_cap)
    return lambda q, operands: op(q, **operands, options=options, implementation=implementation)


def over_dense(row: Row, implementation: str) -> Contender:
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


def contenders(row: Row) -> dict[str, Contender | str]:
    """Each one's function, or why there is none."""
    unfit = f"not run: knows no {row.kv} with scales" if ITEMSIZE[row.kv] != 2 else None
    kernel = kernel_reason() or paged(row, "mosaic")
    rivals = {name: unfit or over_dense(row, name) for name in ("xla", "cudnn")}
    return {"mosaic": kernel, "reference": paged(row, "reference"), **rivals}


def layers(row: Row, name: str) -> int:
    """The kernel's calls of a step share a schedule in decode; all else has nothing to share and compiles sooner."""
    return 32 if name == "mosaic" and row.op == "decode" else 8


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    forms = {"xla": dense, "cudnn": dense}
    kind = Kind(QUICK, full, TINY, contenders, make_inputs, lambda q, out: out, layers, forms)
    return kernel_rows.measure(kind, args)


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    return kernel_rows.show(report, PEERS)


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Each row against the roof; prefill against cuDNN; the skewed batch against an even one of equal bytes."""
    kernels = {}
    for row, name, medians, least in timed_rows(report):
        us, wanted = medians[name] * 1e6, target_of(row) if name == "mosaic" else None
        yield Figure(f"{row['row']}, {name}", us, least * 1e6, "us", wanted)
        if name == "mosaic":
            kernels[row["row"]] = us
            if row["op"] == "prefill" and "cudnn" in medians:
                yield Figure(f"{row['row']} beside cuDNN", us, medians["cudnn"] * 1e6, "us", LEVEL)
    if str(SKEWED) in kernels and str(EVEN) in kernels:
        yield Figure(f"{SKEWED} beside even rows", kernels[str(SKEWED)], kernels[str(EVEN)], "us", 1 / SKEW_TARGET)
