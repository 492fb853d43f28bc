"""Rotary position embeddings and the ways of stretching them past the pre-training context.

Sources: Su et al. 2021 (RoFormer); Chen et al. 2023 (linear interpolation); the NTK-aware dynamic scaling of
Hugging Face `transformers`; Peng et al. 2023 (YaRN); Ding et al. 2024 (LongRoPE); Meta's Llama 3.1 release (llama3).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .config import RopeConfig


def rope_tables(
    rope: RopeConfig, positions: Int[Array, "B T"], contexts: Int[Array, "B"]
) -> tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]:
    """Cosines and sines to rotate the heads at `positions`, in float32.

    Args:
      rope: the layer's rotary embedding.
      positions: absolute position of each token.
      contexts: the length of each row that the dynamic and longrope kinds pick their frequencies by.
    """
    frequencies = jnp.asarray(rope_frequencies(rope, contexts), jnp.float32)
    frequencies = frequencies.reshape(-1, 1, 1, rope.rotary_dim // 2)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rope(
    x: Float[Array, "B T *heads H"], cos: Float[Array, "B T 1 R"], sin: Float[Array, "B T 1 R"]
) -> Float[Array, "B T *heads H"]:
    """Rotate the first 2 R dimensions of each head, pairing dimension i with i + R; computed in float32."""
    half = cos.shape[-1]
    extra = x.ndim - cos.ndim
    cos, sin = (t.reshape(t.shape[:2] + (1,) * extra + t.shape[2:]) for t in (cos, sin))
    x1, x2, rest = jnp.split(x, [half, 2 * half], axis=-1)
    x1, x2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def rope_frequencies(
    rope: RopeConfig, contexts: Int[Array, "B"]
) -> np.ndarray | Float[Array, "R"] | Float[Array, "B R"]:
    """Radians a position of each rotated pair: one table, or one a row for the kinds that depend on the length."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    base = rope.theta**-exponents
    match rope.kind:
        case "default":
            return base
        case "linear":
            return base / rope.factor
        case "dynamic":
            return _dynamic(rope, exponents, contexts)
        case "llama3":
            return _llama3(rope, base)
        case "yarn":
            return _yarn(rope, base)
        case "longrope":
            stretched = contexts[:, None] > rope.original_max_position
            return jnp.where(stretched, base / np.asarray(rope.long_factor), base / np.asarray(rope.short_factor))
    raise ValueError(f"RoPE kind {rope.kind!r} has no formula")


def _dynamic(rope: RopeConfig, exponents: np.ndarray, contexts: Int[Array, "B"]) -> Float[Array, "B R"]:
    lengths = jnp.maximum(contexts, rope.original_max_position).astype(jnp.float32)
    growth = rope.factor * lengths / rope.original_max_position - (rope.factor - 1)
    theta = rope.theta * growth ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return theta[:, None] ** -jnp.asarray(exponents, jnp.float32)


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / base
    smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    kept = np.clip(smooth, 0.0, 1.0)
    return kept * base + (1 - kept) * base / rope.factor


def _yarn(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Dimensions that turn often in the original context are kept, rare ones divided by `factor`, a ramp between."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    high = high + 0.001 if low == high else high
    divided = np.clip((np.arange(rope.rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
    return base * (1 - divided) + base / rope.factor * divided
