"""Cases for the attention ops, with arrays in which all that must not be read is NaN or out of range, and an oracle."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ridgeline.pallas_kernels.pages import AttentionOptions, Pages

BF16, F16, F32, INT8, FP8 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8, jnp.float8_e4m3fn
BOUND = {BF16: 2e-2, F16: 2e-3, F32: 1e-5}
"""Largest relative error, as norms, of an output of each dtype."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: one row a length. Its T newest tokens ask, or, with `starts`, those that stand there.

    `kv` is the pages' dtype where it is not the queries' own. The first `shared` pages are the same in all rows.
    """

    H: int = 64
    S: int = 16
    K: int = 1
    G: int = 1
    T: int = 1
    lengths: tuple[int, ...] = (100,)
    starts: tuple[int, ...] | None = None
    dtype: type = BF16
    kv: type | None = None
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    shared: int = 0

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        return "-".join(
            f"{f.name}={getattr(v, '__name__', v)}" for f in fields if (v := getattr(self, f.name)) != f.default
        )

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(self.H**-0.5 if self.scale is None else self.scale, self.window, self.soft_cap)

    def arrays(self, seed: int, *, garbage: float = np.nan) -> dict[str, Any]:
        """Queries [B, T, K, G, H], pages, tables, lengths, options and sinks, by the ops' names.

        Table entries past a row's end are out of range or name pages of nobody; pages of nobody, and what pages hold
        past their row's end or before what its window reaches, are `garbage`.
        """
        rng = np.random.default_rng(seed)
        B, K, S, H = len(self.lengths), self.K, self.S, self.H
        N = max(-(-length // S) for length in self.lengths) + 1
        P = B * N + 3
        tables = rng.permutation(P)[: B * N].reshape(B, N)
        tables[:, : self.shared] = tables[0, : self.shared]
        valid = np.zeros((P, S), bool)
        starts = self.starts or tuple(length - self.T for length in self.lengths)
        for row, start, length in zip(tables, starts, self.lengths, strict=True):
            used = -(-length // S)
            oldest = 0 if self.window is None else max(0, start + 1 - self.window)
            for n in range(used):
                valid[row[n], max(0, oldest - n * S) : length - n * S] = True
            row[used:] = np.resize([2**30, -7, P, int(np.argmin(valid.any(axis=1)))], N - used)
        arrays = {
            "q": jnp.asarray(rng.standard_normal((B, self.T, K, self.G, H)), self.dtype),
            "block_tables": jnp.asarray(tables, jnp.int32),
            "lengths": jnp.asarray(self.lengths, jnp.int32),
            "options": self.options,
        }
        if self.starts is not None:
            arrays["starts"] = jnp.asarray(starts, jnp.int32)
        if self.sinks:
            arrays["sinks"] = jnp.asarray(rng.standard_normal((K, self.G)) * 2, jnp.float32)
        pages = {}
        for name in "kv":
            values = rng.standard_normal((P, K, S, H))
            if self.kv in (INT8, FP8):
                scales = rng.uniform(0.5, 2.0, (P, K, S)) / 40
                pages[f"{name}_scales"] = jnp.asarray(np.where(valid[:, None], scales, garbage), jnp.float32)
                values = np.round(values * 40).clip(-127, 127)
            if self.kv != INT8:
                values = np.where(valid[:, None, :, None], values, garbage)
            pages[name] = jnp.asarray(values, jnp.float32).astype(self.kv or self.dtype)
        return arrays | {"pages": Pages(**pages)}


def dense(q, pages, block_tables, starts, lengths, options, *, sinks=None) -> np.ndarray:
    """Attention query by query, in float64: row b's query t stands at starts[b] + t; one past the length gets zeros."""
    q, k_pages, v_pages = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, pages.k, pages.v))
    if pages.k_scales is not None:
        k_pages = k_pages * np.asarray(pages.k_scales, np.float64)[..., None]
        v_pages = v_pages * np.asarray(pages.v_scales, np.float64)[..., None]
    scale, window, soft_cap = options.scale, options.window, options.soft_cap
    T, K, H = q.shape[1], q.shape[2], q.shape[4]
    S = k_pages.shape[2]
    out = np.zeros(q.shape)
    for b, (start, length) in enumerate(zip(np.asarray(starts), np.asarray(lengths), strict=True)):
        table = np.asarray(block_tables)[b, : -(-length // S)]
        k, v = (x[table].transpose(1, 0, 2, 3).reshape(K, -1, H) for x in (k_pages, v_pages))
        for t in range(max(0, -start), min(T, length - start)):
            end = start + t + 1
            seen = slice(0 if window is None else max(0, end - window), end)
            scores = np.einsum("kgh,ksh->kgs", q[b, t], k[:, seen]) * scale
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if sinks is not None:
                scores = np.concatenate([scores, np.asarray(sinks, np.float64)[..., None]], axis=-1)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights = (weights / weights.sum(axis=-1, keepdims=True))[..., : end - seen.start]
            out[b, t] = np.einsum("kgs,ksh->kgh", weights, v[:, seen])
    return out


def assert_close(out: jax.Array, expected: np.ndarray, dtype: type) -> float:
    """Within the dtype's bound, finite, of the dtype; returns the relative error."""
    assert out.dtype == dtype
    out = np.asarray(out, np.float64)
    assert np.isfinite(out).all()
    error = float(np.linalg.norm(out - expected) / max(np.linalg.norm(expected), 1e-30))
    assert error < BOUND[dtype]
    return error
