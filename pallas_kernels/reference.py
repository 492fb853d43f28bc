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
_QUERY_BLOCK = 512  # queries scored at once, so that long prompts never hold [T, T] scores
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
        out = jnp.einsum("bkgts,bskh->btkgh", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    if T <= _QUERY_BLOCK:
        return block(q, 0)
    count = -(-T // _QUERY_BLOCK)
    padded = jnp.pad(q, ((0, 0), (0, count * _QUERY_BLOCK - T), (0, 0), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(q.shape[0], count, _QUERY_BLOCK, *q.shape[2:]), 1, 0)
    out = lax.map(lambda args: jax.checkpoint(block)(*args), (blocks, jnp.arange(count) * _QUERY_BLOCK))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :T]


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
    B, T, K, G, H = q.shape
    S, N = k_pages.shape[2], block_tables.shape[1]
    pages = next(n for n in range(max(1, min(N, _KEY_BLOCK // S)), 0, -1) if N % n == 0)
    width = pages * S
    queries = starts[:, None] + jnp.arange(T)

    def block_of(cache, scales, index):  # [B, width, K, H]
        def taken(array):  # [B, width, K, ...]
            first = index * pages
            if identity_table:
                part = lax.dynamic_slice_in_dim(array.reshape(B, N, *array.shape[1:]), first, pages, axis=1)
            else:
                part = array[lax.dynamic_slice_in_dim(block_tables, first, pages, axis=1)]
            return jnp.moveaxis(part, 2, 3).reshape(B, width, K, *array.shape[3:])

        return taken(cache) if scales is None else taken(cache).astype(jnp.float32) * taken(scales)[..., None]

    def step(index, carry):  # online softmax (Milakov and Gimelshein 2018), one block of keys at a time
        out, total, highest = carry
        keys = index * width + jnp.arange(width)
        scores = _scores(q, block_of(k_pages, k_scales, index), scale, soft_cap)
        visible = _visible(queries[:, :, None], keys, window) & (keys < lengths[:, None, None])
        scores = jnp.where(visible[:, None, None], scores, _NEVER)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        kept = jnp.exp(highest - new_highest)
        probs = jnp.where(visible[:, None, None], jnp.exp(scores - new_highest[..., None]), 0.0)
        v = block_of(v_pages, v_scales, index)
        update = jnp.einsum("bkgts,bskh->bkgth", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * kept[..., None] + update, total * kept + probs.sum(axis=-1), new_highest

    shape = (B, K, G, T)
    init = (jnp.zeros((*shape, H), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, _NEVER, jnp.float32))
    last = -(-lengths.max() // width)
    first = jnp.zeros_like(last) if window is None else jnp.maximum(starts.min() - window + 1, 0) // width
    out, total, highest = lax.fori_loop(first, last, step, init)
    total = _with_sinks(total, highest, None if sinks is None else sinks[..., None])
    return (out / total[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype)


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
    B, K, R, H = q.shape
    S, N = k_pages.shape[2], block_tables.shape[1]
    dtype = k_pages.dtype if k_scales is None else jnp.float32

    def rows(array: Any) -> Any:
        return array.reshape(B, N, *array.shape[1:]) if identity_table else array[block_tables]

    # Pages stay a batch axis of both products and the cache their left operand, contracted as it lies: any other form
    # makes XLA transpose or convert the whole cache at every step.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    pages_q = jnp.broadcast_to(q.astype(dtype)[:, None], (B, N, K, R, H))
    scores = product("bnksh,bnkrh->bnksr", rows(k_pages).astype(dtype), pages_q)
    if k_scales is not None:
        scores = scores * rows(k_scales)[..., None]
    scores = _capped(scores * scale, soft_cap)
    positions = jnp.arange(N * S).reshape(N, S, 1)
    ends = lengths[:, None, None, None]
    last_seen = ends - queries + jnp.arange(R) // (R // queries)
    visible = (_visible(last_seen, positions, window) & (positions < ends))[:, :, None]
    scores = jnp.where(visible, scores, _NEVER)
    highest = scores.max(axis=(1, 3), keepdims=True)
    probs = jnp.where(visible, jnp.exp(scores - highest), 0.0)
    total = probs.sum(axis=(1, 3))
    total = _with_sinks(total, highest[:, 0, :, 0], None if sinks is None else jnp.tile(sinks, (1, queries)))
    if v_scales is not None:
        probs = probs * rows(v_scales)[..., None]
    out = product("bnksr,bnksh->bnkrh", probs.astype(dtype), rows(v_pages).astype(dtype)).sum(axis=1)
    return (out / total[..., None]).astype(q.dtype)


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
