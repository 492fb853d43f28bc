"""Rounds of speculation on the device: draft, verify, accept, several times in one dispatch.

The target draws at every position of the draft with that position's own noise, and the draft is accepted as long as it
is what the target draws (drafter-invariant speculation: Daliri, Musco and Suresh 2024, arXiv 2408.07978). So the output
is, token for token, that of decoding without a draft.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from ...model.config import ModelConfig
from ...model.params import Params
from ...model.transformer import Component, Residual
from ..cache import KVCache
from ..extend import extend, last_logits
from ..logprobs import target_logprobs
from ..loop import for_host
from ..sampling.draw import NO_TOKEN, SampleLogprobs, sample
from ..sampling.layout import SamplingPlan
from ..sampling.scores import Adjust
from ..sampling.state import SamplingState, count
from .drafter import Drafter, Texts

REJECTED, NOTHING = NO_TOKEN - 1, NO_TOKEN - 2
"""In place of a token: a draft was wrong here, or before; and there was no draft."""


@functools.partial(
    jax.jit,
    static_argnames=("config", "drafter", "plan", "rounds", "residual", "component", "adjust"),
    donate_argnames=("cache", "draft_pages", "history", "features", "state"),
)
def speculate(
    params: Params,
    config: ModelConfig,
    draft_params: Any,
    drafter: Drafter,
    tokens: Int[Array, "B"],
    cache: KVCache,
    draft_pages: Any,
    history: Int[Array, "B C"],
    features: Float[Array, "B F"] | None,
    state: SamplingState,
    speculates: Bool[Array, "B"],
    plan: SamplingPlan,
    rounds: int,
    residual: Residual | None = None,
    component: Component | None = None,
    adjust: Adjust | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> tuple[Int[Array, "N B T"], SampleLogprobs | None, tuple[Any, ...]]:
    """`decode_steps` that makes 1 to T = `drafter.tokens` + 1 tokens a row and round, for one read of the weights.

    What a rejected draft has cached is left behind by the row's length, and written over. A row that fills up makes as
    many tokens as it has room for.

    Args:
      params, config, tokens, cache, state, plan, residual, component, adjust: as in `decode_steps`.
      draft_params, drafter: as `Drafter.bind` returned them (the second is static).
      draft_pages: as `Drafter.init_pages` returned them.
      history, features: as in `Texts`.
      speculates: rows that take drafts; the others make one token a round.
      rounds: N (static).
      allowed: as in `sample`, for rows that take no drafts: with it, `rounds` is 1.

    Returns:
      The sampled tokens and their log-probabilities (None where no row asks), round by round, `REJECTED` and `NOTHING`
      where there is none; then what the next call takes: the last tokens, cache, draft pages, history, features and
      state.
    """
    places = jnp.arange(drafter.tokens + 1)

    def round_(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        tokens, cache, draft_pages, history, features, state = carry
        rows, starts = cache.rows, cache.lengths
        drafts, drafted = jnp.zeros((len(tokens), 0), jnp.int32), jnp.zeros_like(tokens)
        if drafter.tokens:
            texts = Texts(rows, history, features, state)
            drafts, drafted, draft_pages = drafter.propose(draft_params, draft_pages, texts, plan, adjust)
        room = jnp.maximum(cache.max_lengths - starts, 0)
        new = jnp.minimum(jnp.where(speculates, drafted, 0) + 1, room)
        read = jnp.concatenate([tokens[:, None], drafts], axis=1)
        seen = Seen(drafter.layers, residual)
        seams = {"residual": seen, "component": component}
        logits, cache = extend(params, config, read, new, cache, form="decode", logits="all", **seams)
        positions = starts[:, None] + 1 + places
        guess = jnp.pad(drafts, ((0, 0), (0, 1)))
        made, logprobs, _ = sample(logits, state, positions, plan, guess, adjust, read, allowed)
        right = (made == guess) & (places < new[:, None] - 1)
        kept = jnp.minimum(jnp.cumprod(right, axis=1).sum(axis=1) + 1, new)
        last = jnp.take_along_axis(made, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
        history = history.at[jnp.arange(len(made))[:, None], positions].set(made, mode="drop")
        if drafter.layers:
            # From the token before on: which one would follow it was not known when it was read.
            before, whole = jnp.maximum(starts - 1, 0), jnp.concatenate([features[:, None], seen.features], axis=1)
            text = jnp.take_along_axis(history, before[:, None] + jnp.arange(drafter.tokens + 3), axis=1, mode="clip")
            count_read, at = jnp.where(kept > 0, kept + 1, 0), rows.replace(lengths=before)
            draft_pages = drafter.read(draft_params, draft_pages, text[:, :-1], count_read, at, text[:, 1:], whole)
            features = jnp.where((kept > 0)[:, None], last_of(seen.features, kept), features)
        carry = (
            jnp.where(kept > 0, last, tokens),
            cache.replace(lengths=starts + kept),
            draft_pages,
            history,
            features,
            count(state, made, kept),
        )
        missing = jnp.where(places < new[:, None], REJECTED, NOTHING)
        return carry, (jnp.where(places < kept[:, None], made, missing), logprobs)

    carry, made = lax.scan(round_, (tokens, cache, draft_pages, history, features, state), length=rounds)
    return *for_host(made), carry


class Seen:
    """A `Residual` that keeps the stream after some layers, and is another one besides."""

    def __init__(self, layers: Sequence[int], residual: Residual | None):
        self._layers, self._residual, self._streams = layers, residual, []

    def __call__(self, x: Float[Array, "B T D"], n: int) -> Float[Array, "B T D"]:
        x = x if self._residual is None else self._residual(x, n)
        self._streams += [x] * (n in self._layers)
        return x

    @property
    def features(self) -> Float[Array, "B T F"]:
        """Those streams side by side."""
        return jnp.concatenate(self._streams, axis=-1)


def last_of(features: Float[Array, "B T F"], new: Int[Array, "B"]) -> Float[Array, "B F"]:
    """Those of the last of each row's `new` tokens."""
    return jnp.take_along_axis(features, jnp.maximum(new - 1, 0)[:, None, None], axis=1)[:, 0]


