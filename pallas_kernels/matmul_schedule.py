"""Who reads which part of a weight: equal shares of tiles for one thread block a multiprocessor.

A weight [N, K] is cut into bands of rows and a band into steps along K. All steps, band after band, form one line;
thread block w takes steps w * share to (w + 1) * share - 1 of it, wherever they fall, so that every multiprocessor
reads as many bytes, however small N is. A block leaves one partial sum for each band it touches (the decomposition is
stream-K, Osama et al. 2023). Everything follows from shapes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import layouts
from .dispatch import current_device

COLUMNS = (8, 16, 32, 64, 128)  # to which rows of activations are padded: few kernels, with known registers
WARPGROUP_ROWS = 64  # of the weight: the height of one wgmma
ROW_ALIGNMENT = 8  # of tiles of activations: what the tiling of shared memory copies at once
_STEP_BYTES = (128, 64, 32)  # of a row of the weight in a step: the swizzles; copies and wgmma do best at the widest
_LEAST_BYTES = 16  # that TMA copies of a row, and that strides are multiples of
_MOST_STAGES = 12
TILES_TOGETHER = 16  # of rows, before the next band: 128 each with 4,096 inputs are 17 MB, a third of an H100's L2
_BALANCED = 0.9  # of the steps that the blocks have time for: shares that are as equal are equal enough
_Operand = jax.Array | jax.ShapeDtypeStruct


class Table(NamedTuple):
    """The tiles of rows of many products, each with its own weight, on the device; int32.

    Attributes:
      ends: [E], after the tiles of each weight: the last is the number of tiles. There is room for T.
      group: [T], the weight.
      start: [T], the first row of the tile, a multiple of 8.
      low, high: [T], the first and the end of the rows of the tile that are multiplied by the weight.
    """

    ends: Any
    group: Any
    start: Any
    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The shares, and how a thread block uses its multiprocessor.

    Attributes:
      columns: rows of activations, padded to what wgmma takes.
      bits: of a weight.
      kind: dtype of a weight: uint8 for integers of 4 bits, float4_e2m1fn for these.
      width: inputs a step.
      group: inputs that share a scale or zero point, None where the kernel sees none.
      scale_rows: outputs that share a scale.
      warpgroups: that multiply, 64 rows of a band each.
      bands, steps: of the weight, and of a band.
      share: steps a thread block takes; the last may take fewer. Of many products the fewest that one takes which takes
        any, 0 where blocks take whole bands.
      blocks: thread blocks.
      scales_a_step, zeros_a_step: of each row, copied with a step; 0 where rows have none of their own, or not
        multiples of what can be copied.
      stages: steps in shared memory, the one being multiplied included.
    """

    columns: int
    bits: int
    kind: Any
    width: int
    group: int | None
    scale_rows: int
    warpgroups: int
    bands: int
    steps: int
    share: int
    blocks: int
    scales_a_step: int
    zeros_a_step: int
    stages: int

    @property
    def rows(self) -> int:
        """Of the weight in a band."""
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def part(self) -> int:
        """Inputs that are multiplied at once: all those of a step with the same scale."""
        return self.group or self.width

    @property
    def parts(self) -> int:
        return self.width // self.part

    @property
    def pieces(self) -> int:
        """The most partial sums that a band has."""
        return max(last - first + 1 for first, last in map(self.span, range(self.bands)))

    def span(self, band: int) -> tuple[int, int]:
        """The first and the last thread block that touch a band."""
        return band * self.steps // self.share, ((band + 1) * self.steps - 1) // self.share


