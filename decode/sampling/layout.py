"""Requests in small arrays, on the host: which program they need, and what each of them asks for."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, no_type_check

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int32, UInt32

from .. import buckets
from .params import SamplingParams

EMPTY = SamplingParams(temperature=0.0)
"""What a row without a request asks for."""

_LOGPROBS = 32
NO_MIN_P = float(np.finfo(np.float32).min)
"""`Settings.log_min_p` of a row that has no min-p: finite, as `jax_debug_infs` wants it."""
MAX_INT = int(np.iinfo(np.int32).max)  # as a token id, one that no vocabulary has


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """Which of three programs samples a batch. Static under jit; a row draws the same under every plan that it fits.

    Attributes:
      kind: "greedy", the likeliest tokens; "random", which also draws, with temperature and filters; "full", which also
        has masks, biases, penalties and log probabilities, and needs a state with tables.
      logprobs: width of the lists of top log probabilities; 0 unless the kind is "full".
    """

    kind: Literal["greedy", "random", "full"] = "greedy"
    logprobs: int = 0


# Unchecked at run time: JAX also rebuilds a pytree with shardings, shapes or stacked arrays for leaves.
@no_type_check
@struct.dataclass
class Settings:
    """The numbers that each row of a batch asks for."""

    seeds: UInt32[Array, "B 2"]  # high and low word
    temperature: Float[Array, "B"]  # 0 where greedy
    top_k: Int32[Array, "B"]  # the largest int32 where off
    top_p: Float[Array, "B"]  # 1 where off
    log_min_p: Float[Array, "B"]  # NO_MIN_P where off
    repetition_penalty: Float[Array, "B"]  # 1 where off
    presence_penalty: Float[Array, "B"]  # 0 where off, as the next
    frequency_penalty: Float[Array, "B"]
    logprobs: Bool[Array, "B"]  # whether it wants any
    prompt_lengths: Int32[Array, "B"]


@no_type_check
@struct.dataclass
class RequestArrays:
    """R requests as `insert` takes them: token ids in lists, padded by an id that no vocabulary has."""

    settings: Settings
    allowed: Int32[Array, "R N"]  # the only tokens that may be drawn; none where all may
    masked: Int32[Array, "R N"]
    masked_until: Int32[Array, "R N"]  # the position, from the start of the prompt, from which each may be drawn
    bias: Int32[Array, "R N"]
    bias_values: Float[Array, "R N"]
    prompt: Int32[Array, "R N"]  # these two where penalties look at them
    output: Int32[Array, "R N"]


def make_plan(params: Collection[SamplingParams], vocab_size: int) -> SamplingPlan:
    """The coarsest plan that any of the requests needs."""
    logprobs = [vocab_size if p.logprobs == -1 else p.logprobs for p in params if p.logprobs is not None]
    if logprobs or any(p.logit_bias or p.min_tokens or _is_suppressed(p) or _is_penalized(p) for p in params):
        return SamplingPlan("full", top_width(max(logprobs, default=0), vocab_size))
    return SamplingPlan("greedy" if all(p.greedy for p in params) else "random")


def top_width(count: int, vocab_size: int) -> int:
    """Width of a compiled list of the `count` likeliest tokens: 32, 128, 512 and so on."""
    width = _LOGPROBS
    while width < count:
        width *= 4
    return min(width, vocab_size)


def coarsest(plans: Iterable[SamplingPlan]) -> SamplingPlan:
    """The plan that serves all of them; greedy for none."""
    kinds = ("greedy", "random", "full")
    return max(plans, key=lambda plan: (kinds.index(plan.kind), plan.logprobs), default=SamplingPlan())


def request_arrays(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    eos_token_ids: Collection[int] = (),
    outputs: Sequence[Sequence[int]] | None = None,
) -> RequestArrays:
    """Lay requests out as arrays.

    Args as in `make_sampling_state`; `outputs` is what requests that are resumed have sampled before.
    """
    outputs = [()] * len(params) if outputs is None else outputs
    masks = [_masked(p, len(prompt), eos_token_ids) for p, prompt in zip(params, prompts, strict=True)]
    lists = {
        "allowed": [p.allowed_token_ids or () for p in params],
        "masked": masks,
        "bias": [tuple(p.logit_bias or ()) for p in params],
        "prompt": [ids if p.repetition_penalty != 1 else () for p, ids in zip(params, prompts, strict=True)],
        "output": [ids if _is_penalized(p) else () for p, ids in zip(params, outputs, strict=True)],
    }
    width = buckets.token_list_bucket(max((len(ids) for rows in lists.values() for ids in rows), default=0))
    seeds = [seed if p.seed is None else p.seed for p, seed in zip(params, seeds, strict=True)]

    def floats(name):
        values = np.array([getattr(p, name) for p in params])
        # Out of the reach of overflow and underflow in float32, where 1e30 and 1e300 ask for the same.
        return np.where(values > 0, np.clip(values, 1e-30, 1e30), values).astype(np.float32)

    def ints(values):
        return np.array([min(n, MAX_INT) for n in values], np.int32)

    settings = Settings(
        seeds=np.array([divmod(seed, 2**32) for seed in seeds], np.uint32).reshape(-1, 2),
        temperature=np.where([p.greedy for p in params], np.float32(0), floats("temperature")),
        top_k=ints(p.top_k if p.top_k > 0 else MAX_INT for p in params),
        top_p=floats("top_p"),
        log_min_p=np.array([math.log(p.min_p) if p.min_p > 0 else NO_MIN_P for p in params], np.float32),
        repetition_penalty=floats("repetition_penalty"),
        presence_penalty=floats("presence_penalty"),
        frequency_penalty=floats("frequency_penalty"),
        logprobs=np.array([p.logprobs is not None for p in params], bool),
        prompt_lengths=ints(map(len, prompts)),
    )
    values = _padded([(p.logit_bias or {}).values() for p in params], width, 0, np.float32)
    until = _padded([ints(mask.values()) for mask in masks], width, 0, np.int32)
    ids = {name: _padded(rows, width, MAX_INT, np.int32) for name, rows in lists.items()}
    return RequestArrays(settings=settings, masked_until=until, bias_values=values, **ids)


def _masked(params, prompt_length, eos_token_ids=()):
    """The tokens that may not be drawn at once, and the position from which each may be."""
    ends = (*eos_token_ids, *params.stop_token_ids) if params.min_tokens else ()
    lists = (  # the longest last: it counts
        (params.begin_suppress_tokens, prompt_length + 1),
        (ends, prompt_length + params.min_tokens),
        (params.suppress_tokens, MAX_INT),
    )
    return {token: until for tokens, until in lists for token in tokens}


def _is_suppressed(params):
    return params.suppress_tokens or params.begin_suppress_tokens or params.allowed_token_ids


def _is_penalized(params):
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)


def _padded(rows, width, padding, dtype):
    padded = np.full((len(rows), width), padding, dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = list(values)
    return padded
