"""Attention in plain jnp: what every kernel is held against, and what serves where no kernel does.

Arguments, shapes and meanings are those of the ops of `attention`. Scores, softmax and sums are float32. Pages must be
finite throughout: a weight of zero does not silence a NaN (the kernels do).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

_NEVER = -1e30  # a finite "minus infinity": a row that sees nothing yields zeros, not NaN
_QUERY_BLOCK = 256  # queries scored at once, so that long prompts never hold [T, T] scores
_KEY_BLOCK = 256  # cached positions scored at once in prefill
_TINY = jnp.finfo(jnp.float32).tiny


def causal_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "B T K G H"]:
    T = q.shape[1]

    def block(q_block, first):
        scores = _scores(q_block, k, scale, soft_cap)
        queries, keys = first + jnp.arange(q_block.shape[1]), jnp.arange(T)
        probs = jax.nn.softmax(jnp.where(_visible(queries[:, None], keys, window), scores, _NEVER), axis=-1)
        return jnp.einsum("bkgts,bskh->btkgh", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)

    return _over_queries(block, q)


def prefill_attention(
    q: Float[Array, "B T K G H"],
    k_pages: Num[Array, "P K S H"],
    v_pages: Num[Array, "P K S H"],
    block_tables: Int[Array, "B N"],
    starts: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "K G"] | None,
    k_scales: Float[Array, "P K S"] | None,
    v_scales: Float[Array, "P K S"] | None,
    identity_table: bool,
) -> Float[Array, "B T K G H"]:
    B, _, K, G, H = q.shape
    S, N = k_pages.shape[2], block_tables.shape[1]
    pages = next(n for n in range(max(1, min(N, _KEY_BLOCK // S)), 0, -1) if N % n == 0)
    width = pages * S
    dtype = k_pages.dtype if k_scales is None else jnp.float32
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def block_of(cache, scales, index):  # [B, K, width, H]
        def taken(array):  # [B, K, width, ...]
            first, held = index * pages, _movable(array)
            if identity_table:
                part = lax.dynamic_slice_in_dim(held.reshape(B, N, *array.shape[1:]), first, pages, axis=1)
            else:
                part = held[lax.dynamic_slice_in_dim(block_tables, first, pages, axis=1)]
            part = lax.bitcast_convert_type(part, array.dtype)
            return jnp.moveaxis(part, 1, 2).reshape(B, K, width, *array.shape[3:])

        return taken(cache) if scales is None else taken(cache).astype(dtype) * taken(scales)[..., None]

    def attend(q, first_query):  # [B, T, K, G, H] of a block of queries -> [B, T, K, G, H]
        T = q.shape[1]
        R = G * T
        queries = starts[:, None] + first_query + jnp.arange(R) % T
        q = q.astype(dtype).transpose(0, 2, 3, 1, 4).reshape(B, K, R, H)

        def step(index, carry):  # online softmax (Milakov and Gimelshein 2018), one block of keys at a time
            out, total, highest = carry
            keys = index * width + jnp.arange(width)
            scores = product("bkrh,bksh->bkrs", q, block_of(k_pages, k_scales, index))
            visible = _visible(queries[:, :, None], keys, window) & (keys < lengths[:, None, None])
            scores = jnp.where(visible[:, None], _capped(scores * scale, soft_cap), _NEVER)
            new_highest = jnp.maximum(highest, scores.max(axis=-1))
            kept = jnp.exp(highest - new_highest)
            probs = jnp.where(visible[:, None], jnp.exp(scores - new_highest[..., None]), 0.0)
            update = product("bkrs,bksh->bkrh", probs.astype(dtype), block_of(v_pages, v_scales, index))
            return out * kept[..., None] + update, total * kept + probs.sum(axis=-1), new_highest

        shape = (B, K, R)
        zeros = jnp.zeros((*shape, H), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, _NEVER, jnp.float32)
        end = jnp.minimum(lengths.max(), starts.max() + first_query + T)
        first = 0 if window is None else jnp.maximum(starts.min() + first_query - window + 1, 0) // width
        out, total, highest = lax.fori_loop(jnp.int32(first), -(-end // width), step, zeros)
        total = _with_sinks(total, highest, None if sinks is None else jnp.repeat(sinks, T, axis=1))
        return (out / total[..., None]).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)

    return _over_queries(attend, q)


def decode_attention(
    q: Float[Array, "B K R H"],
    k_pages: Num[Array, "P K S H"],
    v_pages: Num[Array, "P K S H"],
    block_tables: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    *,
    queries: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "K G"] | None,
    k_scales: Float[Array, "P K S"] | None,
    v_scales: Float[Array, "P K S"] | None,
    identity_table: bool,
) -> Float[Array, "B K R H"]:
    """q holds R = queries * G queries a KV head, all heads of the first token, then of the second ..."""
    options = {"scale": scale, "window": window, "soft_cap": soft_cap, "identity_table": identity_table}
    in_one = functools.partial(_decode_in_one, queries=queries, **options)
    arrays = (q, k_pages, v_pages, block_tables, lengths, sinks, k_scales, v_scales)
    if k_scales is None:
        return in_one(*arrays)

    def in_blocks(q, k_pages, v_pages, tables, lengths, sinks, k_scales, v_scales):
        B, K, R, H = q.shape
        rows = q.reshape(B, K, queries, R // queries, H).swapaxes(1, 2)
        more = {"sinks": sinks, "k_scales": k_scales, "v_scales": v_scales}
        out = prefill_attention(rows, k_pages, v_pages, tables, lengths - queries, lengths, **more, **options)
        return out.swapaxes(1, 2).reshape(q.shape)

    # XLA:GPU widens what is quantized inside the product; XLA:CPU would first write all of it out, as float32.
    return lax.platform_dependent(*arrays, cpu=in_blocks, default=in_one)


def _decode_in_one(
    q, k_pages, v_pages, tables, lengths, sinks, k_scales, v_scales, *, queries, scale, window, soft_cap, identity_table
):
    B, K, R, H = q.shape
    S, N = k_pages.shape[2], tables.shape[1]
    dtype = k_pages.dtype if k_scales is None else jnp.float32

    def rows(array: Any) -> Any:
        return array.reshape(B, N, *array.shape[1:]) if identity_table else array[tables]

    # Pages stay a batch axis of both products: any other form makes XLA transpose or convert the whole cache at every
    # step. Scores lie as [queries, positions], so that both are plain products of the cache as it lies.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    pages_q = jnp.broadcast_to(q.astype(dtype)[:, None], (B, N, K, R, H))
    scores = product("bnkrh,bnksh->bnkrs", pages_q, rows(k_pages).astype(dtype))
    if k_scales is not None:
        scores = scores * rows(k_scales)[..., None, :]
    scores = _capped(scores * scale, soft_cap)
    positions = jnp.arange(N * S).reshape(N, 1, S)
    ends = lengths[:, None, None, None]
    last_seen = ends - queries + (jnp.arange(R) // (R // queries))[:, None]
    visible = (_visible(last_seen, positions, window) & (positions < ends))[:, :, None]
    scores = jnp.where(visible, scores, _NEVER)
    highest = scores.max(axis=(1, 4), keepdims=True)
    probs = jnp.where(visible, jnp.exp(scores - highest), 0.0)
    total = probs.sum(axis=(1, 4))
    total = _with_sinks(total, highest[:, 0, ..., 0], None if sinks is None else jnp.tile(sinks, (1, queries)))
    if v_scales is not None:
        probs = probs * rows(v_scales)[..., None, :]
    out = product("bnkrs,bnksh->bnkrh", probs.astype(dtype), rows(v_pages).astype(dtype)).sum(axis=1)
    return (out / total[..., None]).astype(q.dtype)


def _movable(array: Num[Array, "P K S ..."]) -> Num[Array, "P K S ..."]:
    """What to take a part of: float8 as bytes, since XLA:CPU would first convert all of it to float16."""
    return lax.bitcast_convert_type(array, jnp.uint8) if array.dtype == jnp.float8_e4m3fn else array


def _over_queries(attend: Any, q: Float[Array, "B T K G H"]) -> Float[Array, "B T K G H"]:
    """attend(queries, index of the first) of one block of queries after the other."""
    B, T, *rest = q.shape
    if T <= _QUERY_BLOCK:
        return attend(q, 0).astype(q.dtype)
    count = -(-T // _QUERY_BLOCK)
    padded = jnp.pad(q, ((0, 0), (0, count * _QUERY_BLOCK - T), *((0, 0),) * len(rest)))
    blocks = jnp.moveaxis(padded.reshape(B, count, _QUERY_BLOCK, *rest), 1, 0)
    out = lax.map(lambda args: jax.checkpoint(attend)(*args), (blocks, jnp.arange(count) * _QUERY_BLOCK))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :T].astype(q.dtype)


def _with_sinks(total: Float[Array, "..."], highest: Float[Array, "..."], sinks: Any) -> Float[Array, "..."]:
    """Sums of exponentials, sinks included; never zero."""
    if sinks is not None:
        total = total + jnp.exp(jnp.minimum(sinks - highest, 80.0))  # a row that sees nothing stays finite
    return jnp.maximum(total, _TINY)


def _scores(q: Float[Array, "B T K G H"], k: Float[Array, "B S K H"], scale, soft_cap) -> Float[Array, "B K G T S"]:
    scores = jnp.einsum("btkgh,bskh->bkgts", q.astype(k.dtype), k, preferred_element_type=jnp.float32)
    return _capped(scores * scale, soft_cap)


def _capped(scores: Float[Array, "..."], soft_cap: float | None) -> Float[Array, "..."]:
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _visible(queries: Int[Array, "..."], keys: Int[Array, "..."], window: int | None) -> Bool[Array, "..."]:
    """Whether a query at one position sees a key at another."""
    causal = keys <= queries
    return causal if window is None else causal & (keys > queries - window)
