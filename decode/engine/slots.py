"""What the device keeps of the rows that run, by slot, and the programs over slots."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from ...model.config import ModelConfig
from ...model.kv_specs import kinds_by_layer
from ...model.params import Params
from ...sharding.rules import constrain
from ..cache import KVCache, Rows
from ..loop import decode_steps, for_host
from ..prefill import scored_prefill
from ..sampling.draw import SampleLogprobs, sample
from ..sampling.layout import SamplingPlan
from ..sampling.scores import Adjust
from ..sampling.state import SamplingState, empty_state
from ..speculation.drafter import Drafter
from ..speculation.loop import drafted_prefill, speculate

Sampled = tuple[Int[Array, "N B *T"], SampleLogprobs | None]
"""New tokens, step by step or as `speculate` makes them, and their log-probabilities where the plan has any; on the
device."""


@struct.dataclass
class SlotState:
    """What the device keeps of the rows that run, by slot.

    Attributes:
      tokens: [B] int32, the last sampled token of each.
      lengths, contexts: as in `Rows`.
      sampling: what each asks for, and what penalties need of its output; None of rows that are just read.
      history, features: with a drafter, what `Texts` has of each, features where it asks for layers.
    """

    tokens: Any
    lengths: Any
    contexts: Any
    sampling: SamplingState | None
    history: Any = None
    features: Any = None


@functools.partial(jax.jit, static_argnames=("slots", "config", "history", "layers", "mesh"))
def empty_slots(slots: int, config: ModelConfig, history: int, layers: int, mesh: Any) -> SlotState:
    """Slots of a model; `history` positions, and features of so many `layers`, where these are not 0."""

    def zeros(*shape: int, dtype: Any = jnp.int32) -> Array:
        return constrain(jnp.zeros((slots, *shape), dtype), "batch", mesh=mesh)

    sampling, texts = empty_state(slots, config.vocab_size, False, mesh), zeros(history) if history else None
    features = zeros(layers * config.embed_dim, dtype=config.dtype) if layers else None
    return SlotState(zeros(), zeros(), zeros(), sampling, texts, features)


@functools.partial(
    jax.jit,
    static_argnames=("config", "plan", "steps", "residual", "component", "adjust"),
    donate_argnames=("pages", "state"),
)
def decode_slots(
    params: Params,
    config: ModelConfig,
    pages: Any,
    state: SlotState,
    slots: Int[Array, "b"] | None,
    max_lengths: Int[Array, "b"],
    tables: tuple[Int[Array, "b E"], ...],
    plan: SamplingPlan,
    steps: int,
    **seams: Any,
) -> tuple[Sampled, Any, SlotState]:
    """`decode_steps` of the rows in some slots; None is all of them, in order. Slots out of bounds are nobody's."""
    rows = _rows_of(state, slots, plan)
    cache = KVCache(pages, Rows(rows.lengths, max_lengths, rows.contexts, tables, kinds_by_layer(config)))
    made, logprobs, tokens, cache, sampling = decode_steps(
        params, config, rows.tokens, cache, rows.sampling, plan, steps, **seams
    )
    rows = rows.replace(tokens=tokens, lengths=cache.lengths, sampling=sampling)
    return (made, logprobs), cache.pages, _with_rows(state, slots, rows)


@functools.partial(
    jax.jit,
    static_argnames=("config", "drafter", "plan", "rounds", "residual", "component", "adjust"),
    donate_argnames=("draft_pages", "pages", "state"),
)
def speculate_slots(
    params: Params,
    config: ModelConfig,
    draft_params: Any,
    drafter: Drafter,
    draft_pages: Any,
    speculates: Bool[Array, "b"],
    pages: Any,
    state: SlotState,
    slots: Int[Array, "b"] | None,
    max_lengths: Int[Array, "b"],
    tables: tuple[Int[Array, "b E"], ...],
    plan: SamplingPlan,
    rounds: int,
    **seams: Any,
) -> tuple[Sampled, Any, Any, SlotState]:
    """`speculate` for the rows in some slots, as `decode_slots`."""
    rows = _rows_of(state, slots, plan)
    cache = KVCache(pages, Rows(rows.lengths, max_lengths, rows.contexts, tables, kinds_by_layer(config)))
    texts = rows.tokens, cache, draft_pages, rows.history, rows.features, rows.sampling
    made, logprobs, (tokens, cache, draft_pages, history, features, sampling) = speculate(
        params, config, draft_params, drafter, *texts, speculates, plan, rounds, **seams
    )
    changed = {"sampling": sampling, "history": history, "features": features}
    rows = rows.replace(tokens=tokens, lengths=cache.lengths, **changed)
    return (made, logprobs), draft_pages, cache.pages, _with_rows(state, slots, rows)


@functools.partial(jax.jit, static_argnames=("plan", "adjust"), donate_argnames="state")
def enter_slots(
    logits: Float[Array, "b V"],
    state: SlotState,
    slots: Int[Array, "b"],
    read: SlotState,
    plan: SamplingPlan,
    adjust: Adjust | None,
    allowed: UInt32[Array, "b W"] | None,
) -> tuple[Sampled, SlotState]:
    """Draw the tokens that follow texts, and put the rows into their slots; those out of bounds enter none.

    `read` has the last tokens of the texts, their lengths, and features where there are any.
    """
    sampling = _rows_of(state, slots, plan).sampling
    tokens, logprobs, sampling = sample(logits, sampling, read.lengths, plan, None, adjust, read.tokens, allowed)
    if state.history is not None:
        state = state.replace(history=state.history.at[slots, read.lengths].set(tokens, mode="drop"))
    made = for_host(jax.tree.map(lambda x: x[None], (tokens, logprobs)))
    return made, _with_rows(state, slots, read.replace(tokens=tokens, sampling=sampling))


READ = {decode_slots: 0, speculate_slots: 0, enter_slots: 0, scored_prefill: 2, drafted_prefill: 2}
"""Which result of a program the host reads."""


def _rows_of(state: SlotState, slots: Int[Array, "b"] | None, plan: SamplingPlan) -> SlotState:
    if plan.kind != "full":
        state = state.replace(sampling=SamplingState(state.sampling.settings))
    return state if slots is None else jax.tree.map(lambda x: x.at[slots].get(mode="clip"), state)


def _with_rows(state: SlotState, slots: Int[Array, "b"] | None, rows: SlotState) -> SlotState:
    """The state with the tokens and lengths of some rows, what their output counts in penalties, and their history."""
    counts = state.sampling.output_counts
    if rows.sampling.output_counts is not None:
        counts = _at(counts, slots, rows.sampling.output_counts)
    tokens, lengths, contexts = (
        _at(getattr(state, name), slots, getattr(rows, name)) for name in ("tokens", "lengths", "contexts")
    )
    history, features = (
        getattr(state, name) if getattr(rows, name) is None else _at(getattr(state, name), slots, getattr(rows, name))
        for name in ("history", "features")
    )
    return SlotState(tokens, lengths, contexts, state.sampling.replace(output_counts=counts), history, features)


def _at(old: Array, slots: Int[Array, "b"] | None, new: Array) -> Array:
    return new if slots is None else old.at[slots].set(new, mode="drop")
