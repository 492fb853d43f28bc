"""The draw of tokens from scores, and the log probabilities of what was drawn."""

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int, Int32, UInt32

from ...model import arguments
from ...model.promotion import own_promotion
from .layout import SamplingPlan
from .scores import Adjust, token_ids, token_scores, top
from .state import SamplingState, count

NO_TOKEN = -1
"""What is drawn from logits that are no numbers: a token that no vocabulary has."""


@no_type_check  # a scan stacks the leaves
@struct.dataclass
class SampleLogprobs:
    """Log probabilities of the model itself: before adjustments, biases, penalties, temperature and filters.

    Zeros where no row of the batch wants any.
    """

    chosen: Float[Array, "B *T"]  # that of each token
    rank: Int32[Array, "B *T"]  # 1 for the likeliest; of equals the lowest id first: top_ids[rank - 1] is the token
    top_ids: Int32[Array, "B *T N"]  # the likeliest tokens, N of them as the plan says, best first
    top: Float[Array, "B *T N"]


@arguments.arguments(
    logits=arguments.array("f", "..."),
    state=arguments.instance(SamplingState, hint="as make_sampling_state makes one"),
    positions=arguments.array("iu", "..."),
    plan=arguments.instance(SamplingPlan, hint="as make_sampling_state returns it"),
)
@functools.partial(jax.jit, static_argnames=("plan", "adjust"))
@own_promotion
def sample(
    logits: Float[Array, "B *T V"],
    state: SamplingState,
    positions: Int[Array, "B *T"],
    plan: SamplingPlan,
    drafted: Int[Array, "B *T"] | None = None,
    adjust: Adjust | None = None,
    previous: Int[Array, "B *T"] | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> tuple[Int32[Array, "B *T"], SampleLogprobs | None, SamplingState]:
    """Choose the next token of each row, or of each of T positions of each row.

    A row draws by Gumbel-max with noise that its seed, the position and the token id alone determine. Logits with a NaN
    or +inf, or with a NaN that `adjust` has made, give `NO_TOKEN` and NaN log probabilities, and leave the other rows
    as they are.

    Args:
      logits: float32, of the model: [B, V], or [B, T, V] for T positions at once.
      state: as `make_sampling_state` built it, or as the last call returned it.
      positions: of the tokens to be sampled, counted from the start of the row's prompt (whose first token is at 0).
      plan: which steps to run; static under jit.
      drafted: a guess at the T tokens. What it has before a position counts in the penalties there, so that up to its
        first mistake the tokens are, bit for bit, those of T calls. None counts nothing.
      adjust: applied to the logits before everything else; see `Adjust` (static).
      previous: the token before each position, which `adjust` is told.
      allowed: the tokens that may be drawn, after `adjust`, in packed bits: token t is bit t % 32 of word t // 32, and
        W = ceil(V / 32). None for all.

    Returns:
      The tokens, their log probabilities if the plan has any, and the state, which after [B, V] has counted the tokens;
      after [B, T, V] it is as it was, and `count` counts those that are accepted.

    Raises:
      ValueError: `adjust` without `previous`.
    """
    if adjust is not None and previous is None:
        raise ValueError("adjust is told the token before each position; pass them as previous")
    with jax.named_scope("sample"):
        single = logits.ndim == 2
        if logits.ndim not in (2, 3) or positions.shape != logits.shape[:-1]:
            raise ValueError(
                f"sample: logits has shape {logits.shape} and positions {positions.shape}; give one position for each "
                "of the logits, [B, V] or [B, T, V]"
            )
        if single:
            logits, positions = logits[:, None], positions[:, None]
            previous = None if previous is None else previous[:, None]
        broken = jnp.any(~(logits < jnp.inf), axis=-1)
        scores = token_scores(logits, state, positions, plan, drafted, adjust, previous, allowed)
        if adjust is not None:
            broken |= jnp.any(jnp.isnan(scores), axis=-1)
        tokens = jnp.where(broken, NO_TOKEN, draw(scores, state, positions, plan))
        logprobs = _logprobs(logits, tokens, state, plan) if plan.kind == "full" else None
        if single:
            state = count(state, tokens, (~broken[:, 0]).astype(jnp.int32))
            tokens, logprobs = jax.tree.map(lambda x: x[:, 0], (tokens, logprobs))
        return tokens, logprobs, state


def draw(
    scores: Float[Array, "B T V"], state: SamplingState, positions: Int[Array, "B T"], plan: SamplingPlan
) -> Int32[Array, "B T"]:
    """The tokens with the largest score where a row is greedy, of scores and noise where it draws."""
    is_random = state.settings.temperature > 0

    def drawn():
        noise = gumbel_noise(state.settings.seeds, positions, scores.shape[-1])
        return _argmax(scores + jnp.where(is_random[:, None, None], noise, 0.0))

    if plan.kind == "random":
        return drawn()
    if plan.kind == "full":
        return lax.cond(jnp.any(is_random), drawn, lambda: _argmax(scores))
    return _argmax(scores)


def _argmax(scores):
    def in_two_passes(scores):  # each of which XLA vectorizes for a CPU
        best = jnp.max(scores, axis=-1, keepdims=True)
        return jnp.min(jnp.where(scores == best, token_ids(scores), scores.shape[-1] - 1), axis=-1)

    return lax.platform_dependent(scores, cpu=in_two_passes, default=lambda x: jnp.argmax(x, -1).astype(jnp.int32))


def gumbel_noise(seeds: Array, positions: Int[Array, "B T"], vocab_size: int) -> Float[Array, "B T V"]:
    """Standard Gumbel noise, float32: of row b and position t from fold_in(key(seed_b), position_bt).

    Threefry counts its bits by token id, so a token's noise depends on neither V nor how V is sharded, nor on
    `jax_threefry_partitionable`, under whose default `jax.random.bits` counts alike. The 32 bits make
    a float in (0, 1) with full relative precision near 0, where the large noise comes from (up to 22.9): the 23 bits of
    `jax.random.gumbel` end at 15.9, and tie in large vocabularies.
    """

    B, T = positions.shape  # flat: a batch of batches takes XLA three times as long to compile
    keys = jax.random.wrap_key_data(jnp.repeat(seeds, T, axis=0), impl="threefry2x32")
    words = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, positions.reshape(B * T)))
    ids = lax.broadcasted_iota(jnp.uint32, (B * T, vocab_size), 1)
    high, low = threefry2x32_p.bind(words[:, :1], words[:, 1:], jnp.zeros_like(ids), ids)
    bits = (high ^ low).reshape(B, T, vocab_size)
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def token_logprobs(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], count: int) -> SampleLogprobs:
    """Log-probabilities of given tokens, and the `count` likeliest ones."""
    # Ranked by logits: subtracting the normalizer can round two of them to one value.
    ids, chosen = token_ids(logits), tokens[..., None]
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    score = jnp.take_along_axis(logits, chosen, axis=-1)
    better = (logits > score) | ((logits == score) & (ids < chosen))
    top_ids = top(logits, count)[1]
    return SampleLogprobs(
        chosen=jnp.take_along_axis(logprobs, chosen, axis=-1)[..., 0],
        rank=1 + jnp.sum(better, axis=-1, dtype=jnp.int32),
        top_ids=top_ids,
        top=jnp.take_along_axis(logprobs, top_ids, axis=-1),
    )


def _logprobs(logits, tokens, state, plan):
    def ranked():
        return token_logprobs(logits, tokens, plan.logprobs)

    def none():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(ranked))

    return lax.cond(jnp.any(state.settings.logprobs), ranked, none)
