"""What an engine has done and is doing, in numbers."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from ..request import RequestOutput
from .drafts import SpeculationStats
from .scheduler import Scheduler

PERCENTILES = (50, 90, 99)
_RECENT = 1000  # requests that percentiles are of


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A moment of an engine. Times are seconds; percentiles, by percent, are over the requests finished most recently.

    Attributes:
      running, waiting: requests, of which each sample counts, as below.
      finished: requests since the engine began; aborted and failed ones too.
      preemptions: how often a running request had to give up its pages to an older one.
      prompt_tokens, cached_prompt_tokens, generated_tokens: of all requests that have begun, those of them that were
        found in the cache, and those made.
      prefix_hit_rate: of prompt tokens, the share that was found; None before the first.
      pages, pages_used, pages_cached: of the pool, held by requests, and held by none but found by new ones; where
        layers keep different numbers of positions, those that keep all of them.
      ttft, tpot, queue_time: from submission to the first token; between later tokens; from submission until it began.
      steps: calls of `step` that dispatched something.
      host_time: mean seconds of Python a step, waiting for the device left out.
      device_wait: mean seconds a step that the host waited for tokens.
      speculation: with a drafter, what its drafts came to.
    """

    running: int
    waiting: int
    finished: int
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    prefix_hit_rate: float | None
    pages: int
    pages_used: int
    pages_cached: int
    ttft: dict[int, float] | None
    tpot: dict[int, float] | None
    queue_time: dict[int, float] | None
    steps: int
    host_time: float
    device_wait: float
    speculation: SpeculationStats | None = None


class Counters:
    """What `EngineStats` counts and times as an engine runs."""

    def __init__(self):
        self.generated = 0  # tokens
        self._steps, self._host_time, self._device_wait = 0, 0.0, 0.0
        self._times = {name: collections.deque(maxlen=_RECENT) for name in ("ttft", "tpot", "queue_time")}

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step, timed unless it raises."""
        started, waited = time.perf_counter(), self._device_wait
        yield
        self._steps += 1
        self._host_time += time.perf_counter() - started - (self._device_wait - waited)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The part of a step that waits for the device."""
        started = time.perf_counter()
        yield
        self._device_wait += time.perf_counter() - started

    def ended(self, output: RequestOutput) -> None:
        """A request has ended."""
        for name, times in self._times.items():
            if output.tokens and getattr(output, name) is not None:
                times.append(getattr(output, name))

    def stats(self, scheduler: Scheduler, finished: int, speculation: SpeculationStats | None = None) -> EngineStats:
        """Those of now, when so many requests have finished."""
        steps = max(self._steps, 1)
        pools = [max(shard.pools, key=lambda pool: pool.size) for shard in scheduler.shards]
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            finished=finished,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            cached_prompt_tokens=scheduler.found_tokens,
            generated_tokens=self.generated,
            prefix_hit_rate=scheduler.found_tokens / scheduler.prompt_tokens if scheduler.prompt_tokens else None,
            pages=sum(pool.size for pool in pools),
            pages_used=sum(pool.size - pool.free for pool in pools),
            pages_cached=sum(pool.cached for pool in pools),
            **{name: percentiles(values) for name, values in self._times.items()},
            steps=self._steps,
            host_time=self._host_time / steps,
            device_wait=self._device_wait / steps,
            speculation=speculation,
        )


def percentiles(values: Sequence[int | float]) -> dict[int, float] | None:
    """`PERCENTILES` of some values, interpolated linearly; None of nothing."""
    if not values:
        return None
    return dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True))
