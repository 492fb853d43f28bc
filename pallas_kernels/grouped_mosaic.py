"""Products of grouped rows with a weight a group, by the kernel that streams weights (`matmul_mosaic`)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, Shaped, UInt8

from .grouped_schedule import make_grouped_schedule, make_table, padded_rows, pieces
from .matmul_mosaic import stream


# Jitted, so that the layers of a model share one trace of the kernel.
@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def grouped_matmul_mosaic(
    x: Float[Array, "R I"],
    w: Num[Array, "E O C"],
    scales: Shaped[Array, "E blocks groups"] | None,
    zeros: UInt8[Array, "E O groups"] | None,
    sizes: Int[Array, "E"],
    *,
    blocks: int | None = None,
    interpret: Any = None,
) -> Float[Array, "R O"]:
    """Each row of x times the transposed weight of its group: float32, of many rows in x's dtype.

    Args:
      x, w, scales, zeros, sizes: as in `grouped.grouped_matmul`.
      blocks: thread blocks; None fills the device.
      interpret: parameters of Mosaic's interpreter, None to compile.

    Raises:
      NotImplementedError: the kernel does not take such operands.
    """
    R, O = x.shape[0], w.shape[1]  # noqa: E741
    g = make_grouped_schedule(x, w, scales, zeros, blocks=blocks)
    table, tile, real = make_table(g, sizes, R)
    rows = padded_rows(g, R)
    out = jax.ShapeDtypeStruct((g.pieces, rows, O), x.dtype if g.whole else jnp.float32)
    x = jnp.pad(x, ((0, rows - R), (0, 0)))
    partial = stream(g.product, x, w, scales, zeros, table, out, name="grouped_matmul", interpret=interpret)
    if g.whole:
        return jnp.where(real[:, None], partial[0, :R], 0)
    number = jnp.where(real[:, None], pieces(g, table.ends[-1], tile), 0)
    written = jnp.arange(g.pieces)[:, None, None] < jnp.repeat(number, g.product.rows, axis=1)
    return jnp.where(written, partial[:, :R], 0).sum(axis=0)
