"""x @ w.T in the forms that XLA:CPU is fastest at: at the speed of memory where rows are few."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Num

from .lanes_cpu import by_lanes, e4m3, terms_of
from .quantization import ZERO_NIBBLE, QuantizedArray, dequantize, e2m1, scales_of

FEW_ROWS = 64
"""Up to so many rows a product waits for its weight, on CPUs and GPUs."""
_ROWS_BY_LANES = 4  # of integers: one after the other they take less than to widen the weight
BLOCK = 1 << 20  # numbers of a weight that are widened at a time, and stay in cache
_BY_LANES = {"int8", "uint8", "bfloat16", "float16", "float8_e4m3fn"}
_DIGITS = 3
_MOST_BY_DIGITS = 1 << 24 if jax.__version_info__ >= (0, 11) else 0  # numbers of a weight; XLA:CPU copies larger ones


def product_cpu(x: Float[Array, "M I"], w: Num[Array, "*out I"] | QuantizedArray) -> Float[Array, "M *out"]:
    """x @ w.T in float32, in the first form that serves the weight, the rows and the devices."""
    if _cpu_devices() != 1:  # over several, an axis that may be split is neither merged nor cut
        return _widened(x, w) if isinstance(w, QuantizedArray) else _dense(x, w)
    shape = w.shape
    y = on_one_cpu(x, jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), by_output(w)))
    return y.reshape(-1, *shape[:-1])


def on_one_cpu(x: Float[Array, "M I"], w: Num[Array, "O I"] | QuantizedArray) -> Float[Array, "M O"]:
    rows, quantized = x.shape[0], isinstance(w, QuantizedArray)
    values = w.values if quantized else w
    dtype = values.dtype.name
    plain_int8 = quantized and dtype == "int8" and w.scheme.scales_outputs
    by_digits = plain_int8 and 1 < rows <= FEW_ROWS // _DIGITS and values.size <= _MOST_BY_DIGITS
    in_16_bits = plain_int8 and 1 < rows <= FEW_ROWS and x.dtype == jnp.bfloat16
    most = _ROWS_BY_LANES if dtype in ("int8", "uint8") and not (by_digits or in_16_bits) else 1
    if rows <= most and dtype in _BY_LANES and terms_of(w):
        return _in_blocks(by_lanes, x, w) if dtype == "float8_e4m3fn" else _row_by_row(x, w)
    if by_digits:
        return _int8_by_digits(x, w)
    if in_16_bits:
        return _in_blocks(_by_bfloat16, x, w, 2 * BLOCK)
    if rows <= FEW_ROWS and (quantized or dtype == "float16"):
        return _in_blocks(by_float32, x, w)
    return _widened(x, w) if quantized else _dense(x, w)


def _row_by_row(x: Float[Array, "M I"], w: Num[Array, "O I"] | QuantizedArray) -> Float[Array, "M O"]:
    return by_lanes(x, w) if x.shape[0] == 1 else lax.map(lambda row: by_lanes(row[None], w)[0], x)


def by_output(w: Num[Array, "*out I"] | QuantizedArray) -> Num[Array, "*out I"] | QuantizedArray:
    """The weight with scales for each output, where they are of blocks."""
    if not isinstance(w, QuantizedArray) or w.scheme.rows == 1:
        return w
    times = w.values.shape[-2] // w.scales.shape[-2]
    scales, zeros = (part if part is None else jnp.repeat(part, times, axis=-2) for part in (w.scales, w.zeros))
    return w.replace(scales=scales, zeros=zeros, scheme=dataclasses.replace(w.scheme, rows=1))


def by_float32(x: Float[Array, "M I"], w: Num[Array, "R I"] | QuantizedArray) -> Float[Array, "M R"]:
    """By the weight in float32."""
    x = x.astype(jnp.float32)
    if not isinstance(w, QuantizedArray):
        return _weight_left(x, w.astype(jnp.float32))
    if not w.scheme.packed:
        return _widened(x, w)
    groups = w.scales.shape[1]
    if w.values.shape[1] % groups or (w.scheme.group or x.shape[1]) * groups != x.shape[1]:
        return _weight_left(x, dequantize(w))
    # The two numbers of a byte are multiplied apart: to lay them side by side takes longer than the product.
    scales = scales_of(w)[:, :, None]
    zeros = ZERO_NIBBLE if w.zeros is None else w.zeros.astype(jnp.float32)[:, :, None]

    def half(numbers: Array) -> Float[Array, "R J"]:
        numbers = numbers.reshape(numbers.shape[0], groups, -1)
        floats = e2m1(numbers) if w.scheme.dtype == "float4_e2m1fn" else numbers.astype(jnp.float32) - zeros
        return (floats * scales).reshape(numbers.shape[0], -1)

    return _weight_left(x[:, ::2], half(w.values & 15)) + _weight_left(x[:, 1::2], half(w.values >> 4))


def _by_bfloat16(x: BFloat16[Array, "M I"], w: QuantizedArray) -> Float[Array, "M R"]:
    """By the integers as bfloat16, which has all of them: the sums are those of float32. With the weight on the right,
    where XLA:CPU packs it, it is faster than on the left."""
    values = lax.optimization_barrier(w.values.astype(jnp.bfloat16))
    return _scaled(jnp.einsum("mi,oi->mo", x, values, preferred_element_type=jnp.float32), w)


def _in_blocks(
    product: Callable[..., Float[Array, "M R"]],
    x: Float[Array, "M I"],
    w: Num[Array, "O I"] | QuantizedArray,
    most: int = BLOCK,
) -> Float[Array, "M O"]:
    """A product by as many outputs at a time as stay in cache when they are widened or copied."""
    outputs, inputs = w.shape
    count = -(-outputs * inputs // most)
    size = -(-outputs // count)
    if count == 1 or size == 1:
        return product(x, w)

    def block(first: Array) -> Float[Array, "M R"]:
        tied = lax.optimization_barrier((first, w))  # else XLA widens the whole weight before the loop
        return product(x, jax.tree.map(lambda part: rows_of(part, tied[0], size), tied[1]))

    count = -(-outputs // size)
    last = outputs - size  # of which the block before may have some too
    y = jnp.moveaxis(lax.map(block, jnp.minimum(jnp.arange(0, outputs, size), last)), 0, 1).reshape(-1, count * size)
    whole = (count - 1) * size
    return y if count * size == outputs else jnp.concatenate([y[:, :whole], y[:, whole - outputs :]], axis=1)


def rows_of(array: Num[Array, "O N"], first: Array, size: int) -> Num[Array, "R N"]:
    if array.dtype != jnp.float8_e4m3fn:
        return lax.dynamic_slice_in_dim(array, first, size)
    bits = lax.bitcast_convert_type(array, jnp.int8)  # XLA:CPU would widen all of them to cut them
    return lax.bitcast_convert_type(lax.dynamic_slice_in_dim(bits, first, size), array.dtype)


def _cpu_devices() -> int:
    try:
        return jax.device_count("cpu")
    except RuntimeError:  # JAX was told to use other platforms alone: the branch is traced, and left out
        return 0


def _dense(x: Float[Array, "M I"], w: Float[Array, "*out I"]) -> Float[Array, "M *out"]:
    if x.shape[0] > FEW_ROWS and w.ndim == 2:  # with more axes XLA would transpose the result
        return jnp.einsum("mi,oi->mo", x, w, preferred_element_type=jnp.float32)
    return _weight_left(x, w)


def _weight_left(x: Float[Array, "M I"], w: Float[Array, "*out I"]) -> Float[Array, "M *out"]:
    """XLA:CPU streams weights at memory speed only from the left operand, and 16-bit ones only for two rows or more.

    For a single row it would write out a float32 copy of the weight first, twenty times slower.
    """
    rows = x.shape[0]
    if rows == 1 and x.dtype != jnp.float32:
        x = jnp.pad(x, ((0, 1), (0, 0)))
    y = _dot_weight_left(x, w, jnp.float32)
    if x.dtype == jnp.float32 and rows <= FEW_ROWS:
        y = lax.optimization_barrier(y)  # else XLA exchanges the operands of a plain product, which takes twice as long
    return jnp.moveaxis(y[..., :rows], -1, 0)


def _dot_weight_left(x: Num[Array, "M I"], w: Num[Array, "*out I"], dtype: jax.typing.DTypeLike) -> Num[Array, "..."]:
    """[*out, M]."""
    return lax.dot_general(w, x, (((w.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _widened(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    """By the weight as an array of x's dtype, or of float32."""
    if w.scheme.dtype == "float8_e4m3fn":
        w = w.replace(values=e4m3(lax.bitcast_convert_type(w.values, jnp.int8)))
    if w.scheme.scales_outputs:
        return _scaled(_dense(x, w.values.astype(x.dtype)), w)
    return _dense(x, dequantize(w, x.dtype))


def _scaled(y: Float[Array, "M *out"], w: QuantizedArray) -> Float[Array, "M *out"]:
    return y * w.scales[..., 0]


def _int8_by_digits(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    """x in fixed point, a number's digits to base 128 as rows of their own: all products are int8 x int8 -> int32.

    Three digits are 21 bits of the largest number of a row, about what a float32 sum of that many terms keeps. XLA:CPU
    streams int8 weights at memory speed for two rows and more, and would write out a float32 copy for any other form.
    Over several devices the largest number of a row would have to be communicated.
    """
    rest = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(rest), axis=1, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    rest, digits = rest / scale, []
    for _ in range(_DIGITS):
        digits.append(jnp.round(rest))
        rest = (rest - digits[-1]) * 128
    rows = jnp.concatenate(digits).astype(jnp.int8)
    y = lax.optimization_barrier(_dot_weight_left(rows, w.values, jnp.int32)).astype(jnp.float32)
    weights = 128.0 ** -jnp.arange(_DIGITS)
    y = jnp.einsum("...dm,d->m...", y.reshape(*y.shape[:-1], _DIGITS, -1), weights)
    return _scaled(y * scale.reshape(-1, *[1] * (y.ndim - 1)), w)
