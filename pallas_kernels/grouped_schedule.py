"""Who multiplies what, where rows come in groups of any sizes: tiles of rows, and a table made on the device.

The rows of a group are cut into tiles, which begin at a multiple of 8. A tile meets every band of its group's weight;
each such pair is a unit of the streaming kernel's work (`matmul_schedule`), and groups without rows have none. Sizes
are known on the device only: shapes follow from the most tiles that so many rows and groups can make.

Few rows: all units form one line, of which every thread block takes as many steps, and bands that several blocks touch
are added up. Many rows: a block takes whole units, w, w + blocks and so on, and writes the result. Units that run
together share what they read, for they go through up to 16 tiles of a group before the next band.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .matmul_schedule import COLUMNS, ROW_ALIGNMENT, Schedule, Table, make_schedule

_FEW_ROWS = 512  # of all groups, whose partial sums are small beside the weights that they take to compute
_MANY_ROWS = 96  # of a group, from which tiles of 128 rows are mostly full
_TILES_TOGETHER = 16  # of 128 rows and 4,096 inputs in 16 bits are 17 MB, a third of an H100's L2
_Operand = jax.Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class GroupedSchedule:
    """How groups of rows are multiplied.

    Attributes:
      product: the schedule of one tile of rows.
      tiles: of rows, the most there can be.
      whole: whether a thread block takes whole units.
      least: steps of a thread block, if it takes any, where it does not.
    """

    product: Schedule
    tiles: int
    whole: bool
    least: int

    @property
    def pieces(self) -> int:
        """The most partial sums that a unit has."""
        return 1 if self.whole else -(-(self.product.steps - 1) // self.least) + 1

    @property
    def units_a_block(self) -> int:
        """The most that a thread block has which takes whole ones."""
        return -(-self.tiles * self.product.bands // self.product.blocks)


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
    if whole and mean >= _MANY_ROWS:
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
    return GroupedSchedule(product, tiles, whole, least)


def make_table(g: GroupedSchedule, sizes: Int[Array, "E"], rows: int) -> tuple[Table, Int[Array, "R bands"]]:
    """What the kernel is told, and how many partial sums each of `rows` rows has of each band; 0 for rows of no group.

    Args:
      g: the schedule.
      sizes: rows of each group.
      rows: of the activations, of all groups and those after.
    """
    s, E = g.product, sizes.shape[0]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes.astype(jnp.int32)
    first_rows = starts // ROW_ALIGNMENT * ROW_ALIGNMENT
    counts = jnp.where(ends > starts, -(-(ends - first_rows) // s.columns), 0)  # tiles of each group
    tile_ends = jnp.cumsum(counts, dtype=jnp.int32)

    tile = jnp.arange(g.tiles, dtype=jnp.int32)
    group = jnp.minimum(_place(tile_ends, tile), E - 1)
    first_tile = (tile_ends - counts)[group]
    together = first_tile + (tile - first_tile) // _TILES_TOGETHER * _TILES_TOGETHER  # the first of those
    width = jnp.minimum(_TILES_TOGETHER, tile_ends[group] - together)
    band = jnp.arange(s.bands, dtype=jnp.int32)
    unit = (together * s.bands + tile - together)[:, None] + band * width[:, None]  # [tiles, bands]
    total = tile_ends[-1] * s.bands  # units

    block = jnp.arange(s.blocks, dtype=jnp.int32)
    if g.whole:
        steps = jnp.maximum(-(-(total - block) // s.blocks), 0) * s.steps
        shares = jnp.stack([block * (g.units_a_block * s.steps), steps], axis=1)
        first_block, place = unit % s.blocks, unit % s.blocks * g.units_a_block + unit // s.blocks
        pieces = jnp.ones_like(unit)
    else:
        share = jnp.maximum(-(-total * s.steps // s.blocks), g.least)
        steps = jnp.clip(total * s.steps - block * share, 0, share)
        shares = jnp.stack([jnp.where(steps > 0, block * share, 0), steps], axis=1)
        first_block, place = unit * s.steps // share, unit
        pieces = ((unit + 1) * s.steps - 1) // share - first_block + 1

    low = first_rows[group] + (tile - first_tile) * s.columns
    start = jnp.minimum(low, padded_rows(g, rows) - s.columns)  # which keeps tiles within the activations
    real = jnp.maximum(starts[group], low) - start, jnp.minimum(ends[group], low + s.columns) - start
    columns = (group[:, None] * s.bands + band, start[:, None], first_block, *(row[:, None] for row in real))
    lines = jnp.stack(jnp.broadcast_arrays(*columns), axis=-1)  # [tiles, bands, 5]
    most = g.units_a_block * s.blocks
    place = jnp.where((tile < tile_ends[-1])[:, None], place, most)
    units = jnp.zeros((most, lines.shape[-1]), jnp.int32).at[place].set(lines, mode="drop", unique_indices=True)

    row = jnp.arange(rows, dtype=jnp.int32)
    group = jnp.minimum(_place(ends, row), E - 1)
    mine = (tile_ends - counts)[group] + (row - first_rows[group]) // s.columns
    return Table(shares, units), jnp.where((row < ends[-1])[:, None], pieces[mine], 0)


def padded_rows(g: GroupedSchedule, rows: int) -> int:
    """Of the activations, so that a tile fits and the last one begins at a multiple of 8."""
    return max(-(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT, g.product.columns)


def _place(ends: Array, n: Array) -> Array:
    """Of each n, how many ends are not above it: without a binary search, whose loop the host of a GPU would drive."""
    return jnp.searchsorted(ends, n, side="right", method="compare_all").astype(jnp.int32)
