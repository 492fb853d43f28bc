"""The on-device loop: many decode steps and their sampling in one dispatch."""

import functools
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Int, UInt32

from ..model import arguments
from ..model.config import ModelConfig
from ..model.loading import Model
from ..model.params import Params
from ..model.transformer import Component, Residual
from ..sharding.rules import constrain
from .cache import KVCache
from .consume import jit_consuming
from .sampling.draw import SampleLogprobs, sample
from .sampling.layout import SamplingPlan
from .sampling.scores import Adjust
from .sampling.state import SamplingState
from .step import decode_step


@functools.partial(
    jit_consuming,
    static_argnames=("config", "plan", "steps", "residual", "component", "adjust"),
    donate_argnames=("cache", "state"),
)
@arguments.arguments(
    cache=arguments.instance(KVCache, hint="as init_cache makes one"),
    **arguments.seams,
    state=arguments.instance(SamplingState, hint="as make_sampling_state makes one"),
    plan=arguments.instance(SamplingPlan, hint="as make_sampling_state returns it"),
    steps=arguments.whole,
)
def decode_steps(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B"],
    cache: KVCache,
    state: SamplingState,
    plan: SamplingPlan,
    steps: int,
    residual: Residual | None = None,
    component: Component | None = None,
    adjust: Adjust | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> tuple[Int[Array, "N B"], SampleLogprobs | None, Int[Array, "B"], KVCache, SamplingState]:
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
      residual, component: as in `transformer` (static).
      adjust: as in `sample` (static).
      allowed: as in `sample`, for all steps: who knows of each token only what may follow it takes one.

    Returns:
      The sampled tokens and their log-probabilities (None where no row asks), step by step; then what the next call
      takes: the last tokens, cache and state.
    """

    def step(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        tokens, cache, state = carry
        logits, cache = decode_step(params, config, tokens, cache, residual, component)
        tokens, logprobs, state = sample(logits, state, cache.lengths, plan, None, adjust, tokens, allowed)
        return (tokens, cache, state), (tokens, logprobs)

    (tokens, cache, state), made = lax.scan(step, (tokens, cache, state), length=steps)
    made, logprobs = for_host(made)
    return made, logprobs, tokens, cache, state


def for_host(made: Any) -> Any:
    """Results that the host reads: whole on every device, so that each process of a mesh can read them."""
    return jax.tree.map(constrain, made)


def settle(model: Model, out: Any) -> None:
    """Wait, on a mesh of CPU devices: collective programs that are queued there wait for each other for ever."""
    if model.mesh is not None and model.mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(out)
