"""The pieces of a layer: matrix product, RMS norm, gated MLP, soft cap."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .grouped import expert_of_rows, grouped_product
from .params import Params, ParamSpec
from .products import Product, weight_product
from .quantization import QuantizedArray


def linear(
    x: Float[Array, "..."],
    w: Float[Array, "..."] | QuantizedArray,
    spec: ParamSpec,
    bias: Float[Array, "..."] | None = None,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    product: Product = weight_product,
) -> Float[Array, "..."]:
    """x @ w.T with float32 accumulation: every weight product of the project goes through here.

    Args:
      x: [*rows, *in].
      w: [*out, *in], the orientation of checkpoints; an array, or a `QuantizedArray`, which is multiplied as the
        weight that it stands for.
      spec: of the weight, as `float_specs` has it: which of its axes are contracted, and the logical names of all.
      bias: [*out], added in float32.
      out_dtype: of the result, x's own by default.
      product: what multiplies; see `Product`.

    Returns:
      [*rows, *out].
    """
    num_in, num_out = spec.in_axes, len(spec.axes) - spec.in_axes
    rows, inputs, outputs = x.shape[: x.ndim - num_in], x.shape[x.ndim - num_in :], w.shape[:num_out]
    if inputs != w.shape[num_out:]:
        raise ValueError(f"linear contracts {inputs} of x with {w.shape[num_out:]} of w; they differ")
    x = x.reshape(math.prod(rows), -1)
    # The axes of outputs are not flattened: one that is split over devices and is not the first would be gathered.
    values = w.values if isinstance(w, QuantizedArray) else w
    values = values.reshape(*values.shape[:num_out], -1)
    w = w.replace(values=values) if isinstance(w, QuantizedArray) else values
    # Of several input axes it is the first that may be split: it names them all.
    y = product(x, w, spec.axes[: num_out + 1]).reshape(rows + outputs)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype or x.dtype)


def grouped_linear(
    x: Float[Array, "R I"],
    w: Float[Array, "E *out I"] | QuantizedArray,
    sizes: Int[Array, "E"],
    bias: Float[Array, "E *out"] | None = None,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "R *out"]:
    """`linear` of rows that each have the weight and bias of their expert; only those of experts with rows are read.

    Args:
      x: rows in the order of their experts.
      w: all experts of this device, an array or a `QuantizedArray`.
      sizes: rows of each expert. Rows past their sum come out as zeros.
      bias: added in float32.
      out_dtype: of the result, x's own by default.
    """
    if x.shape[1] != w.shape[-1]:
        raise ValueError(f"grouped_linear contracts {x.shape[1]} of x with {w.shape[-1]} of w; they differ")
    y = grouped_product(x, w, sizes)
    if bias is not None:
        bias = jnp.pad(bias.astype(jnp.float32), ((0, 1), *((0, 0),) * (bias.ndim - 1)))
        y = y + bias[expert_of_rows(sizes, x.shape[0])]
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
    x: Float[Array, "B T D"],
    weights: Params,
    specs: dict[str, ParamSpec],
    activation: str,
    product: Product = weight_product,
    neurons: Callable[[Float[Array, "B T F"]], Float[Array, "B T F"]] = lambda x: x,
) -> Float[Array, "B T D"]:
    """down(activation(gate(x)) * up(x)): SwiGLU and its kin (Shazeer 2020).

    Args:
      x: activations.
      weights: those of a layer.
      specs: theirs, as `float_specs` has them.
      activation: a key of `ACTIVATION_FUNCTIONS`.
      product: as `linear` takes it.
      neurons: sees activation(gate) * up, and may put another in its place.
    """
    gate_up = linear(x, weights["gate_up"], specs["gate_up"], weights.get("gate_up_bias"), product=product)
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    hidden = ACTIVATION_FUNCTIONS[activation](gate.astype(jnp.float32)).astype(x.dtype) * up
    return linear(neurons(hidden), weights["down"], specs["down"], weights.get("down_bias"), product=product)
