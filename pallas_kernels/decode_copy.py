"""The line of tiles that a thread block of the decode kernel takes, and the ring of loads that brings them.

`case` is what the kernel is compiled for (`decode_mosaic._Case`), the line that of `decode_schedule`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64  # positions: the rows of one wgmma


class Ring(NamedTuple):
    """Queries, and tiles of K and V, in shared memory and the barriers of their arrival; weights of the values.

    Quantized tiles are read from `wide`, in 16 bits, and their scales come with them.
    """

    q: Any
    k: Any
    v: Any
    weights: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    wide: Any = None
    k_scales: Any = None
    v_scales: Any = None


class Place(NamedTuple):
    """A tile of the line.

    Attributes:
      row, head: its unit.
      at: number within the unit.
      first, tiles: of the row: the first tile that is read, and how many are.
      unit: units of the thread block before this one.
      new_unit: whether it is the first tile of its unit in this thread block.
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
        """Number within the row's positions."""
        return self.first + self.at


class Block:
    """A thread block: its share of the line, and where that comes from and goes to."""

    def __init__(self, case: Any, q: Any, pages: Any, tables: Any, work: Any, rows: Any, ring: Ring):
        self.case, self.q, self.pages, self.tables, self.rows, self.ring = case, q, pages, tables, rows, ring
        self.work, self.index = work, lax.axis_index("block")
        self.count = work[self.index, 3]

    def first(self) -> Place:
        row, head, at = (self.work[self.index, n] for n in range(3))
        return Place(row, head, at, self.rows[row, 0], self.rows[row, 1], jnp.int32(0), jnp.bool_(True))

    def after(self, place: Place) -> Place:
        """The next tile along the line."""
        row, head, at, first, tiles, unit, _ = place
        new_unit = at + 1 == tiles
        at = jnp.where(new_unit, 0, at + 1)
        head = jnp.where(new_unit, head + 1, head)
        new_row = head == self.case.heads
        head = jnp.where(new_row, 0, head)
        row = jnp.where(new_row, jnp.minimum(row + 1, self.case.B - 1), row)
        first, tiles = lax.cond(new_row, lambda: (self.rows[row, 0], self.rows[row, 1]), lambda: (first, tiles))
        return Place(row, head, at, first, tiles, unit + new_unit.astype(jnp.int32), new_unit)

    def slot(self, i: Any) -> Any:
        """Of the block's tile i."""
        return lax.rem(i, jnp.int32(self.case.stages))

    def query_slot(self, place: Place) -> Any:
        return lax.rem(place.unit, jnp.int32(self.case.stages + 1))

    def page_ids(self, place: Place) -> tuple[Any, ...]:
        """The pages of a tile."""
        S, pages = self.case.S, self.case.pages
        entry = place.tile * pages if S <= TILE else lax.div(place.tile, jnp.int32(S // TILE))
        entries = [jnp.minimum(entry + n, self.tables.shape[1] - 1) for n in range(pages)]
        # Entries past the row's length may hold anything: what they lead to is masked, but it must exist.
        return tuple(jnp.clip(self.tables[place.row, n], 0, self.case.P - 1) for n in entries)

    def fetch(self, i: Any, place: Place, page_ids: tuple[Any, ...]) -> None:
        """Starts the copies of the block's tile i, and of the queries of a unit that begins with it."""
        case, ring, pages = self.case, self.ring, self.pages
        slot, kv_head = self.slot(i), lax.div(place.head, jnp.int32(case.splits))

        @pl.when(place.new_unit)
        def _():
            there = self.query_slot(place)
            plgpu.copy_gmem_to_smem(self.q.at[place.row, place.head], ring.q.at[there], ring.q_ready.at[there])

        paged = [(pages.k, ring.k, ring.k_ready), (pages.v, ring.v, ring.v_ready)]
        scales = [(pages.k_scales, ring.k_scales, ring.k_ready), (pages.v_scales, ring.v_scales, ring.v_ready)]
        if case.quantized and case.paged_scales:
            paged += scales
        elif case.quantized:
            for source, target, ready in scales:
                tile = jnp.minimum(place.tile, source.shape[2] - 1)
                plgpu.copy_gmem_to_smem(source.at[place.row, kv_head, tile], target.at[slot], ready.at[slot])
        copied = min(TILE, case.S)
        start = lax.rem(place.tile, jnp.int32(case.S // TILE)) * TILE if case.S > TILE else 0
        for source, target, ready in paged:
            for n, page in enumerate(page_ids):
                there = target.at[slot, pl.ds(n * copied, copied)]
                plgpu.copy_gmem_to_smem(source.at[page, kv_head, pl.ds(start, copied)], there, ready.at[slot])
