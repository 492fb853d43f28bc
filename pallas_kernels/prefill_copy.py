"""What the third warpgroup of the prefill kernel does: it brings tiles of K and V into shared memory, and widens them.

`block` is where the thread block stands (`prefill_mosaic._Block`).
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import layouts, mosaic

STAGES = 2  # tiles of K, and of V, in shared memory
ROWS = 64  # that are widened at a time, of as many columns
_LAYOUT = plgpu.Layout.WGMMA


class Tiles(NamedTuple):
    """Tiles of K, or of V, in shared memory: `ready` for the tensor cores, and as `raw` as they lie in the pages."""

    ready: Any
    filled: Any
    freed: Any
    raw: Any = None
    scales: Any = None
    arrived: Any = None


def _await_free(block, tile, freed):
    pl.when(tile - block.low >= STAGES)(lambda: plgpu.barrier_wait(freed.at[block.slot(tile)]))


def copy_tiles(block, both):
    """The third warpgroup's work: a tile of K and one of V at a time, as soon as there is room."""

    @pl.loop(block.low, block.high)
    def _(tile):
        slot, ids = block.slot(tile), block.page_ids(tile)
        for source, tiles in zip(block.pages[:2], both, strict=True):
            _await_free(block, tile, tiles.freed)
            layouts.copy_tile(source, ids, block.head, tile, tiles.ready.at[slot], tiles.filled.at[slot])


def copy_and_widen(block, both):
    """The third warpgroup's work on a quantized cache: a raw tile arrives while the one before it is widened."""
    case = block.case
    exact = jnp.bfloat16 if case.kv_dtype == jnp.int8 else jnp.float16  # 16 bits that hold each value of the dtype

    def fetch(tile, ids, source, scales, tiles):
        layouts.copy_tile(source, ids, block.head, tile, tiles.raw, tiles.arrived)
        if layouts.copies_scales(case.S):
            layouts.copy_tile(scales, ids, block.head, tile, tiles.scales, tiles.arrived)
        else:
            plgpu.copy_gmem_to_smem(scales.at[block.row, block.head, tile], tiles.scales, tiles.arrived)

    def widen(tile, tiles, real):
        for first in range(0, case.keys, ROWS):
            rows = pl.ds(first, ROWS)
            factors = mosaic.load(tiles.scales.at[rows], _LAYOUT.reduce(1), optimized=False)
            for column in range(0, case.H, case.columns):
                columns = pl.ds(column, case.columns)
                raw = mosaic.load(tiles.raw.at[rows, columns], plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
                value = plgpu.layout_cast(raw.astype(exact), _LAYOUT).astype(jnp.float32)
                value = value * lax.broadcast_in_dim(factors, value.shape, [0])
                if real is not None:
                    value = jnp.where(layouts.between(value.shape, *(row - first for row in real)), value, 0.0)
                tiles.ready.at[block.slot(tile), rows, columns][...] = value.astype(case.dtype)
        plgpu.commit_smem()

    work = list(zip(block.pages[:2], block.pages[2:], both, strict=True))

    @pl.when(block.low < block.high)
    def _():
        ids = block.page_ids(block.low)
        for refs in work:
            fetch(block.low, ids, *refs)

    @pl.loop(block.low, block.high)
    def _(tile):
        ids = block.page_ids(tile + 1)
        for values, refs in enumerate(work):
            tiles = refs[-1]
            _await_free(block, tile, tiles.freed)
            plgpu.barrier_wait(tiles.arrived)
            # Scores of rows that nobody sees are masked, but 0 * NaN is NaN: their values must be zeros.
            widen(tile, tiles, block.real_rows(tile) if values else None)
            plgpu.barrier_arrive(tiles.filled.at[block.slot(tile)])
            pl.when(tile + 1 < block.high)(functools.partial(fetch, tile + 1, ids, *refs))
