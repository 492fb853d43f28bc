"""Weights in fewer bits: `QuantizedArray`, and how arrays become one and are read back.

A weight is (value - zero) * scale. Integers are rounded to the nearest, and the largest of a group fixes its scale, so
that what was quantized once quantizes to the same values again.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Num, UInt8

from .arguments import arguments, array, instance, whole
from .arguments import dtype as a_dtype
from .promotion import own_promotion
from .schemes import Scheme

_LARGEST = {"int8": 127.0, "float8_e4m3fn": float(jnp.finfo(jnp.float8_e4m3fn).max)}
ZERO_NIBBLE = 8
"""What stands for zero in int4 without zero points."""


@struct.dataclass
class QuantizedArray:
    """A weight [*out, *in] in a scheme. A pytree, which `linear` takes in place of an array.

    Attributes:
      values: [*out, *in] of the scheme's dtype. Packed ones are uint8 [*out, *in[:-1], in[-1] / 2]: input 2i in the low
        four bits of byte i and 2i + 1 in the high ones. int4 is from 0 to 15, 8 standing for zero where there are no
        zero points; e2m1 has its sign in the highest bit.
      scales: [*out[:-1], out[-1] / R, N], R outputs (`Scheme.block_rows`) and a group of the inputs, all their axes
        taken as one, sharing each.
      zeros: like the scales, uint8 for int4 and int8 for int8; None without zero points.
      scheme: how they are stored (static).
      order: int32 [I], which input each stored one is; None where they are in order.
      input_scale: float32 [1], of activations where the scheme is static; None elsewhere.
    """

    values: Any
    scales: Any
    zeros: Any
    scheme: Scheme = struct.field(pytree_node=False)
    order: Any = None
    input_scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (*self.values.shape[:-1], self.values.shape[-1] * (2 if self.scheme.packed else 1))

    @property
    def nbytes(self) -> int:
        """Of all its parts."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def stored_shapes(shape: tuple[int, ...], scheme: Scheme, in_axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `values`, and of `scales` and `zeros`, of a weight.

    Raises:
      ValueError: values two to a byte of a last axis that is odd.
    """
    *out, last_out = shape[: len(shape) - in_axes]
    inputs = math.prod(shape[len(shape) - in_axes :])
    scales = (*out, last_out // scheme.block_rows(last_out), scheme.groups(inputs))
    if not scheme.packed:
        return shape, scales
    if shape[-1] % 2:
        raise ValueError(f"a weight of shape {shape} cannot be stored two to a byte: its last axis is odd; use int8")
    return (*shape[:-1], shape[-1] // 2), scales


def scale_axes(axes: Sequence[str | None], in_axes: int, scales: tuple[int, ...]) -> tuple[str | None, ...]:
    """Logical axes of scales of that shape, from those of the weight: they are split with it.

    Groups follow each other along the inputs, whose first axis is the one that may be split.
    """
    out = len(axes) - in_axes
    last = axes[out - 1] if scales[-2] > 1 else None
    return (*axes[: out - 1], last, axes[out] if scales[-1] > 1 else None)


@arguments(w=array("f", "... I"), scheme=instance(Scheme, hint="such as SCHEMES['int8']"), in_axes=whole)
@functools.partial(jax.jit, static_argnames=("scheme", "in_axes"))
@own_promotion
def quantize(w: Float[Array, "..."], scheme: Scheme, in_axes: int = 1) -> QuantizedArray:
    """A weight in a scheme, rounded to nearest; computed in float32.

    Args:
      w: [*out, *in].
      scheme: how to store it.
      in_axes: how many trailing axes a product contracts; one at least, and not all.
    """
    if not 1 <= in_axes < w.ndim:
        raise ValueError(f"quantize: in_axes is {in_axes}; of the {w.ndim} axes of w it must leave one, and take one")
    shape, scales_shape = stored_shapes(w.shape, scheme, in_axes)
    blocks = _blocks(w.astype(jnp.float32).reshape(*w.shape[: w.ndim - in_axes], -1), scheme)
    zeros = None
    if scheme.zero_points:
        # Zero is always within the range, so that it is stored exactly and padding changes nothing.
        low, high = _extreme(jnp.min, blocks), _extreme(jnp.max, blocks)
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        scales = _scales((0.5 * high - 0.5 * low) / 7.5, scheme.scale_dtype)  # halves are exact, and do not overflow
        zeros = jnp.clip(jnp.round(-low / scales), 0, 15)
        values = jnp.clip(jnp.round(blocks / scales) + zeros, 0, 15)
        zeros = zeros.astype(jnp.uint8).reshape(scales_shape)
    elif scheme.dtype == "int4":
        # The largest in magnitude becomes -8, whatever its sign: all sixteen values serve, as in llama.cpp's Q4_0.
        low, high = _extreme(jnp.min, blocks), _extreme(jnp.max, blocks)
        scales = _scales(jnp.where(-low >= high, low, high) / -8, scheme.scale_dtype)
        values = jnp.clip(jnp.round(blocks / scales), -8, 7) + ZERO_NIBBLE
    elif scheme.dtype == "float4_e2m1fn":
        values, scales = _rounded_e2m1(blocks)
    else:
        values, scales = rounded(blocks, scheme.dtype, (-3, -1), scheme.scale_dtype)
    values = _unblock(values, w.shape, in_axes)
    values = pack_int4(values.astype(jnp.uint8)) if scheme.packed else values.astype(scheme.dtype)
    scales = scales.astype(stored_dtype(scheme.scale_dtype)).reshape(scales_shape)
    return QuantizedArray(values.reshape(shape), scales, zeros, scheme)


def stored_dtype(dtype: str) -> str:
    """Of arrays that hold such numbers: the narrowest are held as bytes, which every platform has."""
    return "uint8" if dtype in ("int4", "float4_e2m1fn", "float8_e8m0fnu") else dtype


def _rounded_e2m1(blocks: Float[Array, "..."]) -> tuple[Num[Array, "..."], Num[Array, "..."]]:
    """Four bits each, and the bytes of their scales, of which a block's largest number is 4 to 7.99 times one.

    Source: OCP Microscaling Formats 1.0, section 6.3. Numbers are rounded to nearest, ties to even; those beyond 6
    become 6.
    """
    largest = jnp.max(jnp.abs(blocks), axis=(-3, -1), keepdims=True)
    exponents = jnp.where(largest < jnp.finfo(jnp.float32).tiny, 0, jnp.maximum(jnp.frexp(largest)[1] - 3, -126))
    sizes = jnp.abs(jnp.ldexp(blocks, -exponents))
    between = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # where one value ends and the next, from even to odd, begins
    codes = sum((sizes >= end if index % 2 else sizes > end).astype(jnp.int32) for index, end in enumerate(between))
    return codes | jnp.signbit(blocks).astype(jnp.int32) << 3, exponents + 127


def e2m1(codes: Num[Array, "..."]) -> Float[Array, "..."]:
    """The float32 numbers that four bits each stand for."""
    codes = codes.astype(jnp.int32)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    halves = jnp.where(exponent == 0, mantissa, (mantissa | 2) << jnp.maximum(exponent - 1, 0))
    return jnp.where(codes >= 8, -0.5, 0.5) * halves.astype(jnp.float32)


def scales_of(w: QuantizedArray) -> Float[Array, "..."]:
    """Its scales in float32."""
    if w.scheme.scale_dtype != "float8_e8m0fnu":
        return w.scales.astype(jnp.float32)
    return lax.bitcast_convert_type(w.scales.astype(jnp.int32) << 23, jnp.float32)


def rounded(
    x: Float[Array, "..."], dtype: str, axes: int | tuple[int, ...] = -1, scale_dtype: str = "float32"
) -> tuple[Num[Array, "..."], Float[Array, "..."]]:
    """Numbers in an 8-bit dtype, and the float32 scales, of size one along `axes`, that they are multiplied by.

    A scale is the largest magnitude along `axes` over the largest number of the dtype, 127 or 448. Integers are rounded
    to the nearest, ties to even.
    """
    x = x.astype(jnp.float32)
    scales = _scales(jnp.max(jnp.abs(x), axis=axes, keepdims=True) / _LARGEST[dtype], scale_dtype)
    return rounded_by(x, scales, dtype), scales


def rounded_by(x: Float[Array, "..."], scales: Float[Array, "..."], dtype: str) -> Num[Array, "..."]:
    """Numbers in an 8-bit dtype, by scales that are given: what lies beyond its largest becomes that."""
    largest = _LARGEST[dtype]
    x = jnp.clip(x.astype(jnp.float32) / scales, -largest, largest)  # for float8_e4m3fn has NaN alone there
    return (jnp.round(x) if dtype == "int8" else x).astype(dtype)


@own_promotion
@arguments(w=instance(QuantizedArray), dtype=a_dtype)
def dequantize(w: QuantizedArray, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """The weight [*out, *in] that is stored: (values - zeros) * scales in float32, rounded to `dtype`."""
    in_axes = w.values.ndim - w.scales.ndim + 1
    out = w.shape[: len(w.shape) - in_axes]
    values = unpack_int4(w.values) if w.scheme.packed else w.values
    values = e2m1(values) if w.scheme.dtype == "float4_e2m1fn" else values.astype(jnp.float32)
    values = values.reshape(*out, -1)
    expand = functools.partial(_expand, outputs=out[-1], inputs=values.shape[-1], scheme=w.scheme)
    if w.zeros is not None:
        values = values - expand(w.zeros.astype(jnp.float32))
    elif w.scheme.dtype == "int4":
        values = values - ZERO_NIBBLE
    values = values * expand(scales_of(w))
    if w.order is not None:
        values = jnp.zeros_like(values).at[..., w.order].set(values)
    return values.astype(dtype).reshape(w.shape)


def pack_int4(values: UInt8[Array, "*lead I"]) -> UInt8[Array, "*lead I/2"]:
    """Four bits each, numbers from 0 to 15, two to a byte, the even ones in the low bits."""
    return values[..., ::2] | values[..., 1::2] << 4


def unpack_int4(packed: UInt8[Array, "*lead J"]) -> UInt8[Array, "*lead 2*J"]:
    """What `pack_int4` packed."""
    return jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _blocks(w: Array, scheme: Scheme) -> Array:
    """[*out, I] as [*out[:-1], out[-1] / R, R, N, group]: the axes R and group share a scale; zeros fill the last."""
    *lead, outputs, inputs = w.shape
    rows, groups = scheme.block_rows(outputs), scheme.groups(inputs)
    group = scheme.group or inputs
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, groups * group - inputs)])
    return w.reshape(*lead, outputs // rows, rows, groups, group)


def _unblock(blocks: Array, shape: tuple[int, ...], in_axes: int) -> Array:
    inputs = math.prod(shape[len(shape) - in_axes :])
    return blocks.reshape(*shape[: len(shape) - in_axes], -1)[..., :inputs].reshape(shape)


def _extreme(reduction, blocks: Array) -> Array:
    return reduction(blocks, axis=(-3, -1), keepdims=True)


def _scales(scales: Array, dtype: str) -> Array:
    """As they will be read: rounded to their dtype; a group of zeros, or of numbers next to it, has scale one."""
    scales = scales.astype(dtype).astype(jnp.float32)
    return jnp.where(jnp.abs(scales) < jnp.finfo(jnp.float32).tiny, 1.0, scales)


def _expand(scales: Array, outputs: int, inputs: int, scheme: Scheme) -> Array:
    """A scale for every weight: [*out[:-1], out[-1] / R, N] to [*out, I], or to [*out, 1]."""
    if scales.shape[-2] != outputs:
        scales = jnp.repeat(scales, outputs // scales.shape[-2], axis=-2)
    if scheme.group is None:
        return scales
    return jnp.repeat(scales, scheme.group, axis=-1)[..., :inputs]
