"""Many requests on one model: continuous batching over a shared pool of pages."""

import collections
import contextlib
import dataclasses
import itertools
import operator
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ...model import arguments
from ...model.loading import Model
from ...model.transformer import Component, Residual
from .. import buckets
from ..logprobs import not_finite
from ..prompts import Prompt, make_request
from ..request import FinishReason, Request, StreamChunk
from ..sampling.draw import NO_TOKEN, SampleLogprobs
from ..sampling.layout import SamplingPlan, coarsest, make_plan, request_arrays, top_width
from ..sampling.params import SamplingParams
from ..sampling.scores import Adjust
from .regime import regime_of
from .rehearsal import Rehearsal
from .runner import ANYTHING, Masks, Runner, Sampled
from .scheduler import Chunk, Row, Scheduler
from .sizes import PAGE_SIZE, engine_sizes
from .stats import EngineStats, percentiles

_RECENT = 1000  # requests that percentiles are of


class EngineFull(RuntimeError):
    """As many requests wait as may."""


class _StepFailed(Exception):
    """The requests that it concerns have ended; the others begin again."""


@dataclasses.dataclass(frozen=True)
class _Active:
    """A request that has not ended."""

    request: Request
    row: Row
    plan: SamplingPlan


@dataclasses.dataclass(frozen=True)
class _Dispatch:
    """Tokens that were asked of the device: those of each row stand in one column."""

    sampled: Sampled
    rows: Sequence[Row]
    columns: Sequence[int]


@dataclasses.dataclass(frozen=True)
class _ScoredPrompts:
    """Log-probabilities that were asked of the device: those of each chunk's tokens stand in one row."""

    logprobs: SampleLogprobs
    chunks: Sequence[Chunk]
    places: Sequence[int]

    @property
    def rows(self) -> list[Row]:
        return [chunk.row for chunk in self.chunks]


