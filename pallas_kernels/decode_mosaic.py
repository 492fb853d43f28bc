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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from . import mosaic
from .decode_combine import combine_partials
from .decode_schedule import make_schedule
from .dispatch import current_device
from .pages import AttentionOptions, Pages

_TILE = 64  # positions: the rows of one wgmma
_PADDING_BYTES = 2048  # of shared memory, that barriers take and that buffers lose to alignment
_REDUCTION_BYTES = 1024  # of shared memory, for maxima and sums across warps
_MULTIPROCESSORS = 132  # of an H100 or H200 SXM, where JAX does not say
_LAYOUT = plgpu.Layout.WGMMA
_ROW, _COLUMN = _LAYOUT.reduce(1), _LAYOUT.reduce(0)


@dataclasses.dataclass(frozen=True)
class DecodeTiling:
    """How one decode kernel uses a multiprocessor.

    Attributes:
      columns: queries a wgmma, a multiple of 8.
      stages: tiles of K and V in flight, the one being read included.
      blocks_per_sm: thread blocks that share a multiprocessor.
    """

    columns: int
    stages: int
    blocks_per_sm: int


def decode_tiling(head_dim: int, queries: int, *, quantized: bool) -> DecodeTiling:
    """Several blocks a multiprocessor, so that one loads while another computes, if each can have a deep enough ring.

    Quantized tiles are released before they are multiplied, and widening them is work to overlap: two stages and three
    blocks. Wide heads take one block with all the memory.
    """
    columns = min(-(-queries // 8) * 8, (32 if quantized else 48) if head_dim <= 128 else 24)
    stage = 2 * _TILE * (head_dim + 4 if quantized else 2 * head_dim) + columns * head_dim * 2
    wide_tile = 2 * _TILE * head_dim if quantized else 0
    fixed = columns * (head_dim + _TILE) * 2 + wide_tile + _REDUCTION_BYTES + _PADDING_BYTES
    wanted_blocks, wanted_stages = (3, 2) if quantized else (2, 3)
    for blocks in range(wanted_blocks, 0, -1):
        stages = min(6, (mosaic.SHARED_BYTES // blocks - mosaic.RESERVED_BYTES - fixed) // stage)
        if stages >= wanted_stages:
            break
    return DecodeTiling(columns, stages, blocks)


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
    scale, window, soft_cap = options.scale, options.window, options.soft_cap
    k_pages, v_pages, k_scales, v_scales = pages
    B, K, R, H = q.shape
    P, _, S, _ = k_pages.shape
    quantized = k_scales is not None
    tiling = decode_tiling(H, R, quantized=quantized)
    columns, stages = tiling.columns, tiling.stages
    if blocks is None:
        blocks = tiling.blocks_per_sm * (current_device().multiprocessors or _MULTIPROCESSORS)
    splits = -(-R // columns)  # of the queries of a head, where they are more than one wgmma takes
    heads = K * splits
    q = jnp.pad(q, ((0, 0), (0, 0), (0, splits * columns - R), (0, 0))).reshape(B, heads, columns, H)
    scales = (k_scales, v_scales) if quantized else ()
    # Copies of under 128 bytes are refused, so that the scales of smaller pages are gathered into tiles beforehand.
    scales_paged = S * 4 >= 128
    if not scales_paged:
        scales = tuple(mosaic.scales_in_order(x, block_tables, _TILE) for x in scales)
    schedule = make_schedule(lengths, queries=queries, window=window, tile=_TILE, heads=heads, blocks=blocks)

    dtype, kv_dtype = q.dtype, k_pages.dtype
    group = R // queries
    pages = max(1, _TILE // S)  # a tile is this many pages, or a part of one
    copied = min(_TILE, S)
    slots = blocks + B * heads
    offsets = mosaic.row_blocks(H)
    wide = mosaic.tiled(H, 2)  # of every matrix that wgmma reads

    def split_kernel(q_ref, k_ref, v_ref, *refs):
        scales_ref, refs = (refs[:2], refs[2:]) if quantized else ((), refs)
        tables_ref, lengths_ref, work_ref, rows_ref, sums_ref, stats_ref, q_s, k_s, v_s, p_s, *refs = refs
        q_ready, k_ready, v_ready, *staging = refs
        block = lax.axis_index("block")
        count = work_ref[block, 3]

        def advance(cursor):
            """The next tile along the line, and whether it is another unit's."""
            row, head, at, first, tiles = cursor
            next_unit = at + 1 == tiles
            at = jnp.where(next_unit, 0, at + 1)
            head = jnp.where(next_unit, head + 1, head)
            next_row = head == heads
            head = jnp.where(next_row, 0, head)
            row = jnp.where(next_row, jnp.minimum(row + 1, B - 1), row)
            first, tiles = lax.cond(next_row, lambda: (rows_ref[row, 0], rows_ref[row, 1]), lambda: (first, tiles))
            return (row, head, at, first, tiles), next_unit

        def pages_of(cursor):
            row, _, at, first, _ = cursor
            entry = (first + at) * pages if S <= _TILE else lax.div(first + at, jnp.int32(S // _TILE))
            entries = [jnp.minimum(entry + n, tables_ref.shape[1] - 1) for n in range(pages)]
            # Entries past the row's length may hold anything: what they lead to is masked, but it must exist.
            return tuple(jnp.clip(tables_ref[row, n], 0, P - 1) for n in entries)

        def fetch(number, cursor, unit, new_unit, page_ids):
            row, head, at, first, _ = cursor
            slot = lax.rem(number, jnp.int32(stages))
            kv_head = lax.div(head, jnp.int32(splits))

            @pl.when(new_unit)
            def _():
                place = lax.rem(unit, jnp.int32(stages + 1))
                plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_s.at[place], q_ready.at[place])

            start = lax.rem(first + at, jnp.int32(S // _TILE)) * _TILE if S > _TILE else 0
            paged = [(k_ref, k_s, k_ready), (v_ref, v_s, v_ready)]
            if quantized:
                scale_rings = list(zip(scales_ref, staging[1:], (k_ready, v_ready), strict=True))
                if scales_paged:
                    paged += scale_rings
                else:
                    for tiles_ref, ring, ready in scale_rings:
                        tile = jnp.minimum(first + at, tiles_ref.shape[2] - 1)
                        plgpu.copy_gmem_to_smem(tiles_ref.at[row, kv_head, tile], ring.at[slot], ready.at[slot])
            for pages_ref, ring, ready in paged:
                for n, page in enumerate(page_ids):
                    source, place = pl.ds(start, copied), pl.ds(n * copied, copied)
                    plgpu.copy_gmem_to_smem(pages_ref.at[page, kv_head, source], ring.at[slot, place], ready.at[slot])

        def start_of(cursor):
            *_, at, first, _ = cursor
            return (first + at) * _TILE

        def scores_of(keys, place, base, length, head, key_scales):
            def multiply(acc):
                plgpu.wgmma(acc, keys, mosaic.transposed(q_s.at[place]))

            (x,) = mosaic.products(multiply, [(_TILE, columns)])
            if key_scales is not None:
                x = x * lax.broadcast_in_dim(key_scales, x.shape, [0])
            x = mosaic.scores_in_bits(x, scale, soft_cap)
            position = base + mosaic.iota(x.shape, 0, _LAYOUT)
            if queries == 1:
                last_seen = length - 1
            else:
                column = mosaic.iota(x.shape, 1, _LAYOUT) + lax.rem(head, jnp.int32(splits)) * columns
                last_seen = jnp.minimum(length - queries + lax.div(column, jnp.int32(group)), length - 1)
            seen = position <= last_seen
            if window is not None:
                seen = seen & (position > last_seen - window)
            return jnp.where(seen, x, mosaic.NEVER), seen

        def real_rows(base, length):
            """The first row of a tile and the end of those that some query sees. Others may be anybody's, even NaN."""
            oldest = 0 if window is None else jnp.maximum(length - queries + 1 - window, 0)
            return oldest - base, length - base

        def step(i, carry):
            sums, highest, total, cursor, unit, new_unit, length, ahead, ahead_unit, ahead_new, page_ids = carry
            row, head, *_ = cursor
            base = start_of(cursor)
            slot = lax.rem(i, jnp.int32(stages))
            place = lax.rem(unit, jnp.int32(stages + 1))
            keys, values, key_scales = k_s.at[slot], v_s.at[slot], None

            pl.when(new_unit)(lambda: plgpu.barrier_wait(q_ready.at[place]))
            plgpu.barrier_wait(k_ready.at[slot])
            if quantized:
                wide_s, k_scales_s, v_scales_s = staging
                key_scales = mosaic.load(k_scales_s.at[slot], _ROW)
                mosaic.widen(keys, wide_s)
                plgpu.commit_smem()
                keys = wide_s
            x, seen = scores_of(keys, place, base, length, head, key_scales)
            new_highest = jnp.maximum(highest, x.max(axis=0))
            kept = jnp.exp2(highest - new_highest)
            p = jnp.where(seen, jnp.exp2(x - lax.broadcast_in_dim(new_highest, x.shape, [1])), 0.0)
            total = total * kept + p.sum(axis=0)

            plgpu.barrier_wait(v_ready.at[slot])
            rows, weights = real_rows(base, length), p
            if quantized:
                value_scales = mosaic.load(v_scales_s.at[slot], _ROW)
                if dtype == jnp.float16:  # weights times scales may leave its range, which values do not
                    mosaic.widen(values, wide_s, value_scales, rows)
                else:
                    mosaic.widen(values, wide_s)
                    weights = jnp.where(seen, p * lax.broadcast_in_dim(value_scales, p.shape, [0]), 0.0)
                values = wide_s
            if kv_dtype != jnp.int8:  # which has no NaN
                pl.when((rows[0] > 0) | (rows[1] < _TILE))(lambda: mosaic.clear_rows(values, rows))
            mosaic.store_transposed(p_s, weights.astype(dtype), wide)
            plgpu.commit_smem()

            def fetch_next():
                pl.when(i + stages < count)(lambda: fetch(i + stages, ahead, ahead_unit, ahead_new, page_ids))

            if quantized:  # the ring's slot is free once it is widened
                fetch_next()

            def multiply(*accs):
                for acc, offset in zip(accs, offsets, strict=True):
                    block_of_v = values.at[:, pl.ds(offset, 64)]
                    plgpu.wgmma(acc, mosaic.transposed(block_of_v), mosaic.transposed(p_s))

            updates = mosaic.products(multiply, [(64, columns)] * len(offsets))
            sums = tuple(
                s * lax.broadcast_in_dim(kept, s.shape, [1]) + update for s, update in zip(sums, updates, strict=True)
            )
            if not quantized:
                fetch_next()

            next_cursor, done = advance(cursor)

            @pl.when(done | (i + 1 == count))
            def _():
                partial = block + row * heads + head
                mosaic.store(stats_ref.at[partial, 0], new_highest)
                mosaic.store(stats_ref.at[partial, 1], total)
                for s, offset in zip(sums, offsets, strict=True):
                    mosaic.store(sums_ref.at[partial, pl.ds(offset, 64)], s)

            # The page numbers of the next fetch are loaded a tile ahead, so that nothing waits for them.
            ahead, ahead_new = advance(ahead)
            return (
                tuple(jnp.where(done, 0.0, s) for s in sums),
                jnp.where(done, mosaic.NEVER, new_highest),
                jnp.where(done, 0.0, total),
                next_cursor,
                unit + done.astype(jnp.int32),
                done,
                lax.cond(done, lambda: lengths_ref[next_cursor[0]], lambda: length),
                ahead,
                ahead_unit + ahead_new.astype(jnp.int32),
                ahead_new,
                pages_of(ahead),
            )

        row, head, at = (work_ref[block, n] for n in range(3))
        cursor = ahead = (row, head, at, rows_ref[row, 0], rows_ref[row, 1])
        ahead_unit, ahead_new, page_ids = jnp.int32(0), jnp.bool_(True), pages_of(ahead)
        for i in range(stages):
            begin = functools.partial(fetch, jnp.int32(i), ahead, ahead_unit, ahead_new, page_ids)
            pl.when(i < count)(begin)
            ahead, ahead_new = advance(ahead)
            ahead_unit, page_ids = ahead_unit + ahead_new.astype(jnp.int32), pages_of(ahead)
        zeros = tuple(mosaic.filled((64, columns), 0.0, _LAYOUT) for _ in offsets)
        nothing = (zeros, mosaic.filled((columns,), mosaic.NEVER, _COLUMN), mosaic.filled((columns,), 0.0, _COLUMN))
        first = (cursor, jnp.int32(0), jnp.bool_(True), lengths_ref[row])
        lax.fori_loop(0, count, step, (*nothing, *first, ahead, ahead_unit, ahead_new, page_ids))

    narrow = mosaic.tiled(H, kv_dtype.itemsize)  # as loaded
    copies = pages + (pages if scales_paged else 1) * quantized  # of K or V, a tile
    scratch = [
        plgpu.SMEM((stages + 1, columns, H), dtype, transforms=wide),
        plgpu.SMEM((stages, _TILE, H), kv_dtype, transforms=narrow),
        plgpu.SMEM((stages, _TILE, H), kv_dtype, transforms=narrow),
        plgpu.SMEM((columns, _TILE), dtype, transforms=wide),
        plgpu.Barrier(num_barriers=stages + 1),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    ]
    if quantized:
        scratch += [plgpu.SMEM((_TILE, H), dtype, transforms=wide)]
        scratch += [plgpu.SMEM((stages, _TILE), jnp.float32)] * 2
    sums, stats = mosaic.kernel(
        split_kernel,
        out_type=(
            jax.ShapeDtypeStruct((slots, H, columns), jnp.float32),
            jax.ShapeDtypeStruct((slots, 2, columns), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=scratch,
        reduction_scratch_bytes=_REDUCTION_BYTES,
        interpret=interpret,
    )(q, k_pages, v_pages, *scales, block_tables, lengths, schedule.work, schedule.rows)

    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32) * mosaic.LOG2E, (1, queries))
        sinks = jnp.pad(sinks, ((0, 0), (0, splits * columns - R))).reshape(heads, columns)
    rows = R if splits == 1 else columns
    out = combine_partials(sums, stats, schedule.pieces, sinks, rows=rows, dtype=dtype, interpret=interpret)
    return out.reshape(B, K, splits * rows, H)[:, :, :R]
