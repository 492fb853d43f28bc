"""What `ridgeline bench` times: whole prefills and blocks of decode steps, as `generate` runs them, in turns."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..decode import buckets
from ..decode.cache import KVCache, init_cache
from ..decode.loop import decode_steps, sample_first
from ..decode.prefill import prefill
from ..decode.sampling import make_sampling_state
from ..decode.sampling_params import SamplingParams
from ..decode.step import decode_step
from ..model.loading import Model

Turn = Callable[[], Mapping[str, float]]
"""Runs something once; seconds by what was timed."""

OURS = "ridgeline"
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)


@dataclasses.dataclass
class Contest:
    """All who do the same work, and how long each took.

    Attributes:
      phase, batch, length: the work: prompts of so many tokens, or steps at so many positions.
      turns: by contender; `OURS` is one of them.
      runs: seconds of every turn, by what was timed.
      failures: why a contender is out, by contender.
    """

    phase: Literal["prefill", "decode"]
    batch: int
    length: int
    turns: dict[str, Turn]
    runs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


def in_turns(contests: Sequence[Contest], rounds: int, tick: Callable[[str], None]) -> None:
    """Let every contender run once to compile, then `rounds` times in turns; each round begins with another.

    A slow minute of the machine so falls on all. A peer that fails is out, with its reason; our own failure is raised.

    Args:
      contests: filled in.
      rounds: that count.
      tick: told of every turn.
    """
    pairs = [(contest, name) for contest in contests for name in contest.turns]
    for turn in range(rounds + 1):
        first = turn % len(pairs)
        for contest, name in pairs[first:] + pairs[:first]:
            if name not in contest.failures:
                _take(contest, name, counts=turn > 0)
            tick(f"{name}, {contest.phase} {contest.batch} x {contest.length}")


def _take(contest: Contest, name: str, counts: bool) -> None:
    try:
        seconds = contest.turns[name]()
    except Exception as error:  # whatever another program raises is the finding
        if name == OURS:
            raise
        contest.failures[name] = _reason(error)
        for timed in [timed for timed in contest.runs if timed == name]:
            del contest.runs[timed]
        return
    if counts:
        for timed, value in seconds.items():
            contest.runs.setdefault(timed, []).append(value)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def random_prompts(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Token ids [batch, length], the same in every run."""
    return np.random.default_rng(length).integers(0, vocab_size, (batch, length)).astype(np.int32)


def prefill_turn(model: Model, prompts: np.ndarray, kv_dtype: str | None) -> Turn:
    """Time to the first token: prompts on the host to tokens on the host, cache and sampling state made on the way.

    Beside "ttft": "set_up" of the cache and the sampling state alone, and "sampling" alone.
    """
    rows, length = prompts.shape
    chunks = _chunks(length)

    def set_up() -> tuple[KVCache, Any, Any]:
        cache = init_cache(model.config, rows, buckets.cache_bucket(length + 1), mesh=model.mesh, kv_dtype=kv_dtype)
        return cache, *_sampling(model, prompts)

    def first_token() -> tuple[jax.Array, Any, Any, Any]:
        cache, state, plan = set_up()
        for start, width in chunks:
            part = prompts[:, start : start + width]
            padded = np.zeros((rows, width), np.int32)
            padded[:, : part.shape[1]] = part
            lengths = np.full((rows,), part.shape[1], np.int32)
            logits, cache = prefill(model.params, model.config, padded, lengths, cache)
            _settle(model, logits)
        made, _, _, state = sample_first(logits, state, cache.lengths, plan)
        jax.device_get(made)
        return logits, state, cache.lengths, plan

    def sample(logits: jax.Array, state: Any, lengths: jax.Array, plan: Any) -> None:
        jax.device_get(sample_first(logits, state, lengths, plan)[0])

    def turn() -> Mapping[str, float]:
        alone, _ = _timed(lambda: jax.block_until_ready(set_up()[:2]))
        ttft, outputs = _timed(first_token)
        jax.block_until_ready(outputs[:3])
        sampling, _ = _timed(functools.partial(sample, *outputs))
        return {"ttft": ttft, "set_up": alone, "sampling": sampling}

    return turn


def padded_prompt(length: int) -> int:
    """Tokens that the programs for a prompt were compiled for."""
    return sum(width for _, width in _chunks(length))


def _chunks(length: int) -> list[tuple[int, int]]:
    """Start and width of each run of the prefill program, as `generate` has them."""
    starts = range(0, length, buckets.PREFILL_CHUNK)
    return [(start, buckets.prefill_bucket(min(length - start, buckets.PREFILL_CHUNK))) for start in starts]


