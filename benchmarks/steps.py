"""Prefills and decode steps as an engine runs them, ready to be timed: what is measured of a model is made here."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..decode import buckets
from ..decode.cache import KVCache, Rows, page_dtype
from ..decode.engine.engine import Engine
from ..decode.engine.pages import RowPages
from ..decode.engine.runner import Runner
from ..decode.engine.scheduler import Row
from ..decode.engine.sizes import PAGE_SIZE
from ..decode.loop import settle
from ..decode.sampling.layout import make_plan
from ..decode.sampling.params import SamplingParams
from ..decode.step import decode_step
from ..model.config import ModelConfig
from ..model.kv_specs import kinds_by_layer, page_kinds
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
    """Time to the first token: prompts on the host to tokens on the host, the engine made on the way.

    Beside "ttft": "set_up" of the engine alone, its pool and its slots.
    """
    rows, length = prompts.shape
    one, texts = dataclasses.replace(GREEDY, max_tokens=1), prompts.tolist()
    slots, longest = buckets.batch_bucket(rows), cache_bucket(length + 1)

    def set_up() -> Engine:
        return Engine(
            model,
            max_batch_size=slots,
            cache_tokens=slots * longest,
            max_length=longest,
            prefill_tokens=slots * CHUNK,
            kv_dtype=kv_dtype,
            whole_batches=True,
        )

    def first_token() -> Engine:
        engine = set_up()
        for text in texts:
            engine.submit(text, one)
        for _ in engine.run():
            pass
        return engine

    def turn() -> Mapping[str, float]:
        timed = {}
        for name, run in (("set_up", set_up), ("ttft", first_token)):
            timed[name], engine = elapsed(run)
            engine.close()
        return timed

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
    """Seconds a step: "tpot" in blocks, each read by the host while the next one runs, as an engine does.

    Beside it "queued", the same blocks read at the end alone; and "step", steps without sampling, queued likewise: a
    step that is waited for by itself has its launch in its time, and a queue of them has it once.
    """
    plan = make_plan([GREEDY], model.config.vocab_size)
    tokens = random_prompts(model.config.vocab_size, batch, 1)[:, 0]

    def in_blocks(runner: Runner, rows: Sequence[Row], count: int, read: bool) -> float:
        started, before = time.perf_counter(), None
        for _ in range(count // steps.block):
            (made, _), _ = runner.decode(rows, steps.block, plan)
            if read and before is not None:
                jax.device_get(before)
            before = made
        jax.device_get(before)
        return time.perf_counter() - started

    def alone(runner: Runner, rows: Sequence[Row], count: int) -> float:
        cache, given = _cache_of(runner, rows), jax.block_until_ready(runner.state.tokens + 0)
        started = time.perf_counter()
        for _ in range(count):
            logits, cache = decode_step(model.params, model.config, given, cache)
            settle(model, logits)
        jax.block_until_ready(logits)
        seconds, runner.pages = time.perf_counter() - started, cache.pages
        return seconds

    def turn() -> Mapping[str, float]:
        runner, rows = running_rows(model, batch, steps.capacity, kv_dtype)
        timed = {}
        for name, run, once in (
            ("tpot", functools.partial(in_blocks, read=True), steps.block),
            ("queued", functools.partial(in_blocks, read=False), steps.block),
            ("step", alone, 1),
        ):
            for count in (once, steps.count):  # what others left in the machine's caches is not this one's
                rewind(runner, tokens, steps.cached)
                seconds = run(runner, rows, count)
            timed[name] = seconds / steps.count
        runner.free()
        return timed

    return turn


def running_rows(model: Model, batch: int, capacity: int, kv_dtype: str | None) -> tuple[Runner, list[Row]]:
    """An engine's device side with so many rows that run, each with pages of its own for `capacity` positions.

    Layers with a window have as many pages as it reaches, used in turns. Pages hold noise: see `filled`.
    """
    entries, windows = -(-capacity // PAGE_SIZE), page_kinds(model.config)
    counts = [entries if window is None else min(entries, -(-window // PAGE_SIZE) + 1) for window in windows]
    pools = [batch * count for count in counts]
    runner = Runner(model, batch, pools, PAGE_SIZE, capacity, kv_dtype, whole_batches=True)
    runner.pages = jax.block_until_ready(jax.tree.map(_noise, runner.pages))
    rows = []
    for slot in range(batch):
        row = Row(slot, [], 0, capacity + 1, slot=slot, pages=RowPages(len(windows)))
        row.pages.lists = [[slot * count + n % count for n in range(entries)] for count in counts]
        runner.set_pages(row)
        rows.append(row)
    return runner, rows


def rewind(runner: Runner, tokens: np.ndarray, cached: int) -> None:
    """Let every row have so many positions, and one of the tokens [B] as its last, which is not cached yet."""
    state = runner.state

    def placed(values: np.ndarray) -> jax.Array:
        return jax.device_put(values.astype(np.int32), state.lengths.sharding)

    lengths = placed(np.full(len(tokens), cached))
    runner.state = jax.block_until_ready(state.replace(tokens=placed(tokens), lengths=lengths, contexts=lengths + 0))


def _cache_of(runner: Runner, rows: Sequence[Row]) -> KVCache:
    """The rows as `decode_step` takes them; it consumes the runner's pages."""
    tables = tuple(np.array(lists, np.int32) for lists in zip(*(row.pages.lists for row in rows), strict=True))
    full = np.array([row.max_length - 1 for row in rows], np.int32)
    state, kinds = runner.state, kinds_by_layer(runner.model.config)
    return KVCache(runner.pages, Rows(state.lengths + 0, full, state.contexts + 0, tables, kinds))


def compiled_step(model: Model, cache: KVCache, options: Mapping[str, Any]) -> Callable[..., Any]:
    """`decode_step` compiled with options of XLA's: a function of parameters, tokens and cache."""
    tokens = jnp.zeros((cache.batch_size,), jnp.int32)
    return decode_step.lower(model.params, model.config, tokens, cache).compile(dict(options))


def filled(cache: KVCache, cached: int) -> KVCache:
    """A cache of so many positions a row, noise in every page: zeros would draw less power, and let a GPU clock higher.

    What a cache holds does not change what a step does.
    """
    pages = jax.block_until_ready(jax.tree.map(_noise, cache.pages))
    lengths = jnp.full_like(cache.lengths, cached, device=cache.lengths.sharding)
    return cache.replace(pages=pages, lengths=lengths)


@functools.partial(jax.jit, donate_argnums=0)
def _noise(pages: jax.Array) -> jax.Array:
    block = jax.random.normal(jax.random.key(0), (1, *pages.shape[1:]))
    if pages.dtype == jnp.uint8:  # the bytes of float8
        block = lax.bitcast_convert_type(block.astype(jnp.float8_e4m3fn), jnp.uint8)
    elif pages.dtype == jnp.int8:
        block = 32 * block
    return jnp.broadcast_to(block.astype(pages.dtype), pages.shape) + pages
