"""Decode attention on Hopper: paged, split over KV, in Mosaic GPU.

One warpgroup a thread block, a few blocks a multiprocessor, each with its own ring of TMA loads in flight. Scores are
computed transposed: a tile of 64 cached positions is the row operand of wgmma and the queries of one KV head are its
columns, so that 1 to 16 heads cost 8 or 16 columns and not 64 padded rows. A position of a 128-wide bf16 head then
costs about 4 cycles of shared memory (512 bytes, each read once) against the 24 that its bytes take to arrive from
memory on an H200: wgmma pays at every group size, and CUDA-core products, which read the same bytes from shared memory
and add 2 * G fused multiply-adds an element, at none.

int8 and fp8 tiles are widened through registers into a 16-bit tile and released at once. Scales meet scores and softmax
weights, 8 numbers a position, and not keys and values, of which there are 16 times as many: by their instructions, of
which widening is the most, these kernels have little room.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from . import layouts, mosaic
from .decode_combine import combine_partials
from .decode_schedule import Place, first_place, make_schedule
from .dispatch import current_device
from .pages import AttentionOptions, Pages

_TILE = 64  # positions: the rows of one wgmma
_REDUCTION_BYTES = 1024  # of shared memory, for maxima and sums across warps
_LAYOUT = plgpu.Layout.WGMMA
_ROW, _COLUMN = _LAYOUT.reduce(1), _LAYOUT.reduce(0)


# Jitted, so that the layers of a model share one trace of the kernel.
@functools.partial(jax.jit, static_argnames=("options", "queries", "blocks", "interpret"))
def decode_attention_mosaic(
    q: Float[Array, "B K R H"],
    pages: Pages,
    block_tables: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    options: AttentionOptions,
    queries: int = 1,
    *,
    sinks: Float[Array, "K G"] | None = None,
    blocks: int | None = None,
    interpret: object = None,
) -> Float[Array, "B K R H"]:
    """Attention of the last `queries` tokens of each row over its pages.

    Args:
      q: R = queries * G of each KV head, all heads of the first token, then of the second ...
      pages, block_tables, lengths, options, sinks: as in `attention.decode_attention`, with tables.
      queries: new tokens a row.
      blocks: thread blocks; None fills the device.
      interpret: parameters of Mosaic's interpreter, None to compile.
    """
    B, K, R, H = q.shape
    quantized = pages.k_scales is not None
    columns, stages, blocks_per_sm = _tiling(H, R, quantized=quantized)
    if blocks is None:
        blocks = blocks_per_sm * (current_device().multiprocessors or layouts.MULTIPROCESSORS)
    splits = -(-R // columns)  # of the queries of a head, where they are more than one wgmma takes
    heads, S = K * splits, pages.k.shape[2]
    case = _Case(
        queries, R // queries, heads, splits, H, S, columns, stages, q.dtype, pages.k.dtype, quantized, options
    )
    q = jnp.pad(q, ((0, 0), (0, 0), (0, splits * columns - R), (0, 0))).reshape(B, heads, columns, H)
    pages = layouts.with_copyable_scales(pages, block_tables, _TILE)
    schedule = make_schedule(lengths, queries=queries, window=options.window, tile=_TILE, heads=heads, blocks=blocks)
    shapes = (blocks + B * heads, H, columns), (blocks + B * heads, 2, columns)
    sums, stats = mosaic.kernel(
        functools.partial(_body, case),
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types={"ring": case.ring()},
        reduction_scratch_bytes=_REDUCTION_BYTES,
        kernel_name="split_kernel",
        interpret=interpret,
    )(q, pages, block_tables, lengths, schedule.work, schedule.rows)

    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32) * layouts.LOG2E, (1, queries))
        sinks = jnp.pad(sinks, ((0, 0), (0, splits * columns - R))).reshape(heads, columns)
    rows = R if splits == 1 else columns
    out = combine_partials(sums, stats, schedule.pieces, sinks, rows=rows, dtype=q.dtype, interpret=interpret)
    return out.reshape(B, K, splits * rows, H)[:, :, :R]


def _tiling(head_dim: int, queries: int, *, quantized: bool) -> tuple[int, int, int]:
    """Columns and stages of a case, and thread blocks that share a multiprocessor.

    Several blocks, so that one loads while another computes, if each can have a deep enough ring. Quantized tiles are
    released before they are multiplied, and widening them is work to overlap: two stages and three blocks. Wide heads
    take one block with all the memory.
    """
    columns = min(-(-queries // 8) * 8, (32 if quantized else 48) if head_dim <= 128 else 24)
    stage = 2 * _TILE * (head_dim + 4 if quantized else 2 * head_dim) + columns * head_dim * 2
    wide_tile = 2 * _TILE * head_dim if quantized else 0
    fixed = columns * (head_dim + _TILE) * 2 + wide_tile + _REDUCTION_BYTES + layouts.PADDING_BYTES
    wanted_blocks, wanted_stages = (3, 2) if quantized else (2, 3)
    for blocks in range(wanted_blocks, 0, -1):
        stages = min(6, (layouts.SHARED_BYTES // blocks - layouts.RESERVED_BYTES - fixed) // stage)
        if stages >= wanted_stages:
            break
    return columns, stages, blocks


@dataclasses.dataclass(frozen=True)
class _Case:
    """What the kernel is compiled for: T new tokens, G queries of each a KV head, H head dims, S positions a page.

    The queries of a KV head are `splits` blocks of `columns`, which are a multiple of 8: one is a head of its own here.
    `stages` tiles of K and V are in flight, the one being read included.
    """

    T: int
    G: int
    heads: int
    splits: int
    H: int
    S: int
    columns: int
    stages: int
    dtype: Any
    kv_dtype: Any
    quantized: bool
    options: AttentionOptions

    def ring(self) -> "_Ring":
        narrow, for_wgmma = layouts.tiled(self.H, self.kv_dtype.itemsize), layouts.tiled(self.H, 2)
        tiles = plgpu.SMEM((self.stages, _TILE, self.H), self.kv_dtype, transforms=narrow)
        pages = max(1, _TILE // self.S)
        copies = pages + (pages if layouts.copies_scales(self.S) else 1) * self.quantized  # of K or V, a tile
        ready = plgpu.Barrier(num_arrivals=copies, num_barriers=self.stages)
        wide = plgpu.SMEM((_TILE, self.H), self.dtype, transforms=for_wgmma)
        scales = plgpu.SMEM((self.stages, _TILE), jnp.float32)
        return _Ring(
            plgpu.SMEM((self.stages + 1, self.columns, self.H), self.dtype, transforms=for_wgmma),
            tiles,
            tiles,
            plgpu.SMEM((self.columns, _TILE), self.dtype, transforms=for_wgmma),
            plgpu.Barrier(num_barriers=self.stages + 1),
            ready,
            ready,
            *((wide, scales, scales) if self.quantized else ()),
        )


class _Ring(NamedTuple):
    """Shared memory and barriers: queries, tiles of K and V and, if those are quantized, one in 16 bits, and scales."""

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


class _Carry(NamedTuple):
    """A unit's unnormalized values, highest score and sum of exponentials so far; the tile due and the one to fetch.

    That one's pages are looked up a step before, so that nothing waits for them.
    """

    sums: tuple[Any, ...]
    highest: Any
    total: Any
    here: Place
    length: Any
    ahead: Place
    page_ids: tuple[Any, ...]


class _Block:
    """A thread block: its share of the line of tiles, and where that comes from."""

    def __init__(self, case: _Case, q: Any, pages: Pages, tables: Any, work: Any, rows: Any, ring: _Ring):
        self.case, self.q, self.pages, self.tables, self.rows, self.ring = case, q, pages, tables, rows, ring
        self.index = lax.axis_index("block")
        self.count = work[self.index, 3]

    def slot(self, i: Any) -> Any:
        return lax.rem(i, jnp.int32(self.case.stages))

    def query_slot(self, place: Place) -> Any:
        return lax.rem(place.unit, jnp.int32(self.case.stages + 1))

    def page_ids(self, place: Place) -> tuple[Any, ...]:
        return layouts.page_ids(self.pages.k, self.tables, place.row, place.tile, _TILE)

    def fetch(self, i: Any, place: Place, page_ids: tuple[Any, ...]) -> None:
        """Starts the copies of the block's tile i, and of a unit's queries with its first."""
        pages, ring = self.pages, self.ring
        slot, kv_head = self.slot(i), lax.div(place.head, jnp.int32(self.case.splits))

        @pl.when(place.new_unit)
        def _():
            there = self.query_slot(place)
            plgpu.copy_gmem_to_smem(self.q.at[place.row, place.head], ring.q.at[there], ring.q_ready.at[there])

        paged = [(pages.k, ring.k, ring.k_ready), (pages.v, ring.v, ring.v_ready)]
        scales = [(pages.k_scales, ring.k_scales, ring.k_ready), (pages.v_scales, ring.v_scales, ring.v_ready)]
        if self.case.quantized and layouts.copies_scales(self.case.S):
            paged += scales
        elif self.case.quantized:
            for source, target, ready in scales:
                tile = jnp.minimum(place.tile, source.shape[2] - 1)
                plgpu.copy_gmem_to_smem(source.at[place.row, kv_head, tile], target.at[slot], ready.at[slot])
        for source, target, ready in paged:
            layouts.copy_tile(source, page_ids, kv_head, place.tile, target.at[slot], ready.at[slot])


def _body(case, q, pages, tables, lengths, work, rows, sums, stats, *, ring):
    block = _Block(case, q, pages, tables, work, rows, ring)
    here = ahead = first_place(work, rows, block.index)
    page_ids = block.page_ids(ahead)
    for i in range(case.stages):
        pl.when(i < block.count)(functools.partial(block.fetch, jnp.int32(i), ahead, page_ids))
        ahead = ahead.after(block.rows, case.heads)
        page_ids = block.page_ids(ahead)
    zeros = tuple(layouts.filled((64, case.columns), 0.0, _LAYOUT) for _ in layouts.row_blocks(case.H))
    highest = layouts.filled((case.columns,), layouts.NEVER, _COLUMN)
    total = layouts.filled((case.columns,), 0.0, _COLUMN)
    carry = _Carry(zeros, highest, total, here, lengths[here.row], ahead, page_ids)
    lax.fori_loop(0, block.count, functools.partial(_step, block, lengths, sums, stats), carry)


def _step(block, lengths, sums_out, stats_out, i, carry):
    """Attends over the block's tile i and, as soon as its slot is free, fetches another."""
    case, here, ahead = block.case, carry.here, carry.ahead
    slot, offsets = block.slot(i), layouts.row_blocks(case.H)

    def fetch():
        pl.when(i + case.stages < block.count)(lambda: block.fetch(i + case.stages, ahead, carry.page_ids))

    x, seen = _scores(block, slot, here, carry.length)
    highest = jnp.maximum(carry.highest, x.max(axis=0))
    kept = jnp.exp2(carry.highest - highest)
    p = jnp.where(seen, jnp.exp2(x - lax.broadcast_in_dim(highest, x.shape, [1])), 0.0)
    total = carry.total * kept + p.sum(axis=0)
    values = _weighed(block, slot, here, carry.length, p, seen)
    if case.quantized:  # the slot is free once it is widened
        fetch()

    weights = mosaic.transposed(block.ring.weights)

    def multiply(*accs):
        for acc, offset in zip(accs, offsets, strict=True):
            plgpu.wgmma(acc, mosaic.transposed(values.at[:, pl.ds(offset, 64)]), weights)

    updates = mosaic.products(multiply, [(64, case.columns)] * len(offsets))
    sums = [s * lax.broadcast_in_dim(kept, s.shape, [1]) + new for s, new in zip(carry.sums, updates, strict=True)]
    if not case.quantized:
        fetch()
    following = here.after(block.rows, case.heads)
    done = following.new_unit

    @pl.when(done | (i + 1 == block.count))
    def _():
        partial = block.index + here.row * case.heads + here.head
        mosaic.store(stats_out.at[partial, 0], highest)
        mosaic.store(stats_out.at[partial, 1], total)
        for s, offset in zip(sums, offsets, strict=True):
            mosaic.store(sums_out.at[partial, pl.ds(offset, 64)], s)

    ahead = ahead.after(block.rows, case.heads)
    sums = tuple(jnp.where(done, 0.0, s) for s in sums)
    highest, total = jnp.where(done, layouts.NEVER, highest), jnp.where(done, 0.0, total)
    length = lax.cond(done, lambda: lengths[following.row], lambda: carry.length)
    return _Carry(sums, highest, total, following, length, ahead, block.page_ids(ahead))


