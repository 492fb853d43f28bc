"""Prefill: many tokens a row in one compute-bound program."""

import functools

from jaxtyping import Array, Float, Int

from ..model.config import ModelConfig
from ..model.params import Params
from ..model.transformer import Residual
from .cache import KVCache
from .consume import jit_consuming
from .extend import extend


@functools.partial(jit_consuming, static_argnames=("config", "residual"), donate_argnames="cache")
def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    residual: Residual | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append T tokens a row to the cache and return the logits after the last of each row.

    Calling it again continues the rows: a prompt prefilled in chunks gives the logits of one prefill. (RoPE kinds that
    depend on the length want the whole prompt's in `cache.contexts` for that.) It compiles once a shape of `tokens` and
    of the cache, and consumes the cache it is given.

    Args:
      params: as `param_specs(config)`.
      config: the model (static).
      tokens: token ids, padded on the right.
      lengths: how many of the T tokens of each row count; 0 leaves a row as it is.
      cache: as `init_cache` or an earlier call returned it.
      residual: as in `transformer` (static).

    Returns:
      Logits, float32, and the cache. A row whose tokens do not fit (cached + lengths > max_lengths), whose length is
      outside [0, T], or that has no tokens gets `NO_LOGITS`, the lowest float32, for each of its logits, and its cache
      and length stay as they were.

    Raises:
      ValueError: batch sizes differ.
    """
    return extend(params, config, tokens, lengths, cache, residual=residual)