class Engine:
    """Serves many requests together: each step runs those that decode, and chunks of the prompts of others.

    Requests enter and leave while others run. Keys and values lie in pages of a shared pool, which rows take as they
    grow, and prompts begin with the pages of any earlier one that began alike. A request gives the tokens that it gives
    alone.

    Args:
      model: as `load_model` returns it.
      max_batch_size: most requests that run together.
      cache_tokens: positions that the pool holds; None takes what an accelerator's memory leaves after the weights and
        the programs' own needs, and on CPUs 1 GiB, but no more than all rows at full length take.
      max_length: most positions of a request, prompt and output; None for what the model takes and the pool holds.
      prefill_tokens: most tokens a step; what rows that decode leave of it goes to prompts.
      prefix_caching: whether requests share pages of equal beginnings.
      kv_dtype: of cached keys and values, as `init_cache` takes it.
      max_waiting: most requests that wait; None for any number.
      whole_batches: whether the decode program always has all `max_batch_size` rows, and samples as any request so far
        asks for, so that few programs are compiled; else it has the power of two that holds those that run.
      batch_invariant: whether a request gives the tokens that it gives alone, to the bit, in 16 bits too: all is
        computed by programs of one shape, in which a row's sums do not depend on the other rows. It costs speed: each
        prefill has one chunk, of full width, each dispatch one decode step of all rows, and a request that gave up its
        pages makes its output anew.
      residual, component: intervene in the forward pass of every request, prefill and decode, as in `transformer`.
        Cached keys and values depend on them as on the weights; requests share pages with those of this engine alone,
        for which they are the same.
      adjust: a pure function of the logits of every request, as in `sample`.

    Raises:
      ValueError: a size that is not positive, that the mesh does not divide, or that no memory is left for.
    """

    @jax.transfer_guard("allow")  # what requests are and what comes out is moved on purpose, here and below
    @arguments.arguments(
        model=arguments.instance(Model, hint="as load_model returns it"),
        max_batch_size=arguments.whole,
        cache_tokens=arguments.optional(arguments.whole),
        max_length=arguments.optional(arguments.whole),
        prefill_tokens=arguments.whole,
        prefix_caching=arguments.flag,
        max_waiting=arguments.optional(arguments.whole),
        whole_batches=arguments.flag,
        batch_invariant=arguments.flag,
        **arguments.seams,
        adjust=arguments.optional(arguments.function(2)),
    )
    def __init__(
        self,
        model: Model,
        max_batch_size: int = 64,
        cache_tokens: int | None = None,
        max_length: int | None = None,
        prefill_tokens: int = 2048,
        prefix_caching: bool = True,
        kv_dtype: jax.typing.DTypeLike | None = None,
        max_waiting: int | None = None,
        whole_batches: bool = False,
        batch_invariant: bool = False,
        *,
        residual: Residual | None = None,
        component: Component | None = None,
        adjust: Adjust | None = None,
    ):
        sizes = engine_sizes(model, max_batch_size, cache_tokens, max_length, prefill_tokens, kv_dtype)
        self.model, self.sizes, self.max_waiting = model, sizes, max_waiting
        whole_batches |= batch_invariant
        width = buckets.prefill_floor(min(prefill_tokens, buckets.PREFILL_CHUNK)) if batch_invariant else None
        self._runner = Runner(
            model,
            sizes.slots,
            sizes.pages,
            PAGE_SIZE,
            sizes.max_length,
            kv_dtype,
            whole_batches,
            width,
            residual,
            component,
            adjust,
        )
        self._scheduler = Scheduler(
            sizes.shards(), sizes.slots, prefill_tokens, prefix_caching, regime_of(model.config), batch_invariant
        )
        ropes = {layer.rope for layer in model.config.layers}
        self._borders = sorted({rope.original_max_position for rope in ropes if rope.kind == "longrope"})
        self._replays = batch_invariant or any(rope.kind == "dynamic" for rope in ropes)
        self._whole_batches, self._least_plan = whole_batches, SamplingPlan()
        self._active: dict[int, _Active] = {}
        self._in_flight: list[_Dispatch | _ScoredPrompts] = []
        self._chunks: list[StreamChunk] = []  # made and not yet returned
        self._closed = False
        self._spoiled = False  # whether pages hold what is no number
        self._submitted = self._generated = self._steps = 0
        self._host_time = self._device_wait = 0.0
        self._times = {name: collections.deque(maxlen=_RECENT) for name in ("ttft", "tpot", "queue_time")}

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @arguments.arguments(priority=arguments.whole)
    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> int:
        """Add a request and return its number, which its chunks have for `index`.

        Args:
          prompt: a text, token ids, or the messages of a chat, to which the tokenizer's template is applied.
          sampling: None for the model's own defaults.
          priority: lower ones run first, and give up their pages last; of equals, the first submitted.

        Raises:
          TypeError, ValueError: what `generate` refuses, or more tokens than the pool holds.
          RuntimeError: the engine is closed.
          EngineFull: `max_waiting` requests wait.
        """
        waiting = len(self._scheduler.waiting)
        if self.max_waiting is not None and waiting >= self.max_waiting:
            raise EngineFull(f"{waiting} requests wait, which is max_waiting; submit again when some have begun")
        request = make_request(self.model, self._submitted, prompt, sampling, max_length=self.sizes.max_length)
        return self.add(request, priority)

    def add(self, request: Request, priority: int = 0) -> int:
        """`submit` for a request that has been checked."""
        if self._closed:
            raise RuntimeError("the engine is closed, and its memory given back; make another")
        if request.params.max_tokens is None:  # as many as fit
            request.max_tokens = min(request.max_tokens, max(1, self.sizes.max_length - len(request.prompt)))
        total = len(request.prompt) + request.max_tokens
        if not self._scheduler.fits(total):
            raise ValueError(
                f"request {self._submitted} takes up to {total} positions, prompt and max_tokens, and the pool holds "
                f"{self.sizes.cache_tokens}; lower max_tokens or raise cache_tokens"
            )
        index, self._submitted = self._submitted, self._submitted + 1
        request.start_clock()
        row = Row(
            index,
            list(request.prompt),
            len(request.prompt),
            total,
            priority,
            self._borders,
            self._replays,
            read_whole=request.prompt_logprobs is not None,
            stepwise=request.constraints is not None,
        )
        plan = make_plan([request.params], self.model.config.vocab_size)
        if self._whole_batches:
            self._least_plan = coarsest([self._least_plan, plan])
        self._active[index] = _Active(request, row, plan)
        self._scheduler.add(row)
        return index

    def abort(self, request: int) -> None:
        """End a request; its last chunk, with what it has so far, comes with the next step. Finished ones stay so."""
        if request in self._active:
            self._end(self._active[request].row, "abort")

    @property
    def has_work(self) -> bool:
        """Whether there is anything that a step would run or return."""
        return bool(self._active or self._in_flight or self._chunks)

    def run(self) -> Iterator[StreamChunk]:
        """Step until nothing is left; requests may be submitted meanwhile."""
        while self.has_work:
            yield from self.step()

    @jax.transfer_guard("allow")
    def step(self) -> list[StreamChunk]:
        """Hand the next step to the device, and return what the one before has made.

        A failure on the way ends the requests that it concerns, with "error" for their `finish_reason`; the others are
        read again, and give the tokens that they would have given. So they do after Ctrl-C, should anybody step again.
        """
        started, waited = time.perf_counter(), self._device_wait
        try:
            if any(row.stepwise for dispatch in self._in_flight for row in dispatch.rows):
                self._read_in_flight()  # what may come next depends on it
            dispatched = self._dispatch()
            self._read_in_flight()
            self._in_flight = dispatched
            if self._spoiled:  # what is no number would reach whoever gets the same pages next
                self._recover()
        except _StepFailed:
            self._recover()
        except BaseException:
            self._recover()
            raise
        chunks, self._chunks = self._chunks, []
        self._steps += 1
        self._host_time += time.perf_counter() - started - (self._device_wait - waited)
        return chunks

    @jax.transfer_guard("allow")
    def warm_up(self, progress: bool = False, sampling: Sequence[SamplingParams] | None = None) -> None:
        """Compile every program that any mix of requests can need (with more than 32 log-probabilities a token, one
        more when they are first asked for, and those that score prompts when these are).

        Args:
          progress: whether to show a bar.
          sampling: what requests will ask for, where that is known; None for anything but constraints and bad words.

        Raises:
          RuntimeError: there are requests.
        """
        if self.has_work:
            raise RuntimeError(f"{len(self._active)} requests are there; warm up before the first is submitted")
        with self.rehearsal() as runner:
            shapes = list(runner.shapes(self._scheduler.prefill_tokens, sampling or ANYTHING))
            for run in tqdm(shapes, desc="warm-up", unit="program", disable=not progress):
                run()

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[Rehearsal]:
        """Requests that are run in here have their programs compiled, and get tokens that mean nothing."""
        runner, ends = self._runner, self.model.generation.eos_token_ids
        with Rehearsal(runner, next(n for n in itertools.count() if n not in ends)) as self._runner:
            try:
                yield self._runner
            finally:
                self._runner = runner

    def stats(self) -> EngineStats:
        """What the engine is doing, and has done."""
        scheduler, steps = self._scheduler, max(self._steps, 1)
        pools = [max(shard.pools, key=lambda pool: pool.size) for shard in scheduler.shards]
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            finished=self._submitted - len(self._active),
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            cached_prompt_tokens=scheduler.found_tokens,
            generated_tokens=self._generated,
            prefix_hit_rate=scheduler.found_tokens / scheduler.prompt_tokens if scheduler.prompt_tokens else None,
            pages=sum(pool.size for pool in pools),
            pages_used=sum(pool.size - pool.free for pool in pools),
            pages_cached=sum(pool.cached for pool in pools),
            **{name: percentiles(values) for name, values in self._times.items()},
            steps=self._steps,
            host_time=self._host_time / steps,
            device_wait=self._device_wait / steps,
        )

    def close(self) -> None:
        """Abort what is left, and free the pool's memory."""
        for active in list(self._active.values()):
            self._end(active.row, "abort")
        self._in_flight, self._closed = [], True
        self._runner.free()

    def _dispatch(self) -> list[_Dispatch | _ScoredPrompts]:
        """Hand the next step to the device."""
        step, dispatches = self._scheduler.schedule(), []
        for row in [*step.decode, *(chunk.row for batch in step.prefills for chunk in batch)]:
            if row.pages.changed:
                self._runner.set_pages(row)
        if step.decode:
            with self._concerning(step.decode):
                plan, masks = self._plan(step.decode), self._masks(step.decode)
                sampled, columns = self._runner.decode(step.decode, step.steps, plan, masks)
            dispatches.append(_Dispatch(sampled, step.decode, columns))
        for batch in step.prefills:
            with self._concerning([chunk.row for chunk in batch]):
                entering = [chunk.row for chunk in batch if chunk.last]
                for chunk in batch:
                    self._active[chunk.row.index].request.begin()
                plan = self._plan(entering)
                for row in entering:
                    self._insert(row)
                masks, top = self._masks(entering), self._prompt_logprobs(batch)
                sampled, columns, logprobs = self._runner.prefill(batch, plan, masks, top)
            if logprobs is not None:
                dispatches.append(_ScoredPrompts(logprobs, batch, columns))
            if entering:
                columns = [column for column, chunk in zip(columns, batch, strict=True) if chunk.last]
                dispatches.append(_Dispatch(sampled, entering, columns))
        return dispatches

    def _plan(self, rows: Sequence[Row]) -> SamplingPlan:
        """What samples rows that run or enter, with the tables on the device that it needs."""
        plan = coarsest([*(self._active[row.index].plan for row in rows), self._least_plan])
        if plan.kind == "full":
            self._runner.make_tables()
        return plan

    def _insert(self, row: Row) -> None:
        """Tell the device what a row that is about to enter its slot asks of sampling."""
        request, eos = self._active[row.index].request, self.model.generation.eos_token_ids
        output = request.tokens[: row.context - row.prompt_tokens]
        if row.stepwise:
            request.constraints.restart(output)
        arrays = request_arrays([request.params], [request.prompt], [request.seed], eos, [output])
        self._runner.insert(row.slot, arrays)

    def _masks(self, rows: Sequence[Row]) -> Masks | None:
        """What may come next in rows that are to be asked before each token, if there are any."""
        stepwise = [row for row in rows if row.stepwise]
        return {row.slot: self._active[row.index].request.constraints.mask for row in stepwise} or None

    def _prompt_logprobs(self, chunks: Sequence[Chunk]) -> int | None:
        """How many of the likeliest tokens to list beside those of prompts, or None for no log-probabilities at all."""
        counts = [self._active[chunk.row.index].request.params.prompt_logprobs for chunk in chunks]
        counts = [count for count in counts if count is not None]
        return top_width(max(counts), self.model.config.vocab_size) if counts else None

    def _read_in_flight(self) -> None:
        """Wait for tokens and log-probabilities, and give each request its own."""
        dispatches, self._in_flight = self._in_flight, []
        for dispatch in dispatches:
            if isinstance(dispatch, _ScoredPrompts):
                self._read_prompts(dispatch)
                continue
            with self._concerning(dispatch.rows):
                started = time.perf_counter()
                tokens, logprobs = jax.device_get(dispatch.sampled)
                self._device_wait += time.perf_counter() - started
                self._spoiled |= NO_TOKEN in tokens[:, dispatch.columns]
                for row, column in zip(dispatch.rows, dispatch.columns, strict=True):
                    if not row.done:
                        self._take(row, tokens[:, column].tolist(), logprobs, column)

    def _read_prompts(self, scored: _ScoredPrompts) -> None:
        with self._concerning(scored.rows):
            started = time.perf_counter()
            logprobs = jax.device_get(scored.logprobs)
            self._device_wait += time.perf_counter() - started
        for chunk, place in zip(scored.chunks, scored.places, strict=True):
            if not chunk.row.done:
                with self._concerning([chunk.row]):
                    request, part = self._active[chunk.row.index].request, np.s_[place, : chunk.count]
                    whose = f"prompt {chunk.row.index}", self.model.config.dtype
                    request.score_prompt(chunk.start, jax.tree.map(operator.itemgetter(part), logprobs), *whose)

    def _take(self, row: Row, tokens: list[int], logprobs: SampleLogprobs | None, column: int) -> None:
        request, is_broken = self._active[row.index].request, NO_TOKEN in tokens
        tokens = tokens[: tokens.index(NO_TOKEN)] if is_broken else tokens
        known, again = len(request.tokens), row.known_again(len(tokens))
        request.extend(tokens[again:], logprobs, column, again)
        new = request.tokens[known:]
        request.constrain(tokens)
        self._generated += len(new)
        self._scheduler.advance(row, new, again)
        if request.finished:
            self._end(row, new=new)
        elif is_broken:
            after = f"{len(request.prompt)} of the prompt and {len(request.tokens)} new ones"
            error = not_finite(f"prompt {row.index}: no token can be drawn after {after}", self.model.config.dtype)
            self._end(row, "error", error, new)
        else:
            self._chunks.append(StreamChunk(row.index, new, request.take_text(), None, None))

    def _end(
        self,
        row: Row,
        reason: FinishReason | None = None,
        error: Exception | None = None,
        new: Sequence[int] = (),
    ) -> None:
        """A request has ended by itself, or for a reason: its last chunk, with what is new."""
        request = self._active.pop(row.index).request
        self._scheduler.remove(row)
        if reason is not None:
            request.finish(reason, error)
        output = request.output()
        self._chunks.append(StreamChunk(row.index, list(new), request.take_text(), request.finish_reason, output))
        for name, times in self._times.items():
            if request.tokens and getattr(output, name) is not None:
                times.append(getattr(output, name))

    @contextlib.contextmanager
    def _concerning(self, rows: Sequence[Row]) -> Iterator[None]:
        """A part of a step: if it fails, these requests do."""
        try:
            yield
        except Exception as error:
            for row in rows:
                if not row.done:
                    self._end(row, "error", error)
            raise _StepFailed from error

    def _recover(self) -> None:
        """Begin anew with what is known on the host: nothing on the device, or on its way from there, is relied on."""
        self._in_flight, self._spoiled = [], False
        self._scheduler.restart()
        self._runner.restart()
