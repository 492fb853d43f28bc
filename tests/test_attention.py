"""The reference attention ops against a dense softmax in NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from ridgeline.pallas_kernels.attention import causal_attention, decode_attention, prefill_attention

B, K, G, H, S = 3, 2, 3, 20, 16
VARIANTS = [{}, {"window": 9}, {"soft_cap": 2.0}, {"window": 1}, {"window": 50, "soft_cap": 5.0}]


def dense(q, k, v, starts, lengths, *, scale, window=None, soft_cap=None):
    """q [B, T, K, G, H] at starts + t over k, v [B, L, K, H], of which lengths are valid."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("btkgh,bskh->bkgts", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    queries = starts[:, None, None] + np.arange(q.shape[1])[:, None]
    keys = np.arange(k.shape[1])
    seen = (keys <= queries) & (keys < lengths[:, None, None])
    if window is not None:
        seen &= keys > queries - window
    seen = seen[:, None, None]
    scores = np.where(seen, scores, -1e300)
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bkgts,bskh->btkgh", weights, v)


def random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def paged(rng, k, v, identity):
    """k, v [B, L, K, H] as pages and a table; the pages of a shuffled table lie among others full of garbage."""
    per_row = k.shape[1] // S
    spare = 0 if identity else 4
    order = np.arange(B * per_row) if identity else rng.permutation(B * per_row + spare)[: B * per_row]
    tables = order.reshape(B, per_row).astype(np.int32)
    pages = []
    for a in (k, v):
        out = np.full((B * per_row + spare, K, S, H), 1e3, np.float32)
        out[tables] = a.reshape(B, per_row, S, K, H).transpose(0, 1, 3, 2, 4)
        pages.append(out)
    return *pages, tables


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("T", [1, 37, 1100])
def test_causal_attention(T, variant):
    rng = np.random.default_rng(T)
    q, k, v = random(rng, B, T, K, G, H), random(rng, B, T, K, H), random(rng, B, T, K, H)
    out = causal_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), scale=0.3, **variant)
    expected = dense(q, k, v, np.zeros(B, int), np.full(B, T), scale=0.3, **variant)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "shuffled"])
@pytest.mark.parametrize("pages", [1, 7, 48])
def test_prefill_attention(pages, identity, variant):
    rng = np.random.default_rng(pages)
    L, T = pages * S, 11
    lengths = rng.integers(T, L + 1, B)
    starts = lengths - T
    k, v = random(rng, B, L, K, H), random(rng, B, L, K, H)
    for b in range(B):
        k[b, lengths[b] :] = v[b, lengths[b] :] = 1e3  # what an earlier owner of the page left
    q = random(rng, B, T, K, G, H)
    k_pages, v_pages, tables = paged(rng, k, v, identity)
    arrays = [jnp.asarray(a) for a in (q, k_pages, v_pages, tables, starts, lengths)]
    out = prefill_attention(*arrays, scale=0.3, identity_table=identity, **variant)
    np.testing.assert_allclose(out, dense(q, k, v, starts, lengths, scale=0.3, **variant), atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "shuffled"])
def test_decode_attention(identity, variant):
    rng = np.random.default_rng(5)
    L = 7 * S
    lengths = np.array([0, 1, 100])
    k, v = random(rng, B, L, K, H), random(rng, B, L, K, H)
    for b in range(B):
        k[b, lengths[b] :] = v[b, lengths[b] :] = 1e3
    q = random(rng, B, K, G, H)
    k_pages, v_pages, tables = paged(rng, k, v, identity)
    arrays = [jnp.asarray(a) for a in (q, k_pages, v_pages, tables, lengths)]
    out = decode_attention(*arrays, scale=0.3, identity_table=identity, **variant)
    expected = dense(q[:, None], k, v, lengths - 1, lengths, scale=0.3, **variant)[:, 0]
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert not out[0].any()  # a row of length 0 sees nothing


def test_an_unknown_implementation_is_refused():
    q = jnp.zeros((1, 4, 1, 1, 8))
    with pytest.raises((ValueError, TypeError), match="mosaik"):
        causal_attention(q, q[:, :, 0], q[:, :, 0], scale=1.0, implementation="mosaik")
