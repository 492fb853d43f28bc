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

from .pages import AttentionOptions, Pages

_NEVER = -1e30  # a finite "minus infinity": a row that sees nothing yields zeros, not NaN
_QUERY_BLOCK = 256  # queries scored at once, so that long prompts never hold [T, T] scores
_KEY_BLOCK = 256  # cached positions scored at once in prefill
_DECODE_BLOCK = 128  # and in decode on a CPU, of one row
_DECODE_STEP = 1 << 18  # keys' numbers, and values', of the blocks that decode reads at once: what a CPU's caches hold
_TINY = jnp.finfo(jnp.float32).tiny


def causal_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    options: AttentionOptions,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B T K G H"]:
    def block(q_block, first):
        probs = attention_weights(q_block, k, first, options, sinks)
        return jnp.einsum("bkgts,bskh->btkgh", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)

    return _over_queries(block, q)


def attention_weights(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B N K H"],
    first: int | Int[Array, ""],
    options: AttentionOptions,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B K G T N"]:
    """Query t stands at position first + t."""
    scores = jnp.einsum("btkgh,bskh->bkgts", q.astype(k.dtype), k, preferred_element_type=jnp.float32)
    visible = _visible(first + jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1]), options.window)
    scores = jnp.where(visible, _logits(scores, options), _NEVER)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    of_sinks = jnp.broadcast_to(sinks[:, :, None, None].astype(scores.dtype), (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, of_sinks], axis=-1), axis=-1)[..., :-1]