@functools.partial(
    jax.jit,
    static_argnames=("config", "drafter", "top", "residual", "component"),
    donate_argnames=("cache", "draft_pages"),
)
def drafted_prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    targets: Int[Array, "B T"],
    draft_params: Any,
    drafter: Drafter,
    draft_pages: Any,
    top: int | None,
    residual: Residual | None = None,
    component: Component | None = None,
) -> tuple[Float[Array, "B V"], KVCache, SampleLogprobs | None, Any, Float[Array, "B F"]]:
    """`prefill` for a drafter that asks for layers, or `scored_prefill` where there is a `top`.

    Returns:
      What these return, None for no log-probabilities; then the draft pages, and the features of each row's last token.
    """
    rows, seen = cache.rows, Seen(drafter.layers, residual)
    x, cache = extend(params, config, tokens, lengths, cache, logits=None, residual=seen, component=component)
    draft_pages = drafter.read(draft_params, draft_pages, tokens, lengths, rows, targets, seen.features)
    logprobs = None
    if top is not None:
        there = jnp.arange(tokens.shape[1]) < lengths[:, None]
        logprobs = for_host(target_logprobs([params], [config], [x], targets, there, top)[0])
    logits = last_logits(params, config, x, lengths)
    return logits, cache, logprobs, draft_pages, last_of(seen.features, lengths)


@functools.partial(jax.jit, static_argnames="drafter", donate_argnames="pages")
def read_text(drafter: Drafter, params: Any, pages: Any, *text: Any) -> Any:
    """`Drafter.read` as a program, which consumes the pages."""
    return drafter.read(params, pages, *text)


@functools.partial(jax.jit, donate_argnames="history")
def set_history(history: Int[Array, "B C"], row: Int[Array, ""], text: Int[Array, "C"]) -> Int[Array, "B C"]:
    """The history with the text of a row that begins."""
    return history.at[row].set(text)
