"""Products of a few rows with a weight that may be stored in 8 or 4 bits, with what a layer does to the result.

Takes `implementation`: "reference" is plain jnp, "mosaic" the kernel for Hopper GPUs, None the kernel where it serves
and else the reference, which it says once. Sums are float32.

Letters here: M rows of activations, K inputs, N outputs, F outputs of a gated weight, C stored columns, g inputs and R
outputs that share a scale. A weight is (value - zero) * scale; its form follows from dtypes and shapes:

| values | scales | zeros |
| --- | --- | --- |
| bfloat16 or float16 [N, K] | none | none |
| int8 or float8_e4m3fn [N, K] | float32 [N, 1], or [N/R, K/g] | none |
| uint8 [N, K/2], input 2i in the low four bits of byte i, 2i + 1 in the high | [N, K/g] | uint8 [N, K/g]; none: 8 |
| the same, each four bits an e2m1 number (MXFP4) | float8_e8m0fnu [N, K/g] | none |
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, Shaped, UInt8

from .dispatch import Implementation, serve

Activation = Literal["silu", "gelu", "gelu_tanh"]

_MOST_ROWS = 64  # that the kernel takes
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@functools.partial(jax.named_call, name="matmul")
def matmul(
    x: Float[Array, "M K"],
    values: Num[Array, "*two N C"],
    scales: Shaped[Array, "*two blocks groups"] | None = None,
    zeros: UInt8[Array, "*two N groups"] | None = None,
    *,
    bias: Float[Array, "*two N"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    activation: Activation | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: Implementation = None,
) -> Float[Array, "M N"]:
    """x @ w.T, then the bias, the gate, the residual, all in float32.

    Args:
      x: activations.
      values, scales, zeros: the weight; see the module. With `activation` each has a leading axis of two: what is gated
        by, then what is gated.
      bias: added to the product.
      residual: added last.
      activation: the result is activation(x @ w[0].T + bias[0]) * (x @ w[1].T + bias[1]).
      out_dtype: of the result, x's own by default.
      implementation: see the module.

    Raises:
      NotImplementedError: "mosaic" does not serve the case.
      ValueError: no such implementation or activation, or shapes and dtypes that make no weight.
    """
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(f"matmul: activation is {activation!r}; choose one of {', '.join(_ACTIVATIONS)}")
    check_operands("matmul", x, values, scales, zeros, lead=() if activation is None else (2,))
    flat = [None if part is None else part.reshape(-1, part.shape[-1]) for part in (values, scales, zeros)]

    def finished(sums, bias, residual):
        y = sums if bias is None else sums + bias.astype(jnp.float32).reshape(-1)
        if activation is not None:
            gate, up = jnp.split(y, 2, axis=1)
            y = _ACTIVATIONS[activation](gate) * up
        if residual is not None:
            y = y + residual.astype(jnp.float32)
        return y.astype(out_dtype or x.dtype)

    def mosaic(x, values, scales, zeros, bias, residual):
        from .matmul_mosaic import matmul_mosaic

        return finished(matmul_mosaic(x, values, scales, zeros), bias, residual)

    def plain(x, values, scales, zeros, bias, residual):
        w = dequantized(values, scales, zeros)
        sums = jnp.einsum("mk,nk->mn", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
        return finished(sums, bias, residual)

    check = functools.partial(check_kernel, x, *flat)
    return serve("matmul", implementation, mosaic, plain, check, x, *flat, bias, residual)


def check_kernel(
    x: Float[Array, "M K"],
    values: Num[Array, "N C"],
    scales: Shaped[Array, "blocks groups"] | None = None,
    zeros: UInt8[Array, "N groups"] | None = None,
) -> None:
    """NotImplementedError, with the reason, unless the kernel serves such a product."""
    from .matmul_schedule import make_schedule

    if x.shape[0] > _MOST_ROWS:
        raise NotImplementedError(f"{x.shape[0]} rows of activations; the kernel takes up to {_MOST_ROWS}")
    make_schedule(x, values, scales, zeros)


def dequantized(
    values: Num[Array, "N C"], scales: Shaped[Array, "blocks groups"] | None, zeros: UInt8[Array, "N groups"] | None
) -> Float[Array, "N K"]:
    """The weight that is stored, in float32."""
    if values.dtype == jnp.uint8:
        values = jnp.stack([values & 15, values >> 4], axis=-1).reshape(values.shape[0], -1)
    N, K = values.shape
    is_e2m1 = scales is not None and scales.dtype == jnp.float8_e8m0fnu
    w = twice_e2m1(values.astype(jnp.int32)) * 0.5 if is_e2m1 else values.astype(jnp.float32)
    if values.dtype == jnp.uint8 and not is_e2m1:
        w = w - (8.0 if zeros is None else jnp.repeat(zeros.astype(jnp.float32), K // zeros.shape[1], axis=1))
    if scales is None:
        return w
    scales = jnp.repeat(scales.astype(jnp.float32), N // scales.shape[0], axis=0)
    return w * jnp.repeat(scales, K // scales.shape[1], axis=1)


def twice_e2m1(bits: Int[Array, "..."]) -> Float[Array, "..."]:
    """Twice the numbers of four bits, sign, two of exponent, one of mantissa (OCP Microscaling Formats 1.0, 2023)."""
    low = bits & 7
    size = jnp.where(low == 0, 0, ((low & 1 | 2) << (low >> 1)) >> 1)
    return (size - 2 * size * (bits >> 3)).astype(jnp.float32)


def check_operands(
    op: str, x: Array, values: Array, scales: Array | None, zeros: Array | None, lead: tuple[int, ...] = ()
) -> None:
    """ValueError unless these make weights of `op`, with the leading axes `lead`, for x."""
    for name, part in (("values", values), ("scales", scales), ("zeros", zeros)):
        if part is not None and (part.ndim != 2 + len(lead) or part.shape[:-2] != lead):
            wanted = "two axes" if not lead else f"three axes, the first of {lead[0]}"
            raise ValueError(f"{op}: {name} are {list(part.shape)}; pass {wanted}")
    packed = values.dtype == jnp.uint8
    N, K = values.shape[-2], values.shape[-1] * (2 if packed else 1)
    if K != x.shape[-1]:
        raise ValueError(f"{op}: x has {x.shape[-1]} inputs and the weight {K}; they must agree")
    if (scales is None) == (values.dtype in (jnp.int8, jnp.float8_e4m3fn, jnp.uint8)):
        raise ValueError(
            f"{op}: values are {values.dtype} and scales are {'missing' if scales is None else 'given'}; "
            "int8, float8_e4m3fn and uint8 go with scales, and no others do"
        )
    if scales is not None and (N % scales.shape[-2] or K % scales.shape[-1]):
        raise ValueError(f"{op}: scales are {list(scales.shape)}; they must divide a weight of {[N, K]}")
    if zeros is not None and (not packed or zeros.shape != scales.shape or scales.dtype == jnp.float8_e8m0fnu):
        raise ValueError(
            f"{op}: zeros are {list(zeros.shape)}; they go with integers in uint8 values, in the shape of scales"
        )
