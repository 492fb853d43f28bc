"""Decode: one token a row in one bandwidth-bound program."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..model.config import ModelConfig
from ..model.params import Params
from ..model.transformer import Component, Residual
from .cache import KVCache
from .consume import jit_consuming
from .extend import extend


@functools.partial(jit_consuming, static_argnames=("config", "residual", "component"), donate_argnames="cache")
def decode_step(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B"],
    cache: KVCache,
    residual: Residual | None = None,
    component: Component | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append one token a row to the cache and return the logits after it.

    Compiles once a shape of the cache, consumes the cache it is given, and updates all of it in place.

    Args:
      params: as `param_specs(config)`.
      config: the model (static).
      tokens: the next token id of each row.
      cache: as `prefill` or an earlier step returned it.
      residual, component: as in `transformer` (static).

    Returns:
      Logits, float32, and the cache. A row that is full (lengths == max_lengths) gets `NO_LOGITS`, the lowest float32,
      for each of its logits, and its cache and length stay as they were.

    Raises:
      ValueError: batch sizes differ.
    """
    new = jnp.ones_like(tokens)
    return extend(params, config, tokens[:, None], new, cache, form="decode", residual=residual, component=component)
