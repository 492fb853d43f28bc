"""Rows sorted by expert, each times the weight of its expert, in the form that each platform is fastest at."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..pallas_kernels.dispatch import current_device, serve
from ..pallas_kernels.grouped import check_kernel, grouped_matmul
from .grouped_cpu import grouped_product_cpu
from .products import kernel_operands, kernel_takes
from .products_cpu import FEW_ROWS
from .promotion import own_promotion
from .quantization import QuantizedArray, dequantize


def grouped_product(
    x: Float[Array, "R I"], w: Float[Array, "E *out I"] | QuantizedArray, sizes: Int[Array, "E"]
) -> Float[Array, "R *out"]:
    """Row r times the weight of its expert, with float32 accumulation, in float32.

    Activations are kept as they are in every scheme. Derivatives by x and w are those of the product with the weights
    that w stands for.

    Args:
      x: rows in the order of their experts.
      w: a weight for each expert; all of them on this device.
      sizes: rows of each expert. Rows past their sum come out as zeros.
    """
    if isinstance(w, QuantizedArray) and w.order is not None:
        x, w = x[:, w.order], w.replace(order=None)
    return _product(x, w, sizes)


def expert_of_rows(sizes: Int[Array, "E"], rows: int) -> Int[Array, "R"]:
    """Which expert each of so many rows has; E where it has none."""
    return jnp.sum(jnp.arange(rows)[:, None] >= jnp.cumsum(sizes), axis=1, dtype=jnp.int32)


@jax.custom_jvp
def _product(
    x: Float[Array, "R I"], w: Float[Array, "E *out I"] | QuantizedArray, sizes: Int[Array, "E"]
) -> Float[Array, "R *out"]:
    by_xla = _by_gathering if x.shape[0] <= FEW_ROWS else _by_expert
    if current_device().is_hopper and (not isinstance(w, QuantizedArray) or kernel_takes(x, w)):
        return _by_kernel(x, w, sizes, by_xla)
    return lax.platform_dependent(x, w, sizes, cpu=grouped_product_cpu, default=by_xla)


@_product.defjvp
@own_promotion
def _product_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, w, sizes), (dx, dw, _) = primals, tangents
    _, dy = jax.jvp(lambda x, w: _by_expert(x, w, sizes), (x, w), (dx, dw))
    return _product(x, w, sizes), dy


def _by_kernel(
    x: Float[Array, "R I"],
    w: Float[Array, "E *out I"] | QuantizedArray,
    sizes: Int[Array, "E"],
    by_xla: Callable[..., Float[Array, "R *out"]],
) -> Float[Array, "R *out"]:
    """The kernels' product where they serve, else XLA's."""

    def kernel(x: Array, w: Array | QuantizedArray, sizes: Array) -> Array:
        y = grouped_matmul(x, *kernel_operands(w, 1), sizes=sizes, out_dtype=jnp.float32, implementation="mosaic")
        return y.reshape(x.shape[0], *w.shape[1:-1])

    check = functools.partial(check_kernel, x, *kernel_operands(w, 1))
    return serve("grouped_linear", None, kernel, by_xla, check, x, w, sizes)


def _by_gathering(
    x: Float[Array, "R I"], w: Float[Array, "E *out I"] | QuantizedArray, sizes: Int[Array, "E"]
) -> Float[Array, "R *out"]:
    """XLA fuses all of it into one loop, which reads a weight for each row that it has."""
    expert = expert_of_rows(sizes, x.shape[0])
    of_rows = _widened(jax.tree.map(lambda part: part[jnp.minimum(expert, part.shape[0] - 1)], w), jnp.float32)
    x = jnp.where((expert < sizes.shape[0])[:, None], x, 0).astype(jnp.float32)
    return jnp.sum(of_rows * x.reshape(x.shape[0], *[1] * (of_rows.ndim - 2), -1), axis=-1)


def _by_expert(
    x: Float[Array, "R I"], w: Float[Array, "E *out I"] | QuantizedArray, sizes: Int[Array, "E"]
) -> Float[Array, "R *out"]:
    """All rows by one expert after the other, whose own are kept: differentiable, in reverse too."""
    expert, (experts, *out) = expert_of_rows(sizes, x.shape[0]), w.shape[:-1]

    def add(y: Float[Array, "R *out"], each: tuple) -> tuple[Float[Array, "R *out"], None]:
        index, of_expert = each
        rows = jnp.where((expert == index)[:, None], x, 0)
        product = jnp.einsum("ri,...i->r...", rows, _widened(of_expert, x.dtype), preferred_element_type=jnp.float32)
        return y + product, None

    return lax.scan(add, jnp.zeros((x.shape[0], *out), jnp.float32), (jnp.arange(experts), w))[0]


def _widened(w: Float[Array, "..."] | QuantizedArray, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
    return dequantize(w, dtype) if isinstance(w, QuantizedArray) else w.astype(dtype)
