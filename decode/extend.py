"""The one forward over a cache, under `prefill`, `decode_step` and scoring."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..model import arguments
from ..model.config import ModelConfig
from ..model.params import Params
from ..model.promotion import own_promotion
from ..model.transformer import Component, Residual, transformer, unembed
from ..sharding.rules import constrain
from .attend import CachedAttend, Form
from .cache import KVCache

NO_LOGITS = float(jnp.finfo(jnp.float32).min)
"""Each of the logits where there is no new token: finite, and further down than any model goes."""


@own_promotion
@arguments.arguments(
    params=arguments.parameters,
    config=arguments.config,
    tokens=arguments.array("iu", "B T"),
    new=arguments.array("iu", "B"),
    cache=arguments.instance(KVCache, hint="as init_cache makes one"),
    **arguments.seams,
)
def extend(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    new: Int[Array, "B"],
    cache: KVCache,
    *,
    form: Form = "prefill",
    logits: Literal["last", "all"] | None = "last",
    residual: Residual | None = None,
    component: Component | None = None,
) -> tuple[Float[Array, "B *T N"], KVCache]:
    """Append the first `new` of T tokens to each row of a cache.

    Not jitted: it is to be called in a program that donates the cache, as `prefill` and `decode_step` are.

    Args:
      params: as `param_specs(config)`.
      config: the model.
      tokens: token ids, padded on the right.
      new: how many of each row count; 0 leaves a row as it is.
      cache: as `init_cache` or an earlier call returned it.
      form: how attention reads the pages: "prefill" in blocks of queries, "decode" once for up to 16 tokens a row.
      logits: after the "last" token of each row, or after "all"; None returns the hidden states in their place.
      residual, component: as in `transformer`.

    Returns:
      Logits, float32, [B, V] or [B, T, V], or what `unembed` takes, [B, T, D]; and the cache. A row whose tokens do not
      fit (cached + new > max_lengths) or whose `new` is outside [0, T] stays as it was. Where there is no new token,
      all logits are `NO_LOGITS`, and hidden states are nobody's.

    Raises:
      ValueError: batch sizes differ, or a cache whose windowed layers keep few pages gets more than 1,024 tokens a row.
    """
    B, T = tokens.shape
    most = cache.rows.most_new
    if most is not None and most < T:
        raise ValueError(
            f"{form} got {T} tokens a row; layers with a window keep pages for {most}: call it for so many"
        )
    if B != cache.batch_size:
        raise ValueError(f"{form} got {B} rows of tokens for a cache of {cache.batch_size} rows; make them equal")
    if new.shape != (B,):
        raise ValueError(f"{form} got new tokens of shape {new.shape} for {B} rows of tokens; give one number a row")
    starts = cache.lengths
    fits = (new >= 0) & (new <= T) & (starts + new <= cache.max_lengths)
    new = jnp.where(fits, new, 0)
    lengths = starts + new
    positions = starts[:, None] + jnp.arange(T)
    attend = CachedAttend(cache.rows, new, positions, config, form)
    contexts = jnp.maximum(cache.contexts, lengths)
    seams = {"residual": residual, "component": component}
    x, pages = transformer(params, config, tokens, positions, attend, cache.pages, contexts, **seams)
    cache = cache.replace(pages=pages, lengths=constrain(lengths, "batch"))
    if logits is None:
        return x, cache
    if logits == "last":
        return last_logits(params, config, x, new), cache
    scores = jnp.where((jnp.arange(T) < new[:, None])[..., None], unembed(params, config, x), NO_LOGITS)
    return constrain(scores, "batch", None, "vocab"), cache


def last_logits(
    params: Params, config: ModelConfig, x: Float[Array, "B T D"], new: Int[Array, "B"]
) -> Float[Array, "B V"]:
    """Logits after the last of each row's `new` tokens, of final hidden states; `NO_LOGITS` where there is none."""
    x = x[:, 0] if x.shape[1] == 1 else jnp.take_along_axis(x, jnp.maximum(new - 1, 0)[:, None, None], axis=1)[:, 0]
    return constrain(jnp.where((new > 0)[:, None], unembed(params, config, x), NO_LOGITS), "batch", "vocab")
