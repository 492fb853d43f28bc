"""Scores: from logits to what a token is drawn by, as a pure function of logits and state.

Steps and their order are vLLM V1's (`vllm/v1/sample/sampler.py`, `Sampler.forward`). Every step treats each row alone,
and a step that a row does not ask for leaves that row bit for bit as it was, so a request draws the same tokens
whatever it is batched with.
"""

import functools
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Int32, UInt32

from ...sharding.rules import RULES, constrain, is_split, mesh_of, shard_map
from .layout import NO_MIN_P, SamplingPlan, Settings
from .state import SamplingState


@no_type_check  # as `Settings`
@struct.dataclass
class TokenContext:
    """What `adjust` is told of the tokens that are about to be drawn, one a row."""

    positions: Int32[Array, "B"]  # of the tokens, counted from the start of each row's prompt
    previous: Int32[Array, "B"]  # the tokens before them, of the prompt or of the output
    output_lengths: Int32[Array, "B"]  # how many tokens of its output each row has
    seeds: UInt32[Array, "B 2"]  # high and low word: that of the request, which tells rows apart


Adjust = Callable[[Float[Array, "B V"], TokenContext], Float[Array, "B V"]]
"""adjust(logits, context) -> logits: a pure function of float32 logits.

It comes first, before masks, biases, penalties, temperature and filters, as logits processors do in transformers and
vLLM; log probabilities are of the logits before it. Rows come in any order, beside rows that nobody asked for.
"""

_MAX = float(np.finfo(np.float32).max)
_CANDIDATES = 256  # among which most filters end


def token_scores(
    logits: Float[Array, "B T V"],
    state: SamplingState,
    positions: Int[Array, "B T"],
    plan: SamplingPlan,
    drafted: Int[Array, "B T"] | None = None,
    adjust: Adjust | None = None,
    previous: Int[Array, "B T"] | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> Float[Array, "B T V"]:
    """What tokens are chosen by: the largest of the scores where a row is greedy, of scores and noise where it draws.

    Args as in `sample`. Tokens that cannot be drawn have -inf.
    """
    if state.output_counts is not None:
        state = state.replace(output_counts=_counts_by_position(state.output_counts, drafted, logits.shape[1]))
    if adjust is not None:
        logits = _adjusted(logits, state.settings, positions, adjust, previous)
    if allowed is not None:
        logits = jnp.where(_unpacked(allowed, logits.shape[-1])[:, None], logits, -jnp.inf)
    if plan.kind == "full":
        logits = _penalized(logits, state, positions)
    if plan.kind == "greedy":
        return logits
    drawn = filtered_logits(_scaled(logits, state.settings), state.settings)
    return jnp.where(state.settings.temperature[:, None, None] > 0, drawn, logits)


def _adjusted(logits, settings, positions, adjust, previous):
    B, T, V = logits.shape
    by_row = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), (settings.prompt_lengths, settings.seeds))
    positions, previous = positions.reshape(B * T), previous.reshape(B * T)
    context = TokenContext(positions, previous, positions - by_row[0], by_row[1])
    return adjust(logits.reshape(B * T, V), context).reshape(B, T, V)


