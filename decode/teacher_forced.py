"""Texts through the cache as they are written, with the log-probability of every token that is scored."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from ..model.config import ModelConfig
from ..model.loading import Model
from ..model.params import Params
from ..model.transformer import Component, Residual
from ..sharding.rules import put_rows
from . import buckets
from .cache import KVCache, Rows, copy_pages, init_pages
from .engine.regime import regime_of
from .engine.sizes import PAGE_SIZE, default_cache_tokens
from .extend import extend
from .logprobs import LOGITS, check_finite, target_logprobs
from .loop import for_host, settle
from .sampling.draw import SampleLogprobs
from .stretches import Sharded, Text, batches, pages_of, rows_of, waves

Figures = tuple[SampleLogprobs, dict[str, Any]]
"""What `target_logprobs` returns; of one text, [N] arrays on the host, N the tokens that are scored."""


class TeacherForced:
    """Scores texts by one model, or beside another.

    Args:
      models: the model, and perhaps a reference with its vocabulary and mesh; see `target_logprobs`.
      texts: what to score.
      top: how many of the likeliest tokens to list, at least.
      kv_dtypes: of each model's cached keys and values, as `init_cache` takes it.
      max_batch_size: most rows of a program, and how many of the longest the cache has room for.
      residual, component: as in `transformer`, of all models.

    Raises:
      ValueError: an unknown `kv_dtype`, or no memory for a cache.
    """

    def __init__(
        self,
        models: Sequence[Model],
        texts: Sequence[Text],
        kv_dtypes: Sequence[jax.typing.DTypeLike | None],
        *,
        max_batch_size: int,
        top: int = 0,
        residual: Residual | None = None,
        component: Component | None = None,
    ):
        self._models, self._texts, self._top = models, texts, top
        self._seams = {"residual": residual, "component": component}
        self._mesh = models[0].mesh
        self._shards = 1 if self._mesh is None else self._mesh.shape["data"]
        self._rows = buckets.batch_bucket(-(-min(max_batch_size, len(texts)) // self._shards))
        longest = buckets.cache_bucket(max(text.length for text in texts))
        self._table_width = pages_of(longest)
        room = min(
            default_cache_tokens(model, max(self._rows * self._shards, LOGITS), longest, buckets.PREFILL_CHUNK, dtype)
            for model, dtype in zip(models, kv_dtypes, strict=True)
        )
        # One page more for each row: of the page that its context ends in there may be two. A text always has room.
        most, pages = self._rows * self._table_width, room // len(models) // self._shards // PAGE_SIZE
        least = max(pages_of(len(text.context)) + text.own_pages for text in texts)
        self._pages_per_shard = max(min(most, pages) + self._rows, least)
        self._pages = tuple(
            init_pages(model.config, [self._pages_per_shard * self._shards] * len(kinds), PAGE_SIZE, self._mesh, dtype)
            for model, dtype in zip(models, kv_dtypes, strict=True)
            for kinds in [{layer.window for layer in model.config.layers}]
        )

    def run(self, progress: Callable[[int, int], None] | None = None) -> list[Figures]:
        """The figures of each text; `progress` is called with the tokens scored so far and those to score in all.

        Raises:
          FloatingPointError: a log-probability that is not finite, naming the text and the token.
        """
        parts: list[list[Figures]] = [[] for _ in self._texts]
        done, total = 0, sum(len(text.targets) for text in self._texts)

        def take(made: Any, pieces: Sequence[tuple[int, int, int]]) -> None:
            nonlocal done
            made = jax.device_get(made)
            for place, text, count in pieces:
                parts[text].append(jax.tree.map(lambda x, p=place, n=count: x[p, :n], made))
                self._check_finite(self._texts[text], parts[text])
                done += count
            if progress is not None:
                progress(done, total)

        behind = None  # read one dispatch late, so that the devices have work meanwhile
        regimes = [regime_of(model.config) for model in self._models]
        for wave in waves(self._texts, regimes, self._shards, self._pages_per_shard):
            for width, batch in itertools.chain(batches(wave.contexts, self._rows), batches(wave.scored, self._rows)):
                made, pieces = self._append(width, batch)
                if pieces and behind is not None:
                    take(*behind)
                behind = (made, pieces) if pieces else behind
        if behind is not None:
            take(*behind)
        return [jax.tree.map(lambda *x: np.concatenate(x), *of_text) for of_text in parts]

    def _append(self, width: int, batch: Sharded) -> tuple[Any, list[tuple[int, int, int]]]:
        """Hand the next tokens of some stretches to the devices: figures, and whose they are (row, text, count)."""
        per_shard = rows_of(width, self._rows)
        rows = per_shard * self._shards
        tokens, targets = np.zeros((2, rows, width), np.int32)
        new, starts, contexts = np.zeros((3, rows), np.int32)
        first = np.repeat(np.arange(self._shards, dtype=np.int32) * self._pages_per_shard, per_shard)
        tables = np.repeat(first[:, None], self._table_width, axis=1)  # where there is no row, a page of its shard
        sources, copies = first.copy(), np.full(rows, self._shards * self._pages_per_shard, np.int32)  # out of bounds
        scored, pieces = np.zeros((rows, width), bool), []
        for shard, stretches in enumerate(batch):
            for place, stretch in enumerate(stretches, shard * per_shard):
                count = min(stretch.left, width)
                tokens[place, :count] = stretch.tokens[stretch.done : stretch.done + count]
                new[place], starts[place], contexts[place] = count, stretch.start + stretch.done, stretch.length
                tables[place, : len(stretch.pages)] = stretch.pages
                if stretch.copied is not None and not stretch.done:
                    sources[place], copies[place] = stretch.copied
                if stretch.text is not None:
                    targets[place, :count] = self._texts[stretch.text].targets[stretch.done : stretch.done + count]
                    scored[place, :count] = True
                    pieces.append((place, stretch.text, count))
                stretch.done += count
        arrays = (tokens, new, targets, scored, sources, copies, starts, starts + new, contexts, tables)
        *arrays, starts, ends, contexts, tables = (put_rows(array, self._mesh) for array in arrays)
        made, self._pages = _append(
            tuple(model.params for model in self._models),
            tuple(model.config for model in self._models),
            self._pages,
            Rows(starts, ends, contexts, tables),
            *arrays,
            top=self._top,
            **self._seams,
        )
        settle(self._models[0], made[0].chosen)
        return made, pieces

    def _check_finite(self, text: Text, parts: Sequence[Figures]) -> None:
        """Check the newest part of a text's figures."""
        logprobs, compared = parts[-1]
        start = text.first + sum(len(part[0].chosen) for part in parts[:-1])
        dtypes = [model.config.dtype for model in self._models]
        check_finite(text.name, dtypes[0], text.tokens, start, logprobs.chosen)
        if compared:
            check_finite(f"{text.name}, by the reference", dtypes[1], text.tokens, start, compared["reference"])


@functools.partial(jax.jit, static_argnames=("configs", "top", "residual", "component"), donate_argnames="pages")
def _append(
    params: tuple[Params, ...],
    configs: tuple[ModelConfig, ...],
    pages: tuple[Any, ...],
    rows: Rows,
    tokens: Int[Array, "B T"],
    new: Int[Array, "B"],
    targets: Int[Array, "B T"],
    scored: Bool[Array, "B T"],
    sources: Int[Array, "B"],
    copies: Int[Array, "B"],
    top: int,
    **seams: Any,
) -> tuple[Figures, tuple[Any, ...]]:
    """Copy pages, append tokens to the rows of every model, and score those that are `scored`."""
    hidden, appended = [], []
    for of_model, config, pool in zip(params, configs, pages, strict=True):
        cache = KVCache(copy_pages(pool, config, sources, copies), rows)
        x, cache = extend(of_model, config, tokens, new, cache, logits=None, **seams)
        hidden.append(x)
        appended.append(cache.pages)
    return for_host(target_logprobs(params, configs, hidden, targets, scored, top)), tuple(appended)
