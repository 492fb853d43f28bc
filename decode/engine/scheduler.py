"""What runs next: rows that decode, and chunks of prompts, within a budget of tokens. On the host; knows no arrays.

There are no phases (as in Sarathi-Serve, Agrawal et al. 2024, and vLLM V1): a step runs the rows that decode, then
spends what is left of its budget on prompts, in order of priority and arrival. What it decides depends on the
submissions alone, never on time, so that every process of a mesh comes to the same.
"""

import bisect
import collections
import dataclasses
import sys
from collections.abc import Callable, Sequence

from .. import buckets
from .pages import Key, RowPages, ShardPages, page_keys

Regime = tuple[bytes, int]
"""What keys and values depend on besides tokens, and positions up to which they depend on nothing else."""


@dataclasses.dataclass(eq=False)
class Row:
    """A request as the scheduler sees it.

    Attributes:
      index: its number, in order of arrival.
      tokens: of the prompt, and of the output so far.
      prompt_tokens: how many of them are the prompt's.
      max_length: prompt and output at most.
      priority: lower runs first.
      borders: lengths at which the keys of all positions change, ascending (LongRoPE): the row is read again there.
      replays: whether a row that begins again reads its prompt alone, and makes its output anew: where keys depend on
        the length at which they were made.
      read_whole: whether it begins with no pages of others, as something is wanted of every token of its text.
      computed: positions whose keys and values are written, or will be by what was dispatched.
      in_flight: dispatches whose tokens the host has not seen.
      slot: its place among the rows that run; None while it waits.
      context: its length when it was last begun: what is read as a text, and what length-dependent RoPE goes by.
      done: whether it has ended; what is still in flight of it counts for nothing.
      pages: None until it is first begun.
      keys: of its full pages.
      root, shareable: the regime of its keys; see `Regime`.
      made: tokens that the host has seen since it was last begun, those of its text included.
      stepwise: whether the host must see each of its tokens before the next (a constraint).
      drafts: whether it may take drafts: its keys do not depend on the length at which they were made.
      drafted: positions that the drafter has read.
      step: the last in which something of it was dispatched.
    """

    index: int
    tokens: list[int]
    prompt_tokens: int
    max_length: int
    priority: int = 0
    borders: Sequence[int] = ()
    replays: bool = False
    read_whole: bool = False
    computed: int = 0
    in_flight: int = 0
    slot: int | None = None
    context: int = 0
    done: bool = False
    pages: RowPages | None = None
    keys: list[Key] = dataclasses.field(default_factory=list)
    root: bytes | None = None
    shareable: int = 0
    step: int = 0
    made: int = 0
    stepwise: bool = False
    drafts: bool = True
    drafted: int = 0

    @property
    def reading(self) -> bool:
        """Whether some of its text is yet to be prefilled."""
        return self.computed < self.context

    def known_again(self, count: int) -> int:
        """Of the next `count` tokens, how many the host knows from before the row began again."""
        return max(0, min(count, len(self.tokens) - self.made))

    @property
    def limit(self) -> int:
        """Positions that it may cache before it is read again or done; the last token is not cached."""
        return min([self.max_length - 1, *(border for border in self.borders if border >= self.context)])

    @property
    def speculates(self) -> bool:
        """Whether it takes drafts: else each token depends on the host or its length, or the drafter is behind."""
        return self.drafts and not self.stepwise and self.drafted == self.made - 1

    @property
    def goes_on(self) -> bool:
        """Whether it has tokens to make that were not dispatched; the last is not cached."""
        return self.computed < self.max_length - 1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of one row to be prefilled: from `start`, `count` of them; `last` if a token can be drawn after it."""

    row: Row
    start: int
    count: int
    last: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step dispatches: `steps` decode steps, or rounds, of some rows, then batches of chunks, one by one."""

    decode: list[Row]
    steps: int
    prefills: list[list[Chunk]]


