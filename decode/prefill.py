"""Prefill: many tokens a row in one compute-bound program."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..model import arguments
from ..model.config import ModelConfig
from ..model.params import Params
from ..model.transformer import Component, Residual
from .cache import KVCache
from .consume import jit_consuming
from .extend import extend, last_logits
from .logprobs import target_logprobs
from .loop import for_host
from .sampling.draw import SampleLogprobs


@functools.partial(jit_consuming, static_argnames=("config", "residual", "component"), donate_argnames="cache")
@arguments.arguments(
    params=arguments.parameters,
    config=arguments.config,
    tokens=arguments.array("iu", "B T"),
    lengths=arguments.array("iu", "B"),
    cache=arguments.instance(KVCache, hint="as init_cache makes one"),
    **arguments.seams,
)
def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    residual: Residual | None = None,
    component: Component | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append T tokens a row to the cache and return the logits after the last of each row.

    Calling it again continues the rows: a prompt prefilled in chunks gives the logits of one prefill. (RoPE kinds that
    depend on the length want the whole prompt's in `cache.contexts` for that.) It compiles once a shape of `tokens` and
    of the cache, and consumes the cache it is given.

    Args:
      params: as `param_specs(config)`.
      config: the model (static).
      tokens: token ids, padded on the right by any; those outside the vocabulary are refused as in `decode_step`.
      lengths: how many of the T tokens of each row count; 0 leaves a row as it is.
      cache: as `init_cache` or an earlier call returned it.
      residual, component: as in `transformer` (static).

    Returns:
      Logits, float32, and the cache. A row whose tokens do not fit (cached + lengths > max_lengths), whose length is
      outside [0, T], or that has no tokens gets `NO_LOGITS`, the lowest float32, for each of its logits, and its cache
      and length stay as they were.

    Raises:
      TypeError, ValueError: batch sizes differ, an id outside the vocabulary, or a cache that was consumed before.
    """
    return extend(params, config, tokens, lengths, cache, residual=residual, component=component)


@functools.partial(jax.jit, static_argnames=("config", "top", "residual", "component"), donate_argnames="cache")
def scored_prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    targets: Int[Array, "B T"],
    top: int,
    residual: Residual | None = None,
    component: Component | None = None,
) -> tuple[Float[Array, "B V"], KVCache, SampleLogprobs]:
    """`prefill`, and the log-probabilities of the token that follows each, `targets`, with the `top` likeliest."""
    seams = {"residual": residual, "component": component}
    x, cache = extend(params, config, tokens, lengths, cache, logits=None, **seams)
    there = jnp.arange(tokens.shape[1]) < lengths[:, None]
    logprobs, _ = target_logprobs([params], [config], [x], targets, there, top)
    return last_logits(params, config, x, lengths), cache, for_host(logprobs)
