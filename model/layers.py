"""The pieces of a layer: matrix product, RMS norm, gated MLP, soft cap."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ..sharding.rules import is_split
from .params import Params
from .products import product, quantized_product
from .quantization import QuantizedArray


def linear(
    x: Float[Array, "..."],
    w: Float[Array, "..."] | QuantizedArray,
    bias: Float[Array, "..."] | None = None,
    *,
    in_axes: int = 1,
    axes: tuple[str | None, ...] | None = None,
    mesh: Mesh | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "..."]:
    """x @ w.T with float32 accumulation: every weight product of the project goes through here.

    If the inputs are split over devices, each one's float32 sum is rounded to x's dtype and these are added up: in 16
    bits half the bytes travel (as in Megatron-LM, Shoeybi et al. 2019).

    Args:
      x: [*rows, *in], its `in_axes` trailing axes contracted.
      w: [*out, *in], the orientation of checkpoints; an array, or a `QuantizedArray`, which is multiplied as the
        weight that it stands for.
      bias: [*out], added in float32.
      in_axes: how many trailing axes are contracted.
      axes, mesh: the logical names of w's axes and the mesh that it is split over; kernels run on each device's part.
      out_dtype: of the result, x's own by default.

    Returns:
      [*rows, *out].
    """
    rows, out = x.shape[: x.ndim - in_axes], w.shape[: len(w.shape) - in_axes]
    if x.shape[len(rows) :] != w.shape[len(out) :]:
        raise ValueError(f"linear contracts {x.shape[len(rows) :]} of x with {w.shape[len(out) :]} of w; they differ")
    # The axes of `out` are not flattened: one that is split over devices and is not the first would be gathered.
    x = x.reshape(math.prod(rows), -1)
    axes = axes or (None,) * len(w.shape)
    dtype = x.dtype if any(is_split(axis, mesh) for axis in axes[len(out) :]) else jnp.float32
    if isinstance(w, QuantizedArray):
        y = quantized_product(x, w, axes, mesh, dtype)
    else:
        y = product(x, w.reshape(*out, -1), dtype)
    y = y.reshape(rows + out)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype or x.dtype)


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


def gated_mlp(
    x: Float[Array, "B T D"], weights: Params, activation: str, mesh: Mesh | None = None
) -> Float[Array, "B T D"]:
    """down(activation(gate(x)) * up(x)): SwiGLU and its kin (Shazeer 2020)."""
    gate_up = linear(x, weights["gate_up"], weights.get("gate_up_bias"), axes=(None, "ffn", "embed"), mesh=mesh)
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    hidden = ACTIVATION_FUNCTIONS[activation](gate.astype(jnp.float32)).astype(x.dtype) * up
    return linear(hidden, weights["down"], weights.get("down_bias"), axes=("embed", "ffn"), mesh=mesh)
