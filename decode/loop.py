"""The on-device loop: many decode steps and their sampling in one dispatch."""

import functools
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Int

from ..model.config import ModelConfig
from ..model.params import Params
from .cache import KVCache
from .sampling import SampleLogprobs, SamplingPlan, SamplingState, sample
from .step import decode_step


@functools.partial(jax.jit, static_argnames=("config", "plan", "steps"), donate_argnames=("cache", "state"))
def decode_steps(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B"],
    cache: KVCache,
    state: SamplingState,
    plan: SamplingPlan,
    steps: int,
) -> tuple[Int[Array, "N B"], SampleLogprobs | None, KVCache, SamplingState]:
    """Decode and sample `steps` tokens a row without coming back to the host.

    The trip count is known when it compiles: on a GPU a loop that asks whether to go on costs a round trip to the host
    at every step. Rows that finish on the way run on; the host drops what they make.

    Args:
      params: as `param_specs(config)`.
      config: the model (static).
      tokens: the last sampled token of each row.
      cache: holds everything before those tokens.
      state: per-row sampling state.
      plan: which sampling steps any row needs (static).
      steps: how many tokens to make (static).

    Returns:
      The sampled tokens and their log-probabilities (None where no row asks), step by step, then cache and state.
    """

    def step(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        tokens, cache, state = carry
        logits, cache = decode_step(params, config, tokens, cache)
        tokens, logprobs, state = sample(logits, state, cache.lengths, plan)
        return (tokens, cache, state), (tokens, logprobs)

    (_, cache, state), (made, logprobs) = lax.scan(step, (tokens, cache, state), length=steps)
    return made, logprobs, cache, state


sample_first = functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")(sample)
"""`sample` as a program of its own, for the token that follows prefill."""
