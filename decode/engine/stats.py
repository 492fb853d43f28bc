"""What an engine has done and is doing, in numbers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

PERCENTILES = (50, 90, 99)


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


def percentiles(values: Sequence[int | float]) -> dict[int, float] | None:
    """`PERCENTILES` of some values, interpolated linearly; None of nothing."""
    if not values:
        return None
    return dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True))
