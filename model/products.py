"""x @ w.T in the form that each platform is fastest at, for weights as they are and for quantized ones."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float

from ..pallas_kernels.dispatch import current_device, serve
from ..pallas_kernels.matmul import check_kernel, matmul
from ..sharding.rules import RULES, is_split, mesh_of, shard_map
from .products_cpu import FEW_ROWS, product_cpu
from .promotion import own_promotion
from .quantization import QuantizedArray, dequantize, rounded, rounded_by, scale_axes

Axes = tuple[str | None, ...]
Product = Callable[[Float[Array, "M I"], Float[Array, "*out I"] | QuantizedArray, Axes], Float[Array, "M *out"]]
"""product(x, w, axes) -> x @ w.T, of a weight whose input axes are one, and the logical names of its axes."""


def weight_product(
    x: Float[Array, "M I"], w: Float[Array, "*out I"] | QuantizedArray, axes: Axes
) -> Float[Array, "M *out"]:
    """x @ w.T with float32 accumulation, in the first form that serves the weight, the rows and the device.

    If the inputs are split over devices, each one's float32 sum is rounded to x's dtype and these are added up: in 16
    bits half the bytes travel (as in Megatron-LM, Shoeybi et al. 2019).

    Derivatives by x, and by the scales of a quantized weight, are those of the product with the weight that it stands
    for, also where x is rounded to 8 bits (the straight-through estimator of Bengio, Leonard and Courville 2013).

    Args:
      x: activations.
      w: the weight.
      axes: the logical names of its axes.
    """
    if not isinstance(w, QuantizedArray):
        return _by_platform(x, w, _dtype_of_sums(x, w, axes))
    if w.order is not None:
        x, w = x[:, w.order], w.replace(order=None)
    return _quantized_product(x, w, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _quantized_product(x: Float[Array, "M I"], w: QuantizedArray, axes: Axes) -> Float[Array, "M *out"]:
    few, mesh, dtype = x.shape[0] <= FEW_ROWS, mesh_of(w.values), _dtype_of_sums(x, w, axes)
    if (w.scheme.dynamic or w.scheme.static) and not few:
        return _in_8_bits(x, w).astype(dtype)
    if few and current_device(mesh).is_hopper and kernel_takes(x, w):
        return _by_kernel(x, w, axes, mesh, dtype)
    return _by_platform(x, w, dtype)


@_quantized_product.defjvp
@own_promotion
def _quantized_product_jvp(axes: Axes, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, w = primals
    dtype = _dtype_of_sums(x, w, axes)
    _, dy = jax.jvp(lambda x, w: _by_xla(x, w, dtype).astype(dtype), primals, tangents)
    return _quantized_product(x, w, axes), dy


def _by_platform(
    x: Float[Array, "M I"], w: Float[Array, "*out I"] | QuantizedArray, dtype: jax.typing.DTypeLike
) -> Float[Array, "M *out"]:
    return lax.platform_dependent(
        x,
        w,
        cpu=lambda x, w: product_cpu(x, w).astype(dtype),  # sums over its devices, linked by memory, stay in float32
        default=lambda x, w: _by_xla(x, w, dtype).astype(dtype),
    )


def _dtype_of_sums(x: Array, w: Array | QuantizedArray, axes: Axes) -> jax.typing.DTypeLike:
    return x.dtype if is_split(axes[-1], mesh_of(jax.tree.leaves(w)[0])) else jnp.float32


def kernel_takes(x: Float[Array, "M I"], w: QuantizedArray) -> bool:
    """Whether a kernel has the weight's scheme, and its groups come out even."""
    return x.shape[1] % (w.scheme.group or 1) == 0 and (w.zeros is None or w.scheme.dtype == "int4")


def _by_xla(
    x: Float[Array, "M I"], w: Float[Array, "*out I"] | QuantizedArray, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "M *out"]:
    if not isinstance(w, QuantizedArray):
        return jnp.einsum("mi,...i->m...", x, w, preferred_element_type=dtype)
    if w.scheme.scales_outputs:
        return _by_xla(x, w.values.astype(x.dtype), dtype) * w.scales[..., 0]
    return _by_xla(x, dequantize(w, x.dtype), dtype)


def _in_8_bits(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    """A product in the weight's own dtype: x is rounded to it, by the weight's scale for it or each row by its own."""
    if w.scheme.static:
        x, scales = rounded_by(x, w.input_scale, w.scheme.dtype), w.input_scale
    else:
        x, scales = rounded(x, w.scheme.dtype)
    sums = jnp.int32 if w.scheme.dtype == "int8" else jnp.float32
    y = jnp.einsum("mi,...i->m...", x, w.values, preferred_element_type=sums)
    return y * scales.reshape(-1, *[1] * (y.ndim - 1)) * w.scales[..., 0]


def _by_kernel(
    x: Float[Array, "M I"], w: QuantizedArray, axes: Axes, mesh: AbstractMesh | None, dtype: jax.typing.DTypeLike
) -> Float[Array, "M *out"]:
    """By the kernel that streams the weight, on each device's own part of it."""
    *out, inputs = axes
    parts = [part for part in (w.values, w.scales, w.zeros) if part is not None]
    entries = scale_axes(axes, 1, w.scales.shape)
    # Rows that the devices cannot share evenly are multiplied by all of them.
    rows = "batch" if mesh is not None and x.shape[0] % mesh.shape[RULES["batch"]] == 0 else None

    def local(x: Array, *parts: Array) -> Array:
        y = _streamed(x, QuantizedArray(*parts, *[None] * (3 - len(parts)), w.scheme)).astype(dtype)
        return lax.psum(y, RULES[inputs]) if is_split(inputs, mesh) else y

    in_axes = ((rows, inputs), axes, *[entries] * (len(parts) - 1))
    return shard_map(local, mesh, in_axes, (rows, *out))(x, *parts)


def _streamed(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    """The kernel's product where it serves, else XLA's."""

    def kernel(x: Array, w: QuantizedArray) -> Array:
        y = matmul(x, *kernel_operands(w), out_dtype=jnp.float32, implementation="mosaic")
        return y.reshape(-1, *w.shape[:-1])

    check = functools.partial(check_kernel, x, *kernel_operands(w))
    return serve("linear", None, kernel, _by_xla, check, x, w)


def kernel_operands(w: Array | QuantizedArray, lead: int = 0) -> list[Array | None]:
    """Values, scales and zero points as kernels take them: the axes of outputs are one, `lead` of experts before it."""
    parts = (w.values, w.scales, w.zeros) if isinstance(w, QuantizedArray) else (w, None, None)
    if isinstance(w, QuantizedArray) and w.scheme.scale_dtype == "float8_e8m0fnu":
        parts = w.values, lax.bitcast_convert_type(w.scales, jnp.float8_e8m0fnu), w.zeros
    return [None if part is None else part.reshape(*part.shape[:lead], -1, part.shape[-1]) for part in parts]