class Scheduler:
    """Decides what runs in each step, on which slots and pages.

    Args:
      shards: pages of each data shard.
      slots: rows that can run together; each shard has an equal run of them.
      prefill_tokens: budget of a step, padding included.
      prefix_caching: whether rows begin with pages that others have filled.
      regime: of a row that is read with some length; see `Regime`.
      one_shape: whether every step decodes once and every prefill has one chunk, and pages are shared that a prefill
        has filled, so that all is computed by programs of one shape.
      speculates: whether steps are rounds of speculation, which make as many tokens as turn out right: how many is
        known when they are read, which is before the next step then.
    """

    def __init__(
        self,
        shards: Sequence[ShardPages],
        slots: int,
        prefill_tokens: int,
        prefix_caching: bool = True,
        regime: Callable[[int], Regime] = lambda context: (b"", sys.maxsize),
        one_shape: bool = False,
        speculates: bool = False,
    ):
        self.shards = shards
        self.prefill_tokens = prefill_tokens
        self.prefix_caching = prefix_caching
        self.regime = regime
        self.one_shape = one_shape
        self._speculates = speculates
        self.page_size = shards[0].page_size
        self.waiting: list[Row] = []  # both in order
        self.running: list[Row] = []
        self.preemptions = self.prompt_tokens = self.found_tokens = self._step = 0
        self._slots_per_shard = slots // len(shards)
        self._free_slots = [
            list(range(n * self._slots_per_shard, (n + 1) * self._slots_per_shard)) for n in range(len(shards))
        ]

    def add(self, row: Row) -> None:
        bisect.insort(self.waiting, row, key=_order)

    def remove(self, row: Row) -> None:
        """For a row that has ended, or that nobody wants any more."""
        row.done = True
        if row.slot is None:
            self.waiting.remove(row)
        else:
            self._leave(row)

    def restart(self) -> None:
        """Every row begins again with the tokens that are known; what pages held is forgotten."""
        for row in [*self.running]:
            self._requeue(row)
        for row in self.waiting:
            row.in_flight = 0
        self.forget()

    def forget(self) -> None:
        """Let no page be found."""
        for shard in self.shards:
            shard.forget()

    def fits(self, length: int) -> bool:
        """Whether a row of that length can be finished, were it alone."""
        return self.shards[0].fits(length)

    def shard_of(self, row: Row) -> int:
        return row.slot // self._slots_per_shard

    def schedule(self, drafted: int = 0) -> Step:
        """The next step, of whose rounds each drafts so many tokens a row; whoever asks dispatches it."""
        self._step += 1
        if any(self.shards[0].windows):
            for row in self.running:
                self._pages(row).slide(row.pages, row.computed)
        steps = self._decode_steps(drafted)
        decode = []
        for row in [row for row in self.running if not row.reading and row.goes_on]:
            if row.slot is None:  # it made room for one of the rows before
                continue
            end = min(row.computed + steps * (1 + drafted), row.limit)
            if row.computed in row.borders:
                if not row.in_flight:
                    self._requeue(row)
            elif self._grow(row, end):
                self._dispatch(row, end, samples=True)
                decode.append(row)
            else:
                self._preempt(row)
        return Step(decode, steps, self._prefills(self.prefill_tokens - len(decode)))

    def advance(self, row: Row, tokens: Sequence[int], again: int = 0, drafted: bool = False) -> None:
        """Learn the new tokens that one dispatch has made of a row, after as many `again` as were known.

        `drafted` is whether a drafter that was not behind has read what the dispatch has cached.
        """
        keeps_up = drafted and row.drafted == row.made - 1
        row.in_flight -= 1
        row.made += again + len(tokens)
        row.drafted = row.made - 1 if keeps_up else row.drafted
        row.tokens += tokens
        if row.slot is not None:
            if self._speculates and not row.in_flight:
                row.computed = row.made - 1
            self._register(row)

    def _decode_steps(self, drafted: int) -> int:
        """One where prompts are read or may soon begin, a row is stepwise, or one comes to a border before the host has
        its tokens. While all slots are taken, those that wait begin when a row ends, which is no sooner than at its
        limit or by a stop."""
        most = buckets.decode_steps(drafted)
        near = any(0 < border - row.computed < most for row in self.running for border in row.borders)
        full = not any(self._free_slots) and all(row.computed + most < row.max_length for row in self.running)
        alone = (full or not self.waiting) and not any(row.reading or row.stepwise for row in self.running)
        return most if alone and not near and not self.one_shape else 1

    def _prefills(self, budget: int) -> list[list[Chunk]]:
        batches, written = [], set()
        reading = (row for row in list(self.running) if row.slot is not None and row.reading)
        while row := next(reading, None) or self._next():
            count = _chunk(row.context - row.computed, budget)
            start, end = row.computed, row.computed + count
            if not count or not self._grow(row, end):
                break
            if not batches or self._full(batches[-1], row, count) or not written.isdisjoint(row.keys):
                batches.append([])
                written = set()
            batches[-1].append(Chunk(row, start, count, last=end == row.context))
            self._dispatch(row, end, samples=end == row.context)
            row.drafted = end
            written.update(self._register(row))
            budget -= count
        return batches

    def _full(self, batch: list[Chunk], row: Row, count: int) -> bool:
        """Whether another chunk, padded as all of them are, would be too much for one program, or follows one of it."""
        rows = [chunk.row for chunk in batch] + [row]
        width = max(buckets.prefill_bucket(n) for n in [count, *(chunk.count for chunk in batch)])
        each = collections.Counter(map(self.shard_of, rows))
        padded = len(self.shards) * buckets.batch_bucket(max(each.values())) * width
        return self.one_shape or padded > self.prefill_tokens or row in rows[:-1]

    def _next(self) -> Row | None:
        """Begin the first row that waits, if there is a slot and there are pages for its text. If another is about to
        read what it would read next, that one goes on instead, so that nothing is computed twice."""
        if not self.waiting or self.waiting[0].in_flight:
            return None
        row = self.waiting[0]
        row.context = row.made = row.prompt_tokens if row.replays else len(row.tokens)
        root, row.shareable = self.regime(row.context)
        if root != row.root:
            row.root, row.keys = root, []
        page_keys(row.tokens, self.page_size, row.keys, root)
        shares = self.prefix_caching and not row.read_whole
        known = row.keys[: min(row.context - 1, row.shareable) // self.page_size] if shares else []
        matched = [pages.match(known) for pages in self.shards]
        shards = [n for n, pages in enumerate(self.shards) if pages.room_for(known, matched[n], row.context + 1)]
        shards = [n for n in shards if self._free_slots[n]]
        if not shards:
            return None
        shard = max(shards, key=lambda n: (matched[n], self.shards[n].free))
        page = slice(matched[shard], matched[shard] + 1)
        for other in self.running if known[page] else ():
            reads_it = other.reading and other.computed <= page.start * self.page_size
            if reads_it and other.keys[page] == known[page] and self.shard_of(other) == shard:
                return other
        if row.pages is None:
            self.prompt_tokens += row.prompt_tokens
            self.found_tokens += matched[shard] * self.page_size
        self.waiting.pop(0)
        row.slot = self._free_slots[shard].pop(0)
        row.pages = self.shards[shard].begin(known, matched[shard])
        row.computed = row.drafted = matched[shard] * self.page_size
        bisect.insort(self.running, row, key=_order)
        return row

    def _grow(self, row: Row, length: int) -> bool:
        """Pages for a row up to a length; newer rows of its shard that are not in this step make room."""
        while not self._pages(row).grow(row.pages, length):
            others = (r for r in self.running if self.shard_of(r) == self.shard_of(row) and r.step < self._step)
            newest = max(others, key=_order, default=row)
            if _order(newest) <= _order(row):
                return False
            self._preempt(newest)
        return True

    def _dispatch(self, row: Row, end: int, samples: bool) -> None:
        """Count on a row's positions up to `end`."""
        row.step, row.computed = self._step, end
        row.in_flight += samples

    def _register(self, row: Row) -> Sequence[Key]:
        """Let others find the pages that are full, and whose tokens are known; returns the keys of the new ones."""
        page_keys(row.tokens, self.page_size, row.keys, row.root)
        known = row.context if self.one_shape else len(row.tokens)
        known = min(known, row.drafted) if self._speculates else known  # pages of the drafter are found with them
        before, count = row.pages.registered, min(row.computed, known, row.shareable) // self.page_size
        if self.prefix_caching:
            self._pages(row).register(row.pages, row.keys, count)
        return row.keys[before:count]

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self._requeue(row)

    def _requeue(self, row: Row) -> None:
        """A row gives up its pages and waits, to be read again with the tokens that it has by then."""
        self._leave(row)
        self.add(row)

    def _leave(self, row: Row) -> None:
        self._pages(row).release(row.pages)
        bisect.insort(self._free_slots[self.shard_of(row)], row.slot)
        self.running.remove(row)
        row.slot, row.computed = None, 0

    def _pages(self, row: Row) -> ShardPages:
        return self.shards[self.shard_of(row)]


def _order(row: Row) -> tuple[int, int]:
    return row.priority, row.index


def _chunk(tokens: int, budget: int) -> int:
    """How many of the tokens to run at once: all, or as many as a program takes without padding; 0 if too few."""
    most = min(budget, buckets.PREFILL_CHUNK)
    return tokens if tokens <= most else buckets.prefill_floor(most)
