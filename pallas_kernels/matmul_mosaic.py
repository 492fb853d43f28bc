"""Products of a few rows with a weight, at the speed at which the weight arrives from memory: Mosaic GPU, for Hopper.

Rows of the weight are the rows of wgmma, and activations its columns, so that 1 to 64 of them cost 8 to 64 columns. A
thread block a multiprocessor takes an equal share of the weight (`matmul_schedule`). Up to four warpgroups of it
multiply, 64 rows each, and share the activations that come with each step; the first also keeps a ring of loads in
flight, since a warpgroup for that alone would take a fifth of the registers.

Weights of fewer bits are widened in registers (`matmul_widen`) and multiplied from there: by count, shared memory would
take 36 cycles to write and read a widened 64 x 16 tile of 4 bits, of which one arrives every 25. Products of integers
are exact; scales multiply the float32 sums of their group, or of the whole output.

The same kernel serves many products at once, each of some rows with its own weight (`grouped_mosaic`): a `Table` then
says which parts of which a block takes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Num, Shaped, UInt8

from . import layouts, mosaic
from .matmul_schedule import TILES_TOGETHER, WARPGROUP_ROWS, Schedule, Table, make_schedule
from .matmul_widen import BASE_LAYOUT, RAW_LAYOUT, arranged, widen

_LAYOUT = plgpu.Layout.WGMMA
_INPUTS_AT_ONCE = 128  # that are multiplied from registers: 32 of a thread
_COLUMNS_AT_ONCE = 32  # that they are multiplied with: 16 more


# Jitted, so that the layers of a model share one trace of the kernel.
@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def matmul_mosaic(
    x: Float[Array, "M K"],
    values: Num[Array, "N C"],
    scales: Shaped[Array, "blocks groups"] | None,
    zeros: UInt8[Array, "N groups"] | None,
    *,
    blocks: int | None = None,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """x @ w.T, in float32.

    Args:
      x: 1 to 64 rows, bfloat16 or float16.
      values, scales, zeros: the weight, as in `matmul.matmul`.
      blocks: thread blocks; None fills the device.
      interpret: parameters of Mosaic's interpreter, None to compile.

    Raises:
      NotImplementedError: the kernel does not take such a weight.
    """
    M, N = x.shape[0], values.shape[0]
    s = make_schedule(x, values, scales, zeros, blocks=blocks)
    x = jnp.pad(x, ((0, s.columns - M), (0, 0)))
    out = jax.ShapeDtypeStruct((s.pieces, s.columns, N), jnp.float32)
    partial = stream(s, x, values, scales, zeros, None, out, name="matmul", interpret=interpret)
    pieces = np.repeat([last - first + 1 for first, last in map(s.span, range(s.bands))], s.rows)
    written = np.arange(s.pieces)[:, None, None] < pieces
    return jnp.where(written, partial[:, :M], 0.0).sum(axis=0)


def stream(
    s: Schedule,
    x: Float[Array, "M K"],
    values: Num[Array, "*E N C"],
    scales: Shaped[Array, "*E blocks groups"] | None,
    zeros: UInt8[Array, "*E N groups"] | None,
    table: Table | None,
    out: jax.ShapeDtypeStruct,
    *,
    name: str,
    interpret: Any,
) -> Float[Array, "pieces M N"]:
    """The kernel's partial sums, of which those that no block has written may be anything.

    Args:
      s: the schedule; of a product of one tile of rows, where there is a table.
      x: at least as many rows as the schedule has columns.
      values, scales, zeros: the weight, or one a group.
      table: which tiles of rows meet which weights, and who does it; None for one of each.
      out: shape and dtype of the result.
      name: the kernel's.
      interpret: as in `matmul_mosaic`.
    """
    x = arranged(x, s.bits)
    scales, zeros = (None if part is None else part.reshape(-1, part.shape[-1]) for part in (scales, zeros))
    factors, row_scales = scales, None
    if s.group is None and scales is not None:
        factors, row_scales = None, jnp.repeat(scales[:, 0].astype(jnp.float32), s.scale_rows)
    elif s.kind == jnp.float4_e2m1fn:
        factors = lax.bitcast_convert_type(scales, jnp.uint8)
    return mosaic.kernel(
        functools.partial(_body, s, interpret is not None),
        out_type=out,
        grid=(s.blocks,),
        grid_names=("block",),
        num_threads=s.warpgroups,
        thread_name="warpgroup",
        scratch_types={"ring": _scratch(s, x, values, factors, zeros, interpreted=interpret is not None)},
        reduction_scratch_bytes=0,
        kernel_name=name,
        interpret=interpret,
    )(values.reshape(-1, WARPGROUP_ROWS, values.shape[-1]), x, factors, zeros, row_scales, table)


class _Ring(NamedTuple):
    """Steps in shared memory, and barriers: a step has arrived, all have multiplied it, all are done."""

    weight: Any
    x: Any
    scales: Any
    zeros: Any
    filled: Any
    freed: Any
    done: Any
    wide: Any


def _scratch(s: Schedule, x: Array, values: Array, factors: Any, zeros: Any, *, interpreted: bool) -> _Ring:
    def transforms(columns, itemsize):
        swizzle = min(128, columns * itemsize)
        return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)

    stored = s.width * s.bits // 8 // values.dtype.itemsize
    narrow, wide = transforms(stored, values.dtype.itemsize), transforms(s.part, 2)
    copies = 2
    rings = []
    for entries, count in ((factors, s.scales_a_step), (zeros, s.zeros_a_step)):
        copies += count > 0
        rings.append(plgpu.SMEM((s.stages, s.rows, count), entries.dtype) if count else None)
    widened = (s.warpgroups, _at_once(s)[1], WARPGROUP_ROWS, s.part)
    return _Ring(
        plgpu.SMEM((s.stages, s.warpgroups, WARPGROUP_ROWS, stored), values.dtype, transforms=narrow),
        plgpu.SMEM((s.stages, s.columns, s.width), x.dtype, transforms=wide),
        *rings,
        plgpu.Barrier(num_arrivals=copies, num_barriers=s.stages),
        plgpu.Barrier(num_arrivals=s.warpgroups, num_barriers=s.stages),
        plgpu.Barrier(num_arrivals=s.warpgroups),
        mosaic.operand_scratch(widened, x.dtype, wide, interpreted=interpreted and s.bits < 16),
    )


def _body(s, interpreted, weight, x, factors, zeros, row_scales, table, out, *, ring):
    share = _Share(s, table)
    fetch = functools.partial(_fetch, s, share, (weight, x, factors, zeros), ring)
    _multiply(s, interpreted, share, (factors, zeros, row_scales), ring, out, fetch)


class _Share:
    """What a thread block takes: `count` steps of the line from `start` on, where `s.steps` are a unit.

    A unit is a band of a weight and a tile of rows that it multiplies. Blocks that take whole units have a line each.
    """

    def __init__(self, s: Schedule, table: Table | None):
        self.s, self.table, self.block, self.share = s, table, lax.axis_index("block"), s.share
        self.tiles = 1 if table is None else table.ends[table.ends.shape[0] - 1]
        total = self.tiles * s.bands
        if s.share == 0:
            self.start = 0
            self.count = jnp.maximum(_div(total - self.block + s.blocks - 1, s.blocks), 0) * s.steps
            return
        if table is not None:
            self.share = jnp.maximum(_div(total * s.steps + s.blocks - 1, s.blocks), s.share)
        self.count = jnp.maximum(jnp.minimum(total * s.steps - self.block * self.share, self.share), 0)
        self.start = jnp.where(self.count > 0, self.block * self.share, 0)

    def at(self, i: Any) -> tuple["_Unit", Any]:
        """Unit and step of it, for the block's step i."""
        return self.unit(_div(self.start + i, self.s.steps)), lax.rem(self.start + i, jnp.int32(self.s.steps))

    def unit(self, n: Any) -> "_Unit":
        """The n-th unit of the line."""
        if self.table is None:
            return _Unit(n, self.block - _div(n * self.s.steps, self.s.share))
        if self.s.share == 0:
            piece, n = 0, self.block + n * self.s.blocks
        else:
            piece = self.block - lax.div(n * self.s.steps, self.share)
        before = _div(n, TILES_TOGETHER * self.s.bands) * TILES_TOGETHER  # tiles
        together = jnp.minimum(self.tiles - before, TILES_TOGETHER)
        rest = n - before * self.s.bands
        tile = before + lax.rem(rest, together)
        band = self.table.group[tile] * self.s.bands + lax.div(rest, together)
        return _Unit(band, piece, self.table.start[tile], (self.table.low[tile], self.table.high[tile]))


