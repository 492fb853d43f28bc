"""Who multiplies what, where rows come in groups of any sizes: tiles of rows, and a table made on the device.

The rows of a group are cut into tiles, which begin at a multiple of 8. A tile meets every band of its group's weight;
each such pair is a unit of the streaming kernel's work (`matmul_schedule`), and groups without rows have none. Sizes
are known on the device only: shapes follow from the most tiles that so many rows and groups can make.

Few rows: all units form one line, of which every thread block takes as many steps, and bands that several blocks touch
are added up. Many rows: a block takes whole units, w, w + blocks and so on, and writes the result. Units go through 16
tiles before the next band, so that those which run together share what they read.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .matmul_schedule import COLUMNS, ROW_ALIGNMENT, TILES_TOGETHER, Schedule, Table, make_schedule

_FEW_ROWS = 512  # of all groups, whose partial sums are small beside the weights that they take to compute
_MANY_ROWS = 96  # of a group, from which tiles of 128 rows are mostly full
_Operand = jax.Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class GroupedSchedule:
    """How groups of rows are multiplied.

    Attributes:
      product: the schedule of one tile of rows.
      tiles: of rows, the most there can be.
    """

    product: Schedule
    tiles: int

    @property
    def whole(self) -> bool:
        """Whether a thread block takes whole units."""
        return self.product.share == 0

    @property
    def pieces(self) -> int:
        """The most partial sums that a unit has."""
        return 1 if self.whole else -(-(self.product.steps - 1) // self.product.share) + 1


def make_grouped_schedule(
    x: _Operand, w: _Operand, scales: _Operand | None, zeros: _Operand | None, *, blocks: int | None = None
) -> GroupedSchedule:
    """The schedule of a grouped product, of which it sees shapes and dtypes.

    Args:
      x, w, scales, zeros: as in `grouped.grouped_matmul`.
      blocks: thread blocks; None is one a multiprocessor.

    Raises:
      NotImplementedError: the kernel does not take such operands, and why.
    """
    R, E = x.shape[0], w.shape[0]
    groups = min(R, E)  # that have rows
    mean, whole = -(-R // groups), R > _FEW_ROWS
    small = scales is not None and 1 < scales.shape[2] and x.shape[1] // scales.shape[2] < 128  # leave few registers
    if whole and mean >= _MANY_ROWS and not small:
        columns = COLUMNS[-1]
    else:  # half as many more as the mean, and those between a multiple of 8 and the first
        columns = next((n for n in COLUMNS[:-1] if 2 * n >= 3 * mean + ROW_ALIGNMENT + 5), COLUMNS[-2])
    tiles = (R + groups * (columns + ROW_ALIGNMENT - 2)) // columns
    tile = jax.ShapeDtypeStruct((columns, x.shape[1]), x.dtype)
    weight = (None if part is None else jax.ShapeDtypeStruct(part.shape[1:], part.dtype) for part in (w, scales, zeros))
    product = make_schedule(tile, *weight, blocks=blocks, products=tiles)
    # Partial sums take at most half the bytes of one weight.
    pieces = max(2, x.shape[1] * product.bits // (64 * R))
    least = max(-(-(product.steps - 1) // (pieces - 1)), -(-product.bands * product.steps // product.blocks), 1)
    return GroupedSchedule(dataclasses.replace(product, share=0 if whole else least), tiles)


def make_table(
    g: GroupedSchedule, sizes: Int[Array, "E"], rows: int
) -> tuple[Table, Int[Array, "R"], Bool[Array, "R"]]:
    """What the kernel is told; the tile of each of `rows` rows; and whether it has one.

    Sums over all groups take the place of scans, searches and gathers: each is one small kernel of XLA's.

    Args:
      g: the schedule.
      sizes: rows of each group.
      rows: of the activations, of all groups and those after.
    """
    columns, sizes = g.product.columns, sizes.astype(jnp.int32)
    group, tile, row = (jnp.arange(n, dtype=jnp.int32) for n in (sizes.shape[0], g.tiles, rows))

    def total(where, values):
        return jnp.where(where, values, 0).sum(axis=1, dtype=jnp.int32)

    until = group[:, None] >= group
    ends = total(until, sizes)
    starts = ends - sizes
    aligned = starts // ROW_ALIGNMENT * ROW_ALIGNMENT
    counts = jnp.where(sizes > 0, -(-(ends - aligned) // columns), 0)  # of tiles
    tile_ends = total(until, counts)
    first = tile_ends - counts

    mine = (first <= tile[:, None]) & (tile[:, None] < tile_ends)  # [tiles, E]
    low = aligned + (tile[:, None] - first) * columns
    start = jnp.minimum(low, padded_rows(g, rows) - columns)  # which keeps tiles within the activations
    real = jnp.maximum(starts, low) - start, jnp.minimum(ends, low + columns) - start
    table = Table(tile_ends, *(total(mine, values) for values in (group, start, *real)))

    mine = (starts <= row[:, None]) & (row[:, None] < ends)  # [rows, E]
    return table, total(mine, first + (row[:, None] - aligned) // columns), row < ends[-1]


def pieces(g: GroupedSchedule, tiles: Int[Array, ""], tile: Int[Array, "R"]) -> Int[Array, "R bands"]:
    """How many partial sums each band of each tile has, where there are `tiles` in all."""
    s = g.product
    share = jnp.maximum(-(-tiles * s.bands * s.steps // s.blocks), s.share)
    before = tile // TILES_TOGETHER * TILES_TOGETHER
    together = jnp.minimum(tiles - before, TILES_TOGETHER)
    band = jnp.arange(s.bands, dtype=jnp.int32)
    unit = (before * s.bands + tile - before)[:, None] + band * together[:, None]
    return ((unit + 1) * s.steps - 1) // share - unit * s.steps // share + 1


def padded_rows(g: GroupedSchedule, rows: int) -> int:
    """Of the activations, so that a tile fits and the last one begins at a multiple of 8."""
    return max(-(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT, g.product.columns)
