"""What of given texts runs together, and on which pages. On the host; knows no device.

Texts that begin alike share what comes before their scored tokens: it is computed once, they use its full pages, and
copy the one that it ends in. Programs have as many rows as make 1,024 tokens of their width, so that few are compiled
whatever the lengths.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from . import buckets
from .engine.sizes import PAGE_SIZE


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

    @property
    def own_pages(self) -> int:
        """Pages that no other text uses."""
        return pages_of(self.length) - len(self.context) // PAGE_SIZE


@dataclasses.dataclass(eq=False)
class Stretch:
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


Sharded = list[list[Stretch]]
"""Stretches by data shard."""


def groups(texts: Sequence[Text], regimes: Sequence[Callable[[int], Any]]) -> list[list[int]]:
    """Texts with the same context, whose keys are the same, the longest contexts first; `regimes` as of `regime_of`."""
    alike: dict[Any, list[int]] = {}
    for index, text in enumerate(texts):
        roots, ends = zip(*(regime(text.length) for regime in regimes), strict=True)
        alone = index if min(ends) < len(text.context) else None
        alike.setdefault((text.context.tobytes(), roots, alone), []).append(index)
    return sorted(alike.values(), key=lambda group: -len(texts[group[0]].context))


class Wave:
    """What the cache has room for at once: contexts, and what they are contexts of.

    Args:
      texts: all there are.
      shards: data shards.
      pages: that each has.
    """

    def __init__(self, texts: Sequence[Text], shards: int, pages: int):
        self._texts, self._pages, self._used = texts, pages, [0] * shards
        self.contexts: Sharded = [[] for _ in range(shards)]
        self.scored: Sharded = [[] for _ in range(shards)]

    def place(self, group: Sequence[int]) -> int:
        """Give texts with one context, and it, pages of a shard: the first of them, as many as it returns."""
        shard, context = self._used.index(min(self._used)), self._texts[group[0]].context
        first, end = shard * self._pages, self._used[shard] + pages_of(len(context))
        shared, full = list(range(first + self._used[shard], first + end)), len(context) // PAGE_SIZE
        placed = 0
        for text in (self._texts[index] for index in group):
            if end + text.own_pages > self._pages:
                break
            own = list(range(first + end, first + end + text.own_pages))
            copied = (shared[full], own[0]) if len(shared) > full else None
            tokens, table = text.tokens[len(context) : -1], shared[:full] + own
            stretch = Stretch(tokens, len(context), table, text.length, copied, group[placed])
            self.scored[shard].append(stretch)
            end, placed = end + len(own), placed + 1
        if placed:
            self._used[shard] = end
            if len(context):
                self.contexts[shard].append(Stretch(context, 0, shared, self._texts[group[0]].length))
        return placed


def waves(texts: Sequence[Text], regimes: Sequence[Callable[[int], Any]], shards: int, pages: int) -> Iterator[Wave]:
    """All texts, on pages that each wave hands out anew."""
    wave = Wave(texts, shards, pages)
    for group in groups(texts, regimes):
        while group:
            placed = wave.place(group)
            group = group[placed:]
            if not placed:
                yield wave
                wave = Wave(texts, shards, pages)
    yield wave


def rows_of(width: int, most: int) -> int:
    """Rows a shard of a program of this width, of which there may be `most`."""
    return min(most, buckets.PREFILL_CHUNK // width)


def batches(stretches: Sharded, most: int) -> Iterator[tuple[int, Sharded]]:
    """Stretches that run together, and how many tokens of each at most: of like lengths, the longest first.

    Whoever asks counts what it runs in `done`; `most` as in `rows_of`.
    """
    while any(stretches):
        for queue in stretches:
            queue.sort(key=lambda stretch: -stretch.left)
        width = buckets.prefill_bucket(max(queue[0].left for queue in stretches if queue))
        rows = rows_of(width, most)
        yield width, [queue[:rows] for queue in stretches]
        stretches = [[s for s in queue[:rows] if s.left] + queue[rows:] for queue in stretches]


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)