def make_schedule(
    x: _Operand,
    values: _Operand,
    scales: _Operand | None,
    zeros: _Operand | None,
    *,
    blocks: int | None = None,
    products: int = 1,
) -> Schedule:
    """The schedule of one product, of which it sees shapes and dtypes.

    Args:
      x, values, scales, zeros: as in `matmul_mosaic`.
      blocks: thread blocks; None is one a multiprocessor.
      products: how many such products, of other weights, share the blocks, at most.

    Raises:
      NotImplementedError: the kernel does not take such operands, and why.
    """
    M, K = x.shape
    N = values.shape[0]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"activations are {x.dtype}; the kernel takes bfloat16 and float16")
    if scales is None and values.dtype != x.dtype:
        raise NotImplementedError(f"the weight is {values.dtype}, activations {x.dtype}; the kernel takes one for both")
    blocks = blocks or current_device().multiprocessors or layouts.MULTIPROCESSORS
    bits = 16 if scales is None else 4 if values.dtype == jnp.uint8 else 8
    kind = values.dtype
    if scales is not None and scales.dtype == jnp.float8_e8m0fnu:
        kind = jnp.dtype(jnp.float4_e2m1fn)
    group, scale_rows, entries = None, 1, [0, 0]  # entries: scales and zero points a step
    if scales is not None:
        scale_rows = N // scales.shape[0]
        if scales.shape[1] > 1 or zeros is not None:
            group = K // scales.shape[1]
    if group is not None and scale_rows != 1 and (scale_rows % WARPGROUP_ROWS or zeros is not None):
        raise NotImplementedError(
            f"{scale_rows} outputs share a scale; the kernel takes 1 and, without zero points, "
            f"multiples of {WARPGROUP_ROWS}"
        )

    columns = next(columns for columns in COLUMNS if columns >= M)
    # Sums of many columns leave each thread registers for 64 bytes of a row of 4 bits.
    sizes = _STEP_BYTES[:2] if bits > 4 else _STEP_BYTES[columns > 16 :]
    widths = [size * 8 // bits for size in sizes]
    fitting = [width for width in widths if K % width == 0 and width % (group or width) == 0]
    if not fitting or (group or 32) % 32:
        wanted = f"multiples of {widths[-1]}" + ("" if group is None else f" and groups of 32, 64 or 128, not {group}")
        raise NotImplementedError(f"the weight has {K} inputs of {bits} bits; the kernel takes {wanted}")
    width = fitting[0]
    small = group is not None and group <= (32 if zeros is None else 64)
    # As many as find registers for each small group's sums, or for operands beside many.
    tallest = 2 if (small and columns > 32) or (bits < 16 and columns > 64) else 4
    counts = (4, 2, 1) if N % (2 * WARPGROUP_ROWS) == 0 else (3, 1)
    heights = [n for n in counts if n <= tallest and N % (n * WARPGROUP_ROWS) == 0]
    if not heights:
        raise NotImplementedError(f"the weight has {N} outputs; the kernel takes multiples of {WARPGROUP_ROWS}")
    steps = K // width

    def balance(warpgroups: int) -> float:
        total = N // (warpgroups * WARPGROUP_ROWS) * steps * products
        return total / (-(-total // blocks) * blocks)

    warpgroups = next((n for n in heights if balance(n) >= _BALANCED), max(heights, key=balance))
    bands = N // (warpgroups * WARPGROUP_ROWS)
    share = -(-products * bands * steps // blocks)
    row_bytes = width * bits // 8
    for n, entry in enumerate((scales if scale_rows == 1 else None, zeros)):
        if group is not None and entry is not None and entry.shape[1] * entry.dtype.itemsize % _LEAST_BYTES == 0:
            entries[n] = max(width // group, _LEAST_BYTES // entry.dtype.itemsize)
            row_bytes += entries[n] * entry.dtype.itemsize
    stage = warpgroups * WARPGROUP_ROWS * row_bytes + columns * width * 2
    stages = min(_MOST_STAGES, (layouts.SHARED_BYTES - layouts.RESERVED_BYTES - layouts.PADDING_BYTES) // stage)
    used = -(-bands * steps // share) if products == 1 else blocks
    sizes = columns, bits, kind, width, group, scale_rows, warpgroups, bands, steps, share, used
    return Schedule(*sizes, *entries, stages)