def _scores(block, slot, here, length):
    """Scores of a tile in bits, [positions, queries], and whether a query sees a position; if not, `layouts.NEVER`."""
    case, ring, base = block.case, block.ring, here.tile * _TILE
    place = block.query_slot(here)
    pl.when(here.new_unit)(lambda: plgpu.barrier_wait(ring.q_ready.at[place]))
    plgpu.barrier_wait(ring.k_ready.at[slot])
    keys = ring.k.at[slot]
    if case.quantized:
        scales = mosaic.load(ring.k_scales.at[slot], _ROW)
        layouts.widen(keys, ring.wide)
        plgpu.commit_smem()
        keys = ring.wide

    def multiply(acc):
        plgpu.wgmma(acc, keys, mosaic.transposed(ring.q.at[place]))

    (x,) = mosaic.products(multiply, [(_TILE, case.columns)])
    if case.quantized:
        x = x * lax.broadcast_in_dim(scales, x.shape, [0])
    x = layouts.scores_in_bits(x, case.options)
    position = base + layouts.iota(x.shape, 0, _LAYOUT)
    last_seen = length - 1
    if case.T > 1:
        column = layouts.iota(x.shape, 1, _LAYOUT) + lax.rem(here.head, jnp.int32(case.splits)) * case.columns
        last_seen = jnp.minimum(length - case.T + lax.div(column, jnp.int32(case.G)), length - 1)
    seen = position <= last_seen
    if case.options.window is not None:
        seen = seen & (position > last_seen - case.options.window)
    return jnp.where(seen, x, layouts.NEVER), seen


