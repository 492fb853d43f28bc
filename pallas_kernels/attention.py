"""Attention over arrays: teacher-forced, prefill over cached pages, decode over cached pages.

The cached ops take `implementation`: "reference" is plain jnp, "mosaic" the kernels for Hopper GPUs, None the kernels
where they serve and else the reference, which it says once. Scores, softmax and sums are float32; the output has the
query's dtype.

Shapes: B rows, T new tokens, K KV heads, G queries a KV head, H head dimensions, P pages, N pages a row, S positions
a page. `block_tables[b, n]` is the page that holds positions n * S ... of row b. Without tables the pages lie in row
order, row b's from b * N on with N = P / B, so that the reference reshapes and never gathers.

All are differentiable, forward and in reverse: the derivative of a cached op is that of the reference over every block.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import reference
from .dispatch import Implementation, check_case, serve
from .pages import AttentionOptions, Pages

_MAX_DECODE_TOKENS = 16  # newest tokens a row that the decode kernel takes


def causal_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    options: AttentionOptions,
    *,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of a whole sequence over itself; differentiable, and plain jnp on every device.

    `sinks` are as in `prefill_attention`.
    """
    return reference.causal_attention(q, k, v, options, sinks)


def attention_weights(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B N K H"],
    options: AttentionOptions,
    *,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B K G T N"]:
    """What share of each value a query takes, as attention computes it: with its scale, window, soft cap and sinks.

    To look at, in an `attend` of one's own; attention itself never holds all of them.

    Args:
      q: queries of the last T of the N positions: all of a sequence where T is N.
      k: keys from position 0 on.
      options: what the layer asks of attention: the `AttentionSpec` that an `attend` is given.
      sinks: as in `prefill_attention`; what they take is missing from the sum of a row, which is 1 without.

    Returns:
      float32; 0 where a query does not see a key. KV head k's g-th query is the model's head k * G + g.
    """
    for name, array, axes in (("q", q, 5), ("k", k, 4)):
        if getattr(array, "ndim", None) != axes:
            raise ValueError(f"attention_weights: {name} has not {axes} axes; it must be an array as documented")
    if not isinstance(options, AttentionOptions):
        raise TypeError(f"attention_weights: options is {options!r:.80}; it must be AttentionOptions")
    return reference.attention_weights(q, k, k.shape[1] - q.shape[1], options, sinks)


@functools.partial(jax.named_call, name="prefill_attention")
def prefill_attention(
    q: Float[Array, "B T K G H"],
    pages: Pages,
    block_tables: Int[Array, "B N"] | None,
    starts: Int[Array, "B"],
    lengths: Int[Array, "B"],
    options: AttentionOptions,
    *,
    sinks: Float[Array, "K G"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of T new tokens over cached pages that already hold those tokens' keys and values.

    No [T, N * S] scores are held: keys come a block at a time.

    Args:
      q: queries; row b's query t stands at position starts[b] + t.
      pages: the cache of one layer.
      block_tables: page of each stretch of S positions; None is row order.
      starts: positions cached before these tokens.
      lengths: positions cached in all; the loop over keys ends at the longest row's.
      options: what the layer asks of attention.
      sinks: a further logit of each head, which takes its share of the softmax and has no value.
      implementation: see the module.

    Raises:
      NotImplementedError: "mosaic" does not serve the case.
      ValueError: no such implementation, or scales without quantized pages or the reverse.
    """
    pages = _checked("prefill_attention", pages)

    def mosaic(q, pages, tables, starts, lengths, sinks):
        from .prefill_mosaic import prefill_attention_mosaic

        tables = _tables(q, pages, tables)
        return prefill_attention_mosaic(q, pages, tables, starts, lengths, options, sinks=sinks)

    def plain(q, pages, tables, starts, lengths, sinks, all_blocks=False):
        return reference.prefill_attention(q, pages, tables, starts, lengths, options, sinks, all_blocks)

    check = functools.partial(check_case, q, pages, options)
    arrays = (q, pages, block_tables, starts, lengths, sinks)
    run = functools.partial(serve, "prefill_attention", implementation, mosaic, plain, check)
    return _with_derivative(run, plain)(*arrays)


@functools.partial(jax.named_call, name="decode_attention")
def decode_attention(
    q: Float[Array, "B *T K G H"],
    pages: Pages,
    block_tables: Int[Array, "B N"] | None,
    lengths: Int[Array, "B"],
    options: AttentionOptions,
    *,
    sinks: Float[Array, "K G"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B *T K G H"]:
    """Attention of the newest token of each row, or the T newest, over its cached pages, which already hold them.

    Args:
      q: queries, [B, K, G, H] or, to verify T drafted tokens at once, [B, T, K, G, H]; row b's stand at positions
        lengths[b] - T to lengths[b] - 1.
      lengths: positions cached, the new tokens included; a row of length 0 yields zeros.
      pages, block_tables, options, sinks, implementation: as in `prefill_attention`.

    Raises:
      As `prefill_attention`.
    """
    pages = _checked("decode_attention", pages)
    *T, K, G, H = q.shape[1:]
    queries = T[0] if T else 1

    def mosaic(q, pages, tables, lengths, sinks):
        from .decode_mosaic import decode_attention_mosaic

        return decode_attention_mosaic(q, pages, _tables(q, pages, tables), lengths, options, queries, sinks=sinks)

    def plain(q, pages, tables, lengths, sinks, all_blocks=False):
        return reference.decode_attention(q, pages, tables, lengths, options, queries, sinks, all_blocks)

    check = functools.partial(check_case, q, pages, options, max_tokens=_MAX_DECODE_TOKENS)
    rows = jnp.moveaxis(q, 1, 2) if T else q  # [B, K, T, G, H]
    arrays = (rows.reshape(-1, K, queries * G, H), pages, block_tables, lengths, sinks)
    run = functools.partial(serve, "decode_attention", implementation, mosaic, plain, check)
    out = _with_derivative(run, plain)(*arrays)
    return jnp.moveaxis(out.reshape(rows.shape), 2, 1) if T else out


def _with_derivative(run: Callable[..., Array], plain: Callable[..., Array]) -> Callable[..., Array]:
    """`run` with the derivative of `plain(*arrays, all_blocks=True)`."""
    run = jax.custom_jvp(run)

    @run.defjvp
    def _(arrays, tangents):
        return run(*arrays), jax.jvp(functools.partial(plain, all_blocks=True), arrays, tangents)[1]

    return run


def _checked(op: str, pages: Pages) -> Pages:
    """Pages of numbers, with scales where they want them."""
    pages = pages.numbers()
    for name, numbers, scales in (("k", pages.k, pages.k_scales), ("v", pages.v, pages.v_scales)):
        quantized = numbers.dtype in (jnp.int8, jnp.float8_e4m3fn)
        if quantized and scales is None:
            raise ValueError(f"{op}: {name} pages are {numbers.dtype}; pass {name}_scales")
        if scales is not None and not quantized:
            raise ValueError(f"{op}: {name}_scales go with int8 and float8_e4m3fn pages, not with {numbers.dtype}")
    return pages


def _tables(q: Array, pages: Pages, tables: Array | None) -> Array:
    """The tables, those of row order where there are none."""
    B, P = q.shape[0], pages.k.shape[0]
    return jnp.arange(P, dtype=jnp.int32).reshape(B, P // B) if tables is None else tables
