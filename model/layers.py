"""The pieces of a layer: matrix product, RMS norm, gated MLP, soft cap."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .params import Params

_FEW_ROWS = 64  # up to so many, a product on a CPU waits for its weight
_MOST_TERMS = 64 if jax.__version_info__ >= (0, 11) else 12  # that XLA:CPU fuses into one vectorised loop


def linear(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    *,
    in_axes: int = 1,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "..."]:
    """x @ w.T with float32 accumulation: every weight product of the project goes through here.

    Args:
      x: [*rows, *in], its `in_axes` trailing axes contracted.
      w: [*out, *in], the orientation of checkpoints.
      bias: [*out], added in float32.
      in_axes: how many trailing axes are contracted.
      out_dtype: of the result, x's own by default.

    Returns:
      [*rows, *out].
    """
    rows, out = x.shape[: x.ndim - in_axes], w.shape[: w.ndim - in_axes]
    if x.shape[len(rows) :] != w.shape[len(out) :]:
        raise ValueError(f"linear contracts {x.shape[len(rows) :]} of x with {w.shape[len(out) :]} of w; they differ")
    # The axes of `out` are not flattened: one that is split over devices and is not the first would be gathered.
    x, w = x.reshape(math.prod(rows), -1), w.reshape(*out, -1)
    y = lax.platform_dependent(x, w, cpu=_product_cpu, default=_product).reshape(rows + out)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype or x.dtype)


def _product(x: Float[Array, "M I"], w: Float[Array, "*out I"]) -> Float[Array, "M *out"]:
    return jnp.einsum("mi,...i->m...", x, w, preferred_element_type=jnp.float32)


def _product_cpu(x: Float[Array, "M I"], w: Float[Array, "*out I"]) -> Float[Array, "M *out"]:
    rows, size = x.shape
    one_device = _cpu_devices() == 1  # over several, an axis that may be split is neither merged nor sliced
    if one_device and rows > _FEW_ROWS:  # a plain product; with more axes XLA would transpose its result
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
    if x.dtype == jnp.float32 and rows <= _FEW_ROWS:
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


def rms_norm(
    x: Float[Array, "..."], weight: Float[Array, "..."], eps: float, offset: float = 0.0
) -> Float[Array, "..."]:
    """x / rms(x) * (weight + offset), in float32, over the trailing axes that `weight` has.

    Source: Zhang and Sennrich 2019.
    """
    axes = tuple(range(-weight.ndim, 0))
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
    return (x32 * scale * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap): Gemma 2's bound on scores and logits. None leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def gated_mlp(x: Float[Array, "B T D"], weights: Params, activation: str) -> Float[Array, "B T D"]:
    """down(activation(gate(x)) * up(x)): SwiGLU and its kin (Shazeer 2020)."""
    gate_up = linear(x, weights["gate_up"], weights.get("gate_up_bias"))
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    hidden = ACTIVATION_FUNCTIONS[activation](gate.astype(jnp.float32)).astype(x.dtype) * up
    return linear(hidden, weights["down"], weights.get("down_bias"))