def _weighed(block, slot, here, length, p, seen):
    """A tile of values as wgmma reads it; its weights, which are probabilities times scales, go to the ring's."""
    case, ring, window = block.case, block.ring, block.case.options.window
    plgpu.barrier_wait(ring.v_ready.at[slot])
    values, base = ring.v.at[slot], here.tile * _TILE
    # The rows that some query sees. Others may be anybody's, even NaN.
    oldest = 0 if window is None else jnp.maximum(length - case.T + 1 - window, 0)
    rows = oldest - base, length - base
    if case.quantized:
        scales = mosaic.load(ring.v_scales.at[slot], _ROW)
        if case.dtype == jnp.float16:  # weights times scales may leave its range, which values do not
            layouts.widen(values, ring.wide, scales, rows)
        else:
            layouts.widen(values, ring.wide)
            p = jnp.where(seen, p * lax.broadcast_in_dim(scales, p.shape, [0]), 0.0)
        values = ring.wide
    if case.kv_dtype != jnp.int8:  # which has no NaN
        pl.when((rows[0] > 0) | (rows[1] < _TILE))(lambda: layouts.clear_rows(values, rows))
    mosaic.store_transposed(ring.weights, p.astype(case.dtype), layouts.tiled(case.H, 2))
    plgpu.commit_smem()
    return values