class _Unit(NamedTuple):
    """A band among those of all weights, the number of the block among those that take steps of the unit, the first row
    of activations, and which rows from there on are the unit's, if not all."""

    band: Any
    piece: Any
    start: Any = 0
    rows: tuple[Any, Any] | None = None


def _div(a: Any, b: int) -> Any:
    return lax.div(a, jnp.int32(b))


def _at_once(s):
    """Columns that are multiplied at once, and parts of a step with them."""
    few = s.bits < 16 and s.columns <= 2 * _COLUMNS_AT_ONCE
    columns = min(s.columns, _COLUMNS_AT_ONCE) if few else s.columns
    return columns, max(1, min(_INPUTS_AT_ONCE // s.part, _COLUMNS_AT_ONCE // columns))


def _fetch(s, share, sources, ring, i):
    """Starts the copies of the block's step i."""
    weight, x, factors, zeros = sources
    stored = ring.weight.shape[-1]
    slot = lax.rem(i, jnp.int32(s.stages))
    unit, step = share.at(i)
    filled = ring.filled.at[slot]
    tiles = weight.at[pl.ds(unit.band * s.warpgroups, s.warpgroups), :, pl.ds(step * stored, stored)]
    plgpu.copy_gmem_to_smem(tiles, ring.weight.at[slot], filled)
    plgpu.copy_gmem_to_smem(x.at[pl.ds(unit.start, s.columns), pl.ds(step * s.width, s.width)], ring.x.at[slot], filled)
    rows = pl.ds(unit.band * s.rows, s.rows)
    for source, entries, each in ((factors, ring.scales, s.scales_a_step), (zeros, ring.zeros, s.zeros_a_step)):
        if each:  # a copy may reach beyond the step's own, to be long enough
            first = lax.div(step * s.parts, jnp.int32(each)) * each
            plgpu.copy_gmem_to_smem(source.at[rows, pl.ds(first, each)], entries.at[slot], filled)


def _multiply(s, interpreted, share, entries, ring, out, fetch):
    """What every warpgroup does, the first of which also keeps the ring filled."""
    warpgroup, count = lax.axis_index("warpgroup"), share.count
    factors, zeros, row_scales = entries
    ahead = s.stages - 1  # steps that are fetched before they are multiplied
    mine = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    at_once, parts_at_once = _at_once(s)
    blocks = [pl.ds(first, min(at_once, s.columns - first)) for first in range(0, s.columns, at_once)]

    def row_entries(entries, slot, step, part, each):
        """Each row's scale or zero point, for one group of a step."""
        place = lax.rem(step * s.parts, jnp.int32(each)) + part
        return mosaic.load(entries.at[slot, mine, place], BASE_LAYOUT, optimized=False)

    def entries_ahead(i):
        """Scales and zero points of a step that are not copied: loaded a step ahead, so that nothing waits for them."""
        unit, step = share.at(jnp.maximum(jnp.minimum(i, count - 1), 0))
        row = unit.band * s.rows + warpgroup * WARPGROUP_ROWS

        def of(entries, copied, rows):
            if entries is None or copied:
                return ()
            places = [step * s.parts + part for part in range(s.parts)]
            if rows > 1:  # all of the warpgroup's share one
                return tuple(entries[_div(row, rows), place] for place in places)
            mine = [entries.at[pl.ds(row, WARPGROUP_ROWS), place] for place in places]
            return tuple(mosaic.load(each, BASE_LAYOUT, optimized=False) for each in mine)

        return of(factors, s.scales_a_step, s.scale_rows), of(zeros, s.zeros_a_step, 1)

    def operand(weight, slot, step, part, points):
        """The weight of a group, as the row operand of wgmma."""
        if s.bits == 16:
            return weight
        stored = weight.shape[1] // s.parts
        columns, point = slice(part * stored, (part + 1) * stored), None
        if zeros is not None:
            point = row_entries(ring.zeros, slot, step, part, s.zeros_a_step) if s.zeros_a_step else points[part]
            point = point.astype(jnp.int32)
        wide = widen(weight, s.kind, columns, point, ring.x.dtype, interpreted=interpreted)
        return mosaic.operand(wide, ring.wide, warpgroup, part % parts_at_once)

    def multiplied(operands, slot, parts, columns):
        """A function that adds the parts' products to an accumulator each."""

        def multiply(*sums):
            for acc, weight, part in zip(sums, operands, parts, strict=True):
                plgpu.wgmma(acc, weight, mosaic.transposed(ring.x.at[slot, columns, pl.ds(part * s.part, s.part)]))

        return multiply

    def scaled(product, slot, step, part, scales):
        scale = row_entries(ring.scales, slot, step, part, s.scales_a_step) if s.scales_a_step else scales[part]
        if s.scale_rows > 1:
            return product * scale
        if s.kind == jnp.float4_e2m1fn:  # the exponents of powers of two
            scale = lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
        return product * lax.broadcast_in_dim(scale.astype(jnp.float32), product.shape, [0])

    def body(i, carry):
        sums, (scales, points) = carry
        slot = lax.rem(i, jnp.int32(s.stages))
        step = lax.rem(share.start + i, jnp.int32(s.steps))
        following = entries_ahead(i + 1)

        @pl.when((warpgroup == 0) & (i + ahead < count))
        def _():  # into the slot of the step before, which the others have left by now
            pl.when(i > 0)(lambda: plgpu.barrier_wait(ring.freed.at[lax.rem(i + ahead, jnp.int32(s.stages))]))
            if s.bits < 16:
                plgpu.commit_smem()  # what was read by ordinary loads is copied over
            fetch(i + ahead)

        plgpu.barrier_wait(ring.filled.at[slot])
        weight, sums = ring.weight.at[slot, warpgroup], list(sums)
        if s.bits < 16:
            weight = mosaic.load(weight, RAW_LAYOUT, optimized=False)
        for first in range(0, s.parts, parts_at_once):
            parts = range(first, min(first + parts_at_once, s.parts))
            operands = [operand(weight, slot, step, part, points) for part in parts]
            for n, columns in enumerate(blocks):
                multiply = multiplied(operands, slot, parts, columns)
                if factors is None:
                    sums[n] = mosaic.accumulated(multiply, sums[n], interpreted=interpreted)
                    continue
                products = mosaic.products(multiply, [(WARPGROUP_ROWS, columns.size)] * len(parts))
                for part, product in zip(parts, products, strict=True):
                    sums[n] = sums[n] + scaled(product, slot, step, part, scales)
        plgpu.barrier_arrive(ring.freed.at[slot])
        return tuple(sums), following

    def unit_body(n, entries):
        cleared = tuple(layouts.filled((WARPGROUP_ROWS, columns.size), 0.0, _LAYOUT) for columns in blocks)
        first = n * s.steps - share.start
        steps = jnp.maximum(first, 0), jnp.minimum(first + s.steps, count)
        sums, entries = lax.fori_loop(*steps, body, (cleared, entries))
        unit = share.unit(n)
        if row_scales is not None:
            scales = row_scales.at[pl.ds(unit.band * s.rows + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
            scales = mosaic.load(scales, BASE_LAYOUT, optimized=False)
            sums = [total * lax.broadcast_in_dim(scales, total.shape, [0]) for total in sums]
        outputs = pl.ds(lax.rem(unit.band, jnp.int32(s.bands)) * s.rows + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        for total, columns in zip(sums, blocks, strict=True):
            rows = pl.ds(unit.start + columns.start, columns.size)
            here = None if unit.rows is None else tuple(row - columns.start for row in unit.rows)
            target = out.at[unit.piece, rows, outputs]
            mosaic.scatter_transposed(target, total.astype(out.dtype), here, interpreted=interpreted)
        return entries

    @pl.when(warpgroup == 0)
    def _():
        pl.loop(0, jnp.minimum(ahead, count))(fetch)

    first, end = (_div(share.start + n, s.steps) for n in (0, count + s.steps - 1))
    lax.fori_loop(first, end, unit_body, entries_ahead(0))
    mosaic.finish_together(ring.done)