def prefill_attention(
    q: Float[Array, "B T K G H"],
    pages: Pages,
    block_tables: Int[Array, "B N"] | None,
    starts: Int[Array, "B"],
    lengths: Int[Array, "B"],
    options: AttentionOptions,
    sinks: Float[Array, "K G"] | None,
    all_blocks: bool = False,
) -> Float[Array, "B T K G H"]:
    """With `all_blocks` its loops have a length that is known when it is compiled, so that it is differentiable."""
    B, _, K, G, H = q.shape
    S, N = pages.k.shape[2], _pages_a_row(B, pages, block_tables)
    count = next(n for n in range(max(1, min(N, _KEY_BLOCK // S)), 0, -1) if N % n == 0)
    width = count * S
    dtype = pages.k.dtype if pages.k_scales is None else jnp.float32
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def block_of(cache, scales, index):  # [B, K, width, H]
        def taken(array):  # [B, K, width, ...]
            first, held = index * count, _movable(array)
            if block_tables is None:
                part = lax.dynamic_slice_in_dim(held.reshape(B, N, *array.shape[1:]), first, count, axis=1)
            else:
                part = held[lax.dynamic_slice_in_dim(block_tables, first, count, axis=1)]
            # Not where it would change nothing: it has no derivative.
            part = part if part.dtype == array.dtype else lax.bitcast_convert_type(part, array.dtype)
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
            scores = product("bkrh,bksh->bkrs", q, block_of(pages.k, pages.k_scales, index))
            visible = _visible(queries[:, :, None], keys, options.window) & (keys < lengths[:, None, None])
            scores = jnp.where(visible[:, None], _logits(scores, options), _NEVER)
            new_highest = jnp.maximum(highest, scores.max(axis=-1))
            kept = jnp.exp(highest - new_highest)
            probs = jnp.where(visible[:, None], jnp.exp(scores - new_highest[..., None]), 0.0)
            update = product("bkrs,bksh->bkrh", probs.astype(dtype), block_of(pages.v, pages.v_scales, index))
            return out * kept[..., None] + update, total * kept + probs.sum(axis=-1), new_highest

        shape = (B, K, R)
        zeros = jnp.zeros((*shape, H), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, _NEVER, jnp.float32)
        first, last = 0, N // count
        if not all_blocks:
            last = -(-jnp.minimum(lengths.max(), starts.max() + first_query + T) // width)
            if options.window is not None:
                first = jnp.maximum(starts.min() + first_query - options.window + 1, 0) // width
        out, total, highest = lax.fori_loop(*_bounds(first, last), step, zeros)
        total = _with_sinks(total, highest, None if sinks is None else jnp.repeat(sinks, T, axis=1))
        return (out / total[..., None]).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)

    return _over_queries(attend, q)


def decode_attention(
    q: Float[Array, "B K R H"],
    pages: Pages,
    block_tables: Int[Array, "B N"] | None,
    lengths: Int[Array, "B"],
    options: AttentionOptions,
    queries: int,
    sinks: Float[Array, "K G"] | None,
    all_blocks: bool = False,
) -> Float[Array, "B K R H"]:
    """q holds R = queries * G queries a KV head, all heads of the first token, then of the second ...

    `all_blocks` as in `prefill_attention`.
    """
    in_one = functools.partial(_decode_in_one, options=options, queries=queries)
    by_blocks = functools.partial(_decode_by_blocks, options=options, queries=queries)

    def as_prefill(q, pages, tables, lengths, sinks):
        B, K, R, H = q.shape
        rows = q.reshape(B, K, queries, R // queries, H).swapaxes(1, 2)
        out = prefill_attention(rows, pages, tables, lengths - queries, lengths, options, sinks)
        return out.swapaxes(1, 2).reshape(q.shape)

    if all_blocks:
        return in_one(q, pages, block_tables, lengths, sinks)
    # XLA:GPU gathers and widens inside the products; XLA:CPU would first write all of it out, the rows' whole capacity.
    on_cpu = by_blocks if pages.k_scales is None else as_prefill
    return lax.platform_dependent(q, pages, block_tables, lengths, sinks, cpu=on_cpu, default=in_one)


def _decode_by_blocks(q, pages, tables, lengths, sinks, *, options, queries):
    """At the cost of the blocks that rows hold: a loop over a list of them, some a step, each by itself.

    What the blocks give is merged afterwards (flash-decoding, Dao, Haziza, Massa and Sizov 2023), so that a row's
    numbers do not depend on the other rows.
    """
    (B, K, R, H), dtype = q.shape, q.dtype
    P, _, S, _ = pages.k.shape
    tables = jnp.arange(P, dtype=jnp.int32).reshape(B, -1) if tables is None else tables
    count = min(tables.shape[1], max(1, _DECODE_BLOCK // S))  # pages a block
    width, most = count * S, -(-tables.shape[1] // count)
    tables = jnp.pad(tables, ((0, 0), (0, most * count - tables.shape[1]))).reshape(B, most, count)
    at_once = min(B * most, max(1, _DECODE_STEP // (width * K * H)))
    seen = 0 if options.window is None else jnp.maximum(lengths - queries - options.window + 1, 0) // width
    held = jnp.maximum(-(-lengths // width) - seen, 0)  # blocks of each row
    ends = jnp.cumsum(held)
    q = 2 * q.astype(jnp.float32)  # for keys come halved

    def step(index, parts):
        item = index * at_once + jnp.arange(at_once)
        row = jnp.minimum((item[:, None] >= ends).sum(axis=1), B - 1)  # past the list: a block that the row cannot see
        block = (seen + held - ends)[row] + item
        table = tables.at[row, block].get(mode="clip")
        scores = jnp.einsum("mkrh,mkwh->mkrw", q[row], _halved(pages.k, table))
        positions = block[:, None, None] * width + jnp.arange(width)
        length = lengths[row, None, None]
        last_seen = length - queries + (jnp.arange(R) // (R // queries))[:, None]
        visible = (_visible(last_seen, positions, options.window) & (positions < length))[:, None]
        scores = jnp.where(visible, _logits(scores, options), _NEVER)
        highest = scores.max(axis=-1)
        probs = jnp.where(visible, jnp.exp(scores - highest[..., None]), 0.0)
        out = jnp.einsum("mkrw,mkwh->mkrh", 2 * probs, _halved(pages.v, table))
        new = out, probs.sum(axis=-1), highest
        return tuple(lax.dynamic_update_slice_in_dim(x, y, index * at_once, 0) for x, y in zip(parts, new, strict=True))

    items = -(-B * most // at_once) * at_once
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    parts = zeros((items, K, R, H)), zeros((items, K, R)), zeros((items, K, R))
    parts = lax.fori_loop(*_bounds(0, -(-ends[-1] // at_once)), step, parts)

    def merge(index, carry):  # online softmax (Milakov and Gimelshein 2018)
        out, total, highest = carry
        own = (index < held)[:, None, None]
        part_out, part_total, part_highest = (x.at[ends - held + index].get(mode="clip") for x in parts)
        new_highest = jnp.maximum(highest, jnp.where(own, part_highest, _NEVER))
        kept, added = jnp.exp(highest - new_highest), jnp.where(own, jnp.exp(part_highest - new_highest), 0.0)
        out = out * kept[..., None] + part_out * added[..., None]
        return out, total * kept + part_total * added, new_highest

    nothing = zeros((B, K, R, H)), zeros((B, K, R)), jnp.full((B, K, R), _NEVER, jnp.float32)
    out, total, highest = lax.fori_loop(*_bounds(0, held.max()), merge, nothing)
    total = _with_sinks(total, highest, None if sinks is None else jnp.tile(sinks, (1, queries)))
    return (out / total[..., None]).astype(dtype)


def _halved(cache: Float[Array, "P K S H"], table: Int[Array, "M n"]) -> Float[Array, "M K n*S H"]:
    """Half of what the pages of each of M blocks hold. Of a mere copy XLA:CPU makes a loop of half the speed."""
    _, K, S, H = cache.shape
    dims = lax.GatherDimensionNumbers((1, 3, 4), collapsed_slice_dims=(0,), start_index_map=(0,))
    part = lax.gather(cache, table[..., None], dims, (1, K, S, H), mode="clip")
    return part.reshape(len(table), K, -1, H).astype(jnp.float32) * 0.5


def _decode_in_one(q, pages, tables, lengths, sinks, *, options, queries):
    B, K, R, H = q.shape
    S, N = pages.k.shape[2], _pages_a_row(B, pages, tables)
    dtype = pages.k.dtype if pages.k_scales is None else jnp.float32

    def rows(array: Any) -> Any:
        return array.reshape(B, N, *array.shape[1:]) if tables is None else array[tables]

    # Pages stay a batch axis of both products: any other form makes XLA transpose or convert the whole cache at every
    # step. Scores lie as [queries, positions], so that both are plain products of the cache as it lies.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    pages_q = jnp.broadcast_to(q.astype(dtype)[:, None], (B, N, K, R, H))
    scores = product("bnkrh,bnksh->bnkrs", pages_q, rows(pages.k).astype(dtype))
    if pages.k_scales is not None:
        scores = scores * rows(pages.k_scales)[..., None, :]
    scores = _logits(scores, options)
    positions = jnp.arange(N * S).reshape(N, 1, S)
    ends = lengths[:, None, None, None]
    last_seen = ends - queries + (jnp.arange(R) // (R // queries))[:, None]
    visible = (_visible(last_seen, positions, options.window) & (positions < ends))[:, :, None]
    scores = jnp.where(visible, scores, _NEVER)
    highest = scores.max(axis=(1, 4), keepdims=True)
    probs = jnp.where(visible, jnp.exp(scores - highest), 0.0)
    total = probs.sum(axis=(1, 4))
    total = _with_sinks(total, highest[:, 0, ..., 0], None if sinks is None else jnp.tile(sinks, (1, queries)))
    if pages.v_scales is not None:
        probs = probs * rows(pages.v_scales)[..., None, :]
    out = product("bnkrs,bnksh->bnkrh", probs.astype(dtype), rows(pages.v).astype(dtype)).sum(axis=1)
    return (out / total[..., None]).astype(q.dtype)


def _bounds(*bounds: int | Int[Array, ""]) -> list[Int[Array, ""]] | tuple[int, ...]:
    """The bounds of a loop: numbers, which make it a scan, or else of one dtype."""
    return bounds if all(isinstance(bound, int) for bound in bounds) else [jnp.asarray(b, jnp.int32) for b in bounds]


def _pages_a_row(rows: int, pages: Pages, tables: Int[Array, "B N"] | None) -> int:
    return pages.k.shape[0] // rows if tables is None else tables.shape[1]


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


def _logits(products: Float[Array, "..."], options: AttentionOptions) -> Float[Array, "..."]:
    scores, cap = products * options.scale, options.soft_cap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _visible(queries: Int[Array, "..."], keys: Int[Array, "..."], window: int | None) -> Bool[Array, "..."]:
    """Whether a query at one position sees a key at another."""
    causal = keys <= queries
    return causal if window is None else causal & (keys > queries - window)
