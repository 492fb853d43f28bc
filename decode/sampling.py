"""From logits to tokens on the device: log probabilities, masks, biases, penalties, filters, and the draw.

Steps and their order are vLLM V1's (`vllm/v1/sample/sampler.py`, `Sampler.forward`). Every step treats each row alone,
and a step that a row does not ask for leaves that row bit for bit as it was, so a request draws the same tokens
whatever it is batched with.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from ..sharding.rules import named_sharding, shard_map
from .sampling_params import SamplingParams

_MAX = float(np.finfo(np.float32).max)
_MAX_INT = int(np.iinfo(np.int32).max)


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """Which steps any row of a batch needs. Static under jit: a step that is off is not compiled.

    Attributes:
      random: some row draws; otherwise all are greedy.
      filters: some row that draws has top-k, top-p or min-p.
      min_tokens: some row may not end yet.
      bias: some row has a logit bias.
      penalties: some row has a repetition, presence or frequency penalty.
      candidates: how many of the likeliest tokens the filters look at, where the top-k of every row that draws is no
        larger; None for all, which costs a sort of the vocabulary.
      logprobs: width of the lists of top log probabilities: what the rows ask for, rounded up to one of few widths so
        that few programs are compiled; 0 for the chosen token's alone, None for none.
      mesh: over whose tensor axis the vocabulary is split: each device finds its own best, and only those are gathered.
    """

    random: bool = False
    filters: bool = False
    min_tokens: bool = False
    bias: bool = False
    penalties: bool = False
    logprobs: int | None = None
    candidates: int | None = None
    mesh: Mesh | None = None


# Unchecked at run time: JAX also rebuilds a pytree with shardings, shapes or stacked arrays for leaves.
@no_type_check
@struct.dataclass
class SamplingState:
    """What each row of a batch asks of sampling, and what it has sampled. `make_sampling_state` builds it.

    Attributes:
      seeds: high and low word of each row's seed.
      temperature: 0 where the row is greedy.
      top_k: the vocabulary size where off.
      top_p: 1 where off.
      log_min_p: -inf where off.
      repetition_penalty, presence_penalty, frequency_penalty: 1, 0 and 0 where off.
      min_length: the position, counted from the start of the prompt, from which the row may end.
      stop_mask: tokens that end the row; None unless the plan has min_tokens.
      bias: added to the logits; None unless the plan has bias.
      prompt_mask: tokens of the prompt; None unless the plan has penalties.
      output_counts: how often each token was sampled; None unless the plan has penalties.
    """

    seeds: UInt32[Array, "B 2"]
    temperature: Float[Array, "B"]
    top_k: Int32[Array, "B"]
    top_p: Float[Array, "B"]
    log_min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]
    min_length: Int32[Array, "B"]
    stop_mask: Bool[Array, "B V"] | None = None
    bias: Float[Array, "B V"] | None = None
    prompt_mask: Bool[Array, "B V"] | None = None
    output_counts: Int32[Array, "B V"] | None = None


@no_type_check  # as above: a scan stacks the leaves
@struct.dataclass
class SampleLogprobs:
    """Log probabilities of the model itself: before masks, biases, penalties, temperature and filters.

    Attributes:
      chosen: that of each row's token.
      rank: 1 for the likeliest token; of equals the lowest id ranks first, so that `top_ids[rank - 1]` is the token.
      top_ids: the likeliest tokens, N of them as the plan says, best first.
      top: their log probabilities.
    """

    chosen: Float[Array, "B"]
    rank: Int32[Array, "B"]
    top_ids: Int32[Array, "B N"]
    top: Float[Array, "B N"]


def make_sampling_state(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]] | None,
    seeds: Sequence[int],
    vocab_size: int,
    eos_token_ids: Collection[int] = (),
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[SamplingState, SamplingPlan]:
    """Lay a batch's requests out as arrays, on the host, and find which steps they need.

    Args:
      params: one a request, validated against the vocabulary (`SamplingParams.validate`).
      prompts: each request's prompt, of token ids in [0, vocab_size), which penalties and min_tokens ask for; None for
        empty ones.
      seeds: one a request, in [0, 2**64); used where its `params` name none.
      vocab_size: V.
      eos_token_ids: the model's end-of-sequence tokens.
      batch_size: B, the requests' number by default; rows past the requests are greedy and ask for nothing.
      mesh: the model's, or None for one device.

    Raises:
      ValueError: the sequences differ in length, or do not fit in `batch_size`.
    """
    requests, B, V = len(params), len(params) if batch_size is None else batch_size, vocab_size
    prompts = [()] * requests if prompts is None else prompts
    if not len(prompts) == len(seeds) == requests <= B:
        raise ValueError(
            f"{requests} sampling params, {len(prompts)} prompts and {len(seeds)} seeds for a batch of {B}; "
            "give one of each for every request, and a batch that holds them all"
        )
    drawn = [p for p in params if not p.greedy]
    plan = SamplingPlan(
        random=bool(drawn),
        filters=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in drawn),
        candidates=_candidates([p.top_k for p in drawn], V),
        mesh=mesh,
        min_tokens=any(p.min_tokens > 0 for p in params),
        bias=any(p.logit_bias for p in params),
        penalties=any(
            (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0) for p in params
        ),
        logprobs=_logprobs_width([p.logprobs for p in params if p.logprobs is not None], V),
    )
    rows = list(params) + [SamplingParams(temperature=0.0)] * (B - requests)
    lengths = [len(prompt) for prompt in prompts] + [0] * (B - requests)
    seeds = [s if p.seed is None else p.seed for p, s in zip(params, seeds, strict=True)] + [0] * (B - requests)

    def floats(values):
        # Out of the reach of overflow and underflow in float32, where 1e30 and 1e300 ask for the same.
        return np.array([min(max(x, 1e-30), 1e30) if x > 0 else x for x in values], np.float32)

    def ints(values):
        return np.array([min(n, _MAX_INT) for n in values], np.int32)

    stop_mask = bias = prompt_mask = output_counts = None
    if plan.min_tokens:
        stop_mask = np.zeros((B, V), bool)
        for row, p in enumerate(params):
            # An end token beyond the logits, which some configs name, can never be sampled.
            stop_mask[row, [t for t in (*eos_token_ids, *p.stop_token_ids) if t < V]] = True
    if plan.bias:
        bias = np.zeros((B, V), np.float32)
        for row, p in enumerate(params):
            for token, value in (p.logit_bias or {}).items():
                bias[row, token] = value
    if plan.penalties:
        prompt_mask, output_counts = np.zeros((B, V), bool), np.zeros((B, V), np.int32)
        for row, prompt in enumerate(prompts):
            prompt_mask[row, np.asarray(prompt, np.int64)] = True
    state = SamplingState(
        seeds=np.array([divmod(s, 2**32) for s in seeds], np.uint32).reshape(B, 2),
        temperature=floats(0.0 if p.greedy else p.temperature for p in rows),
        top_k=ints(min(p.top_k, V) if p.top_k > 0 else V for p in rows),
        top_p=floats(p.top_p for p in rows),
        log_min_p=np.array([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in rows], np.float32),
        repetition_penalty=floats(p.repetition_penalty for p in rows),
        presence_penalty=floats(p.presence_penalty for p in rows),
        frequency_penalty=floats(p.frequency_penalty for p in rows),
        min_length=ints(length + p.min_tokens for p, length in zip(rows, lengths, strict=True)),
        stop_mask=stop_mask,
        bias=bias,
        prompt_mask=prompt_mask,
        output_counts=output_counts,
    )
    return jax.tree.map(functools.partial(_place, vocab_size=V, mesh=mesh), state), plan


def _place(array, vocab_size, mesh):
    if mesh is None:
        return jnp.asarray(array)
    axes = ("batch", "vocab" if array.shape[1:] == (vocab_size,) else None)[: array.ndim]
    return jax.device_put(array, named_sharding("sampling state", array.shape, axes, mesh))


def _logprobs_width(asked: list[int], vocab_size: int) -> int | None:
    if not asked or max(asked) == 0:
        return 0 if asked else None
    width = 8
    while width < max(asked):
        width *= 4
    return min(width, vocab_size)


def _candidates(top_k: list[int], vocab_size: int) -> int | None:
    if not top_k or min(top_k) <= 0:
        return None
    return next((width for width in (64, 1024) if max(top_k) <= width < vocab_size), None)


@functools.partial(jax.jit, static_argnames="plan")
def sample(
    logits: Float[Array, "B V"], state: SamplingState, positions: Int[Array, "B"], plan: SamplingPlan
) -> tuple[Int32[Array, "B"], SampleLogprobs | None, SamplingState]:
    """Choose each row's next token.

    A row draws by Gumbel-max with noise that its seed, its position and the token id alone determine. A row that
    holds a NaN or +inf logit, such as one whose cache is full, gives token 0 and NaN log probabilities, and leaves the
    other rows as they are.

    Args:
      logits: float32, of the model.
      state: as `make_sampling_state` built it, or as the last call returned it.
      positions: of the token to be sampled, counted from the start of the row's prompt (whose first token is at 0).
      plan: which steps to run; static under jit.

    Returns:
      The tokens, their log probabilities if the plan has any, and the state that counts the tokens as sampled.
    """
    with jax.named_scope("sample"):
        broken = jnp.any(~(logits < jnp.inf), axis=-1)
        scores = _adjusted_logits(logits, state, positions, plan)
        tokens = jnp.argmax(scores, axis=-1)
        if plan.random:
            scores = _scaled_logits(scores, state)
            if plan.filters:
                scores = filtered_logits(scores, state, plan)
            drawn = jnp.argmax(scores + _gumbel(state, positions, logits.shape[-1]), axis=-1)
            tokens = jnp.where(state.temperature > 0, drawn, tokens)
        tokens = jnp.where(broken, 0, tokens).astype(jnp.int32)
        logprobs = None if plan.logprobs is None else _logprobs(logits, tokens, plan)
        if plan.penalties:
            sampled = _token_ids(logits) == tokens[:, None]
            state = state.replace(output_counts=state.output_counts + sampled)
        return tokens, logprobs, state


def _adjusted_logits(logits, state, positions, plan):
    """What greedy rows choose by too: end tokens masked, biases added, penalties taken off.

    Source: `MinTokensLogitsProcessor` and `LogitBiasLogitsProcessor` of `vllm/v1/sample/logits_processor/builtin.py`,
    `apply_penalties` of `vllm/model_executor/layers/utils.py`.
    """
    if plan.min_tokens:
        too_short = positions < state.min_length
        logits = jnp.where(state.stop_mask & too_short[:, None], -jnp.inf, logits)
    if plan.bias:
        logits = logits + state.bias
    if plan.penalties:
        counts = state.output_counts
        seen = state.prompt_mask | (counts > 0)
        penalty = jnp.where(seen, state.repetition_penalty[:, None], 1.0)
        logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = logits - state.frequency_penalty[:, None] * counts
        logits = logits - state.presence_penalty[:, None] * (counts > 0)
    return logits


def _scaled_logits(logits, state):
    """(logits - their maximum) / temperature: subtracted first, a tiny temperature overflows to -inf, never to inf."""
    # Clipped, as inf - inf is NaN: a row may have every token masked, or penalties that overflow.
    best = jnp.clip(jnp.max(logits, axis=-1, keepdims=True), -_MAX, _MAX)
    return (logits - best) / jnp.where(state.temperature > 0, state.temperature, 1.0)[:, None]


def filtered_logits(
    logits: Float[Array, "B V"], state: SamplingState, plan: SamplingPlan = SamplingPlan()
) -> Float[Array, "B V"]:
    """Logits, after temperature, with -inf for every token that min-p, top-k or top-p takes out of the draw.

    The tokens are ranked once, best first, of equals the lowest id first. Each filter keeps the head of that list:
    min-p those at least min_p times as likely as the first; top-k the first k, no more among equals; top-p, on the
    distribution that those two leave, the shortest head of probability top_p or more. One token at least is kept.

    Source: `MinPLogitsProcessor` of `vllm/v1/sample/logits_processor/builtin.py` and `apply_top_k_top_p_pytorch` of
    `vllm/v1/sample/ops/topk_topp_sampler.py` (whose top-k keeps every token equal to the k-th).
    """
    ranked, ranked_ids = _ranked(logits, plan)
    rank = jnp.arange(ranked.shape[-1])
    kept = rank < state.top_k[:, None]
    kept &= ranked >= ranked[:, :1] + state.log_min_p[:, None]
    probs = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    better = jnp.cumsum(probs, axis=-1) - probs
    # Off must be off exactly: the sum may round up to 1 before the last token.
    kept &= (better < state.top_p[:, None]) | (state.top_p[:, None] >= 1)
    last = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1) - 1
    bound, bound_id = (jnp.take_along_axis(x, last, axis=-1) for x in (ranked, ranked_ids))
    below = (logits < bound) | ((logits == bound) & (_token_ids(logits) > bound_id))
    return jnp.where(below, -jnp.inf, logits)


def _ranked(logits, plan):
    """The head of the list of tokens, best first, of equals the lowest id first: logits and ids."""
    if plan.candidates is not None:
        return _top(logits, plan.candidates, plan.mesh)

    def ranked(logits):
        best, ids = lax.sort((-logits, _token_ids(logits)), num_keys=1, is_stable=True)
        return -best, ids

    rows = ("batch", None)  # whole rows: one gather of the logits, and nothing after it
    return shard_map(ranked, plan.mesh, (rows,), (rows, rows))(logits)


def _top(logits, count, mesh):
    """`lax.top_k`, of which each device sends no more than `count` candidates of its own."""
    if mesh is None:
        return lax.top_k(logits, count)

    def local(logits):
        values, ids = lax.top_k(logits, min(count, logits.shape[-1]))
        return values, ids + lax.axis_index("tensor") * logits.shape[-1]

    def merged(values, ids):
        # Candidates are in the order of their devices' ids, so that of equals the lowest id still comes first.
        best, where = lax.top_k(values, count)
        return best, jnp.take_along_axis(ids, where, axis=-1)

    split, rows = ("batch", "vocab"), ("batch", None)
    candidates = shard_map(local, mesh, (split,), (split, split))(logits)
    return shard_map(merged, mesh, (rows, rows), (rows, rows))(*candidates)


def _gumbel(state, positions, vocab_size):
    """Standard Gumbel noise, float32 [B, V]: row b from fold_in(key(seed_b), position_b).

    Threefry counts its bits by token id, so a token's noise depends on neither V nor how V is sharded. The 32 bits make
    a float in (0, 1) with full relative precision near 0, where the large noise comes from (up to 22.9): the 23 bits of
    `jax.random.gumbel` end at 15.9, and tie in large vocabularies.
    """

    def row(key, position):
        return jax.random.bits(jax.random.fold_in(key, position), (vocab_size,), jnp.uint32)

    bits = jax.vmap(row)(jax.random.wrap_key_data(state.seeds, impl="threefry2x32"), positions)
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _logprobs(logits, tokens, plan):
    # Ranked by logits: subtracting the normalizer can round two of them to one value.
    ids, chosen = _token_ids(logits), tokens[:, None]
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    score = jnp.take_along_axis(logits, chosen, axis=-1)
    better = (logits > score) | ((logits == score) & (ids < chosen))
    top_ids = _top(logits, plan.logprobs, plan.mesh)[1]
    return SampleLogprobs(
        chosen=jnp.take_along_axis(logprobs, chosen, axis=-1)[:, 0],
        rank=1 + jnp.sum(better, axis=-1, dtype=jnp.int32),
        top_ids=top_ids,
        top=jnp.take_along_axis(logprobs, top_ids, axis=-1),
    )


def _token_ids(logits):
    return lax.broadcasted_iota(jnp.int32, logits.shape, 1)
