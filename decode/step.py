"""Decode: one token a row in one bandwidth-bound program."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..model import arguments
from ..model.config import ModelConfig
from ..model.params import Params
from ..model.transformer import Component, Residual
from .cache import KVCache
from .consume import jit_consuming
from .extend import extend


@functools.partial(jit_consuming, static_argnames=("config", "residual", "component"), donate_argnames="cache")
@arguments.arguments(
    params=arguments.parameters,
    config=arguments.config,
    tokens=arguments.array("iu", "B"),
    cache=arguments.instance(KVCache, hint="as init_cache makes one"),
    **arguments.seams,
)
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
      tokens: the next token id of each row. One outside the vocabulary is refused where the array is on the host or a
        CPU; under a trace, or on an accelerator, where to look would be to wait, ids are the caller's.
      cache: as `prefill` or an earlier step returned it.
      residual, component: as in `transformer` (static).

    Returns:
      Logits, float32, and the cache. A row that is full (lengths == max_lengths) gets `NO_LOGITS`, the lowest float32,
      for each of its logits, and its cache and length stay as they were.

    Raises:
      TypeError, ValueError: batch sizes differ, an id outside the vocabulary, or a cache that was consumed before.
    """
    new = jnp.ones_like(tokens)
    return extend(params, config, tokens[:, None], new, cache, form="decode", residual=residual, component=component)
