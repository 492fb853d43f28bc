"""Who reads what in a split-KV decode: equal shares of KV tiles for a fixed number of thread blocks.

The tiles of all (row, head) units, in row-major order, form one line; thread block w takes tiles w * share to
(w + 1) * share - 1 of it, wherever they fall, so that one long row beside many short ones keeps every block busy. A
block writes one partial result for each unit it touches. Counting block and unit boundaries along the line, the partial
of block w for unit u is number w + u: no two collide, and the partials of one unit are consecutive. (The decomposition
is stream-K, Osama et al. 2023; splitting KV for decode is Flash-Decoding, Dao et al. 2023.)

Everything follows from the lengths on the device: nothing is recompiled as they grow, and the layers of a model share
one schedule, which XLA computes once a step.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class Schedule(NamedTuple):
    """How the tiles are shared out, with W thread blocks and U = B * heads units.

    Attributes:
      work: [W, 4]: row, head, tile within the unit where a block starts, and how many tiles it takes.
      rows: [B, 2]: the first tile that a row reads, and how many. At least one, so that every unit has a partial.
      pieces: [U, 2]: the first and the last block that touch a unit.
    """

    work: Int[Array, "W 4"]
    rows: Int[Array, "B 2"]
    pieces: Int[Array, "U 2"]


def make_schedule(
    lengths: Int[Array, "B"], *, queries: int, window: int | None, tile: int, heads: int, blocks: int
) -> Schedule:
    """The schedule of one decode attention.

    Args:
      lengths: positions cached, the new tokens included.
      queries: new tokens a row; they stand at the last positions.
      window: positions that a query sees, itself included; None is all before it.
      tile: positions a tile.
      heads: units a row.
      blocks: thread blocks.
    """
    oldest_seen = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - queries + 1 - window, 0)
    first = oldest_seen // tile
    tiles = jnp.maximum(-(-lengths // tile) - first, 1)
    ends = jnp.cumsum(tiles) * heads
    begins = ends - tiles * heads
    share = -(-ends[-1] // blocks)

    start = jnp.arange(blocks) * share
    row = jnp.minimum((ends <= start[:, None]).sum(axis=1), lengths.shape[0] - 1)
    head, at = jnp.divmod(start - begins[row], tiles[row])
    work = jnp.stack([row, head, at, jnp.clip(ends[-1] - start, 0, share)], axis=1)

    unit = begins[:, None] + jnp.arange(heads) * tiles[:, None]
    pieces = jnp.stack([unit // share, (unit + tiles[:, None] - 1) // share], axis=-1).reshape(-1, 2)
    return Schedule(*(x.astype(jnp.int32) for x in (work, jnp.stack([first, tiles], axis=1), pieces)))


class Place(NamedTuple):
    """A tile of the line, for the block that takes it: `at` of the unit of `row` and `head`.

    The row reads tiles `first` to `first` + `tiles` - 1 of its positions. `unit` counts the units that the block has
    begun before, and `new_unit` says that it begins this one here.
    """

    row: Any
    head: Any
    at: Any
    first: Any
    tiles: Any
    unit: Any
    new_unit: Any

    @property
    def tile(self) -> Any:
        """Of the row's positions."""
        return self.first + self.at

    def after(self, rows: Any, heads: int) -> "Place":
        """The next tile along the line, of `Schedule.rows`."""
        row, head, at, first, tiles, unit, _ = self
        new_unit = at + 1 == tiles
        at = jnp.where(new_unit, 0, at + 1)
        head = jnp.where(new_unit, head + 1, head)
        new_row = head == heads
        head = jnp.where(new_row, 0, head)
        row = jnp.where(new_row, jnp.minimum(row + 1, rows.shape[0] - 1), row)
        first, tiles = lax.cond(new_row, lambda: (rows[row, 0], rows[row, 1]), lambda: (first, tiles))
        return Place(row, head, at, first, tiles, unit + new_unit.astype(jnp.int32), new_unit)


def first_place(work: Any, rows: Any, block: Any) -> Place:
    """Where a block starts, by `Schedule.work` and `Schedule.rows`."""
    row, head, at = (work[block, n] for n in range(3))
    return Place(row, head, at, rows[row, 0], rows[row, 1], jnp.int32(0), jnp.bool_(True))
