"""x @ w.T in the form that each platform is fastest at, for weights as they are and for quantized ones."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int8, Num

from ..pallas_kernels.dispatch import current_device, serve
from ..pallas_kernels.matmul import check_kernel, matmul
from ..sharding.rules import RULES, is_split, shard_map
from .quantization import ZERO_NIBBLE, QuantizedArray, dequantize, rounded, scale_axes

FEW_ROWS = 64
"""Up to so many rows a product waits for its weight, on CPUs and GPUs."""
_MOST_TERMS = 64 if jax.__version_info__ >= (0, 11) else 12  # that XLA:CPU fuses into one vectorized loop
_DIGITS = 3


def product(
    x: Float[Array, "M I"], w: Float[Array, "*out I"], dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "M *out"]:
    """x @ w.T, summed in float32 on each device and over devices in `dtype`, which is the result's."""
    return _on_platforms(_product_cpu, functools.partial(_product, dtype=dtype), x, w, dtype)


def quantized_product(
    x: Float[Array, "M I"],
    w: QuantizedArray,
    axes: tuple[str | None, ...],
    mesh: Mesh | None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "M *out"]:
    """The same of a quantized weight, whose input axes, however many, are contracted as one.

    Args:
      x: activations.
      w: the weight.
      axes: the logical names of its axes.
      mesh: that both lie on.
      dtype: of the result, and of sums over devices.
    """
    out = w.scales.ndim - 1
    if w.order is not None:
        x = x[:, w.order]
    w = w.replace(values=w.values.reshape(*w.values.shape[:out], -1), order=None)
    if w.scheme.dynamic and x.shape[0] > FEW_ROWS:
        return _dynamic_product(x, w).astype(dtype)
    whole_groups = x.shape[1] % (w.scheme.group or 1) == 0
    in_kernel = whole_groups and (w.zeros is None or w.scheme.dtype == "int4")
    if x.shape[0] <= FEW_ROWS and current_device(mesh).is_hopper and in_kernel:
        return _kernel_product(x, w, axes[: out + 1], mesh, dtype)
    others = functools.partial(_quantized_product, product=functools.partial(_product, dtype=dtype))
    return _on_platforms(_quantized_product_cpu, others, x, w, dtype)


def _on_platforms(cpu: Callable, others: Callable, x: Array, w: Any, dtype: jax.typing.DTypeLike) -> Array:
    """The platform's way, in `dtype`; on a CPU, where links between devices are memory, sums stay in float32."""
    return lax.platform_dependent(
        x, w, cpu=lambda x, w: cpu(x, w).astype(dtype), default=lambda x, w: others(x, w).astype(dtype)
    )


def _kernel_product(
    x: Float[Array, "M I"],
    w: QuantizedArray,
    axes: tuple[str | None, ...],
    mesh: Mesh | None,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "M *out"]:
    """By the kernel that streams the weight, on each device's own part of it."""
    *out, inputs = axes
    parts = [part for part in (w.values, w.scales, w.zeros) if part is not None]
    entries = scale_axes(axes, 1, w.scales.shape)

    def local(x: Array, *parts: Array) -> Array:
        y = _streamed(x, QuantizedArray(*parts, *[None] * (3 - len(parts)), w.scheme)).astype(dtype)
        return lax.psum(y, RULES[inputs]) if is_split(inputs, mesh) else y

    in_axes = (("batch", inputs), axes, *[entries] * (len(parts) - 1))
    return shard_map(local, mesh, in_axes, ("batch", *out))(x, *parts)


