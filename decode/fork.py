"""New rows that continue old ones over shared pages: `n` samples of a prompt, beams, trees of any kind."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ..model import arguments
from ..model.promotion import own_promotion
from ..sharding.rules import constrain, mesh_of
from .cache import KVCache, Rows
from .consume import telling_what_was_consumed


@own_promotion
@jax.transfer_guard("allow")
@arguments.arguments(cache=arguments.instance(KVCache, hint="as init_cache makes one"))
@telling_what_was_consumed("fork")
def fork(cache: KVCache, rows: Sequence[int] | Int[np.ndarray, "R"] | Int[Array, "R"]) -> KVCache:
    """A cache whose row r continues what row `rows[r]` holds. The cache that is given is consumed.

    Rows that continue the same one share its full pages; the page in use is copied, and what comes after lies in pages
    of each row's own. A row that nobody continues gives its pages up: `fork(cache, [2])` cuts all rows but one. Under
    a trace only the number of rows need be known, and row numbers are the caller's to check.

    Layers that keep a window's pages alone have those copied whole, since they are written over. With more rows than
    the cache has, its pool grows by their pages, which copies it; make the cache with as many rows as there will be,
    where that matters.

    Args:
      cache: B rows, as `init_cache`, `prefill` or `decode_step` returned it, with room (max_lengths) of their own.
      rows: [R], which row each new one continues, any number of times.

    Raises:
      ValueError: no rows, one that the cache does not have, or a mesh that splits rows over "data", where a row's pages
        stay with their devices.
    """
    mesh = mesh_of(cache.lengths)
    if mesh is not None and mesh.shape["data"] > 1:
        raise ValueError(
            f"fork: the mesh splits rows over {mesh.shape['data']} 'data' devices, and pages stay where they are; use "
            "a mesh with data=1"
        )
    if not isinstance(rows, jax.core.Tracer):
        rows = np.asarray(rows)
        if rows.ndim != 1 or not rows.size or rows.dtype.kind not in "iu":
            raise ValueError(f"fork: rows is {rows.dtype} {rows.shape}; give the number of a row for each new one")
        if rows.min() < 0 or rows.max() >= cache.batch_size:
            wrong = next(row for row in rows.tolist() if not 0 <= row < cache.batch_size)
            raise ValueError(f"fork: there is no row {wrong}; the cache has rows 0 to {cache.batch_size - 1}")
    B, R, pages = cache.batch_size, len(rows), cache.pages
    tables = cache.block_tables if isinstance(cache.block_tables, tuple) else (cache.block_tables,)
    kinds = cache.rows.kinds if len(tables) > 1 else (0,) * len(pages)
    pools = [jax.tree.leaves(pages[kinds.index(kind)])[0].shape[0] for kind in range(len(tables))]
    widths = [table.shape[1] for table in tables]
    if cache.rows.most_new is not None:  # layers with a window use a row's pages in turn
        widths = [pool // B for pool in pools]
    if R > B:
        pages = _grown(pages, tuple(math.ceil(pools[kind] / B) * R - pools[kind] for kind in kinds))
    pages, tables, of_rows = _fork(pages, tables, cache.rows, jnp.asarray(rows), kinds, tuple(widths))
    return cache.replace(pages=pages, block_tables=tables if len(tables) > 1 else tables[0], **of_rows)


@functools.partial(jax.jit, static_argnames="more")
def _grown(pages: tuple[Any, ...], more: tuple[int, ...]) -> tuple[Any, ...]:
    """Each layer's pages, and so many more behind them."""

    def grown(leaf: Array, count: int) -> Array:
        return jnp.pad(leaf, [(0, count), *[(0, 0)] * (leaf.ndim - 1)])

    return tuple(jax.tree.map(functools.partial(grown, count=n), layer) for layer, n in zip(pages, more, strict=True))


@functools.partial(jax.jit, static_argnames=("kinds", "widths"), donate_argnames="pages")
def _fork(
    pages: tuple[Any, ...],
    tables: tuple[Int[Array, "B _"], ...],
    old: Rows,
    rows: Int[Array, "R"],
    kinds: tuple[int, ...],
    widths: tuple[int, ...],
) -> tuple[tuple[Any, ...], tuple[Int[Array, "R _"], ...], dict[str, Int[Array, "R"]]]:
    first = jnp.argmax(rows[:, None] == rows, axis=1) == jnp.arange(
        len(rows)
    )  # these go on in their parents' own pages
    of_rows = {name: constrain(getattr(old, name)[rows], "batch") for name in ("lengths", "max_lengths", "contexts")}
    moves = []
    for kind, (table, width) in enumerate(zip(tables, widths, strict=True)):
        numbers = jax.tree.leaves(pages[kinds.index(kind)])[0]
        full = of_rows["lengths"] // numbers.shape[2]
        moves.append(_moves(table[rows], full, first, width, numbers.shape[0]))

    def moved(kind: int, leaf: Array) -> Array:
        _, source, target = moves[kind]
        return leaf.at[target].set(leaf[source], mode="drop")

    pages = tuple(jax.tree.map(functools.partial(moved, kind), layer) for kind, layer in zip(kinds, pages, strict=True))
    return pages, tuple(table for table, _, _ in moves), of_rows


def _moves(
    table: Int[Array, "R N"], full: Int[Array, "R"], first: Bool[Array, "R"], width: int, pool: int
) -> tuple[Int[Array, "R N"], Int[Array, "_"], Int[Array, "_"]]:
    """The new rows' table, and which pages are to be copied to which; those out of bounds to none.

    Args:
      table: of the rows that each new row continues.
      full: pages of each that are full.
      first: rows that keep all pages of the row that they continue.
      width: different pages of a row; where they are fewer than N they are used in turn, and all written to again.
      pool: how many pages there are.
    """
    R, N = table.shape
    turns = width < N
    entry = jnp.arange(N)
    shared = first[:, None] | (jnp.zeros((R, N), bool) if turns else entry < full[:, None])
    held = jnp.zeros(pool, bool).at[jnp.where(shared, table, pool)].set(True, mode="drop")
    own = ~shared & (entry < width)
    free = jnp.argsort(held, stable=True)[(jnp.cumsum(own.ravel()) - 1).reshape(R, N)]
    new = jnp.where(shared, table, free[:, entry % width])
    in_use = jnp.broadcast_to(jnp.arange(width), (R, width)) if turns else jnp.minimum(full, N - 1)[:, None]
    source, target, own = (jnp.take_along_axis(x, in_use, axis=1) for x in (table, new, own))
    return new, source.ravel(), jnp.where(own, target, pool).ravel()
