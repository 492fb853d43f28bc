"""What sampling keeps of each row of a batch, on the device; rows enter and leave, and the others are not touched."""

import functools
import numbers
from collections.abc import Collection, Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32

from ...model import arguments
from ...model.fields import shortened
from ...model.promotion import own_promotion
from ...sharding.rules import constrain
from .layout import EMPTY, MAX_INT, RequestArrays, SamplingPlan, Settings, make_plan, request_arrays
from .params import SamplingParams

_TABLES = {"masked_until": jnp.int32, "bias": jnp.float32, "prompt_mask": bool, "output_counts": jnp.int32}


@no_type_check  # as `Settings`
@struct.dataclass
class SamplingState:
    """What each row of a batch asks of sampling, and what it has sampled; tables are None where no plan is "full"."""

    settings: Settings
    masked_until: Int32[Array, "B V"] | None = None  # the position from which each token may be drawn
    bias: Float[Array, "B V"] | None = None
    prompt_mask: Bool[Array, "B V"] | None = None
    output_counts: Int32[Array, "B V"] | None = None  # how often each token was sampled


@jax.transfer_guard("allow")
@arguments.arguments(
    params=arguments.sequence,
    prompts=arguments.optional(arguments.sequence),
    seeds=arguments.sequence,
    vocab_size=arguments.whole,
    batch_size=arguments.optional(arguments.whole),
    mesh=arguments.mesh,
)
def make_sampling_state(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]] | None,
    seeds: Sequence[int],
    vocab_size: int,
    eos_token_ids: Collection[int] = (),
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[SamplingState, SamplingPlan]:
    """A batch of requests on the device, and the plan that they need.

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
    requests, B = len(params), len(params) if batch_size is None else batch_size
    prompts = [()] * requests if prompts is None else prompts
    for name, values, kind in (("params", params, SamplingParams), ("prompts", prompts, Sequence)):
        for value in values:
            if not isinstance(value, kind):
                raise TypeError(f"make_sampling_state: {name} has {shortened(value)}; each must be {kind.__name__}")
    for seed in seeds:
        if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**64:
            raise ValueError(f"make_sampling_state: seeds has {shortened(seed)}; each must be in [0, 2**64)")
    if not len(prompts) == len(seeds) == requests <= B:
        raise ValueError(
            f"{requests} sampling params, {len(prompts)} prompts and {len(seeds)} seeds for a batch_size of {B}; "
            "give one of each for every request, and a batch that holds them all"
        )
    plan, empty = make_plan(params, vocab_size), B - requests
    arrays = request_arrays(
        [*params, *[EMPTY] * empty], [*prompts, *[()] * empty], [*seeds, *[0] * empty], eos_token_ids
    )
    state = empty_state(B, vocab_size, plan.kind == "full", mesh)
    return insert(state, np.arange(B, dtype=np.int32), arrays), plan


@functools.partial(jax.jit, static_argnames=("batch_size", "vocab_size", "tables", "mesh"))
@own_promotion
def empty_state(batch_size: int, vocab_size: int, tables: bool, mesh: Mesh | None = None) -> SamplingState:
    """B rows without requests, with or without the tables that a "full" plan needs."""

    def rows(x):
        return constrain(jnp.broadcast_to(x, (batch_size, *x.shape[1:])), "batch", mesh=mesh)

    def table(dtype):
        return constrain(jnp.zeros((batch_size, vocab_size), dtype), "batch", "vocab", mesh=mesh)

    settings = jax.tree.map(rows, request_arrays([EMPTY], [()], [0]).settings)
    return SamplingState(settings, **{name: table(dtype) for name, dtype in _TABLES.items() if tables})


@functools.partial(jax.jit, donate_argnames="state")
@own_promotion
def insert(state: SamplingState, rows: Int[Array, "R"], requests: RequestArrays) -> SamplingState:
    """Put requests into rows of a batch, in place of what was there; to insert `EMPTY` is to leave.

    Compiles once a number of requests and a bucket of their longest list. The state is consumed and updated in place;
    rows outside of the batch are left out.
    """
    new = {"settings": requests.settings}
    if state.bias is not None:
        each, V = jnp.arange(rows.shape[0])[:, None], state.bias.shape[1]
        zeros = {name: jnp.zeros((rows.shape[0], V), dtype) for name, dtype in _TABLES.items()}
        restricted = jnp.any(requests.allowed != MAX_INT, axis=1, keepdims=True)
        until = jnp.where(restricted, MAX_INT, zeros["masked_until"]).at[each, requests.allowed].set(0, mode="drop")
        new["masked_until"] = until.at[each, requests.masked].max(requests.masked_until, mode="drop")
        new["bias"] = zeros["bias"].at[each, requests.bias].set(requests.bias_values, mode="drop")
        new["prompt_mask"] = zeros["prompt_mask"].at[each, requests.prompt].set(True, mode="drop")
        new["output_counts"] = zeros["output_counts"].at[each, requests.output].add(1, mode="drop")
    return jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), state, SamplingState(**new))


def count(state: SamplingState, tokens: Int[Array, "B T"], accepted: Int[Array, "B"]) -> SamplingState:
    """The state once the first `accepted` of T tokens a row, 0 to T, belong to its output."""
    if state.output_counts is None:
        return state
    B, T = tokens.shape
    new = (jnp.arange(T) < accepted[:, None]).astype(jnp.int32)
    return state.replace(output_counts=state.output_counts.at[jnp.arange(B)[:, None], tokens].add(new))
