"""How large an engine's pool is: what is asked for, or what memory leaves."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...model.config import ModelConfig
from ...model.kv_specs import kinds_by_layer, kv_specs, page_kinds
from ...model.loading import Model
from ...model.params import abstract_params
from .. import buckets
from ..cache import KVCache, Rows, init_pages, page_dtype
from ..prefill import prefill
from ..speculation.drafter import Drafter
from .pages import PagePool, ShardPages

PAGE_SIZE = 64
"""Positions a page."""

_CPU_BYTES = 2**30
_SHARE = 0.95  # of what accelerators have left: the rest is for fragments and small arrays


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Attributes:
    slots: rows that run together.
    cache_tokens: positions that the pool holds.
    max_length: most positions of a row.
    windows, pages: of each kind of layer, its window and how many pages it has, of all data shards together.
    data: data shards.
    """

    slots: int
    cache_tokens: int
    max_length: int
    windows: tuple[int | None, ...]
    pages: tuple[int, ...]
    data: int

    def shards(self) -> list[ShardPages]:
        """Empty pools of each data shard."""
        shares = [pages // self.data for pages in self.pages]
        return [
            ShardPages(self.windows, [PagePool(range(n * share, (n + 1) * share)) for share in shares], PAGE_SIZE)
            for n in range(self.data)
        ]


def engine_sizes(
    model: Model,
    max_batch_size: int,
    cache_tokens: int | None,
    max_length: int | None,
    prefill_tokens: int,
    kv_dtype: jax.typing.DTypeLike | None,
    drafter: Drafter | None = None,
) -> Sizes:
    """Arguments and errors as of `Engine`."""
    sizes = {"max_batch_size": max_batch_size, "cache_tokens": cache_tokens, "max_length": max_length}
    for name, value in (sizes | {"prefill_tokens": prefill_tokens}).items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be positive")
    if prefill_tokens < buckets.SMALLEST_PREFILL:
        raise ValueError(f"prefill_tokens is {prefill_tokens}; it must be at least {buckets.SMALLEST_PREFILL}")
    config, data = model.config, 1 if model.mesh is None else model.mesh.shape["data"]
    slots = -(-max_batch_size // data) * data
    longest = min(max_length or config.max_position, config.max_position)
    windows = page_kinds(config)
    if cache_tokens is None:
        cache_tokens = default_cache_tokens(model, slots, longest, prefill_tokens, kv_dtype, drafter)
    a_shard = max(1, cache_tokens // data // PAGE_SIZE)
    pages = tuple(data * _share(window, a_shard, slots // data, prefill_tokens) for window in windows)
    return Sizes(slots, data * a_shard * PAGE_SIZE, min(longest, a_shard * PAGE_SIZE), windows, pages, data)


def default_cache_tokens(
    model: Model,
    slots: int,
    max_length: int,
    prefill_tokens: int,
    kv_dtype: jax.typing.DTypeLike | None = None,
    drafter: Drafter | None = None,
) -> int:
    """Positions of a pool that memory has room for, and no more than all rows at full length take."""
    return min(slots * _whole(max_length), _room(model, slots, prefill_tokens, kv_dtype, drafter))


def _whole(length: int) -> int:
    return math.ceil(length / PAGE_SIZE) * PAGE_SIZE


def _share(window: int | None, pages: int, slots: int, prefill_tokens: int) -> int:
    """Pages of a kind of layer on a shard: with a window, what is written in a step, and what the rows that run and as
    many finished ones hold."""
    if window is None:
        return pages
    held = -(-window // PAGE_SIZE) + 1
    return min(pages, -(-max(prefill_tokens, buckets.PREFILL_CHUNK) // PAGE_SIZE) + (2 * held + 1) * slots)


def _room(
    model: Model, slots: int, prefill_tokens: int, kv_dtype: jax.typing.DTypeLike | None, drafter: Drafter | None
) -> int:
    """Positions for which the devices have memory, of all data shards together."""
    config, mesh = model.config, model.mesh
    data, tensor = (1, 1) if mesh is None else (mesh.shape["data"], mesh.shape["tensor"])
    configs = [config, *(() if drafter is None else drafter.configs)]
    specs = jax.tree.leaves([kv_specs(c, page_dtype(kv_dtype, c, mesh), tensor) for c in configs])
    a_position = sum(jnp.dtype(s.dtype).itemsize * math.prod(s.shape(pages=1, page_size=1)) for s in specs)
    devices = [jax.local_devices()[0]] if mesh is None else list(mesh.local_devices)
    if devices[0].platform == "cpu":
        return data * max(PAGE_SIZE, _CPU_BYTES // a_position)
    left = min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in (d.memory_stats() for d in devices))
    scored = slots * (1 if drafter is None else drafter.tokens + 1)
    left = int(_SHARE * (left - _temporaries(config, mesh, scored, prefill_tokens, kv_dtype)))
    room = left * tensor // a_position
    if room < PAGE_SIZE:
        raise ValueError(
            f"no memory is left for a cache: {left / 2**30:.2f} GiB a device after weights and temporaries; take a "
            "smaller model, fewer bits, more devices, or a lower prefill_tokens"
        )
    return data * room


@functools.cache
def _temporaries(
    config: ModelConfig, mesh: Mesh | None, scored: int, prefill_tokens: int, kv_dtype: jax.typing.DTypeLike | None
) -> int:
    """Bytes a device of what the largest prefill needs besides its arguments, as XLA has compiled it, and of the scores
    of so many tokens."""
    data, kinds = 1 if mesh is None else mesh.shape["data"], len(page_kinds(config))
    width = buckets.prefill_floor(prefill_tokens)
    rows = data * max(1, prefill_tokens // width // data)
    zeros = jnp.zeros((rows,), jnp.int32)
    tables = (jnp.zeros((rows, 1), jnp.int32),) * kinds
    pages = init_pages(config, [data] * kinds, PAGE_SIZE, mesh, kv_dtype)
    cache = KVCache(pages, Rows(zeros, zeros, zeros, tables, kinds_by_layer(config)))
    compiled = prefill.lower(
        abstract_params(config, mesh), config, jnp.zeros((rows, width), jnp.int32), zeros, cache
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes + 3 * scored * config.vocab_size * 4  # logits and scores
