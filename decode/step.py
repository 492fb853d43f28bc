"""Decode: one token a row in one bandwidth-bound program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..model.config import ModelConfig
from ..model.params import Params
from ..model.transformer import transformer, unembed
from ..pallas_kernels.attention import decode_attention
from .attend import cached_attend
from .cache import KVCache


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B"],
    cache: KVCache,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append one token a row to the cache and return the logits after it.

    Compiles once a shape of the cache, consumes the cache it is given, and updates all of it in place.

    Args:
      params: as `param_specs(config)`.
      config: the model (static).
      tokens: the next token id of each row.
      cache: as `prefill` or an earlier step returned it.

    Returns:
      Logits, float32, and the cache. A row that is full (lengths == max_lengths) gets NaN logits, and its cache and
      length stay as they were.

    Raises:
      ValueError: batch sizes differ.
    """
    if tokens.shape[0] != cache.batch_size:
        raise ValueError(
            f"decode_step got {tokens.shape[0]} tokens for a cache of {cache.batch_size} rows; make them equal"
        )
    has_room = cache.lengths < cache.max_lengths
    lengths = cache.lengths + has_room
    positions = cache.lengths[:, None]

    attend = cached_attend(cache, _one_query_attention, positions, has_room[:, None], lengths)
    x, layers = transformer(params, config, tokens[:, None], positions, attend, cache.layers, cache.max_lengths)
    logits = jnp.where(has_room[:, None], unembed(params, config, x[:, 0]), jnp.nan)
    return cache.updated(logits, layers, lengths)


def _one_query_attention(q: Float[Array, "B 1 K G H"], *args: Array, **kwargs: Any) -> Float[Array, "B 1 K G H"]:
    return decode_attention(q[:, 0], *args, **kwargs)[:, None]
