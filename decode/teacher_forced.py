"""Texts through the cache as they are written, with the log-probability of every token that is scored.

What comes before the scored tokens is computed once for all texts that begin alike: they share its full pages, and
copy the page that it ends in. Programs have as many rows as make 1,024 tokens of their width, so that few are compiled
whatever the lengths.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from ..model.config import ModelConfig
from ..model.loading import Model
from ..model.params import Params
from ..model.transformer import Residual
from ..sharding.rules import put_rows
from . import buckets
from .cache import KVCache, Rows, copy_pages, init_pages
from .engine.regime import regime_of
from .engine.sizes import PAGE_SIZE, default_cache_tokens
from .extend import extend
from .logprobs import target_logprobs
from .loop import for_host, settle
from .sampling.draw import SampleLogprobs

Figures = tuple[SampleLogprobs, dict[str, Any]]
"""What `target_logprobs` returns; of one text, [N] arrays on the host, N the tokens that are scored."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Attributes:
    name: for errors.
    tokens: at least two.
    first: place of the first token that is scored, at least 1; all after it are too.
    """

    name: str
    tokens: Int[np.ndarray, "N"]
    first: int

    @property
    def context(self) -> Int[np.ndarray, "_"]:
        """What texts may share: all before the token that predicts the first scored one."""
        return self.tokens[: self.first - 1]

    @property
    def targets(self) -> Int[np.ndarray, "_"]:
        return self.tokens[self.first :]

    @property
    def length(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.tokens) - 1


@dataclasses.dataclass(eq=False)
class _Stretch:
    """Tokens to append to a row's pages.

    Attributes:
      tokens: what to append.
      start: its first token's position.
      pages: the row's block table.
      length: of the whole row, which length-dependent RoPE goes by.
      copied: the page that is copied first, and where to, if any is.
      text: which of the texts it scores, if any.
      done: how many of the tokens were dispatched.
    """

    tokens: Int[np.ndarray, "N"]
    start: int
    pages: Sequence[int]
    length: int
    copied: tuple[int, int] | None = None
    text: int | None = None
    done: int = 0

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


class TeacherForced:
    """Scores texts by one model, or beside another.

    Args:
      models: the model, and perhaps a reference with its vocabulary and mesh; see `target_logprobs`.
      texts: what to score.
      top: how many of the likeliest tokens to list, at least.
      kv_dtypes: of each model's cached keys and values, as `init_cache` takes it.
      max_batch_size: most rows of a program, and how many of the longest the cache has room for.
      residual: as in `transformer`, of all models.

    Raises:
      ValueError: an unknown `kv_dtype`, or a text for which the devices have no memory.
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
    ):
        self._models, self._texts, self._top, self._residual = models, texts, top, residual
        self._mesh = models[0].mesh
        self._shards = 1 if self._mesh is None else self._mesh.shape["data"]
        self._rows = buckets.batch_bucket(-(-min(max_batch_size, len(texts)) // self._shards))
        longest = buckets.cache_bucket(max(text.length for text in texts))
        count, slots = len(models), self._rows * self._shards
        tokens = min(
            default_cache_tokens(model, count * slots, longest, buckets.PREFILL_CHUNK, kv_dtype)
            for model, kv_dtype in zip(models, kv_dtypes, strict=True)
        )
        # One page more for each row: of the page that its context ends in there may be two.
        self._pages_per_shard = tokens // count // self._shards // PAGE_SIZE + self._rows
        self._table_width = -(-longest // PAGE_SIZE)
        for text in texts:
            if _pages_of(len(text.context)) + _own_pages(text) > self._pages_per_shard:
                raise ValueError(
                    f"{text.name} has {len(text.tokens):,} tokens, and memory has room for "
                    f"{self._pages_per_shard * PAGE_SIZE:,} a row; take a shorter text, or a kv_dtype of fewer bits"
                )
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
                _check_finite(self._texts[text], parts[text])
                done += count
            if progress is not None:
                progress(done, total)

        behind = None  # read one dispatch late, so that the devices have work meanwhile
        for stretches in self._phases():
            for width, batch in self._batches(stretches):
                made, pieces = self._append(width, batch)
                if not pieces:
                    continue
                if behind is not None:
                    take(*behind)
                behind = made, pieces
        if behind is not None:
            take(*behind)
        return [jax.tree.map(lambda *x: np.concatenate(x), *of_text) for of_text in parts]

    def _phases(self) -> Iterator[list[list[_Stretch]]]:
        """What can be computed together, by data shard: contexts as many as have room, then what they are contexts of,
        and so on until no text is left. Pages are all handed out anew after that.
        """
        contexts, scored, used = self._nothing()
        for indices in self._groups():
            while indices:
                shard = used.index(min(used))
                indices, fit = self._place(indices, shard, contexts, scored, used)
                if not fit:
                    yield contexts
                    yield scored
                    contexts, scored, used = self._nothing()
        yield contexts
        yield scored

    def _nothing(self) -> tuple[list[list[_Stretch]], list[list[_Stretch]], list[int]]:
        return [[] for _ in range(self._shards)], [[] for _ in range(self._shards)], [0] * self._shards

    def _groups(self) -> list[list[int]]:
        """Texts with the same context, whose keys are the same; the longest contexts first."""
        regimes, groups = [regime_of(model.config) for model in self._models], {}
        for index, text in enumerate(self._texts):
            roots, ends = zip(*(regime(text.length) for regime in regimes), strict=True)
            alone = index if min(ends) < len(text.context) else None
            groups.setdefault((text.context.tobytes(), roots, alone), []).append(index)
        return sorted(groups.values(), key=lambda group: -len(self._texts[group[0]].context))

    def _place(
        self,
        indices: Sequence[int],
        shard: int,
        contexts: list[list[_Stretch]],
        scored: list[list[_Stretch]],
        used: list[int],
    ) -> tuple[Sequence[int], bool]:
        """Give a context and its texts pages of a shard; returns the texts that are left, and whether any fit."""
        texts = [self._texts[index] for index in indices]
        context, first = texts[0].context, shard * self._pages_per_shard
        end = used[shard] + _pages_of(len(context))
        shared = list(range(first + used[shard], first + end))
        full, fit = len(context) // PAGE_SIZE, 0
        for index, text in zip(indices, texts, strict=True):
            own = _own_pages(text)
            if end + own > self._pages_per_shard:
                break
            pages = list(range(first + end, first + end + own))
            copied = (shared[full], pages[0]) if len(shared) > full else None
            tokens, table = text.tokens[len(context) : -1], shared[:full] + pages
            scored[shard].append(_Stretch(tokens, len(context), table, text.length, copied, index))
            end, fit = end + own, fit + 1
        if fit:
            used[shard] = end
            if len(context):
                contexts[shard].append(_Stretch(context, 0, shared, texts[0].length))
        return indices[fit:], bool(fit)

    def _batches(self, stretches: list[list[_Stretch]]) -> Iterator[tuple[int, list[list[_Stretch]]]]:
        """Stretches that run together, by data shard, and how many tokens a row: of like lengths, the longest first."""
        while any(stretches):
            for queue in stretches:
                queue.sort(key=lambda stretch: -stretch.left)
            width = buckets.prefill_bucket(max(queue[0].left for queue in stretches if queue))
            rows = self._rows_of(width)
            yield width, [queue[:rows] for queue in stretches]
            stretches = [[s for s in queue[:rows] if s.left] + queue[rows:] for queue in stretches]

    def _rows_of(self, width: int) -> int:
        return min(self._rows, buckets.PREFILL_CHUNK // width)

    def _append(self, width: int, batch: Sequence[Sequence[_Stretch]]) -> tuple[Any, list[tuple[int, int, int]]]:
        """Hand the next tokens of some stretches to the devices: figures, and whose they are (row, text, count)."""
        per_shard = self._rows_of(width)
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
            residual=self._residual,
        )
        settle(self._models[0], made[0].chosen)
        return made, pieces


def _pages_of(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def _own_pages(text: Text) -> int:
    """Pages of a text that it does not share."""
    return _pages_of(text.length) - len(text.context) // PAGE_SIZE


def _check_finite(text: Text, parts: Sequence[Figures]) -> None:
    """Check the newest part of a text's figures."""
    logprobs, compared = parts[-1]
    for whose, values in {"the model": logprobs.chosen, "the reference": compared.get("reference", 0)}.items():
        if not np.isfinite(values).all():
            at = int(np.argmin(np.isfinite(values)))
            place = text.first + sum(len(part[0].chosen) for part in parts[:-1]) + at
            raise FloatingPointError(
                f"{text.name}: the log-probability of token {place} (id {text.tokens[place]}) is {values[at]}, as "
                f"{whose} has logits there that are not finite; load it in float32, and look at its weights"
            )


@functools.partial(jax.jit, static_argnames=("configs", "top", "residual"), donate_argnames="pages")
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
    residual: Residual | None,
) -> tuple[Figures, tuple[Any, ...]]:
    """Copy pages, append tokens to the rows of every model, and score those that are `scored`."""
    hidden, appended = [], []
    for of_model, config, pool in zip(params, configs, pages, strict=True):
        cache = KVCache(copy_pages(pool, config, sources, copies), rows)
        x, cache = extend(of_model, config, tokens, new, cache, logits=None, residual=residual)
        hidden.append(x)
        appended.append(cache.pages)
    return for_host(target_logprobs(params, configs, hidden, targets, scored, top)), tuple(appended)
