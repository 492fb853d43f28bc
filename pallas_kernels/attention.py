"""Attention over arrays: teacher-forced, prefill over cached pages, decode over cached pages.

The cached ops take `implementation`: "reference" is plain jnp, "mosaic" the kernels for Hopper GPUs, None the kernels
where they serve and else the reference, which it says once. Scores, softmax and sums are float32; the output has the
query's dtype.

Shapes: B rows, T new tokens, K KV heads, G queries a KV head, H head dimensions, P pages, N pages a row, S positions
a page. Pages are [P, K, S, H]; `block_tables[b, n]` is the page that holds positions n * S ... of row b. With
`identity_table` the table is known to be 0, 1, 2 ... in row order, so that the reference reshapes and never gathers.
Pages are in the query's dtype or a wider one, or int8 or float8_e4m3fn with `k_scales` and `v_scales`: what is stored
times the scale of its position and head is the key or value.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from . import reference
from .dispatch import Implementation, check_case, serve

_MAX_DECODE_TOKENS = 16  # newest tokens a row that the decode kernel takes


def causal_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of a whole sequence over itself; differentiable, and plain jnp on every device.

    Args:
      q, k, v: queries, keys, values.
      scale: multiplies q . k.
      window: each query sees itself and the window - 1 positions before it; None sees all before it.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).
    """
    return reference.causal_attention(q, k, v, scale=scale, window=window, soft_cap=soft_cap)


@functools.partial(jax.named_call, name="prefill_attention")
def prefill_attention(
    q: Float[Array, "B T K G H"],
    k_pages: Num[Array, "P K S H"],
    v_pages: Num[Array, "P K S H"],
    block_tables: Int[Array, "B N"],
    starts: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
    k_scales: Float[Array, "P K S"] | None = None,
    v_scales: Float[Array, "P K S"] | None = None,
    identity_table: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of T new tokens over cached pages that already hold those tokens' keys and values.

    No [T, N * S] scores are held: keys come a block at a time.

    Args:
      q: queries; row b's query t stands at position starts[b] + t.
      k_pages, v_pages: the cache of one layer.
      block_tables: page of each stretch of S positions.
      starts: positions cached before these tokens.
      lengths: positions cached in all; the loop over keys ends at the longest row's.
      scale, window, soft_cap: as in `causal_attention`.
      sinks: a further logit of each head, which takes its share of the softmax and has no value.
      k_scales, v_scales, identity_table, implementation: see the module.

    Raises:
      NotImplementedError: "mosaic" does not serve the case.
      ValueError: no such implementation, or scales without quantized pages or the reverse.
    """
    _check_scales("prefill_attention", k_pages, v_pages, k_scales, v_scales)
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}

    def mosaic(q, k_pages, v_pages, tables, starts, lengths, sinks, k_scales, v_scales):
        from .prefill_mosaic import prefill_attention_mosaic

        more = {"sinks": sinks, "k_scales": k_scales, "v_scales": v_scales}
        return prefill_attention_mosaic(q, k_pages, v_pages, tables, starts, lengths, **more, **options)

    def plain(q, k_pages, v_pages, tables, starts, lengths, sinks, k_scales, v_scales):
        more = {"sinks": sinks, "k_scales": k_scales, "v_scales": v_scales, "identity_table": identity_table}
        return reference.prefill_attention(q, k_pages, v_pages, tables, starts, lengths, **more, **options)

    check = functools.partial(check_case, q, k_pages, v_pages, k_scales, scale=scale)
    arrays = (q, k_pages, v_pages, block_tables, starts, lengths, sinks, k_scales, v_scales)
    return serve("prefill_attention", implementation, mosaic, plain, check, *arrays)


@functools.partial(jax.named_call, name="decode_attention")
def decode_attention(
    q: Float[Array, "B *T K G H"],
    k_pages: Num[Array, "P K S H"],
    v_pages: Num[Array, "P K S H"],
    block_tables: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
    k_scales: Float[Array, "P K S"] | None = None,
    v_scales: Float[Array, "P K S"] | None = None,
    identity_table: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B *T K G H"]:
    """Attention of the newest token of each row, or the T newest, over its cached pages, which already hold them.

    Args:
      q: queries, [B, K, G, H] or, to verify T drafted tokens at once, [B, T, K, G, H]; row b's stand at positions
        lengths[b] - T to lengths[b] - 1.
      lengths: positions cached, the new tokens included; a row of length 0 yields zeros.
      k_pages, v_pages, block_tables, scale, window, soft_cap, sinks, k_scales, v_scales, identity_table,
        implementation: as in `prefill_attention`.

    Raises:
      As `prefill_attention`.
    """
    _check_scales("decode_attention", k_pages, v_pages, k_scales, v_scales)
    *T, K, G, H = q.shape[1:]
    options = {"queries": T[0] if T else 1, "scale": scale, "window": window, "soft_cap": soft_cap}

    def mosaic(q, k_pages, v_pages, tables, lengths, sinks, k_scales, v_scales):
        from .decode_mosaic import decode_attention_mosaic

        more = {"sinks": sinks, "k_scales": k_scales, "v_scales": v_scales}
        return decode_attention_mosaic(q, k_pages, v_pages, tables, lengths, **more, **options)

    def plain(q, k_pages, v_pages, tables, lengths, sinks, k_scales, v_scales):
        more = {"sinks": sinks, "k_scales": k_scales, "v_scales": v_scales, "identity_table": identity_table}
        return reference.decode_attention(q, k_pages, v_pages, tables, lengths, **more, **options)

    check = functools.partial(check_case, q, k_pages, v_pages, k_scales, scale=scale, max_tokens=_MAX_DECODE_TOKENS)
    rows = jnp.moveaxis(q, 1, 2) if T else q  # [B, K, T, G, H]
    arrays = (rows.reshape(-1, K, options["queries"] * G, H), k_pages, v_pages, block_tables, lengths)
    out = serve("decode_attention", implementation, mosaic, plain, check, *arrays, sinks, k_scales, v_scales)
    return jnp.moveaxis(out.reshape(rows.shape), 2, 1) if T else out


def _check_scales(op: str, k_pages: Array, v_pages: Array, k_scales: Array | None, v_scales: Array | None) -> None:
    for name, pages, scales in (("k", k_pages, k_scales), ("v", v_pages, v_scales)):
        quantized = pages.dtype in (jnp.int8, jnp.float8_e4m3fn)
        if quantized and scales is None:
            raise ValueError(f"{op}: {name}_pages are {pages.dtype}; pass {name}_scales")
        if scales is not None and not quantized:
            raise ValueError(f"{op}: {name}_scales go with int8 and float8_e4m3fn pages, not with {pages.dtype}")
