"""Prefill: many tokens a row in one compute-bound program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..model.config import ModelConfig
from ..model.params import Params
from ..model.transformer import transformer, unembed
from ..pallas_kernels.attention import prefill_attention
from .attend import cached_attend
from .cache import KVCache


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: KVCache,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append T tokens a row to the cache and return the logits after the last of each row.

    Calling it again continues the rows: a prompt prefilled in chunks gives the logits of one prefill. It compiles
    once a shape of `tokens` and of the cache, and consumes the cache it is given.

    Args:
      params: as `param_specs(config)`.
      config: the model (static).
      tokens: token ids, padded on the right.
      lengths: how many of the T tokens of each row count; 0 leaves a row as it is.
      cache: as `init_cache` or an earlier call returned it.

    Returns:
      Logits, float32, and the cache. A row whose tokens do not fit (cached + lengths > max_lengths), whose length is
      outside [0, T], or that has no tokens gets NaN logits, and its cache and length stay as they were.

    Raises:
      ValueError: batch sizes differ.
    """
    B, T = tokens.shape
    if B != cache.batch_size:
        raise ValueError(f"prefill got {B} rows of tokens for a cache of {cache.batch_size}; make them equal")
    starts = cache.lengths
    fits = (lengths >= 0) & (lengths <= T) & (starts + lengths <= cache.max_lengths)
    new = jnp.where(fits, lengths, 0)
    x, layers = hidden_states(params, config, tokens, new, cache)
    last = jnp.take_along_axis(x, jnp.maximum(new - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.where((new > 0)[:, None], unembed(params, config, last), jnp.nan)
    return cache.updated(logits, layers, starts + new)


def hidden_states(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], new: Int[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """The final hidden states after every token, and the layers of the cache with the first `new` of each row."""
    starts, steps = cache.lengths, jnp.arange(tokens.shape[1])
    positions, valid = starts[:, None] + steps, steps < new[:, None]
    attend = cached_attend(cache, prefill_attention, positions, valid, starts, starts + new)
    return transformer(params, config, tokens, positions, attend, cache.layers, cache.max_lengths)
