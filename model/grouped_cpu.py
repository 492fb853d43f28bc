"""Rows sorted by expert, each times the weight of its expert, on a CPU: weights without rows are never read.

A loop of unknown length goes over blocks of rows that share an expert, and for each over as many outputs at a time as
stay in cache: XLA:CPU copies what is cut out of an array before it multiplies it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from .products_cpu import BLOCK, by_float32, by_output, on_one_cpu, rows_of
from .quantization import QuantizedArray

_MOST_ROWS = 64  # of a block: enough for a product to be bound by arithmetic
_FEW_ROWS = 8


class BlockTable(NamedTuple):
    """Which rows each block has, in order; a block's rows are of one expert.

    Attributes:
      expert: [N], of each block; of those past the last it is any.
      first: [N], its first row. The rows behind an expert's last one, up to the size of a block, are not its own.
      count: [], blocks that there are.
    """

    expert: Int[Array, "N"]
    first: Int[Array, "N"]
    count: Int[Array, ""]


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block, a power of two: about as many as an expert has."""
    return min(_MOST_ROWS, 1 << max(0, math.ceil(math.log2(rows / experts))))


def block_table(sizes: Int[Array, "E"], rows: int, size: int) -> BlockTable:
    """The blocks of up to `size` rows that so many sorted rows make, of which each expert has some: at most N.

    Every expert's first block begins at its first row; N is what the worst of all `sizes` needs.
    """
    sizes = sizes.astype(jnp.int32)
    blocks = -(-sizes // size)
    ends, starts = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes
    index = jnp.arange(min(rows, rows // size + sizes.shape[0]), dtype=jnp.int32)
    expert = jnp.sum(index[:, None] >= ends, axis=1, dtype=jnp.int32).clip(max=sizes.shape[0] - 1)
    return BlockTable(expert, starts[expert] + (index - (ends - blocks)[expert]) * size, ends[-1])


def grouped_product_cpu(
    x: Float[Array, "R I"], w: Num[Array, "E *out I"] | QuantizedArray, sizes: Int[Array, "E"]
) -> Float[Array, "R *out"]:
    """In float32; rows past the sum of `sizes` are zeros."""
    (rows, inputs), (experts, *out) = x.shape, w.shape[:-1]
    outputs, size = math.prod(out), block_rows(rows, experts)
    # A part of a weight that is in cache already is widened there in less time than other forms take for few rows.
    product = by_float32 if size <= _FEW_ROWS and not isinstance(w, QuantizedArray) else on_one_cpu
    table = block_table(sizes, rows, size)
    w = jax.tree.map(lambda part: part.reshape(experts, -1, part.shape[-1]), w)
    step = -(-outputs // -(-outputs * inputs // BLOCK))
    steps = -(-outputs // step)
    x = jnp.pad(x, ((0, size), (0, 0)))

    def multiply(index: Int[Array, ""], y: Float[Array, "M O"]) -> Float[Array, "M O"]:
        index, tied = lax.optimization_barrier((index, w))  # else XLA widens all weights before the loop
        block, first = index // steps, jnp.minimum(index % steps * step, outputs - step)
        part = _outputs_of(tied, table.expert[block], first, step)
        rows_of_block = lax.dynamic_slice_in_dim(x, table.first[block], size)
        # The rows behind an expert's own are overwritten by the block that follows.
        return lax.dynamic_update_slice(y, product(rows_of_block, part), (table.first[block], first))

    y = jnp.zeros((rows + size, outputs), jnp.float32)
    y = lax.fori_loop(jnp.int32(0), table.count * steps, multiply, y)[:rows]
    return jnp.where((jnp.arange(rows) < jnp.sum(sizes))[:, None], y, 0).reshape(rows, *out)


def _outputs_of(
    w: Num[Array, "E O I"] | QuantizedArray, expert: Int[Array, ""], first: Int[Array, ""], size: int
) -> Num[Array, "S I"] | QuantizedArray:
    """The weights of some outputs of an expert."""

    def cut(part: Num[Array, "E O N"]) -> Num[Array, "S N"]:
        return rows_of(part.reshape(-1, part.shape[-1]), expert * part.shape[1] + first, size)

    if not isinstance(w, QuantizedArray):
        return cut(w)
    scales, zeros = (None if part is None else part[expert][None] for part in (w.scales, w.zeros))
    w = w.replace(scales=scales, zeros=zeros)
    w = by_output(w)
    scales, zeros = (
        None if part is None else lax.dynamic_slice_in_dim(part[0], first, size) for part in (w.scales, w.zeros)
    )
    return w.replace(values=cut(w.values), scales=scales, zeros=zeros)