def _unpacked(words, V):
    bits = words[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return bits.reshape(len(words), -1)[:, :V].astype(bool)


def _counts_by_position(counts, drafted, T):
    """[B, T, V]: at each position, what the row's output holds if the tokens drafted before it are accepted."""
    by_position, ids = [counts], lax.broadcasted_iota(jnp.int32, counts.shape, 1)
    for t in range(T - 1):
        earlier = by_position[-1]
        by_position.append(earlier if drafted is None else earlier + (ids == drafted[:, t, None]))
    return jnp.stack(by_position, axis=1)


def _penalized(logits, state, positions):
    """What greedy rows choose by too: tokens masked, biases added, penalties taken off.

    Source: `MinTokensLogitsProcessor` and `LogitBiasLogitsProcessor` of `vllm/v1/sample/logits_processor/builtin.py`,
    `apply_penalties` of `vllm/model_executor/layers/utils.py`.
    """
    settings, counts = state.settings, state.output_counts
    repetition, presence, frequency = _by_row(
        settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty
    )
    logits = jnp.where(positions[..., None] < state.masked_until[:, None], -jnp.inf, logits)
    logits = logits + state.bias[:, None]
    penalty = jnp.where(state.prompt_mask[:, None] | (counts > 0), repetition, 1.0)
    logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return logits - frequency * counts - presence * (counts > 0)


def _scaled(logits, settings):
    """(logits - their maximum) / temperature: subtracted first, a tiny temperature overflows to -inf, never to inf."""
    # Clipped, as inf - inf is NaN: a row may have every token masked, or penalties that overflow.
    best = jnp.clip(jnp.max(logits, axis=-1, keepdims=True), -_MAX, _MAX)
    (temperature,) = _by_row(settings.temperature)
    return (logits - best) / jnp.where(temperature > 0, temperature, 1.0)


def filtered_logits(logits: Float[Array, "B T V"], settings: Settings) -> Float[Array, "B T V"]:
    """Logits, after temperature, with -inf for every token that min-p, top-k or top-p takes out of the draw.

    The tokens are ranked once, best first, of equals the lowest id first. Each filter keeps the head of that list:
    min-p those at least min_p times as likely as the first; top-k the first k, no more among equals; top-p, on the
    distribution that those two leave, the shortest head of probability top_p or more. One token at least is kept.

    Source: `MinPLogitsProcessor` of `vllm/v1/sample/logits_processor/builtin.py` and `apply_top_k_top_p_pytorch` of
    `vllm/v1/sample/ops/topk_topp_sampler.py` (whose top-k keeps every token equal to the k-th).
    """
    V = logits.shape[-1]
    off = (settings.top_k >= V) & (settings.top_p >= 1) & (settings.log_min_p <= NO_MIN_P)
    (off,) = _by_row(off | (settings.temperature == 0))

    def cut():
        last, certain = _last_kept(logits, settings, *top(logits, min(_CANDIDATES, V)))

        def of_all():
            by_sorting, _ = _last_kept(logits, settings, *_ranked(logits))
            return jax.tree.map(lambda x, y: jnp.where(certain, x, y), last, by_sorting)

        return lax.cond(jnp.all(certain | off), lambda: last, of_all)

    nowhere = jnp.zeros((*logits.shape[:2], 1), logits.dtype), jnp.zeros((*logits.shape[:2], 1), jnp.int32)
    score, token = lax.cond(jnp.all(off), lambda: nowhere, cut)
    below = (logits < score) | ((logits == score) & (token_ids(logits) > token))
    return jnp.where(below & ~off, -jnp.inf, logits)


def _last_kept(logits, settings, ranked, ids):
    """Score and id of the last token that the filters keep, and whether this head of the list is enough to tell."""
    V, head = logits.shape[-1], ranked.shape[-1]
    top_k, top_p, log_min_p = _by_row(settings.top_k, settings.top_p, settings.log_min_p)
    best = ranked[..., :1]
    kept = (jnp.arange(head) < top_k) & (ranked >= best + log_min_p)
    closed = (top_k <= head) | ~kept[..., -1:] | (head == V)  # all that top-k and min-p leave is in the head
    weights = jnp.where(kept, jnp.exp(ranked - best), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if head < V:
        rest = jnp.where(logits >= best + log_min_p, jnp.exp(logits - best), 0.0)
        total = jnp.where(closed, total, jnp.sum(rest, axis=-1, keepdims=True))
    probs = weights / total
    better = jnp.cumsum(probs, axis=-1) - probs
    # Off must be off exactly: the sum may round up to 1 before the last token.
    kept &= (better < top_p) | (top_p >= 1)
    certain = closed | ((top_k >= V) & ~kept[..., -1:])
    last = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1) - 1
    return tuple(jnp.take_along_axis(x, last, axis=-1) for x in (ranked, ids)), certain


def _ranked(logits):
    """All tokens, best first, of equals the lowest id first: scores and ids."""
    with jax.named_scope("whole_vocabulary"):
        split = constrain(logits, "batch", None, "vocab")  # or XLA gathers them ahead of the conditional
        whole = constrain(split, "batch")
        negative, ids = lax.sort((-whole, token_ids(whole)), num_keys=1, is_stable=True)
        return -negative, ids


def top(logits: Float[Array, "B T V"], count: int) -> tuple[Float[Array, "B T N"], Int[Array, "B T N"]]:
    """Scores and ids of the N = `count` likeliest tokens, best first, of equals the lowest id first.

    Each device ranks what it has of the vocabulary and sends its N best.
    """
    mesh, split = mesh_of(logits), ("batch", None, "vocab")
    in_parts = is_split("vocab", mesh)

    def local(logits):
        ids = token_ids(logits) + (lax.axis_index("tensor") * logits.shape[-1] if in_parts else 0)
        best, best_of_chunks = (functools.partial(way, count=count) for way in (_best, _best_of_chunks))
        return lax.platform_dependent(logits, ids, cpu=best, default=best_of_chunks)

    logits = jnp.where(logits == 0, 0.0, logits)  # -0.0 would rank below 0.0
    if in_parts:  # of one size, as shard_map wants them: what is added ranks below every token
        added = -logits.shape[-1] % mesh.shape[RULES["vocab"]]
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, added)), constant_values=-jnp.inf)
    candidates = shard_map(local, mesh, (split,), (split, split))(logits)
    return _best(*(constrain(x, "batch") for x in candidates), count) if in_parts else candidates


def _best_of_chunks(values, ids, count):
    """On GPUs, which sort for it, many short sorts take fewer passes over memory than a long one."""
    chunks, size = 1, values.shape[-1]
    while size % (2 * chunks) == 0 and size // (2 * chunks) >= 16 * count:
        chunks *= 2
    if chunks > 1:
        parts = _best(*(x.reshape(*x.shape[:-1], chunks, -1) for x in (values, ids)), count)
        values, ids = (x.reshape(*x.shape[:-2], -1) for x in parts)
    return _best(values, ids, count)


def _best(values, ids, count):
    """The `count` largest of each list and their ids, which are in order, so that of equals the lowest comes first."""
    best, where = lax.top_k(values, min(count, values.shape[-1]))
    # Without the barrier XLA merges later slices with that of top_k, no longer knows it, and sorts everything.
    return lax.optimization_barrier(best), jnp.take_along_axis(ids, where, axis=-1)


def token_ids(logits: Float[Array, "*B V"]) -> Int[Array, "*B V"]:
    """The token of each of the logits."""
    return lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _by_row(*settings):
    return (x[:, None, None] for x in settings)
