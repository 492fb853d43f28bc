"""Many requests on one model: continuous batching over a shared pool of pages."""

import contextlib
import copy
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

from ...model import arguments
from ...model.loading import Model
from ...model.transformer import Component, Residual
from .. import buckets
from ..logprobs import not_finite
from ..prompts import Prompt, make_request
from ..request import FinishReason, Request, StreamChunk
from ..sampling.draw import NO_TOKEN
from ..sampling.layout import SamplingPlan, coarsest, make_plan, request_arrays, top_width
from ..sampling.params import SamplingParams
from ..sampling.scores import Adjust
from ..speculation.drafter import Drafter
from .drafts import Drafts
from .regime import regime_of
from .rehearsal import Rehearsal
from .results import Dispatch, Drafting, PromptLogprobs, RowTokens, ScoredPrompts
from .runner import ANYTHING, Masks, Runner
from .scheduler import Chunk, Row, Scheduler
from .sizes import PAGE_SIZE, engine_sizes
from .stats import Counters, EngineStats


class EngineFull(RuntimeError):
    """As many requests wait as may."""


class _StepFailed(Exception):
    """The requests that it concerns have ended; the others begin again."""


@dataclasses.dataclass(frozen=True)
class _Active:
    """A request, or a sample of one, that has not ended."""

    number: int  # of the request; each sample has a row
    request: Request
    row: Row
    plan: SamplingPlan


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
        pages makes its output anew. Routed experts on GPUs are left out: their kernel's sums follow the whole batch.
      residual, component: intervene in the forward pass of every request, prefill and decode, as in `transformer`.
        Cached keys and values depend on them as on the weights; requests share pages with those of this engine alone,
        for which they are the same.
      adjust: a pure function of the logits of every request, as in `sample`.
      drafter: guesses tokens, several of which are then checked at once; it changes none. Each step waits for the last
        one's tokens. Requests with constraints, and those whose keys depend on their length (dynamic RoPE), take no
        drafts.
      adapt_drafts: whether fewer tokens than `drafter.tokens` are drafted, a half or a quarter of them and so on, or
        none, where tokens come faster so, by what is measured meanwhile. (Not in several processes, whose clocks
        differ, nor with `batch_invariant`, where how many are checked at once may round a sum.)

    Raises:
      ValueError: a size that is not positive, that the mesh does not divide, or that no memory is left for; a drafter
        that cannot draft for the model.
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
        drafter=arguments.optional(arguments.instance(Drafter)),
        adapt_drafts=arguments.flag,
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
        drafter: Drafter | None = None,
        adapt_drafts: bool = True,
    ):
        sizes = engine_sizes(model, max_batch_size, cache_tokens, max_length, prefill_tokens, kv_dtype, drafter)
        self.model, self.sizes, self.max_waiting = model, sizes, max_waiting
        whole_batches |= batch_invariant
        width = buckets.prefill_floor(min(prefill_tokens, buckets.PREFILL_CHUNK)) if batch_invariant else None
        self._drafts = None if drafter is None else Drafts(drafter, adapt_drafts and not batch_invariant)
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
            drafter,
            self._drafts.sizes if self._drafts else (),
        )
        regime = regime_of(model.config)
        policy = prefill_tokens, prefix_caching, regime, batch_invariant, drafter is not None
        self._scheduler = Scheduler(sizes.shards(), sizes.slots, *policy)
        ropes = {layer.rope for layer in model.config.layers}
        self._borders = sorted({rope.original_max_position for rope in ropes if rope.kind == "longrope"})
        self._takes_drafts = not any(rope.kind == "dynamic" for rope in ropes)
        self._replays = batch_invariant or not self._takes_drafts
        self._whole_batches, self._least_plan = whole_batches, SamplingPlan()
        self._active: dict[int, _Active] = {}
        self._in_flight: list[Dispatch | ScoredPrompts] = []
        self._chunks: list[StreamChunk] = []  # made and not yet returned
        self._closed = False
        self._spoiled = False  # whether pages hold what is no number
        self._submitted = self._rows = 0
        self._counters = Counters()

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
        """Add a request and return its number, which its chunks have for `index`, and those of all its samples.

        Each sample runs as a row of its own. The first computes the prompt; the others begin with its full pages, and
        compute what is left, a page at most.

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
        number, self._submitted = self._submitted, self._submitted + 1
        for sample in request.samples:
            sample.max_tokens = request.max_tokens
            self._add(sample, number, total, priority)
        return number

    def _add(self, request: Request, number: int, total: int, priority: int) -> None:
        request.start_clock()
        row = Row(
            self._rows,
            list(request.prompt),
            len(request.prompt),
            total,
            priority,
            self._borders,
            self._replays,
            read_whole=request.prompt_logprobs is not None,
            stepwise=request.constraints is not None,
            drafts=self._takes_drafts,
        )
        plan = make_plan([request.params], self.model.config.vocab_size)
        if self._whole_batches:
            self._least_plan = coarsest([self._least_plan, plan])
        self._active[row.index] = _Active(number, request, row, plan)
        self._rows += 1
        self._scheduler.add(row)

    def abort(self, request: int) -> None:
        """End a request, with all its samples; their last chunks, with what they have so far, come with the next step.
        Finished ones stay so."""
        for active in [active for active in self._active.values() if active.number == request]:
            self._end(active.row, "abort")

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
        with self._counters.step():
            self._step()
        chunks, self._chunks = self._chunks, []
        return chunks

    def _step(self) -> None:
        try:
            drafted = self._pick_drafts()
            if self._depends_on_in_flight(drafted):
                self._read_in_flight()
            dispatched = self._dispatch(drafted)
            self._read_in_flight()
            self._in_flight = dispatched
            if self._spoiled:  # what is no number would reach whoever gets the same pages next
                self._recover()
        except _StepFailed:
            self._recover()
        except BaseException:
            self._recover()
            raise

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
        drafts, self._drafts = self._drafts, copy.deepcopy(self._drafts)
        with Rehearsal(runner, next(n for n in itertools.count() if n not in ends)) as self._runner:
            try:
                yield self._runner
            finally:
                self._runner, self._drafts = runner, drafts

    def stats(self) -> EngineStats:
        """What the engine is doing, and has done."""
        speculation = self._drafts.stats() if self._drafts else None
        return self._counters.stats(self._scheduler, self._rows - len(self._active), speculation)

    def close(self) -> None:
        """Abort what is left, and free the pool's memory."""
        for active in list(self._active.values()):
            self._end(active.row, "abort")
        self._in_flight, self._closed = [], True
        self._runner.free()

    def _pick_drafts(self) -> int:
        """How many tokens the next rounds draft."""
        rows = sum(not row.reading for row in self._scheduler.running)
        return self._drafts.pick(self._rows_of(rows)) if self._drafts else 0

    def _rows_of(self, rows: int) -> int:
        """Rows of the decode program for so many."""
        return (self.sizes.slots if self._whole_batches else buckets.batch_bucket(rows)) if rows else 0

    def _depends_on_in_flight(self, drafted: int) -> bool:
        """Whether what may come next depends on tokens that the host has not seen."""
        tokens = [dispatch for dispatch in self._in_flight if isinstance(dispatch, Dispatch)]
        was_drafted = any(dispatch.drafting is not None and dispatch.drafting.size for dispatch in tokens)
        return drafted > 0 or was_drafted or any(row.stepwise for dispatch in tokens for row in dispatch.rows)

    def _dispatch(self, drafted: int) -> list[Dispatch | ScoredPrompts]:
        """Hand the next step to the device."""
        step, dispatches = self._scheduler.schedule(drafted), []
        for row in [*step.decode, *(chunk.row for batch in step.prefills for chunk in batch)]:
            if row.pages.changed:
                self._runner.set_pages(row)
        if step.decode:
            with self._concerning(step.decode):
                plan, masks = self._plan(step.decode), self._masks(step.decode)
                for row in step.decode if drafted else ():
                    self._runner.catch_up(row, row.made - 1, min(self._scheduler.prefill_tokens, buckets.PREFILL_CHUNK))
                started = time.perf_counter()
                sampled, columns = self._runner.decode(step.decode, step.steps, plan, masks, drafted)
            drafting = None
            if self._drafts:
                drafting = Drafting(self._rows_of(len(step.decode)), drafted, step.steps, not step.prefills, started)
            dispatches.append(Dispatch(sampled, step.decode, columns, drafting))
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
                dispatches.append(ScoredPrompts(logprobs, batch, columns))
            if entering:
                columns = [column for column, chunk in zip(columns, batch, strict=True) if chunk.last]
                dispatches.append(Dispatch(sampled, entering, columns))
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
        self._runner.insert(row.slot, arrays, row.tokens[: row.context])

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
            with self._concerning(dispatch.rows), self._counters.waiting():
                results = dispatch.read()
            if self._drafts:
                self._drafts.read(dispatch, results)
            drafting = dispatch.drafting if isinstance(dispatch, Dispatch) else None
            drafted = drafting is not None and (drafting.size > 0 or self._runner.sees_all)
            for row, result in results:
                self._spoiled |= result.is_broken
                with self._concerning([row]):
                    if not row.done:
                        self._take(row, result, drafted)

    def _take(self, row: Row, made: RowTokens | PromptLogprobs, drafted: bool) -> None:
        active, dtype = self._active[row.index], self.model.config.dtype
        request = active.request
        if isinstance(made, PromptLogprobs):
            request.score_prompt(made.start, made.logprobs, f"prompt {active.number}", dtype)
            return
        tokens = made.tokens[: made.tokens.index(NO_TOKEN)] if made.is_broken else made.tokens
        known, again = len(request.tokens), row.known_again(len(tokens))
        request.extend(tokens[again:], made.logprobs, again)
        new = request.tokens[known:]
        request.count_drafts(*made.speculation(again + len(new)))
        request.constrain(tokens)
        self._counters.generated += len(new)
        self._scheduler.advance(row, new, again, drafted)
        if request.finished:
            self._end(row, new=new)
        elif made.is_broken:
            after = f"{len(request.prompt)} of the prompt and {len(request.tokens)} new ones"
            error = not_finite(f"prompt {active.number}: no token can be drawn after {after}", dtype)
            self._end(row, "error", error, new)
        else:
            self._add_chunk(active, new)

    def _add_chunk(self, active: _Active, new: Sequence[int]) -> None:
        """A chunk of a request, with what is new."""
        request, sample = active.request, active.request.samples.index(active.request)
        output = request.result() if request.finished else None
        text, reason = request.take_text(), request.finish_reason
        self._chunks.append(StreamChunk(active.number, list(new), text, reason, output, sample))

    def _end(
        self,
        row: Row,
        reason: FinishReason | None = None,
        error: Exception | None = None,
        new: Sequence[int] = (),
    ) -> None:
        """A request has ended by itself, or for a reason: its last chunk, with what is new."""
        active = self._active.pop(row.index)
        request = active.request
        self._scheduler.remove(row)
        if reason is not None:
            request.finish(reason, error)
        self._add_chunk(active, new)
        output = request.output()
        self._counters.ended(output)

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
