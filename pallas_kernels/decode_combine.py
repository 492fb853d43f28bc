"""The second pass of split-KV decode: the partial results of each (row, head) unit become its attention output."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from . import layouts, mosaic

_LAYOUT = plgpu.Layout.WGMMA
_FLOATS_IN_FLIGHT = 8192  # 64 registers a thread: partials loaded at once, to hide the latency of each


def combine_partials(
    sums: Float[Array, "slots H R"],
    stats: Float[Array, "slots 2 R"],
    pieces: Int[Array, "U 2"],
    sinks: Float[Array, "heads R"] | None,
    *,
    rows: int,
    dtype: jax.typing.DTypeLike,
    interpret: object = None,
) -> Float[Array, "U rows H"]:
    """Softmax-weighted values, from sums over stretches of positions that each had a maximum of its own.

    Args:
      sums: unnormalized values of R queries, transposed, float32; unit u's are slots pieces[u] + u.
      stats: each partial's maximum score, in bits (base-2 logarithm), and its sum of exponentials.
      pieces: `Schedule.pieces`.
      sinks: a further logit of each query's head, in bits, that has no value (unit u's head is u % heads).
      rows: how many of the R queries are real.
      dtype: of the result.
      interpret: parameters of Mosaic's interpreter, None to compile.
    """
    H, R = sums.shape[1:]
    column = _LAYOUT.reduce(0)
    offsets = layouts.row_blocks(H)
    unroll = max(1, min(8, _FLOATS_IN_FLIGHT // (H * R)))

    def wide(vector, like):
        return lax.broadcast_in_dim(vector, like.shape, [1])

    def combine_kernel(sums_ref, stats_ref, pieces_ref, *refs):
        *sinks_ref, out_ref, out_s = refs
        u = lax.axis_index("unit")
        first, last = pieces_ref[u, 0] + u, pieces_ref[u, 1] + u

        def step(i, carry):
            highest, total, outs = carry
            slots = [first + i * unroll + j for j in range(unroll)]
            real = [slot <= last for slot in slots]
            slots = [jnp.minimum(slot, last) for slot in slots]
            loaded = [
                [mosaic.load(sums_ref.at[s, pl.ds(o, 64)], _LAYOUT, optimized=False) for o in offsets] for s in slots
            ]
            maxima = [mosaic.load(stats_ref.at[slot, 0], column, optimized=False) for slot in slots]
            totals = [mosaic.load(stats_ref.at[slot, 1], column, optimized=False) for slot in slots]
            maxima = [jnp.where(ok, m, layouts.NEVER) for ok, m in zip(real, maxima, strict=True)]
            new_highest = functools.reduce(jnp.maximum, maxima, highest)
            kept = jnp.exp2(highest - new_highest)
            weights = [jnp.where(ok, jnp.exp2(m - new_highest), 0.0) for ok, m in zip(real, maxima, strict=True)]
            total = total * kept + sum(w * t for w, t in zip(weights, totals, strict=True))
            outs = tuple(
                out * wide(kept, out) + sum(part[n] * wide(w, out) for part, w in zip(loaded, weights, strict=True))
                for n, out in enumerate(outs)
            )
            return new_highest, total, outs

        zeros = tuple(layouts.filled((64, R), 0.0, _LAYOUT) for _ in offsets)
        init = (layouts.filled((R,), layouts.NEVER, column), layouts.filled((R,), 0.0, column), zeros)
        steps = lax.div(last - first + unroll, jnp.int32(unroll))
        highest, total, outs = lax.fori_loop(0, steps, step, init)
        if sinks_ref:
            # The maximum stays that of the real scores: a row that sees nothing has total 0 and yields zeros, and a
            # sink far above all scores makes its term infinite and the output zero, which it then is.
            head = lax.rem(u, jnp.int32(sinks_ref[0].shape[0]))
            sink = mosaic.load(sinks_ref[0].at[head], column, optimized=False)
            total = total + jnp.exp2(jnp.minimum(sink - highest, 126.0))
        total = jnp.maximum(total, 1e-30)
        for offset, out in zip(offsets, outs, strict=True):
            normalized = plgpu.layout_cast((out / wide(total, out)).astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            mosaic.store(mosaic.transposed(out_s.at[:, pl.ds(offset, 64)]), normalized)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, rows)], out_ref.at[u])
        plgpu.wait_smem_to_gmem(0)

    units = pieces.shape[0]
    return mosaic.kernel(
        combine_kernel,
        out_type=jax.ShapeDtypeStruct((units, rows, H), dtype),
        grid=(units,),
        grid_names=("unit",),
        scratch_types=[plgpu.SMEM((R, H), dtype)],
        interpret=interpret,
    )(sums, stats, pieces, *(() if sinks is None else (sinks,)))
