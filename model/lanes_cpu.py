"""A matrix times one row as a single loop of XLA:CPU that LLVM vectorizes: weights are widened in registers alone.

The columns are cut into blocks, a block into terms of as many columns as there are lanes. The loop goes over blocks,
then outputs, then lanes, so that a block of the row stays in the first cache; its body is the sum of a block's terms,
written out. The sums of lanes and blocks, a few hundredths of the weight, are added up by a second, small product.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Num

from .quantization import ZERO_NIBBLE, QuantizedArray

_LANES = 8  # a byte of the weight's dtype; eight float32 are the 256 bits that XLA:CPU prefers
_TERMS = (16, 64)  # with fewer LLVM unrolls the lanes, and vectorizes nothing; with more registers are spilled
_BFLOAT16 = (32, 64) if jax.__version_info__ >= (0, 11) else (64, 12)
"""Lanes and most terms of bfloat16: in loops of more terms or blocks XLA:CPU is slower, or widens it in memory."""
_CHAINS = 4  # of additions, each of which waits for the one before


def terms_of(w: Num[Array, "O I"] | QuantizedArray) -> int:
    """Terms of a block: the most that divide the columns and are whole groups; 0 where there are none in the range."""
    values, group = (w.values, _group(w)) if isinstance(w, QuantizedArray) else (w, None)
    if isinstance(w, QuantizedArray) and w.scheme.dtype == "float4_e2m1fn":
        return 0
    lanes = _lanes_of(values)
    unit = 1 if group is None else group // lanes
    if values.shape[1] % lanes or unit == 0 or unit * lanes != (group or lanes):
        return 0
    count = values.shape[1] // lanes
    if values.dtype == jnp.bfloat16:
        return count if 6 <= count <= _BFLOAT16[1] else 0
    fewest, most = _TERMS
    return max((terms for terms in range(unit, most + 1, unit) if terms >= fewest and count % terms == 0), default=0)


def _lanes_of(values: Num[Array, "..."]) -> int:
    return _BFLOAT16[0] if values.dtype == jnp.bfloat16 else _LANES * values.dtype.itemsize


def _group(w: QuantizedArray) -> int | None:
    """Columns of the stored values, bytes of int4, that share a scale; None where all do."""
    if w.scheme.group is None:
        return None
    return w.scheme.group // 2 if w.scheme.dtype == "int4" else w.scheme.group


def by_lanes(x: Float[Array, "1 I"], w: Num[Array, "O I"] | QuantizedArray) -> Float[Array, "1 O"]:
    """x @ w.T in float32, of a weight that has `terms_of`."""
    x, terms = x[0].astype(jnp.float32), terms_of(w)
    if not isinstance(w, QuantizedArray):
        return _sums(_widened_terms(w, x, terms))[None]
    is_int4, scales = w.scheme.dtype == "int4", w.scales.astype(jnp.float32)
    y = _sums((_int4_terms if is_int4 else _widened_terms)(w.values, x, terms), w, scales)
    zeros = ZERO_NIBBLE if is_int4 and w.zeros is None else w.zeros
    if zeros is not None:
        y = y - (scales * jnp.asarray(zeros, jnp.float32)) @ jnp.sum(x.reshape(scales.shape[1], -1), axis=1)
    return y[None]


def _cut(array: Num[Array, "... I"], terms: int, lanes: int = _LANES) -> Num[Array, "... C T L"]:
    return array.reshape(*array.shape[:-1], -1, terms, lanes)


def _at_this_step(*arrays: Array) -> tuple[Array, ...]:
    # The barrier ties the weight to this step: in a loop XLA would widen all weights beforehand, and read those.
    return lax.optimization_barrier(arrays)


def _widened_terms(values: Num[Array, "O I"], x: Float[Array, "I"], terms: int) -> list[Float[Array, "C O L"]]:
    values, x = _at_this_step(*(_cut(array, terms, _lanes_of(values)) for array in (values, x)))
    is_e4m3 = values.dtype == jnp.float8_e4m3fn
    values = lax.bitcast_convert_type(values, jnp.int8) if is_e4m3 else values  # a copy; cut float8 would be widened
    widen = e4m3 if is_e4m3 else jnp.float32
    return [widen(_term(values, t)) * x[:, None, t] for t in range(terms)]


def _int4_terms(values: Num[Array, "O J"], x: Float[Array, "I"], terms: int) -> list[Float[Array, "C O L"]]:
    even, odd = x.reshape(-1, 2).T
    odd = odd / 16  # a byte is 16 times its high number and once its low one, which `even` makes up for
    values, even, odd = _at_this_step(*(_cut(array, terms) for array in (values, even - odd, odd)))

    def term(t: int) -> Float[Array, "C O L"]:
        both = _term(values, t).astype(jnp.int32)
        return (both & 15).astype(jnp.float32) * even[:, None, t] + both.astype(jnp.float32) * odd[:, None, t]

    return [term(t) for t in range(terms)]


def _term(values: Num[Array, "O C T L"], t: int) -> Num[Array, "C O L"]:
    return jnp.swapaxes(values[:, :, t], 0, 1)


def _sums(
    terms: list[Float[Array, "C O L"]], w: QuantizedArray | None = None, scales: Float[Array, "O N"] | None = None
) -> Float[Array, "O"]:
    """The sum of the terms over blocks and lanes; a scale multiplies the sum of its group's terms."""
    group = None if w is None else _group(w)
    if group is not None:
        size = group // _LANES
        blocks = scales.reshape(scales.shape[0], -1, len(terms) // size)
        groups = (terms[first : first + size] for first in range(0, len(terms), size))
        terms = [_add(part) * blocks[:, :, index].T[:, :, None] for index, part in enumerate(groups)]
    sums = _add([_add(terms[chain::_CHAINS]) for chain in range(min(_CHAINS, len(terms)))])
    blocks, outputs, lanes = sums.shape
    sums = lax.optimization_barrier(sums.reshape(-1, lanes))
    y = jnp.sum((sums @ jnp.ones(lanes, jnp.float32)).reshape(blocks, outputs), axis=0)
    return y if scales is None or group is not None else y * scales[:, 0]


def _add(terms: list[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


def e4m3(bits: Int8[Array, "..."]) -> Float[Array, "..."]:
    """Float8 numbers from their bits, which are those of a float16 a 256th as large: XLA:CPU widens float16 faster."""
    bits = bits.astype(jnp.int16)  # the sign is copied to the upper half
    return lax.bitcast_convert_type(bits << 7 & 0xBFFF, jnp.float16).astype(jnp.float32) * 256
