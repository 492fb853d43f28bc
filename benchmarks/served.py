"""What is made of the times at which requests came and their tokens were there, and of the pages that were found."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ..decode.engine import stats


@dataclasses.dataclass(frozen=True)
class Served:
    """A request that was served: when it arrived and each of its tokens came, in seconds on one clock; one at least."""

    arrival: float
    times: Sequence[float]

    @property
    def ttft(self) -> float:
        """Seconds from arrival to first token."""
        return self.times[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for a single token."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None

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


def summarize(served: Sequence[Served], ttft_limit: float, tpot_limit: float) -> dict[str, Any]:
    """All figures of a replay, in seconds and per second, over the time from first arrival to last token."""
    seconds = max(each.times[-1] for each in served) - min(each.arrival for each in served)
    good = sum(each.meets(ttft_limit, tpot_limit) for each in served)
    return {
        "requests": len(served),
        "seconds": seconds,
        "ttft": percentiles([each.ttft for each in served]),
        "tpot": percentiles([each.tpot for each in served if each.tpot is not None]),
        "end_to_end": percentiles([each.end_to_end for each in served]),
        "requests_per_s": len(served) / seconds,
        "output_tokens_per_s": sum(len(each.times) for each in served) / seconds,
        "limits": {"ttft": ttft_limit, "tpot": tpot_limit},
        "goodput": {"share": good / len(served), "requests_per_s": good / seconds},
    }


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
