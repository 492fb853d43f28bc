"""Paged flash attention of new tokens over a cache that already holds them: a Mosaic GPU kernel for Hopper.

A thread block serves 128 query rows of one KV head. A row is a query head at a token, so that all heads of a group
share each read of K and V. Two warpgroups attend, 64 rows each; a third brings K and V into shared memory some tiles
ahead of them, page by page, and widens them there if they are quantized. The two take turns at the tensor cores, one
multiplying while the other is in its softmax, as in FlashAttention-3 (Shah et al. 2024). The softmax is online
(Milakov and Gimelshein 2018), in float32 and base 2.

Shapes: B rows, T new tokens, K KV heads, G queries per KV head, H head dim, P pages, S positions a page, N pages a
row; R = T * G query rows of a KV head, padded to whole blocks, of which row r is head r % G at token r // G.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from . import layouts, mosaic
from .pages import AttentionOptions, Pages
from .prefill_copy import STAGES, Tiles, copy_and_widen, copy_tiles

_ATTENDING = 2  # warpgroups
_ROWS = 64  # query rows a warpgroup: the height of one wgmma, and all that fits in registers at 256 dims
_BLOCK = _ATTENDING * _ROWS
_LAYOUT = plgpu.Layout.WGMMA


# Jitted, so that the layers of a model share one trace of the kernel.
@functools.partial(jax.jit, static_argnames=("options", "interpret"))
def prefill_attention_mosaic(
    q: Float[Array, "B T K G H"],
    pages: Pages,
    block_tables: Int[Array, "B N"],
    starts: Int[Array, "B"],
    lengths: Int[Array, "B"],
    options: AttentionOptions,
    *,
    sinks: Float[Array, "K G"] | None = None,
    interpret: Any = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of T new tokens over cached pages that already hold those tokens' keys and values.

    Row b's query t stands at position starts[b] + t and sees the positions up to its own, below lengths[b], of which
    the last `window` where that is given. A query that stands at or past the length yields zeros. Neither table entries
    past a row's length nor what pages hold past it reach the result, whatever they are.

    Args:
      q, pages, block_tables, starts, lengths, options, sinks: as in `attention.prefill_attention`, with tables.
      interpret: parameters of Mosaic's interpreter, None to compile.
    """
    B, T, K, G, H = q.shape
    S, R = pages.k.shape[2], -(-T * G // _BLOCK) * _BLOCK
    quantized, interpreted = pages.k_scales is not None, interpret is not None
    case = _Case(T, G, H, S, R, q.dtype, pages.k.dtype, quantized, options, interpreted)
    rows = jnp.pad(q.transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H), ((0, 0), (0, 0), (0, R - T * G), (0, 0)))
    if sinks is not None:
        sinks = jnp.pad(jnp.tile(sinks.astype(jnp.float32), (1, T)), ((0, 0), (0, R - T * G)))
    pages = layouts.with_copyable_scales(pages, block_tables, case.keys)
    out = mosaic.kernel(
        functools.partial(_body, case),
        out_type=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        grid=(B, K, R // _BLOCK),  # the last varies fastest: blocks that run together share K and V in L2
        grid_names=("row", "kv_head", "block"),
        num_threads=_ATTENDING + 1,
        thread_name="warpgroup",
        scratch_types=case.scratch(),
        reduction_scratch_bytes=0,  # a row of wgmma's layout is reduced within a warp
        kernel_name="prefill_attention",
        interpret=interpret,
    )(rows, pages, block_tables, starts, lengths, sinks)
    return out[:, :, : T * G].reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4)


