"""The device side of the engine: the pool of pages, what each slot holds, and the programs that advance them."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, UInt32

from ...model.kv_specs import kinds_by_layer
from ...model.loading import Model
from ...model.transformer import Component, Residual
from ...sharding.rules import put_rows
from .. import buckets
from ..cache import KVCache, Rows, init_pages
from ..loop import settle
from ..prefill import prefill, scored_prefill
from ..sampling.draw import SampleLogprobs
from ..sampling.layout import RequestArrays, SamplingPlan, make_plan, request_arrays
from ..sampling.params import SamplingParams
from ..sampling.scores import Adjust
from ..sampling.state import empty_state, insert
from ..speculation.drafter import Drafter
from ..speculation.loop import drafted_prefill, read_text, set_history
from .pages import ABSENT
from .scheduler import Chunk, Row
from .slots import Sampled, SlotState, decode_slots, empty_slots, enter_slots, speculate_slots

Masks = Mapping[int, UInt32[np.ndarray, "W"]]
"""By slot, the tokens that may be drawn, as `sample` takes them. Programs without any mask are others: None."""

ANYTHING = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0), SamplingParams(logprobs=1)
"""Requests that together need every program of sampling but those with masks."""


class Runner:
    """Pages and slots on the device. Calls return at once; their results are on the device.

    Args:
      model: as `load_model` returns it.
      slots: B, rows that run together, a multiple of the mesh's "data".
      pages: how many pages layers of each kind have (`page_kinds`).
      page_size: positions a page.
      max_length: most positions of a row.
      kv_dtype: of cached keys and values, as `init_cache` takes it.
      whole_batches: as in `Engine`.
      width: of every prefill; None for the bucket of the longest chunk.
      residual, component, adjust, drafter: as in `Engine`.
      draft_sizes: numbers of tokens that it is asked to draft.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        pages: Sequence[int],
        page_size: int,
        max_length: int,
        kv_dtype: jax.typing.DTypeLike | None = None,
        whole_batches: bool = False,
        width: int | None = None,
        residual: Residual | None = None,
        component: Component | None = None,
        adjust: Adjust | None = None,
        drafter: Drafter | None = None,
        draft_sizes: Sequence[int] = (),
    ):
        self.model, self.slots, self._max_length = model, slots, max_length
        self._draft_params, self._drafter = (None, None) if drafter is None else drafter.bind(model)
        self._draft_sizes = tuple(draft_sizes) or (0,)
        self._width, self._adjust = width, adjust
        self._forward_seams = {"residual": residual, "component": component}
        # On data shards rows stay with the devices that have their pages.
        self._whole_batches = whole_batches or (model.mesh is not None and model.mesh.shape["data"] > 1)
        self.shards = 1 if model.mesh is None else model.mesh.shape["data"]
        self._pages_per_shard = [n // self.shards for n in pages]
        # Drafts are verified together, at positions past the last of a row too, of which nothing is kept.
        entries = -(-(max_length + (0 if drafter is None else drafter.tokens)) // page_size)
        shards = np.arange(slots)[:, None] * self.shards // slots
        self._tables = [(shards * n).astype(np.int32).repeat(entries, axis=1) for n in self._pages_per_shard]
        self._vocab_size = model.config.vocab_size
        self._page_size, layout = page_size, (pages, page_size, model.mesh, kv_dtype)
        self._empty_pages = functools.partial(init_pages, model.config, *layout)
        self._empty_draft_pages = functools.partial(self._drafter.init_pages, *layout) if drafter else lambda: None
        self.restart()

    def restart(self) -> None:
        """Empty pages and slots, in place of those that there were, if any."""
        self.free()
        self.pages, self.draft_pages = self._empty_pages(), self._empty_draft_pages()
        history, layers = (0, 0) if self._drafter is None else (self._max_length, len(self._drafter.layers))
        self.state = empty_slots(self.slots, self.model.config, history, layers, self.model.mesh)

    def free(self) -> None:
        """Give the memory back."""
        self.pages = self.draft_pages = self.state = None

    def set_pages(self, row: Row) -> None:
        """Copy a row's pages into the block tables. What its window has left behind is some page of its shard."""
        shard = row.slot * self.shards // self.slots
        for table, per_shard, pages in zip(self._tables, self._pages_per_shard, row.pages.lists, strict=True):
            entries = np.asarray(pages, np.int32)
            table[row.slot, : len(pages)] = np.where(entries == ABSENT, shard * per_shard, entries)
        row.pages.changed = False

    def insert(self, slot: int, request: RequestArrays, text: Sequence[int]) -> None:
        """What the row that is about to enter a slot asks of sampling, and its text."""
        sampling = self._run(insert, self.state.sampling, np.array([slot], np.int32), request)
        self.state = self.state.replace(sampling=sampling)
        if self._drafter is not None:
            padded = np.zeros(self._max_length, np.int32)
            padded[: len(text)] = text
            history = self._run(set_history, self.state.history, np.int32(slot), padded)
            self.state = self.state.replace(history=history)

    def make_tables(self) -> None:
        """Have what "full" plans need of the slots."""
        if self.state.sampling.bias is None:
            tables = self._run(empty_state, self.slots, self._vocab_size, True, self.model.mesh)
            self.state = self.state.replace(sampling=tables.replace(settings=self.state.sampling.settings))

    def prefill(
        self, chunks: Sequence[Chunk], plan: SamplingPlan, masks: Masks | None = None, top: int | None = None
    ) -> tuple[Sampled | None, list[int], SampleLogprobs | None]:
        """Run chunks of prompts; rows whose text ends draw a token and enter their slots.

        Returns:
          One token a row of the program, of which those of texts that go on are nobody's, and each chunk's row; and
          where there is a `top`, log-probabilities of the token that follows each, with so many of the likeliest.
        """
        places, tokens, new, targets, batch = self._text_of(chunks)
        rows, features = len(tokens), None
        last = np.zeros(rows, np.int32)
        slots = np.full(rows, self.slots, np.int32)  # out of bounds, where nothing enters
        for place, chunk in zip(places, chunks, strict=True):
            last[place] = chunk.row.tokens[chunk.start + chunk.count - 1]
            if chunk.last:
                slots[place] = chunk.row.slot
        arguments = self.model.params, self.model.config, tokens, new, KVCache(self.pages, batch)
        if self._drafter is not None and self._drafter.layers:
            drafting = targets, self._draft_params, self._drafter, self.draft_pages, top
            out = self._run(drafted_prefill, *arguments, *drafting, **self._forward_seams)
            logits, cache, scored, self.draft_pages, features = out
        else:
            if self.draft_pages is not None:
                self._draft_reads(tokens, new, batch)
            if top is None:
                (logits, cache), scored = self._run(prefill, *arguments, **self._forward_seams), None
            else:
                logits, cache, scored = self._run(scored_prefill, *arguments, targets, top, **self._forward_seams)
        self.pages = cache.pages
        made = None
        if any(chunk.last for chunk in chunks):
            read = SlotState(last, cache.lengths, cache.contexts, None, None, features)
            allowed = self._allowed(masks, places, rows, [chunk.row.slot for chunk in chunks])
            made, self.state = self._run(enter_slots, logits, self.state, slots, read, plan, self._adjust, allowed)
        return made, places, scored

    @property
    def sees_all(self) -> bool:
        """Whether the drafter is not behind after rounds that drafted nothing: it reads what they make, or no pages."""
        return self.draft_pages is None or bool(self._drafter.layers)

    def catch_up(self, row: Row, end: int, most: int) -> None:
        """Have the drafter read what was made of a row while it drafted nothing, up to a position, so much at a time.

        Where a window has left some of it behind, there are no pages to read it into, and the row takes no more drafts.
        """
        start = max(0, row.drafted - 1)  # a round whose drafts were all right has left one out
        if any(ABSENT in pages[start // self._page_size :] for pages in row.pages.lists):
            return
        while row.drafted < end:
            count = min(end - start, most)
            _, tokens, new, _, batch = self._text_of([Chunk(row, start, count, last=False)])
            self._draft_reads(tokens, new, batch)
            row.drafted = start = start + count

    def decode(
        self, rows: Sequence[Row], steps: int, plan: SamplingPlan, masks: Masks | None = None, drafted: int = 0
    ) -> tuple[Sampled, list[int]]:
        """Make the next tokens of rows that have entered, in so many steps, or rounds where there is a drafter.

        Each round drafts so many tokens.

        Returns:
          The new tokens, and the row of the program that each row was.
        """
        slots = [row.slot for row in rows]
        if self._whole_batches:
            places, count, taken = slots, self.slots, None
        else:
            places, count = list(range(len(rows))), min(buckets.batch_bucket(len(rows)), self.slots)
            taken = np.full(count, self.slots, np.int32)
            taken[: len(rows)] = slots
        max_lengths = np.zeros(count, np.int32)
        max_lengths[places] = [row.limit for row in rows]
        where = taken, self._put(max_lengths), self._tables_of(places, count, slots)
        seams = {"adjust": self._adjust, "allowed": self._allowed(masks, places, count, slots), **self._forward_seams}
        weights = self.model.params, self.model.config
        if self._drafter is None:
            out = self._run(decode_slots, *weights, self.pages, self.state, *where, plan, steps, **seams)
            made, self.pages, self.state = out
            return made, places
        speculates = np.zeros(count, bool)
        speculates[places] = [row.speculates for row in rows]
        drafter = self._drafter.shortened(drafted)
        drafting = self._draft_params, drafter, self.draft_pages, self._put(speculates)
        out = self._run(speculate_slots, *weights, *drafting, self.pages, self.state, *where, plan, steps, **seams)
        made, self.draft_pages, self.pages, self.state = out
        return made, places

    def shapes(self, prefill_tokens: int, sampling: Sequence[SamplingParams]) -> Iterator[Callable[[], Any]]:
        """Calls that run every program that such requests need, one after the other."""
        plans = list(dict.fromkeys(make_plan([params], self._vocab_size) for params in sampling))
        full = any(plan.kind == "full" for plan in plans)
        words = any(len(word) > 1 for word in self.model.generation.bad_words)
        masks = [None, {}] if words or any(params.constraint or params.bad_words for params in sampling) else [None]
        if full:
            self.make_tables()
        per_shard, longest = self.slots // self.shards, self._max_length

        def rows(count: int) -> list[Row]:
            slots = [shard * per_shard + n for shard in range(self.shards) for n in range(count)]
            return [Row(0, [0] * longest, longest, longest + 1, context=longest, slot=slot) for slot in slots]

        for length in {buckets.token_list_bucket(n): n for n in range(longest if full else 1)}.values():
            request = request_arrays([SamplingParams(repetition_penalty=2.0)], [[0] * length], [0])
            yield functools.partial(self.insert, 0, request, [])
        most = min(longest, prefill_tokens, buckets.PREFILL_CHUNK)
        widths = sorted({buckets.prefill_bucket(n): n for n in range(1, most + 1)}.items())
        for count in sorted({buckets.batch_bucket(n + 1) for n in range(per_shard)}):
            some = rows(min(count, per_shard))
            for n, (width, tokens) in enumerate(widths):
                if count == 1 or self.shards * count * width <= prefill_tokens:
                    chunks = [Chunk(row, 0, tokens, last=True) for row in some]
                    for case in itertools.product(plans, masks) if n == 0 else [(plans[0], None)]:
                        yield functools.partial(self.prefill, chunks, *case)
            for plan in plans if count == 1 or not self._whole_batches else []:
                for drafted in self._draft_sizes:
                    for case in [(buckets.decode_steps(drafted), plan, None), *((1, plan, mask) for mask in masks)]:
                        yield functools.partial(self.decode, some, *case, drafted)

    def _text_of(
        self, chunks: Sequence[Chunk]
    ) -> tuple[list[int], Array | np.ndarray, Array | np.ndarray, Array | np.ndarray, Rows]:
        """Each chunk's row of a program; the tokens, how many count, the tokens after each, and the rows."""
        places, rows = self._places([chunk.row.slot for chunk in chunks])
        width = self._width or buckets.prefill_bucket(max(chunk.count for chunk in chunks))
        tokens, targets = np.zeros((2, rows, width), np.int32)
        new, starts, contexts = np.zeros((3, rows), np.int32)
        for place, chunk in zip(places, chunks, strict=True):
            end = chunk.start + chunk.count
            tokens[place, : chunk.count] = chunk.row.tokens[chunk.start : end]
            following = chunk.row.tokens[chunk.start + 1 : end + 1]
            targets[place, : len(following)] = following
            new[place], starts[place], contexts[place] = chunk.count, chunk.start, chunk.row.context
        batch = Rows(
            lengths=self._put(starts),
            max_lengths=self._put(starts + new),
            contexts=self._put(contexts),
            block_tables=self._tables_of(places, rows, [chunk.row.slot for chunk in chunks]),
            kinds=kinds_by_layer(self.model.config),
        )
        return places, self._put(tokens), self._put(new), self._put(targets), batch

    def _draft_reads(self, *text: Any) -> None:
        self.draft_pages = self._run(read_text, self._drafter, self._draft_params, self.draft_pages, *text)

    def _run(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Everything jitted that a runner calls goes through here."""
        out = program(*args, **kwargs)
        settle(self.model, out)
        return out

    def _places(self, slots: Sequence[int]) -> tuple[list[int], int]:
        """Rows of a program for rows in these slots, each on its slot's data shard, and how many rows it has."""
        each, shards = [0] * self.shards, [slot * self.shards // self.slots for slot in slots]
        ranks = []
        for shard in shards:
            ranks.append(each[shard])
            each[shard] += 1
        per_shard = buckets.batch_bucket(max(each))
        return [shard * per_shard + rank for shard, rank in zip(shards, ranks, strict=True)], self.shards * per_shard

    def _tables_of(self, places: Sequence[int], count: int, slots: Sequence[int]) -> tuple[Array | np.ndarray, ...]:
        """The block tables of a program with `count` rows, of which those at `places` are in `slots`."""
        tables = []
        for table, pages in zip(self._tables, self._pages_per_shard, strict=True):
            first = np.arange(count) * self.shards // count * pages  # of the shard, where there is no row
            part = np.repeat(first.astype(np.int32)[:, None], table.shape[1], axis=1)
            part[places] = table[slots]
            tables.append(self._put(part))
        return tuple(tables)

    def _allowed(
        self, masks: Masks | None, places: Sequence[int], count: int, slots: Sequence[int]
    ) -> Array | np.ndarray | None:
        """The masks of a program's rows, of all bits where a slot has none."""
        if masks is None:
            return None
        allowed = np.full((count, -(-self._vocab_size // 32)), 2**32 - 1, np.uint32)
        for place, slot in zip(places, slots, strict=True):
            if slot in masks:
                allowed[place] = masks[slot]
        return self._put(allowed)

    def _put(self, rows: np.ndarray) -> Array | np.ndarray:
        return put_rows(rows, self.model.mesh)
