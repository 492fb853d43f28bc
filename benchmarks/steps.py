"""Prefills and decode steps as `generate` runs them, ready to be timed: what is measured of a model is made here."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..decode import buckets
from ..decode.cache import KVCache, page_dtype
from ..decode.runner import Runner, settle
from ..decode.sampling.params import SamplingParams
from ..decode.step import decode_step
from ..model.config import ModelConfig
from ..model.loading import Model
from .timing import Turn, elapsed

CHUNK = buckets.PREFILL_CHUNK
cache_bucket = buckets.cache_bucket
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)


def kv_name(config: ModelConfig, kv_dtype: str | None) -> str:
    """What a cache on the default device holds."""
    return kv_dtype or page_dtype(None, config, None).name


def random_prompts(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Token ids [batch, length], the same in every run."""
    return np.random.default_rng(length).integers(0, vocab_size, (batch, length)).astype(np.int32)


def prefill_turn(model: Model, prompts: np.ndarray, kv_dtype: str | None) -> Turn:
    """Time to the first token: prompts on the host to tokens on the host, cache and sampling state made on the way.

    Beside "ttft": "set_up" of the cache and the sampling state alone, and "sampling" alone.
    """
    length = prompts.shape[1]

    def set_up() -> Runner:
        return _runner(model, prompts, cache_bucket(length + 1), kv_dtype)

    def first_token() -> tuple[Runner, jax.Array]:
        runner = set_up()
        logits = runner.prefill(prompts)
        jax.device_get(runner.first(logits)[0])
        return runner, logits

    def turn() -> Mapping[str, float]:
        alone, _ = elapsed(lambda: jax.block_until_ready(set_up().cache))
        ttft, (runner, logits) = elapsed(first_token)
        jax.block_until_ready((logits, runner.state))
        sampling, _ = elapsed(lambda: jax.device_get(runner.first(logits)[0]))
        return {"ttft": ttft, "set_up": alone, "sampling": sampling}

    return turn


def chunks(length: int) -> list[tuple[int, int]]:
    """Start and width of each run of the prefill program over a prompt, as `generate` has them."""
    starts = range(0, length, CHUNK)
    return [(start, buckets.prefill_bucket(min(length - start, CHUNK))) for start in starts]


@dataclasses.dataclass(frozen=True)
class Steps:
    """Decode steps that are timed together: positions a row holds before the first, so that they see a context in the
    mean; how many, in whole blocks; steps a dispatch; positions of the cache, as `generate` has it for the context and
    no fewer than the steps need.
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
    return Steps(cached, count, block, max(cache_bucket(context), cached + count))


def decode_turn(model: Model, batch: int, steps: Steps, kv_dtype: str | None) -> Turn:
    """Seconds a step: "tpot" in blocks, each read by the host before the next, as tokens are generated.

    Beside it "queued", the same blocks read at the end alone; and "step", steps without sampling, queued likewise: a
    step that is waited for by itself has its launch in its time, and a queue of them has it once.
    """
    prompts = random_prompts(model.config.vocab_size, batch, 1)

    def in_blocks(runner: Runner, tokens: jax.Array, count: int, read: bool) -> float:
        _sample(runner, batch)
        runner.tokens = tokens
        jax.block_until_ready((runner.state, runner.cache.lengths))
        started = time.perf_counter()
        for _ in range(count // steps.block):
            made, _ = runner.decode(steps=steps.block)
            if read:
                jax.device_get(made)
        jax.device_get(made)
        return time.perf_counter() - started

    def alone(runner: Runner, tokens: jax.Array, count: int) -> float:
        jax.block_until_ready(runner.cache.lengths)
        started = time.perf_counter()
        for _ in range(count):
            logits, runner.cache = decode_step(model.params, model.config, tokens, runner.cache)
            settle(model, logits)
        jax.block_until_ready(logits)
        return time.perf_counter() - started

    def turn() -> Mapping[str, float]:
        runner = _runner(model, prompts, steps.capacity, kv_dtype)
        runner.cache = filled(runner.cache, steps.cached)
        tokens = jax.device_put(prompts[:, 0], None if model.mesh is None else runner.cache.lengths.sharding)
        timed = {}
        for name, run, once in (
            ("tpot", functools.partial(in_blocks, read=True), steps.block),
            ("queued", functools.partial(in_blocks, read=False), steps.block),
            ("step", alone, 1),
        ):
            for count in (once, steps.count):  # what others left in the machine's caches is not this one's
                runner.cache = rewound(runner.cache, steps.cached)
                seconds = run(runner, tokens, count)
            timed[name] = seconds / steps.count
        return timed

    return turn


def compiled_step(model: Model, cache: KVCache, options: Mapping[str, Any]) -> Callable[..., Any]:
    """`decode_step` compiled with options of XLA's: a function of parameters, tokens and cache."""
    tokens = jnp.zeros((cache.batch_size,), jnp.int32)
    return decode_step.lower(model.params, model.config, tokens, cache).compile(dict(options))


def filled(cache: KVCache, cached: int) -> KVCache:
    """A cache of so many positions a row, noise in every page: zeros would draw less power, and let a GPU clock higher.

    What a cache holds does not change what a step does.
    """
    return rewound(cache, cached).replace(pages=jax.block_until_ready(jax.tree.map(_noise, cache.pages)))


def rewound(cache: KVCache, cached: int) -> KVCache:
    """The cache with so many positions a row."""
    return cache.replace(lengths=jnp.full_like(cache.lengths, cached, device=cache.lengths.sharding))


@functools.partial(jax.jit, donate_argnums=0)
def _noise(pages: jax.Array) -> jax.Array:
    block = jax.random.normal(jax.random.key(0), (1, *pages.shape[1:]))
    if pages.dtype == jnp.uint8:  # the bytes of float8
        block = lax.bitcast_convert_type(block.astype(jnp.float8_e4m3fn), jnp.uint8)
    elif pages.dtype == jnp.int8:
        block = 32 * block
    return jnp.broadcast_to(block.astype(pages.dtype), pages.shape) + pages


def _runner(model: Model, prompts: np.ndarray, capacity: int, kv_dtype: str | None) -> Runner:
    """Ready for greedy rows that begin with these prompts."""
    runner = Runner(model, len(prompts), capacity, kv_dtype=kv_dtype)
    runner.begin(prompts, [capacity] * len(prompts))
    _sample(runner, len(prompts))
    return runner


def _sample(runner: Runner, rows: int) -> None:
    runner.sample_with([GREEDY] * rows, [[]] * rows, range(rows))
