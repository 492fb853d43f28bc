"""Weights of 8 and 4 bits become the 16-bit row operand of wgmma in registers, by a few operations a pair of weights.

A 32-bit word of a row holds 4 or 8 weights. Masked at one of 2 or 4 shifts it leaves one weight in each half, and bits
set above those make each half a 16-bit float: this is how CUTLASS and Marlin (Frantar et al. 2024) widen. The pairs of
a word are weights that lie half a word apart, and no data moves between threads, so that inputs come in another order
than they are stored in: `arranged` puts the activations into that order.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from . import mosaic
from .matmul import twice_e2m1

_LANE_BYTES = 16  # of a row, that the four threads of a quad hold a word of each
_LAYOUT = plgpu.Layout.WGMMA
RAW_LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X  # a word a thread
BASE_LAYOUT = _LAYOUT.reduce(1)


def arranged(x: Array, bits: int) -> Array:
    """[..., K] with inputs in the order in which weights of so many bits meet them; of 16 bits, as they are."""
    if bits == 16:
        return x
    n = 16 // bits  # pairs a word
    # A thread c = 2a + b of a quad has word 2b + a of 16 bytes (`WGMMA_UPCAST_2X`), whose weight n * e + j is half e of
    # pair j; in wgmma's operand, that half is column 2c + e of the eight that pair j has.
    words = x.reshape(*x.shape[:-1], -1, 2, 2, 2, n)  # b, a, e, j
    return jnp.moveaxis(words, (-1, -3, -4, -2), (-4, -3, -2, -1)).reshape(x.shape)


def base(dtype: Any) -> int:
    """Bits of 128 in bfloat16, of 1024 in float16: set above a small integer, they make it a float that much larger."""
    return 0x4300 if dtype == jnp.bfloat16 else 0x6400


def twice(half: Any) -> Any:
    """A word of two equal halves."""
    return half * 0x10001


def pairs(word: Any, kind: Any, dtype: Any) -> list[tuple[Any, Any]]:
    """Two words for each pair, as 16-bit floats: the pair is their difference, or for floats their product.

    Args:
      word: supports shifts and bitwise operations with integers: as well a NumPy array as a register.
      kind: of the weights: int8, float8_e4m3fn, float4_e2m1fn, or uint8 for two of 4 bits a byte, which are less 8.
      dtype: bfloat16 or float16.
    """
    above = twice(base(dtype))
    if kind == jnp.uint8:
        return [(word >> 4 * j & 0x000F000F | above, above | twice(8)) for j in range(4)]
    if kind == jnp.int8:  # its low seven bits less 128 where it is negative, which is the bit that doubles 128
        shifted = word, word >> 8
        return [(part & 0x007F007F | above, part & 0x00800080 | above) for part in shifted]
    # The exponent is moved to where the wider one ends, which leaves the value too small by the biases' difference.
    if kind == jnp.float4_e2m1fn:
        shift, scale = (6, 0x7E80) if dtype == jnp.bfloat16 else (9, 0x7400)  # 2 ** 126, 2 ** 14
        kept = twice(7 << shift)
        signs = [word << 12 - 4 * j & 0x80008000 for j in range(4)]
        sizes = [word << shift - 4 * j if shift >= 4 * j else word >> 4 * j - shift for j in range(4)]
        return [(sign | size & kept, twice(scale)) for sign, size in zip(signs, sizes, strict=True)]
    shift, scale = (4, 0x7B80) if dtype == jnp.bfloat16 else (7, 0x5C00)  # 2 ** 120, 2 ** 8
    kept = twice(0x7F << shift)
    even = word << 8 & 0x80008000 | word << shift & kept
    odd = word & 0x80008000 | word >> 8 - shift & kept
    return [(even, twice(scale)), (odd, twice(scale))]


def widen(raw: Any, kind: Any, part: slice, zeros: Any, dtype: Any, *, interpreted: bool) -> Any:
    """A part of the columns as [64, weights], in wgmma's layout and the order of `arranged`.

    Args:
      raw: [64, columns] of int8, float8_e4m3fn, or uint8 for two weights of 4 bits a byte, in `RAW_LAYOUT`.
      kind: as in `pairs`.
      part: of the columns.
      zeros: for 4 bits, zero points, [64] int32 in `BASE_LAYOUT`; None where they are 8.
      dtype: bfloat16 or float16.
      interpreted: whether the interpreter is to run the kernel.
    """
    packed = raw.dtype == jnp.uint8
    weights = (part.stop - part.start) * (2 if packed else 1)
    arguments = (raw,) if zeros is None else (raw, twice(zeros | base(dtype)))

    def plain(raw, bases=None):
        raw = raw[:, part]
        if not packed:
            return arranged(raw.astype(jnp.float32).astype(dtype), 8)
        values = jnp.stack([raw & 15, raw >> 4], axis=-1).reshape(raw.shape[0], -1).astype(jnp.int32)
        if kind == jnp.float4_e2m1fn:
            return arranged((twice_e2m1(values) * 0.5).astype(dtype), 4)
        return arranged((values - (8 if bases is None else (bases & 15)[:, None])).astype(dtype), 4)

    @mosaic.inline(
        plain,
        interpreted=interpreted,
        arg_types=(RAW_LAYOUT, BASE_LAYOUT)[: len(arguments)],
        return_type=plgpu.ShapeDtypeStruct((64, weights), dtype, layout=_LAYOUT),
    )
    def convert(_, raw, *bases):
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import arith, llvm, vector
        from jax.experimental.mosaic import gpu as mgpu

        i32 = ir.IntegerType.get_signless(32)
        element = (ir.BF16Type if dtype == jnp.bfloat16 else ir.F16Type).get()
        pair_type, word_type = ir.VectorType.get((2,), element), ir.VectorType.get((1,), i32)
        name = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
        operation = f"{'mul' if jnp.issubdtype(kind, jnp.floating) else 'sub'}.{name} $0, $1, $2;"

        def constant(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value - (value >> 31 << 32)))

        class Word:
            def __init__(self, value):
                self.value = value

            def __and__(self, mask):
                return Word(arith.andi(self.value, constant(mask)))

            def __or__(self, other):
                return Word(arith.ori(self.value, other.value if isinstance(other, Word) else constant(other)))

            def __lshift__(self, count):
                return Word(arith.shli(self.value, constant(count)))

            def __rshift__(self, count):
                return Word(arith.shrui(self.value, constant(count)) if count else self.value)

        def word_of(register):
            return vector.extract(vector.bitcast(word_type, register), [], [0])

        halves = [word_of(register) for register in bases[0].registers.flat] if bases else [None, None]
        words = raw.registers.reshape(-1, 2)  # of each 16 bytes, and of rows 8 apart
        out = []
        for block in words[part.start // _LANE_BYTES : part.stop // _LANE_BYTES]:
            found = [pairs(Word(word_of(register)), kind, dtype) for register in block]
            for at_rows in zip(*found, strict=True):
                for (a, b), half in zip(at_rows, halves, strict=True):
                    b = half or (constant(b) if isinstance(b, int) else b.value)
                    result = llvm.inline_asm(i32, [a.value, b], operation, "=r,r,r")
                    out.append(vector.bitcast(pair_type, vector.broadcast(word_type, result)))
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(len(out), object)
        registers[:] = out
        registers = registers.reshape(layout.registers_shape((64, weights)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return convert(*arguments)
