"""x @ w.T in the form that each platform is fastest at, for weights as they are and for quantised ones."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .quantization import LARGEST, QuantizedArray, dequantize

FEW_ROWS = 64
"""Up to so many rows a product waits for its weight, on CPUs and GPUs."""
_MOST_TERMS = 64 if jax.__version_info__ >= (0, 11) else 12  # that XLA:CPU fuses into one vectorised loop


def product(x: Float[Array, "M I"], w: Float[Array, "*out I"]) -> Float[Array, "M *out"]:
    """x @ w.T, float32."""
    return lax.platform_dependent(x, w, cpu=_product_cpu, default=_product)


def quantized_product(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    """x @ w.T, float32, of a weight [*out, *in] whose input axes are taken as one."""
    if w.scheme.dynamic and x.shape[0] > FEW_ROWS:
        return _dynamic_product(x, w)
    out = w.scales.shape[:-2] + w.shape[w.scales.ndim - 2 : w.scales.ndim - 1]
    if w.scheme.group is None:
        # Integers and e4m3 numbers are exact in x's dtype; their scales, one an output, follow the product.
        values = w.values.reshape(*out, -1).astype(x.dtype)
        return product(x, values) * w.scales[..., 0].astype(jnp.float32)
    return product(x, dequantize(w, x.dtype).reshape(*out, -1))


def _dynamic_product(x: Float[Array, "M I"], w: QuantizedArray) -> Float[Array, "M *out"]:
    """A product in the weight's own dtype: each row of x is rounded to it by a scale of its own."""
    out = w.scales.shape[:-1]
    largest = LARGEST[w.scheme.dtype]
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=1, keepdims=True) / largest
    scales = jnp.where(scales == 0, 1.0, scales)
    x = jnp.clip(x / scales, -largest, largest)
    exact = jnp.int32 if w.scheme.dtype == "int8" else jnp.float32
    x = (jnp.round(x) if w.scheme.dtype == "int8" else x).astype(w.scheme.dtype)
    y = jnp.einsum("mi,...i->m...", x, w.values.reshape(*out, -1), preferred_element_type=exact)
    return y * scales.reshape(-1, *[1] * len(out)) * w.scales[..., 0]


def _product(x: Float[Array, "M I"], w: Float[Array, "*out I"]) -> Float[Array, "M *out"]:
    return jnp.einsum("mi,...i->m...", x, w, preferred_element_type=jnp.float32)


def _product_cpu(x: Float[Array, "M I"], w: Float[Array, "*out I"]) -> Float[Array, "M *out"]:
    rows, size = x.shape
    one_device = _cpu_devices() == 1  # over several, an axis that may be split is neither merged nor sliced
    if one_device and rows > FEW_ROWS:  # a plain product; with more axes XLA would transpose its result
        y = jnp.einsum("mi,oi->mo", x, w.reshape(-1, size), preferred_element_type=jnp.float32)
        return y.reshape(rows, *w.shape[:-1])
    lanes = next((lanes for lanes in (32, 64) if size % lanes == 0 and size <= _MOST_TERMS * lanes), None)
    if one_device and rows == 1 and x.dtype == jnp.bfloat16 and lanes is not None:
        return _product_by_lanes(x[0], w, lanes)[None]
    # XLA:CPU streams weights at memory speed only from the left operand, and 16-bit ones only for two rows or more; for
    # a single row it would write out a float32 copy of the weight first, twenty times slower.
    if rows == 1 and x.dtype != jnp.float32:
        x = jnp.pad(x, ((0, 1), (0, 0)))
    y = lax.dot_general(w, x, (((w.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if x.dtype == jnp.float32 and rows <= FEW_ROWS:
        y = lax.optimization_barrier(y)  # else XLA exchanges the operands of a plain product, which takes twice as long
    return jnp.moveaxis(y[..., :rows], -1, 0)


def _cpu_devices() -> int:
    try:
        return jax.device_count("cpu")
    except RuntimeError:  # JAX was told to use other platforms alone: the branch is traced, and left out
        return 0


def _product_by_lanes(x: Float[Array, "I"], w: Float[Array, "*out I"], lanes: int) -> Float[Array, "*out"]:
    """A bfloat16 matrix times a vector as one fused loop that LLVM vectorises: twice as fast as XLA's own product.

    Each of `lanes` sums takes every such column; a second, small product adds them up.
    """
    # The barrier ties the weight to this step: in a loop XLA would widen all weights beforehand, and read those.
    x, w = lax.optimization_barrier((x.astype(jnp.float32), w))

    def term(first: int) -> Array:
        return w[..., first : first + lanes].astype(jnp.float32) * x[first : first + lanes]

    sums = functools.reduce(jnp.add, map(term, range(0, w.shape[-1], lanes)))
    return lax.optimization_barrier(sums) @ jnp.ones((lanes,), jnp.float32)
