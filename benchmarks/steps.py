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
from ..decode.cache import KVCache, init_cache, page_dtype
from ..decode.loop import decode_steps, sample_first
from ..decode.prefill import prefill
from ..decode.sampling import make_sampling_state
from ..decode.sampling_params import SamplingParams
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
    rows, length = prompts.shape

    def set_up() -> tuple[KVCache, Any, Any]:
        return new_cache(model, rows, cache_bucket(length + 1), kv_dtype), *_sampling(model, prompts)

    def first_token() -> tuple[jax.Array, Any, Any, Any]:
        cache, state, plan = set_up()
        for start, width in chunks(length):
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
        alone, _ = elapsed(lambda: jax.block_until_ready(set_up()[:2]))
        ttft, outputs = elapsed(first_token)
        jax.block_until_ready(outputs[:3])
        sampling, _ = elapsed(functools.partial(sample, *outputs))
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

    def in_blocks(cache: KVCache, tokens: jax.Array, count: int, read: bool) -> tuple[float, KVCache]:
        state, plan = _sampling(model, prompts)
        jax.block_until_ready((state, cache.lengths))
        started = time.perf_counter()
        for _ in range(count // steps.block):
            made, _, tokens, cache, state = decode_steps(
                model.params, model.config, tokens, cache, state, plan, steps=steps.block
            )
            jax.device_get(made) if read else _settle(model, made)
        jax.device_get(made)
        return time.perf_counter() - started, cache

    def alone(cache: KVCache, tokens: jax.Array, count: int) -> tuple[float, KVCache]:
        jax.block_until_ready(cache.lengths)
        started = time.perf_counter()
        for _ in range(count):
            logits, cache = decode_step(model.params, model.config, tokens, cache)
            _settle(model, logits)
        jax.block_until_ready(logits)
        return time.perf_counter() - started, cache

    def turn() -> Mapping[str, float]:
        cache = filled_cache(model, batch, steps.capacity, steps.cached, kv_dtype)
        tokens = jax.device_put(prompts[:, 0], None if model.mesh is None else cache.lengths.sharding)
        timed = {}
        for name, run, once in (
            ("tpot", functools.partial(in_blocks, read=True), steps.block),
            ("queued", functools.partial(in_blocks, read=False), steps.block),
            ("step", alone, 1),
        ):
            for count in (once, steps.count):  # what others left in the machine's caches is not this one's
                seconds, cache = run(rewound(cache, steps.cached), tokens, count)
            timed[name] = seconds / steps.count
        return timed

    return turn


def compiled_step(model: Model, cache: KVCache, options: Mapping[str, Any]) -> Callable[..., Any]:
    """`decode_step` compiled with options of XLA's: a function of parameters, tokens and cache."""
    tokens = jnp.zeros((cache.batch_size,), jnp.int32)
    return decode_step.lower(model.params, model.config, tokens, cache).compile(dict(options))


def new_cache(model: Model, batch: int, capacity: int, kv_dtype: str | None) -> KVCache:
    """An empty cache on the model's devices."""
    return init_cache(model.config, batch, capacity, mesh=model.mesh, kv_dtype=kv_dtype)


def filled_cache(model: Model, batch: int, capacity: int, cached: int, kv_dtype: str | None) -> KVCache:
    """A cache of so many positions a row, noise in every page: zeros would draw less power, and let a GPU clock higher.

    What a cache holds does not change what a step does.
    """
    cache = rewound(new_cache(model, batch, capacity, kv_dtype), cached)
    leaves = {name: getattr(cache, name) for name in ("k", "v", "k_scales", "v_scales")}
    return cache.replace(**jax.block_until_ready(jax.tree.map(_noise, leaves)))


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


def _sampling(model: Model, prompts: np.ndarray) -> tuple[Any, Any]:
    rows, eos = len(prompts), model.generation.eos_token_ids
    requests = [GREEDY] * rows, [[]] * rows, list(range(rows))
    return make_sampling_state(*requests, model.config.vocab_size, eos, batch_size=rows, mesh=model.mesh)


def _settle(model: Model, out: jax.Array) -> None:
    """Wait, on a mesh of CPU devices: collective programs that are queued there wait for each other for ever."""
    if model.mesh is not None and model.mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(out)