@dataclasses.dataclass(frozen=True)
class Steps:
    """Decode steps that are timed together, around a context.

    Attributes:
      cached: positions a row holds before the first: so many that the steps see the context in the mean.
      count: of steps, in whole blocks.
      block: steps a dispatch.
      capacity: positions of the cache: as `generate` has it for the context, and no fewer than the steps need.
    """

    cached: int
    count: int
    block: int
    capacity: int


def plan_steps(context: int, tokens: int) -> Steps:
    """At least `tokens` steps around a context; a context below half of them is seen at its end, not in the mean."""
    block = min(tokens, buckets.DECODE_STEPS)
    count = -(-tokens // block) * block
    cached = max(1, context - (count + 1) // 2)
    return Steps(cached, count, block, max(buckets.cache_bucket(context), cached + count))


def decode_turn(model: Model, batch: int, steps: Steps, kv_dtype: str | None) -> Turn:
    """Seconds a step: "tpot" in blocks, "single" dispatched one by one, "step" one by one without sampling.

    The cache holds noise: what is in it does not change what a step does.
    """
    prompts = random_prompts(model.config.vocab_size, batch, 1)

    def rewound(cache: KVCache) -> KVCache:
        return cache.replace(lengths=jnp.full_like(cache.lengths, steps.cached, device=cache.lengths.sharding))

    def in_blocks(cache: KVCache, tokens: jax.Array, block: int, count: int) -> KVCache:
        state, plan = _sampling(model, prompts)
        started = time.perf_counter()
        for _ in range(count // block):
            made, _, tokens, cache, state = decode_steps(
                model.params, model.config, tokens, cache, state, plan, steps=block
            )
            jax.device_get(made)
        taken.append((time.perf_counter() - started) / count)
        return rewound(cache)

    def without_sampling(cache: KVCache, tokens: jax.Array, count: int) -> KVCache:
        started = time.perf_counter()
        for _ in range(count):
            logits, cache = decode_step(model.params, model.config, tokens, cache)
            jax.block_until_ready(logits)
        taken.append((time.perf_counter() - started) / count)
        return rewound(cache)

    taken: list[float] = []

    def turn() -> Mapping[str, float]:
        cache = _fill(rewound(init_cache(model.config, batch, steps.capacity, mesh=model.mesh, kv_dtype=kv_dtype)))
        place = None if model.mesh is None else cache.lengths.sharding
        tokens = jax.device_put(prompts[:, 0], place)
        found = {}
        for name, run, once in (
            ("tpot", functools.partial(in_blocks, block=steps.block), steps.block),
            ("single", functools.partial(in_blocks, block=1), 1),
            ("step", without_sampling, 1),
        ):
            cache = run(cache, tokens, count=once)  # what others left in the machine's caches is not this one's
            taken.clear()
            cache = run(cache, tokens, count=steps.count)
            found[name] = taken[0]
        return found

    return turn


def _sampling(model: Model, prompts: np.ndarray) -> tuple[Any, Any]:
    rows = len(prompts)
    return make_sampling_state(
        [GREEDY] * rows,
        [[]] * rows,
        list(range(rows)),
        model.config.vocab_size,
        model.generation.eos_token_ids,
        batch_size=rows,
        mesh=model.mesh,
    )


@functools.partial(jax.jit, donate_argnums=0)
def _noise(pages: jax.Array) -> jax.Array:
    block = jax.random.normal(jax.random.key(0), (1, *pages.shape[1:]))
    if pages.dtype == jnp.uint8:  # the bytes of float8
        block = lax.bitcast_convert_type(block.astype(jnp.float8_e4m3fn), jnp.uint8)
    elif pages.dtype == jnp.int8:
        block = 32 * block
    return jnp.broadcast_to(block.astype(pages.dtype), pages.shape) + pages


def _fill(cache: KVCache) -> KVCache:
    """Noise in every page: zeros would draw less power, and let a GPU clock higher."""
    leaves = {name: getattr(cache, name) for name in ("k", "v", "k_scales", "v_scales")}
    return cache.replace(**jax.block_until_ready(jax.tree.map(_noise, leaves)))


def _settle(model: Model, out: jax.Array) -> None:
    """Wait, on a mesh of CPU devices: collective programs that are queued there wait for each other for ever."""
    if model.mesh is not None and model.mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(out)


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    out = run()
    return time.perf_counter() - started, out
