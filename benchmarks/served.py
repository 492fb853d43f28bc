"""What is made of the times at which requests came and their tokens were there, and of the pages that were found."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from ..decode.engine import stats
from ..decode.engine.stats import PERCENTILES


@dataclasses.dataclass(frozen=True)
class Served:
    """A request that was served: when it arrived and each of its tokens came, in seconds on one clock; one at least."""

    arrival: float
    times: Sequence[float]
    prompt_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds from arrival to first token."""
        return self.times[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for a single token."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None

    @property
    def itl(self) -> list[float]:
        """Seconds from each token to the next (inter-token latencies); none within a block that came at once."""
        return [after - before for before, after in itertools.pairwise(self.times)]

    @property
    def end_to_end(self) -> float:
        """Seconds from arrival to last token."""
        return self.times[-1] - self.arrival

    def meets(self, ttft_limit: float, tpot_limit: float) -> bool:
        """Whether neither limit, in seconds, is exceeded; a single token has no TPOT to exceed one."""
        return self.ttft <= ttft_limit and (self.tpot is None or self.tpot <= tpot_limit)


def percentiles(values: Sequence[int | float]) -> dict[str, float] | None:
    """As of an engine's statistics, by names that JSON takes; None of nothing."""
    found = stats.percentiles(values)
    return found and {f"p{percent}": value for percent, value in found.items()}


LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
"""What `summarize` tells in milliseconds: to the first token, a token after it, between tokens, and end to end."""


def summarize(served: Sequence[Served], ttft_limit: float, tpot_limit: float) -> dict[str, float | None]:
    """All figures of a replay under the names that `vllm bench serve` has for them.

    Times run from the first arrival to the last token. "good_share" is ours: of the requests that meet both limits.
    """
    duration = max(each.times[-1] for each in served) - min(each.arrival for each in served)
    good = sum(each.meets(ttft_limit, tpot_limit) for each in served)
    prompts, outputs = sum(each.prompt_tokens for each in served), sum(len(each.times) for each in served)
    result = {
        "duration": duration,
        "completed": len(served),
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": len(served) / duration,
        "request_goodput": good / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (prompts + outputs) / duration,
        "max_concurrent_requests": _most_at_once(served),
        "good_share": good / len(served),
    }
    seconds = {
        "ttft": [each.ttft for each in served],
        "tpot": [each.tpot for each in served if each.tpot is not None],
        "itl": [gap for each in served for gap in each.itl],
        "e2el": [each.end_to_end for each in served],
    }
    return result | {name: value for key in LATENCIES for name, value in _latencies(key, seconds[key]).items()}


def _latencies(key: str, seconds: Sequence[float]) -> dict[str, float | None]:
    names = ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES if percent != 50))
    if not seconds:
        return {f"{name}_{key}_ms": None for name in names}
    each = 1e3 * np.asarray(seconds)
    ends = (np.percentile(each, percent) for percent in PERCENTILES if percent != 50)
    values = (each.mean(), np.median(each), each.std(), *ends)
    return {f"{name}_{key}_ms": float(value) for name, value in zip(names, values, strict=True)}


def _most_at_once(served: Sequence[Served]) -> int:
    """Most requests that had arrived and were not done."""
    changes = sorted([(each.times[-1], -1) for each in served] + [(each.arrival, 1) for each in served])
    return max(itertools.accumulate(change for _, change in changes))


def allowed_hit_rate(prompts: Iterable[Sequence[int]], page_size: int) -> float | None:
    """Share of prompt tokens that pages of earlier prompts hold, if none is ever forgotten; None of no prompts.

    Prompts come one after the other, and full pages are shared from the beginning on. The page with a prompt's last
    token never counts: some token must be run, for the logits after it.
    """
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}  # of pages, by the number of the page before and the tokens
    shared = total = 0
    for prompt in prompts:
        page, known, total = 0, True, total + len(prompt)
        for end in range(page_size, len(prompt) + 1, page_size):
            step = page, tuple(prompt[end - page_size : end])
            known = known and step in numbers and end < len(prompt)
            shared += page_size * known
            page = numbers.setdefault(step, len(numbers) + 1)
    return shared / total if total else None
