"""Who holds which pages of the pool, and which of them hold what prompts begin with. On the host, in small integers.

The design is vLLM's (`vllm/v1/core/block_pool.py`): full pages are known by a hash of all tokens up to their end, pages
that nobody holds wait in the order of their last use, and a page is forgotten when it is taken for something else.
"""

import hashlib
from collections.abc import Iterable, Sequence

from ...model.kv_specs import pages_per_row

Key = bytes
"""Stands for all tokens up to the end of a page, and for whatever else their keys and values depend on."""

ABSENT = -1
"""In a row's list of pages: one that is no longer needed, as every query's window begins after it."""


def page_keys(tokens: Sequence[int], page_size: int, keys: list[Key], root: bytes = b"") -> None:
    """Append the keys of the full pages of `tokens` that `keys` lacks; `root` is what keys depend on besides tokens."""
    for first in range(len(keys) * page_size, len(tokens) - page_size + 1, page_size):
        parent = keys[-1] if keys else root
        page = b"".join(token.to_bytes(4, "little") for token in tokens[first : first + page_size])
        keys.append(hashlib.blake2b(parent + page, digest_size=16).digest())


class PagePool:
    """Pages that layers of one kind have on one data shard."""

    def __init__(self, pages: Iterable[int]):
        self._free = dict.fromkeys(pages)  # in the order of their last use
        self._holders = dict.fromkeys(self._free, 0)
        self._pages: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def size(self) -> int:
        return len(self._holders)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that would be found."""
        return sum(page in self._free for page in self._keys)

    def find(self, key: Key) -> int | None:
        """The page that holds what the key stands for."""
        return self._pages.get(key)

    def is_free(self, page: int) -> bool:
        return page in self._free

    def hold(self, page: int) -> None:
        self._free.pop(page, None)
        self._holders[page] += 1

    def take(self) -> int:
        """A page for new content: the one not used for longest, which is forgotten. One must be free."""
        page = next(iter(self._free))
        self.hold(page)
        self.forget(page)
        return page

    def release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free[page] = None

    def register(self, page: int, key: Key) -> None:
        """Let a held page be found by its key, unless another one is."""
        if key not in self._pages and page not in self._keys:
            self._pages[key] = page
            self._keys[page] = key

    def forget_all(self) -> None:
        for page in list(self._keys):
            self.forget(page)

    def forget(self, page: int) -> None:
        if page in self._keys:
            del self._pages[self._keys.pop(page)]


class RowPages:
    """The pages of one row: a list for each kind of layer, entry n for positions n * S to (n + 1) * S - 1."""

    def __init__(self, kinds: int):
        self.lists: list[list[int]] = [[] for _ in range(kinds)]
        self.registered = 0  # of the first of them, how many have been offered to the pools
        self.changed = True  # since the block tables were last made


class ShardPages:
    """The pools of one data shard, a kind of layer each: those that see all positions, and those of each window.

    Args:
      windows: of each kind; None sees all.
      pools: one a kind.
      page_size: S.
    """

    def __init__(self, windows: Sequence[int | None], pools: Sequence[PagePool], page_size: int):
        self.windows, self.pools, self.page_size = windows, pools, page_size

    @property
    def free(self) -> int:
        """Pages that nobody holds, of the kind that has fewest."""
        return min(pool.free for pool in self.pools)

    def match(self, keys: Sequence[Key]) -> int:
        """The longest beginning, in pages, of which every kind of layer has what tokens after it see."""
        count = len(keys)
        for window, pool in self._kinds():
            if window is None:
                count = next((n for n in range(count) if pool.find(keys[n]) is None), count)
        while True:
            gaps = [self._gap(window, pool, keys, count) for window, pool in self._windowed()]
            if all(gap is None for gap in gaps):
                return count
            count = min(gap for gap in gaps if gap is not None)

    def room_for(self, keys: Sequence[Key], matched: int, length: int) -> bool:
        """Whether a row that begins with `matched` pages of these keys could have all pages up to `length`."""
        for window, pool in self._kinds():
            first = self._first_seen(window, matched)
            revived = sum(pool.is_free(pool.find(keys[n])) for n in range(first, matched))
            if pool.free - revived < self._most_pages(window, length) - (matched - first):
                return False
        return True

    def fits(self, length: int) -> bool:
        """Whether a row of that length can have all its pages, were it alone."""
        return all(self._most_pages(window, length) <= pool.size for window, pool in self._kinds())

    def begin(self, keys: Sequence[Key], matched: int) -> RowPages:
        """A row that holds the first `matched` pages of these keys."""
        row = RowPages(len(self.pools))
        row.registered = matched
        for (window, pool), pages in zip(self._kinds(), row.lists, strict=True):
            first = self._first_seen(window, matched)
            pages += [ABSENT] * first + [pool.find(keys[n]) for n in range(first, matched)]
            for page in pages[first:]:
                pool.hold(page)
        return row

    def grow(self, row: RowPages, length: int) -> bool:
        """Give the row pages up to `length`; False, and nothing taken, if some pool has too few."""
        count = -(-length // self.page_size)
        missing = [count - len(pages) for pages in row.lists]
        if any(n > pool.free for n, pool in zip(missing, self.pools, strict=True)):
            return False
        for pool, pages, n in zip(self.pools, row.lists, missing, strict=True):
            for _ in range(n):
                pages.append(pool.take())
                row.changed = True
        return True

    def slide(self, row: RowPages, computed: int) -> None:
        """Release what lies before the window of every position from `computed` on."""
        for (window, pool), pages in zip(self._kinds(), row.lists, strict=True):
            end = min(_first_visible(window, computed) // self.page_size, len(pages))
            for n in reversed(range(end)):
                if pages[n] == ABSENT:
                    break
                pool.release(pages[n])
                pages[n] = ABSENT

    def register(self, row: RowPages, keys: Sequence[Key], count: int) -> None:
        """Let the row's first `count` pages be found by their keys."""
        for n in range(row.registered, count):
            for pool, pages in zip(self.pools, row.lists, strict=True):
                if pages[n] != ABSENT:
                    pool.register(pages[n], keys[n])
        row.registered = max(row.registered, count)

    def release(self, row: RowPages) -> None:
        """Release all of the row's pages, the last first, so that the beginning is found for longest."""
        for pool, pages in zip(self.pools, row.lists, strict=True):
            for page in reversed(pages):
                if page != ABSENT:
                    pool.release(page)
            pages.clear()

    def forget(self) -> None:
        """Let no page be found."""
        for pool in self.pools:
            pool.forget_all()

    def _most_pages(self, window: int | None, length: int) -> int:
        return pages_per_row(window, length, self.page_size)

    def _kinds(self) -> Iterable[tuple[int | None, PagePool]]:
        return zip(self.windows, self.pools, strict=True)

    def _windowed(self) -> Iterable[tuple[int, PagePool]]:
        return ((window, pool) for window, pool in self._kinds() if window is not None)

    def _first_seen(self, window: int | None, count: int) -> int:
        """The first page that a token after `count` pages sees."""
        return min(_first_visible(window, count * self.page_size) // self.page_size, count)

    def _gap(self, window: int, pool: PagePool, keys: Sequence[Key], count: int) -> int | None:
        """The last page that tokens after `count` pages see and that is not there; None if all are."""
        seen = reversed(range(self._first_seen(window, count), count))
        return next((n for n in seen if pool.find(keys[n]) is None), None)


def _first_visible(window: int | None, position: int) -> int:
    return 0 if window is None else max(0, position - window + 1)
