"""Traces of conversations: several turns each, over system prompts that many of them share."""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator

import numpy as np

from .request_trace import BLOCK_TOKENS, TraceRequest


@dataclasses.dataclass(frozen=True)
class Conversations:
    """What conversations are drawn from. The numbers that ship are round ones, fitted to nothing.

    Attributes:
      rate: requests a second in the long run; conversations begin independently of each other (a Poisson process).
      systems: different system prompts, each as likely.
      system_blocks: length of each, in blocks.
      turns: mean of the geometric distribution of turns.
      message, output: median tokens of what the user says and of what is generated, log-normal,
      message_std, output_std: with these deviations of the logarithm.
      seconds_per_token: that an output takes to come and be read.
      pause: mean seconds, exponential, from then to the user's next message.
      longest: positions, prompt and output, beyond which a conversation does not go on.
    """

    rate: float = 2.0
    systems: int = 4
    system_blocks: int = 2
    turns: float = 4.0
    message: float = 60.0
    message_std: float = 1.0
    output: float = 200.0
    output_std: float = 0.6
    seconds_per_token: float = 0.05
    pause: float = 5.0
    longest: int = 8192


def generate_conversations(
    count: int, seed: int, workload: Conversations, rate: float | None = None
) -> list[TraceRequest]:
    """Draw so many requests, in order of arrival; equal seeds give equal traces, and longer ones begin like shorter.

    Each turn's prompt is the prompt before it, its output (tokens that stand in for it) and a new message. Arrivals are
    whole milliseconds, as files have them.

    Args:
      count: how many.
      seed: of all that is drawn.
      workload: the distributions.
      rate: requests a second in the long run; None takes the workload's own.
    """
    started, trace = 0.0, []
    coming: list[tuple[float, int, TraceRequest]] = []
    numbers = itertools.count()
    blocks = itertools.count(workload.systems * workload.system_blocks)
    gap = workload.turns / (workload.rate if rate is None else rate)
    for index in itertools.count():
        rng = np.random.default_rng([seed, index])
        started += rng.exponential(gap) if index else 0.0
        while coming and coming[0][0] <= started:
            trace.append(heapq.heappop(coming)[-1])
            if len(trace) == count:
                return trace
        for request in _turns(workload, started, rng, blocks):
            heapq.heappush(coming, (request.arrival, next(numbers), request))


def _turns(workload: Conversations, at: float, rng: np.random.Generator, fresh: Iterator[int]) -> list[TraceRequest]:
    """One conversation; each turn is drawn in the order in which it happens."""

    def length(median: float, deviation: float) -> int:
        return max(1, round(median * np.exp(deviation * rng.standard_normal())))

    system = int(rng.integers(workload.systems)) * workload.system_blocks
    blocks = list(range(system, system + workload.system_blocks))
    prompt, turns = len(blocks) * BLOCK_TOKENS, []
    for _ in range(rng.geometric(1 / workload.turns)):
        prompt += length(workload.message, workload.message_std)
        output = length(workload.output, workload.output_std)
        if prompt + output > workload.longest:
            break
        blocks += itertools.islice(fresh, -(-prompt // BLOCK_TOKENS) - len(blocks))
        turns.append(TraceRequest(round(at, 3), prompt, output, tuple(blocks)))
        prompt += output
        at += output * workload.seconds_per_token + rng.exponential(workload.pause)
    return turns