@dataclasses.dataclass(frozen=True)
class _Case:
    """What the kernel is compiled for: the module's sizes, dtypes, and what the layer asks of attention."""

    T: int
    G: int
    H: int
    S: int
    R: int
    dtype: Any
    kv_dtype: Any
    quantized: bool
    options: AttentionOptions
    interpreted: bool

    @property
    def keys(self) -> int:
        """Positions a tile.

        A thread holds H / 2 accumulators, half as many scores as a tile has keys, and a quarter as many registers of
        probabilities: 128 keys fit up to 128 dims, in registers and in 227 KB of shared memory, 64 beyond.
        """
        return 128 if self.H <= 128 else 64

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that attends and of one that copies: 504 in all for the three warpgroups.

        Widening is done on 64 x 64 values a time, 32 float32 a thread, beside the numbers of the next tile's pages.
        """
        if not self.quantized:
            return 232, 40
        return (192, 120) if self.H <= 128 else (224, 56)

    @property
    def columns(self) -> int:
        """Head dims a tile of the shared-memory layout, in 16 bits and in 8."""
        return layouts.swizzle_bytes(self.H, 2) // 2

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers of a block, by the names that `_body` takes."""
        transforms = layouts.tiled(self.H, 2)
        copies = max(1, self.keys // self.S)
        tiles = Tiles(
            plgpu.SMEM((STAGES, self.keys, self.H), self.dtype, transforms=transforms),
            plgpu.Barrier(num_arrivals=1 if self.quantized else copies, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=_ATTENDING, num_barriers=STAGES),
        )
        if self.quantized:
            tiles = tiles._replace(
                raw=plgpu.SMEM((self.keys, self.H), self.kv_dtype, transforms=layouts.tiled(self.H, 1)),
                scales=plgpu.SMEM((self.keys,), jnp.float32),
                arrived=plgpu.Barrier(num_arrivals=copies + (copies if layouts.copies_scales(self.S) else 1)),
            )
        probs = (_ATTENDING, _ROWS, self.keys)
        return {
            "q_s": plgpu.SMEM((_ATTENDING, _ROWS, self.H), self.dtype, transforms=transforms),
            "q_filled": plgpu.Barrier(num_barriers=_ATTENDING),
            "k_s": tiles,
            "v_s": tiles,
            "turn": plgpu.Barrier(num_arrivals=_ATTENDING),
            "done": plgpu.Barrier(num_arrivals=_ATTENDING + 1),
            "probs_s": mosaic.operand_scratch(probs, self.dtype, transforms, interpreted=self.interpreted),
        }


class _Block:
    """Where a thread block stands: its KV head, query rows and positions, and the tiles of keys that those see."""

    def __init__(self, case: _Case, pages: Pages, tables: Any, starts: Any, lengths: Any):
        self.case, self.window, self.pages, self.tables = case, case.options.window, pages, tables
        self.row, self.head = lax.axis_index("row"), lax.axis_index("kv_head")
        self.first_row = (case.R // _BLOCK - 1 - lax.axis_index("block")) * _BLOCK  # those that see most start first
        self.start = starts[self.row]
        self.length = jnp.minimum(lengths[self.row], tables.shape[1] * case.S)
        self.first_query = self.start + _div(self.first_row, case.G)
        self.last_query = self.start + jnp.minimum(_div(self.first_row + _BLOCK - 1, case.G), case.T - 1)
        self.low = jnp.int32(0)
        if self.window is not None:
            self.low = _div(jnp.maximum(self.first_query - self.window + 1, 0), case.keys)
        high = _div(jnp.minimum(self.last_query + 1, self.length) + case.keys - 1, case.keys)
        self.high = jnp.where(self.first_query < self.length, high, self.low)

    def slot(self, tile: Any) -> Any:
        return lax.rem(tile - self.low, jnp.int32(STAGES))

    def page_ids(self, tile: Any) -> tuple[Any, ...]:
        return layouts.page_ids(self.pages.k, self.tables, self.row, tile, self.case.keys)

    def sees_all(self, tile: Any) -> Any:
        """Whether every query of the block sees every key of the tile."""
        end = (tile + 1) * self.case.keys
        seen = (end - 1 <= self.first_query) & (end <= self.length)
        return seen if self.window is None else seen & (tile * self.case.keys > self.last_query - self.window)

    def real_rows(self, tile: Any) -> tuple[Any, Any]:
        """The first row of the tile and the end of those that some query sees. Others may be anybody's, even NaN."""
        oldest = 0 if self.window is None else self.first_query + 1 - self.window
        return oldest - tile * self.case.keys, self.length - tile * self.case.keys

    def masked(self, tile: Any, first: Any, scores: Any) -> Any:
        """Scores of the 64 query rows from `first`, those that are not seen never to count.

        The length hides no key from a query below it; looking at it keeps NaN out of the other queries' rows, and the
        compiler from holding products of `key`'s parts in registers throughout the loop, which spills.
        """
        key = layouts.iota(scores.shape, 1, _LAYOUT) + tile * self.case.keys
        row = layouts.iota(scores.shape, 0, _LAYOUT) + first
        ahead = (key - self.start) * self.case.G  # key <= start + row // G, without the division
        seen = (ahead <= row) & (key < self.length)
        if self.window is not None:
            seen &= ahead + self.window * self.case.G > row
        return jnp.where(seen, scores, layouts.NEVER)


def _body(case, q, pages, tables, starts, lengths, sinks, out, *, q_s, q_filled, k_s, v_s, turn, done, probs_s):
    block = _Block(case, pages, tables, starts, lengths)
    warpgroup = lax.axis_index("warpgroup")
    attending, copying = case.registers

    @pl.when(warpgroup == _ATTENDING)
    def _():
        plgpu.set_max_registers(copying, action="decrease")
        if case.quantized:
            copy_and_widen(block, (k_s, v_s))
        else:
            copy_tiles(block, (k_s, v_s))

    @pl.when(warpgroup < _ATTENDING)
    def _():
        plgpu.set_max_registers(attending, action="increase")
        first = block.first_row + warpgroup * _ROWS
        mine = q_s.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[block.row, block.head, pl.ds(first, _ROWS)], mine, q_filled.at[warpgroup])
        plgpu.barrier_wait(q_filled.at[warpgroup])
        result, highest, total = _attend(block, warpgroup, first, mine, k_s, v_s, turn, probs_s)
        if sinks is not None:
            sink = mosaic.load(sinks.at[block.head, pl.ds(first, _ROWS)], _LAYOUT.reduce(1), optimized=False)
            total = total + jnp.exp2(sink * layouts.LOG2E - highest)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        result = result * lax.broadcast_in_dim(1 / total, result.shape, [0])
        row = layouts.iota(result.shape, 0, _LAYOUT) + first
        result = jnp.where(row < (block.length - block.start) * case.G, result, 0.0)
        mine[...] = result.astype(case.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out.at[block.row, block.head, pl.ds(first, _ROWS)])
        plgpu.wait_smem_to_gmem(0)

    mosaic.finish_together(done)


def _attend(block, warpgroup, first, q, k_s, v_s, turn, probs_s):
    """The loop over keys for 64 query rows: unnormalized result, highest score in bits, sum of the exponentials."""
    case = block.case
    # Multiplied in the exponential, where it costs nothing; capped scores are in bits already.
    capped = case.options.soft_cap is not None
    to_bits = 1.0 if capped else case.options.scale * layouts.LOG2E

    def next_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def await_keys(tile):
        pl.when(tile < block.high)(lambda: plgpu.barrier_wait(k_s.filled.at[block.slot(tile)]))

    def times_keys(slot):
        def multiply(acc):
            plgpu.wgmma(acc, q, mosaic.transposed(k_s.ready.at[slot]))
            next_turn()

        (scores,) = mosaic.products(multiply, [(_ROWS, case.keys)])
        return scores

    def plus_values(result, probs, slot, tile):
        probs = mosaic.operand(probs, probs_s, warpgroup)

        def multiply(acc):
            plgpu.wgmma(acc, probs, v_s.ready.at[slot])
            await_keys(tile + 1)

        return mosaic.accumulated(multiply, result, interpreted=case.interpreted)

    def step(tile, carry):
        result, highest, total = carry
        slot = block.slot(tile)
        scores = times_keys(slot)
        plgpu.barrier_arrive(k_s.freed.at[slot])
        if capped:
            scores = layouts.scores_in_bits(scores, case.options)
        scores = lax.cond(block.sees_all(tile), lambda x: x, functools.partial(block.masked, tile, first), scores)
        new_highest = jnp.maximum(highest, scores.max(axis=1) * to_bits)
        kept = jnp.exp2(highest - new_highest)
        probs = jnp.exp2(scores * to_bits - lax.broadcast_in_dim(new_highest, scores.shape, [0]))
        result = result * lax.broadcast_in_dim(kept, result.shape, [0])
        total = total * kept + probs.sum(axis=1)
        # Else the compiler moves parts of the softmax past the barrier, into the other warpgroup's turn.
        carried = lax.optimization_barrier((result, new_highest, total, probs.astype(case.dtype)))
        result, new_highest, total, probs = carried
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_s.filled.at[slot])
        plgpu.barrier_wait(turn)
        if not case.quantized:
            real = block.real_rows(tile)

            @pl.when((real[0] > 0) | (real[1] < case.keys))
            def _():  # both warpgroups do so, each before it reads the tile: what they write is the same
                layouts.clear_rows(v_s.ready.at[slot], real)
                plgpu.commit_smem()

        result = plus_values(result, probs, slot, tile)
        plgpu.barrier_arrive(v_s.freed.at[slot])
        return result, new_highest, total

    # A tile that hides all its keys from a row leaves NEVER above this, so that its exponentials are zeros, not ones.
    lowest = layouts.NEVER * to_bits / 2
    carry = (
        layouts.filled((_ROWS, case.H), 0.0, _LAYOUT),
        layouts.filled((_ROWS,), lowest, _LAYOUT.reduce(1)),
        layouts.filled((_ROWS,), 0.0, _LAYOUT.reduce(1)),
    )
    await_keys(block.low)
    pl.when(warpgroup == 1)(next_turn)
    carry = lax.fori_loop(block.low, block.high, step, carry)
    pl.when(warpgroup == 0)(next_turn)
    return carry


def _div(a: Any, b: int) -> Any:
    return lax.div(a, jnp.int32(b))
