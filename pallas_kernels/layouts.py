"""Tiles in registers and shared memory: their layouts, and what the kernels do with scores and values in them."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from . import mosaic
from .pages import AttentionOptions, Pages

NEVER = -1e30  # a finite "minus infinity": a row that sees nothing yields zeros, not NaN
SHARED_BYTES = 228 * 1024  # of shared memory a multiprocessor of Hopper has
RESERVED_BYTES = 1024  # of it that each thread block takes for itself
PADDING_BYTES = 2048  # of a block's, that barriers take and that buffers lose to alignment
MULTIPROCESSORS = 132  # of an H100 or H200 SXM, where JAX does not say
LOG2E = math.log2(math.e)


def scores_in_bits(products: Any, options: AttentionOptions) -> Any:
    """Scaled, capped scores times log2(e), so that exponentials are powers of two.

    tanh is written out: the hardware's own is exact to 11 bits, which a cap of 50 turns into an error of 2 %.
    """
    scale, soft_cap = options.scale, options.soft_cap
    if soft_cap is None:
        return products * (scale * LOG2E)
    grown = jnp.exp2(products * (2 * LOG2E * scale / soft_cap))
    return (soft_cap * LOG2E) - (2 * soft_cap * LOG2E) / (grown + 1.0)


def between(shape: Sequence[int], first: Any, end: Any) -> Any:
    """Whether an element lies in rows first to end - 1."""
    row = iota(shape, 0, plgpu.Layout.WGMMA)
    return (row >= first) & (row < end)


def clear_rows(tile: Any, real: tuple[Any, Any]) -> None:
    """Zeros for the rows of a tile outside `real`, first and end: a weight of zero does not silence a NaN.

    The tile, of 16 bits, has a multiple of 64 rows. It is done in blocks, for which registers suffice.
    """
    for first in range(0, tile.shape[0], 64):
        for column, width in _column_blocks(tile.shape[1]):
            part = tile.at[pl.ds(first, 64), pl.ds(column, width)]
            value = mosaic.load(part, plgpu.Layout.WGMMA)
            kept = between(value.shape, *(row - first for row in real))
            mosaic.store(part, jnp.where(kept, value, jnp.zeros_like(value)))


def widen(narrow: Any, wide: Any, row_weights: Any = None, rows: tuple[Any, Any] = (0, 64)) -> None:
    """Writes a tile of int8 or fp8 to one of 16 bits, in blocks of columns, for which registers suffice.

    Args:
      narrow, wide: [64, columns] references of shared memory.
      row_weights: [64] float32; each row is multiplied by its own.
      rows: the first row and the end of those that are real, with `row_weights`; the others become zeros.
    """
    for start, width in _column_blocks(narrow.shape[1]):
        part = mosaic.load(narrow.at[:, pl.ds(start, width)], plgpu.Layout.WGMMA, optimized=False)
        if row_weights is not None:
            weighted = part.astype(jnp.float32) * lax.broadcast_in_dim(row_weights, part.shape, [0])
            part = jnp.where(between(part.shape, *rows), weighted, 0.0)
        elif part.dtype != jnp.int8 and wide.dtype == jnp.bfloat16:
            part = part.astype(jnp.float32)  # Hopper converts fp8 to float16 and float32 only
        mosaic.store(wide.at[:, pl.ds(start, width)], part.astype(wide.dtype))


def iota(shape: Sequence[int], dimension: int, layout: Any) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, tuple(shape), dimension, layout=layout)


def filled(shape: Sequence[int], value: float, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(tuple(shape), value, jnp.float32), layout)


def _column_blocks(columns: int) -> list[tuple[int, int]]:
    """Start and width of blocks of 64 columns, or of one where 64 does not divide."""
    width = columns if columns % 64 else 64
    return [(start, width) for start in range(0, columns, width)]


def swizzle_bytes(columns: int, itemsize: int) -> int:
    """Bytes of the widest swizzle that divides a row of `columns` elements, and of at most 64 of them."""
    return next(width for width in (64 * itemsize, 32 * itemsize, 16 * itemsize) if columns * itemsize % width == 0)


def tiled(columns: int, itemsize: int) -> tuple[Any, ...]:
    """The shared-memory transforms of a matrix with `columns`, for wgmma where elements have 16 bits."""
    swizzle = swizzle_bytes(columns, itemsize)
    if swizzle == 16:  # no swizzle at all
        return ()
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def copies_scales(page_size: int) -> bool:
    """Whether scales are copied from their pages: TMA writes to multiples of 128 bytes, which are 32 scales."""
    return page_size >= 32


def with_copyable_scales(pages: Pages, block_tables: Int[Array, "B N"], tile: int) -> Pages:
    """The scales of pages too small to be copied from become [B, K, tiles, tile], those of a row in order."""
    K, S = pages.k.shape[1:3]
    if pages.k_scales is None or copies_scales(S):
        return pages
    B, N = block_tables.shape
    tables = jnp.pad(block_tables, ((0, 0), (0, -N % (tile // S))))
    k, v = (x[tables].transpose(0, 2, 1, 3).reshape(B, K, -1, tile) for x in (pages.k_scales, pages.v_scales))
    return pages._replace(k_scales=k, v_scales=v)


def page_ids(pages: Any, tables: Any, row: Any, tile: Any, positions: int) -> tuple[Any, ...]:
    """The pages of a row's tile of so many positions, or the page that it is a part of.

    Entries past the row's length may hold anything: what they lead to is masked, but it must exist.
    """
    P, _, S, _ = pages.shape
    count = max(1, positions // S)
    entry = tile * count if S <= positions else lax.div(tile, jnp.int32(S // positions))
    entries = [jnp.minimum(entry + n, tables.shape[1] - 1) for n in range(count)]
    return tuple(jnp.clip(tables[row, n], 0, P - 1) for n in entries)


def copy_tile(pages: Any, ids: Sequence[Any], head: Any, tile: Any, target: Any, barrier: Any) -> None:
    """Starts the copies of a tile out of its pages, of values or of scales: each is an arrival at the barrier."""
    S, positions = pages.shape[2], target.shape[0]
    copied = min(S, positions)
    start = lax.rem(tile, jnp.int32(S // positions)) * positions if S > positions else 0
    for n, page in enumerate(ids):
        there = target.at[pl.ds(n * copied, copied)]
        plgpu.copy_gmem_to_smem(pages.at[page, head, pl.ds(start, copied)], there, barrier)


def row_blocks(rows: int) -> list[int]:
    """Where blocks of 64 rows, which is what wgmma multiplies, start; the last overlaps where 64 does not divide."""
    return [min(start, rows - 64) for start in range(0, rows, 64)]
