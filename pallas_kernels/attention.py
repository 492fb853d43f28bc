"""Attention over arrays: teacher-forced, prefill over cached pages, decode over cached pages.

Each op takes `implementation`: None picks the fastest that can serve the case, "reference" is plain jnp and the
oracle of every kernel. Scores, softmax and sums are float32; the output has the query's dtype.

Shapes: B rows, T new tokens, K KV heads, G queries a KV head, H head dimensions, P pages, N pages a row, S positions
a page. Pages are [P, K, S, H], in the query's dtype or a wider one; `block_tables[b, n]` is the page that holds
positions n * S ... of row b. With `identity_table` the table is known to be 0, 1, 2 ... in row order, so that pages are
reshaped, never gathered.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Implementation = Literal["reference"] | None

_NEVER = -1e30  # a finite "minus infinity": a row that sees nothing yields zeros, not NaN
_QUERY_BLOCK = 512  # queries scored at once, so that long prompts never hold [T, T] scores
_KEY_BLOCK = 256  # cached positions scored at once in prefill


def causal_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of a whole sequence over itself; differentiable.

    Args:
      q, k, v: queries, keys, values.
      scale: multiplies q . k.
      window: each query sees itself and the window - 1 positions before it; None sees all before it.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).
      implementation: see the module.
    """
    _check(implementation)
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


@functools.partial(jax.named_call, name="prefill_attention")
def prefill_attention(
    q: Float[Array, "B T K G H"],
    k_pages: Float[Array, "P K S H"],
    v_pages: Float[Array, "P K S H"],
    block_tables: Int[Array, "B N"],
    starts: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    identity_table: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of T new tokens over cached pages that already hold those tokens' keys and values.

    Args:
      q: queries; row b's query t stands at position starts[b] + t.
      k_pages, v_pages: the cache of one layer.
      block_tables: page of each stretch of S positions.
      starts: positions cached before these tokens.
      lengths: positions cached in all; the loop over keys ends at the longest row's.
      scale, window, soft_cap, implementation: as in `causal_attention`.
      identity_table: see the module.
    """
    _check(implementation)
    B, T, K, G, H = q.shape
    S, N = k_pages.shape[2], block_tables.shape[1]
    pages = next(n for n in range(max(1, min(N, _KEY_BLOCK // S)), 0, -1) if N % n == 0)
    width = pages * S
    queries = starts[:, None] + jnp.arange(T)

    def block_of(cache, index):  # [B, width, K, H]
        first = index * pages
        if identity_table:
            taken = lax.dynamic_slice_in_dim(cache.reshape(B, N, K, S, H), first, pages, axis=1)
        else:
            taken = cache[lax.dynamic_slice_in_dim(block_tables, first, pages, axis=1)]
        return taken.transpose(0, 1, 3, 2, 4).reshape(B, width, K, H)

    def step(index, carry):  # online softmax (Milakov and Gimelshein 2018), one block of keys at a time
        out, total, highest = carry
        keys = index * width + jnp.arange(width)
        scores = _scores(q, block_of(k_pages, index), scale, soft_cap)
        visible = _visible(queries[:, :, None], keys, window) & (keys < lengths[:, None, None])
        scores = jnp.where(visible[:, None, None], scores, _NEVER)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        kept = jnp.exp(highest - new_highest)
        probs = jnp.where(visible[:, None, None], jnp.exp(scores - new_highest[..., None]), 0.0)
        v = block_of(v_pages, index)
        update = jnp.einsum("bkgts,bskh->bkgth", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * kept[..., None] + update, total * kept + probs.sum(axis=-1), new_highest

    shape = (B, K, G, T)
    init = (jnp.zeros((*shape, H), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, _NEVER, jnp.float32))
    last = -(-lengths.max() // width)
    first = jnp.zeros_like(last) if window is None else jnp.maximum(starts.min() - window + 1, 0) // width
    out, total, _ = lax.fori_loop(first, last, step, init)
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return out.transpose(0, 3, 1, 2, 4).astype(q.dtype)


@functools.partial(jax.named_call, name="decode_attention")
def decode_attention(
    q: Float[Array, "B K G H"],
    k_pages: Float[Array, "P K S H"],
    v_pages: Float[Array, "P K S H"],
    block_tables: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    identity_table: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B K G H"]:
    """Attention of one new token a row over its cached pages, which already hold the token's own key and value.

    Args:
      q: queries; row b's stands at position lengths[b] - 1.
      k_pages, v_pages, block_tables, identity_table: as in `prefill_attention`.
      lengths: positions cached, the new token included; a row of length 0 yields zeros.
      scale, window, soft_cap, implementation: as in `causal_attention`.
    """
    _check(implementation)
    B, K, G, H = q.shape
    S, N = k_pages.shape[2], block_tables.shape[1]

    def rows(cache):
        return cache.reshape(B, N, K, S, H) if identity_table else cache[block_tables]

    # Pages stay a batch axis of both products and the cache their left operand, contracted as it lies: any other form
    # makes XLA transpose or convert the whole cache at every step.
    pages_q = jnp.broadcast_to(q.astype(k_pages.dtype)[:, None], (B, N, K, G, H))
    scores = jnp.einsum("bnksh,bnkgh->bnksg", rows(k_pages), pages_q, preferred_element_type=jnp.float32)
    scores = _capped(scores * scale, soft_cap)
    positions = jnp.arange(N * S).reshape(N, S)
    visible = _visible(lengths[:, None, None] - 1, positions, window) & (positions < lengths[:, None, None])
    visible = visible[:, :, None, :, None]
    scores = jnp.where(visible, scores, _NEVER)
    probs = jnp.where(visible, jnp.exp(scores - scores.max(axis=(1, 3), keepdims=True)), 0.0)
    total = jnp.maximum(probs.sum(axis=(1, 3)), jnp.finfo(jnp.float32).tiny)
    probs = probs.astype(v_pages.dtype)
    out = jnp.einsum("bnksg,bnksh->bnkgh", probs, rows(v_pages), preferred_element_type=jnp.float32).sum(axis=1)
    return (out / total[..., None]).astype(q.dtype)


def _scores(q: Float[Array, "B T K G H"], k: Float[Array, "B S K H"], scale, soft_cap) -> Float[Array, "B K G T S"]:
    scores = jnp.einsum("btkgh,bskh->bkgts", q.astype(k.dtype), k, preferred_element_type=jnp.float32)
    return _capped(scores * scale, soft_cap)


def _capped(scores: Float[Array, "..."], soft_cap: float | None) -> Float[Array, "..."]:
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _visible(queries: Int[Array, "..."], keys: Int[Array, "..."], window: int | None) -> Bool[Array, "..."]:
    """Whether a query at one position sees a key at another."""
    causal = keys <= queries
    return causal if window is None else causal & (keys > queries - window)


def _check(implementation: Implementation) -> None:
    if implementation not in (None, "reference"):
        raise ValueError(f"attention implementation {implementation!r} is not available; choose None or 'reference'")
