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
from .decode_copy import TILE, Block, Place, Ring
from .decode_schedule import make_schedule
from .dispatch import current_device
from .pages import AttentionOptions, Pages

_PADDING_BYTES = 2048  # of shared memory, that barriers take and that buffers lose to alignment
_REDUCTION_BYTES = 1024  # of shared memory, for maxima and sums across warps
_MULTIPROCESSORS = 132  # of an H100 or H200 SXM, where JAX does not say
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
    P, _, S, _ = pages.k.shape
    columns, stages, blocks_per_sm = _tiling(H, R, quantized=pages.k_scales is not None)
    if blocks is None:
        blocks = blocks_per_sm * (current_device().multiprocessors or _MULTIPROCESSORS)
    splits = -(-R // columns)
    case = _Case(B, K, R, H, P, S, queries, columns, splits, stages, q.dtype, pages.k.dtype, options)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, splits * columns - R), (0, 0))).reshape(B, case.heads, columns, H)
    if case.quantized and not case.paged_scales:
        k_scales, v_scales = (layouts.scales_in_order(x, block_tables, TILE) for x in (pages.k_scales, pages.v_scales))
        pages = pages._replace(k_scales=k_scales, v_scales=v_scales)
    schedule = make_schedule(
        lengths, queries=queries, window=options.window, tile=TILE, heads=case.heads, blocks=blocks
    )
    slots = blocks + B * case.heads
    sums, stats = mosaic.kernel(
        functools.partial(_body, case),
        out_type=(
            jax.ShapeDtypeStruct((slots, H, columns), jnp.float32),
            jax.ShapeDtypeStruct((slots, 2, columns), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types={"ring": case.ring()},
        reduction_scratch_bytes=_REDUCTION_BYTES,
        kernel_name="split_kernel",
        interpret=interpret,
    )(q, pages, block_tables, lengths, schedule.work, schedule.rows)

    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32) * layouts.LOG2E, (1, queries))
        sinks = jnp.pad(sinks, ((0, 0), (0, splits * columns - R))).reshape(case.heads, columns)
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
    stage = 2 * TILE * (head_dim + 4 if quantized else 2 * head_dim) + columns * head_dim * 2
    wide_tile = 2 * TILE * head_dim if quantized else 0
    fixed = columns * (head_dim + TILE) * 2 + wide_tile + _REDUCTION_BYTES + _PADDING_BYTES
    wanted_blocks, wanted_stages = (3, 2) if quantized else (2, 3)
    for blocks in range(wanted_blocks, 0, -1):
        stages = min(6, (layouts.SHARED_BYTES // blocks - layouts.RESERVED_BYTES - fixed) // stage)
        if stages >= wanted_stages:
            break
    return columns, stages, blocks


@dataclasses.dataclass(frozen=True)
class _Case:
    """What the kernel is compiled for.

    Attributes:
      B, K, R, H, P, S: rows, KV heads, queries of each, head dims, pages, positions a page.
      queries: new tokens a row.
      columns: queries a wgmma, a multiple of 8.
      splits: blocks of so many that the queries of a KV head take: each is a head of its own here.
      stages: tiles of K and V in flight, the one being read included.
      dtype, kv_dtype: of queries and of pages.
      options: what the layer asks of attention.
    """

    B: int
    K: int
    R: int
    H: int
    P: int
    S: int
    queries: int
    columns: int
    splits: int
    stages: int
    dtype: Any
    kv_dtype: Any
    options: AttentionOptions

    @property
    def heads(self) -> int:
        return self.K * self.splits

    @property
    def quantized(self) -> bool:
        return self.kv_dtype != self.dtype

    @property
    def paged_scales(self) -> bool:
        """Whether scales are copied from their pages: copies of under 128 bytes are refused."""
        return self.S * 4 >= 128

    @property
    def pages(self) -> int:
        """Pages a tile, or one where a tile is a part of it."""
        return max(1, TILE // self.S)

    @property
    def offsets(self) -> list[int]:
        """Where the blocks of head dims start that are multiplied at once."""
        return layouts.row_blocks(self.H)

    @property
    def wide(self) -> tuple[Any, ...]:
        """Transforms of every matrix that wgmma reads."""
        return layouts.tiled(self.H, 2)

    def ring(self) -> Ring:
        """Shared memory and barriers of a thread block."""
        tiles = plgpu.SMEM(
            (self.stages, TILE, self.H), self.kv_dtype, transforms=layouts.tiled(self.H, self.kv_dtype.itemsize)
        )
        copies = self.pages + (self.pages if self.paged_scales else 1) * self.quantized  # of K or V, a tile
        ready = plgpu.Barrier(num_arrivals=copies, num_barriers=self.stages)
        ring = Ring(
            plgpu.SMEM((self.stages + 1, self.columns, self.H), self.dtype, transforms=self.wide),
            tiles,
            tiles,
            plgpu.SMEM((self.columns, TILE), self.dtype, transforms=self.wide),
            plgpu.Barrier(num_barriers=self.stages + 1),
            ready,
            ready,
        )
        if not self.quantized:
            return ring
        scales = plgpu.SMEM((self.stages, TILE), jnp.float32)
        wide = plgpu.SMEM((TILE, self.H), self.dtype, transforms=self.wide)
        return ring._replace(wide=wide, k_scales=scales, v_scales=scales)


class _Softmax(NamedTuple):
    """Of a unit so far: unnormalized values by blocks of head dims, the highest score in bits, sum of exponentials."""

    sums: tuple[Any, ...]
    highest: Any
    total: Any


class _Carry(NamedTuple):
    """What a step hands to the next: the tile that is due and its row's length, the one to fetch and its pages."""

    softmax: _Softmax
    here: Place
    length: Any
    ahead: Place
    page_ids: tuple[Any, ...]


def _body(case, q, pages, tables, lengths, work, rows, sums, stats, *, ring):
    block = Block(case, q, pages, tables, work, rows, ring)
    here = ahead = block.first()
    page_ids = block.page_ids(ahead)
    for i in range(case.stages):
        pl.when(i < block.count)(functools.partial(block.fetch, jnp.int32(i), ahead, page_ids))
        ahead = block.after(ahead)
        page_ids = block.page_ids(ahead)
    zeros = tuple(layouts.filled((64, case.columns), 0.0, _LAYOUT) for _ in case.offsets)
    softmax = _Softmax(
        zeros,
        layouts.filled((case.columns,), layouts.NEVER, _COLUMN),
        layouts.filled((case.columns,), 0.0, _COLUMN),
    )
    carry = _Carry(softmax, here, lengths[here.row], ahead, page_ids)
    lax.fori_loop(0, block.count, functools.partial(_step, block, lengths, sums, stats), carry)


def _step(block, lengths, sums_out, stats_out, i, carry):
    """Attends over the block's tile i, and fetches the one that takes its slot."""
    case = block.case
    (sums, highest, total), here, length, ahead, page_ids = carry
    slot = block.slot(i)

    def fetch():
        pl.when(i + case.stages < block.count)(lambda: block.fetch(i + case.stages, ahead, page_ids))

    x, seen = _scores(block, slot, here, length)
    new_highest = jnp.maximum(highest, x.max(axis=0))
    kept = jnp.exp2(highest - new_highest)
    p = jnp.where(seen, jnp.exp2(x - lax.broadcast_in_dim(new_highest, x.shape, [1])), 0.0)
    total = total * kept + p.sum(axis=0)
    values = _weigh(block, slot, p, seen, _real_rows(case, here, length))
    if case.quantized:  # the ring's slot is free once it is widened
        fetch()
    updates = _weighted_sums(block, values)
    sums = tuple(s * lax.broadcast_in_dim(kept, s.shape, [1]) + new for s, new in zip(sums, updates, strict=True))
    if not case.quantized:
        fetch()

    following = block.after(here)
    done = following.new_unit

    @pl.when(done | (i + 1 == block.count))
    def _():
        partial = block.index + here.row * case.heads + here.head
        mosaic.store(stats_out.at[partial, 0], new_highest)
        mosaic.store(stats_out.at[partial, 1], total)
        for s, offset in zip(sums, case.offsets, strict=True):
            mosaic.store(sums_out.at[partial, pl.ds(offset, 64)], s)

    # The page numbers of the next fetch are loaded a tile ahead, so that nothing waits for them.
    ahead = block.after(ahead)
    softmax = _Softmax(
        tuple(jnp.where(done, 0.0, s) for s in sums),
        jnp.where(done, layouts.NEVER, new_highest),
        jnp.where(done, 0.0, total),
    )
    length = lax.cond(done, lambda: lengths[following.row], lambda: length)
    return _Carry(softmax, following, length, ahead, block.page_ids(ahead))


def _scores(block, slot, here, length):
    """Scores of a tile in bits, [positions, queries], and which count: the others are `layouts.NEVER`."""
    case, ring = block.case, block.ring
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

    (x,) = mosaic.products(multiply, [(TILE, case.columns)])
    if case.quantized:
        x = x * lax.broadcast_in_dim(scales, x.shape, [0])
    x = layouts.scores_in_bits(x, case.options)
    seen = _seen(case, x.shape, here, length)
    return jnp.where(seen, x, layouts.NEVER), seen


def _seen(case, shape, here, length):
    """Whether a query sees a position."""
    position = here.tile * TILE + layouts.iota(shape, 0, _LAYOUT)
    if case.queries == 1:
        last_seen = length - 1
    else:
        column = layouts.iota(shape, 1, _LAYOUT) + lax.rem(here.head, jnp.int32(case.splits)) * case.columns
        token = lax.div(column, jnp.int32(case.R // case.queries))
        last_seen = jnp.minimum(length - case.queries + token, length - 1)
    seen = position <= last_seen
    if case.options.window is not None:
        seen = seen & (position > last_seen - case.options.window)
    return seen


def _real_rows(case, here, length):
    """The first row of a tile and the end of those that some query sees. Others may be anybody's, even NaN."""
    window, base = case.options.window, here.tile * TILE
    oldest = 0 if window is None else jnp.maximum(length - case.queries + 1 - window, 0)
    return oldest - base, length - base


def _weigh(block, slot, p, seen, rows):
    """Stores the weights of a tile's values, which are softmax's and the scales'; returns the values as wgmma reads."""
    case, ring = block.case, block.ring
    plgpu.barrier_wait(ring.v_ready.at[slot])
    values = ring.v.at[slot]
    if case.quantized:
        scales = mosaic.load(ring.v_scales.at[slot], _ROW)
        if case.dtype == jnp.float16:  # weights times scales may leave its range, which values do not
            layouts.widen(values, ring.wide, scales, rows)
        else:
            layouts.widen(values, ring.wide)
            p = jnp.where(seen, p * lax.broadcast_in_dim(scales, p.shape, [0]), 0.0)
        values = ring.wide
    if case.kv_dtype != jnp.int8:  # which has no NaN
        pl.when((rows[0] > 0) | (rows[1] < TILE))(lambda: layouts.clear_rows(values, rows))
    mosaic.store_transposed(ring.weights, p.astype(case.dtype), case.wide)
    plgpu.commit_smem()
    return values


def _weighted_sums(block, values):
    """Values times weights, [head dims, queries] for each block of head dims."""
    case, weights = block.case, block.ring.weights

    def multiply(*accs):
        for acc, offset in zip(accs, case.offsets, strict=True):
            plgpu.wgmma(acc, mosaic.transposed(values.at[:, pl.ds(offset, 64)]), mosaic.transposed(weights))

    return mosaic.products(multiply, [(64, case.columns)] * len(case.offsets))
