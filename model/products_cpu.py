"""x @ w.T in the forms that XLA:CPU is fastest at: at the speed of memory where rows are few."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Num

from .quantization import ZERO_NIBBLE, QuantizedArray, dequantize

FEW_ROWS = 64
"""Up to so many rows a product waits for its weight, on CPUs and GPUs."""
_MOST_TERMS = 64 if jax.__version_info__ >= (0, 11) else 12  # that XLA:CPU fuses into one vectorized loop
_DIGITS = 3


def product_cpu(x: Float[Array, "M I"], w: Num[Array, "*out I"] | QuantizedArray) -> Float[Array, "M *out"]:
    """x @ w.T in float32, in the first form that serves the weight, the rows and the devices."""
    rows, quantized = x.shape[0], isinstance(w, QuantizedArray)
    one_device = _cpu_devices() == 1  # over several, an axis that may be split is neither merged nor cut
    if one_device and rows == 1 and (lanes := _lanes(x, w)):
        return _by_lanes(x, w, lanes)
    plain_int8 = quantized and w.scheme.dtype == "int8" and w.scheme.scales_outputs
    if one_device and plain_int8 and rows * _DIGITS <= FEW_ROWS:
        return _int8_by_digits(x, w)
    if quantized:
        return _widened(x, w)
    if one_device and rows > FEW_ROWS:
        return _plain(x, w)
    return _weight_left(x, w)


def _cpu_devices() -> int:
    try:
        return jax.device_count("cpu")
    except RuntimeError:  # JAX was told to use other platforms alone: the branch is traced, and left out
        return 0


def _plain(x: Float[Array, "M I"], w: Float[Array, "*out I"]) -> Float[Array, "M *out"]:
    """A product of matrices: with more axes XLA would transpose its result."""
    y = jnp.einsum("mi,oi->mo", x, w.reshape(-1, w.shape[-1]), preferred_element_type=jnp.float32)
    return y.reshape(-1, *w.shape[:-1])


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
        w = w.replace(values=_e4m3(lax.bitcast_convert_type(w.values, jnp.int8)))
    if w.scheme.scales_outputs:
        return _scaled(product_cpu(x, w.values.astype(x.dtype)), w)
    return product_cpu(x, dequantize(w, x.dtype))


def _scaled(y: Float[Array, "M *out"], w: QuantizedArray) -> Float[Array, "M *out"]:
    return y * w.scales[..., 0]


def _lanes(x: Float[Array, "1 I"], w: Num[Array, "*out I"] | QuantizedArray) -> int:
    """Columns a term of a product by lanes, bytes of int4; 0 where the form does not serve."""
    if not isinstance(w, QuantizedArray):
        return _dividing(x.shape[1], (32, 64)) if x.dtype == jnp.bfloat16 else 0
    if w.scheme.dtype != "int4":
        return _dividing(x.shape[1], (32, 64)) if w.scheme.scales_outputs else 0
    group = w.scheme.group or x.shape[1]
    whole = tuple(lanes for lanes in (32, 64, 16) if group // 2 % lanes == 0)  # which do not straddle groups
    return _dividing(x.shape[1] // 2, whole) if x.shape[1] % group == 0 else 0


def _dividing(size: int, choices: tuple[int, ...]) -> int:
    """The first that divides the columns into no more terms than one loop takes; 0 where none does."""
    return next((lanes for lanes in choices if size % lanes == 0 and size <= _MOST_TERMS * lanes), 0)


def _by_lanes(x: Float[Array, "1 I"], w: Num[Array, "*out I"] | QuantizedArray, lanes: int) -> Float[Array, "1 *out"]:
    """A matrix times one row as one fused loop that LLVM vectorizes: XLA's own product takes twice as long or more.

    Each of `lanes` sums takes every such column; a second, small product adds them up.
    """
    if not isinstance(w, QuantizedArray):
        return _values_by_lanes(x, w, lanes)
    if w.scheme.dtype == "int4":
        return _int4_by_lanes(x, w, lanes)
    return _scaled(_values_by_lanes(x, w.values, lanes), w)


def _values_by_lanes(x: Float[Array, "1 I"], w: Num[Array, "*out I"], lanes: int) -> Float[Array, "1 *out"]:
    x, w = _at_this_step(x[0].astype(jnp.float32), w)
    is_e4m3 = w.dtype == jnp.float8_e4m3fn
    w = lax.bitcast_convert_type(w, jnp.int8) if is_e4m3 else w  # before it is cut: XLA:CPU would copy cut float8

    def term(first: int) -> Array:
        part = w[..., first : first + lanes]
        return (_e4m3(part) if is_e4m3 else part.astype(jnp.float32)) * x[first : first + lanes]

    return _sum_of_lanes(term(first) for first in range(0, w.shape[-1], lanes))


def _int4_by_lanes(x: Float[Array, "1 I"], w: QuantizedArray, lanes: int) -> Float[Array, "1 *out"]:
    """A group's scale multiplies the sum of its terms."""
    group, x = w.scheme.group or x.shape[1], x[0].astype(jnp.float32)
    scales = w.scales.astype(jnp.float32)
    zeros = ZERO_NIBBLE if w.zeros is None else w.zeros.astype(jnp.float32)
    sums = jnp.sum(x.reshape(-1, group), axis=1)  # what zero points multiply
    even, odd = x.reshape(-1, 2).T
    odd = odd / 16  # a byte is 16 times its high number and once its low one, which `even` makes up for
    even, odd, values, scales = _at_this_step(even - odd, odd, w.values, scales)

    def term(first: int) -> Array:
        part, columns = values[..., first : first + lanes], slice(first, first + lanes)
        low, both = (part & 15).astype(jnp.float32), part.astype(jnp.float32)
        index = 2 * first // group
        return (low * even[columns] + both * odd[columns]) * scales[..., index : index + 1]

    return _sum_of_lanes(term(first) for first in range(0, values.shape[-1], lanes)) - (scales * zeros) @ sums


def _at_this_step(*arrays: Array) -> tuple[Array, ...]:
    # The barrier ties the weight to this step: in a loop XLA would widen all weights beforehand, and read those.
    return lax.optimization_barrier(arrays)


def _sum_of_lanes(terms: Iterable[Array]) -> Float[Array, "1 *out"]:
    sums = lax.optimization_barrier(functools.reduce(jnp.add, terms))
    return (sums @ jnp.ones((sums.shape[-1],), jnp.float32))[None]


def _e4m3(bits: Int8[Array, "..."]) -> Float[Array, "..."]:
    """Float8 numbers from their bits, which are those of a float16 a 256th as large: XLA:CPU widens float16 faster."""
    bits = bits.astype(jnp.int16)  # the sign is copied to the upper half
    return lax.bitcast_convert_type(bits << 7 & 0xBFFF, jnp.float16).astype(jnp.float32) * 256


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
