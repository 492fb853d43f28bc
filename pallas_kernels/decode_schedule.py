"""Who reads what in a split-KV decode: equal shares of KV tiles for a fixed number of thread blocks.

The tiles of all (row, head) units, in row-major order, form one line; thread block w takes tiles w * share to
(w + 1) * share - 1 of it, wherever they fall, so that one long row beside many short ones keeps every block busy. A
block writes one partial result for each unit it touches. Counting block and unit boundaries along the line, the partial
of block w for unit u is number w + u: no two collide, and the partials of one unit are consecutive. (The decomposition
is stream-K, Osama et al. 2023; splitting KV for decode is Flash-Decoding, Dao et al. 2023.)

Everything follows from the lengths on the device: nothing is recompiled as they grow, and the layers of a model share
one schedule, which XLA computes once a step.
"""

from typing import NamedTuple

import jax.numpy as jnp
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