@jax.custom_vjp
def _streamed(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    """The kernel's product where it serves, else XLA's; differentiable in x alone."""
    parts = (w.values, w.scales, w.zeros)

    def flat(*parts: Array | None) -> list[Array | None]:
        return [None if part is None else part.reshape(-1, part.shape[-1]) for part in parts]

    def kernel(x: Array, *parts: Array | None) -> Array:
        y = matmul(x, *flat(*parts), out_dtype=jnp.float32, implementation="mosaic")
        return y.reshape(-1, *parts[0].shape[:-1])

    def by_xla(x: Array, *parts: Array | None) -> Array:
        return _quantized_product(x, QuantizedArray(*parts, w.scheme))

    return serve("linear", None, kernel, by_xla, functools.partial(check_kernel, x, *flat(*parts)), x, *parts)


def _streamed_forward(x: Array, w: QuantizedArray) -> tuple[Array, tuple[QuantizedArray, Array]]:
    return _streamed(x, w), (w, jnp.zeros((0,), x.dtype))


def _streamed_backward(saved: tuple[QuantizedArray, Array], dy: Array) -> tuple[Array, None]:
    w, like = saved
    dx = jnp.einsum("m...,...i->mi", dy, dequantize(w), preferred_element_type=jnp.float32)
    return dx.astype(like.dtype), None


_streamed.defvjp(_streamed_forward, _streamed_backward)


def _product(
    x: Float[Array, "M I"], w: Float[Array, "*out I"], dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "M *out"]:
    return jnp.einsum("mi,...i->m...", x, w, preferred_element_type=dtype)


def _quantized_product(x: Float[Array, "M I"], w: QuantizedArray, product: Callable = _product) -> Array:
    if w.scheme.group is not None or w.zeros is not None or w.scheme.dtype == "int4":
        return product(x, dequantize(w, x.dtype))
    # Integers and e4m3 numbers are exact in x's dtype; their scales, one an output, follow the product.
    return product(x, w.values.astype(x.dtype)) * w.scales[..., 0]


def _dynamic_product(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    """A product in the weight's own dtype: each row of x is rounded to it by a scale of its own."""
    x, scales = rounded(x, w.scheme.dtype)
    sums = jnp.int32 if w.scheme.dtype == "int8" else jnp.float32
    y = jnp.einsum("mi,...i->m...", x, w.values, preferred_element_type=sums)
    return y * scales.reshape(-1, *[1] * (y.ndim - 1)) * w.scales[..., 0]


def _product_cpu(x: Float[Array, "M I"], w: Float[Array, "*out I"]) -> Float[Array, "M *out"]:
    rows, size = x.shape
    one_device = _cpu_devices() == 1  # over several, an axis that may be split is neither merged nor sliced
    if one_device and rows > FEW_ROWS:  # a plain product; with more axes XLA would transpose its result
        y = jnp.einsum("mi,oi->mo", x, w.reshape(-1, size), preferred_element_type=jnp.float32)
        return y.reshape(rows, *w.shape[:-1])
    if one_device and rows == 1 and x.dtype == jnp.bfloat16 and (lanes := _lanes(size)):
        return _product_by_lanes(x, w, lanes)
    # XLA:CPU streams weights at memory speed only from the left operand, and 16-bit ones only for two rows or more; for
    # a single row it would write out a float32 copy of the weight first, twenty times slower.
    if rows == 1 and x.dtype != jnp.float32:
        x = jnp.pad(x, ((0, 1), (0, 0)))
    y = _weight_left(x, w, jnp.float32)
    if x.dtype == jnp.float32 and rows <= FEW_ROWS:
        y = lax.optimization_barrier(y)  # else XLA exchanges the operands of a plain product, which takes twice as long
    return jnp.moveaxis(y[..., :rows], -1, 0)


def _quantized_product_cpu(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    rows, size = x.shape
    one_device = _cpu_devices() == 1
    per_output = w.scheme.group is None and w.zeros is None
    if one_device and rows == 1:
        if w.scheme.dtype == "int4":
            group = w.scheme.group or size
            whole = tuple(lanes for lanes in (32, 64, 16) if group // 2 % lanes == 0)  # which do not straddle groups
            if size % group == 0 and (lanes := _lanes(size // 2, whole)):
                return _int4_product_by_lanes(x, w, lanes)
        elif per_output and (lanes := _lanes(size)):
            return _product_by_lanes(x, w.values, lanes) * w.scales[..., 0]
    # Over several devices the largest number of a row would have to be communicated.
    if one_device and w.scheme.dtype == "int8" and per_output and rows * _DIGITS <= FEW_ROWS:
        return _int8_product_by_digits(x, w)
    if w.scheme.dtype == "float8_e4m3fn":
        w = w.replace(values=_e4m3(lax.bitcast_convert_type(w.values, jnp.int8)))
    return _quantized_product(x, w, _product_cpu)


def _cpu_devices() -> int:
    try:
        return jax.device_count("cpu")
    except RuntimeError:  # JAX was told to use other platforms alone: the branch is traced, and left out
        return 0


def _weight_left(x: Array, w: Array, dtype: jax.typing.DTypeLike) -> Array:
    """[*out, M]."""
    return lax.dot_general(w, x, (((w.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _lanes(size: int, choices: tuple[int, ...] = (32, 64)) -> int:
    """Columns a term of a product by lanes; 0 where it would take too many terms for one loop."""
    return next((lanes for lanes in choices if size % lanes == 0 and size <= _MOST_TERMS * lanes), 0)


def _product_by_lanes(x: Float[Array, "1 I"], w: Num[Array, "*out I"], lanes: int) -> Float[Array, "1 *out"]:
    """A matrix times one row as one fused loop that LLVM vectorizes: XLA's own product takes twice as long or more.

    Each of `lanes` sums takes every such column; a second, small product adds them up.
    """
    x, w = _at_this_step(x[0].astype(jnp.float32), w)
    is_e4m3 = w.dtype == jnp.float8_e4m3fn
    w = lax.bitcast_convert_type(w, jnp.int8) if is_e4m3 else w  # before it is cut: XLA:CPU would copy cut float8

    def term(first: int) -> Array:
        part = w[..., first : first + lanes]
        return (_e4m3(part) if is_e4m3 else part.astype(jnp.float32)) * x[first : first + lanes]

    return _sum_of_lanes(term(first) for first in range(0, w.shape[-1], lanes))


def _int4_product_by_lanes(x: Float[Array, "1 I"], w: QuantizedArray, lanes: int) -> Float[Array, "1 *out"]:
    """The same for int4, `lanes` bytes a term: a group's scale multiplies the sum of its terms."""
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


def _sum_of_lanes(terms) -> Float[Array, "1 *out"]:
    sums = lax.optimization_barrier(functools.reduce(jnp.add, terms))
    return (sums @ jnp.ones((sums.shape[-1],), jnp.float32))[None]


def _e4m3(bits: Int8[Array, "..."]) -> Float[Array, "..."]:
    """Float8 numbers from their bits, which are those of a float16 a 256th as large: XLA:CPU widens float16 faster."""
    bits = bits.astype(jnp.int16)  # the sign is copied to the upper half
    return lax.bitcast_convert_type(bits << 7 & 0xBFFF, jnp.float16).astype(jnp.float32) * 256


def _int8_product_by_digits(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    """x in fixed point, a number's digits to base 128 as rows of their own: all products are int8 x int8 -> int32.

    Three digits are 21 bits of the largest number of a row, about what a float32 sum of that many terms keeps. XLA:CPU
    streams int8 weights at memory speed for two rows and more, and would write out a float32 copy for any other form.
    """
    rest = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(rest), axis=1, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    rest, digits = rest / scale, []
    for _ in range(_DIGITS):
        digits.append(jnp.round(rest))
        rest = (rest - digits[-1]) * 128
    rows = jnp.concatenate(digits).astype(jnp.int8)
    y = lax.optimization_barrier(_weight_left(rows, w.values, jnp.int32)).astype(jnp.float32)
    weights = 128.0 ** -jnp.arange(_DIGITS)
    y = jnp.einsum("...dm,d->m...", y.reshape(*y.shape[:-1], _DIGITS, -1), weights)
    return y * scale.reshape(-1, *[1] * (y.ndim - 1)) * w.scales[..., 0]
