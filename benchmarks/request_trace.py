"""Request traces: when requests come, how long they are, and what their prompts share; generated ones are drawn after
distributions fitted to a real one.

The source of the fit is the conversation trace of "Azure LLM inference trace 2023" (Azure/AzurePublicDataset on GitHub,
CC-BY Attribution License): 19,366 requests within an hour to language models in Azure. It is described in Patel,
Choukse, Zhang, Shah, Goiri, Maleki and Bianchini, "Splitwise: Efficient generative LLM inference using phase
splitting", ISCA 2024. The trace is no part of this package; `ridgeline bench replay --fit FILE` fits anew and compares.

Arrivals are no Poisson process. One gap alone is nearly exponential (a KS distance of 0.022), but the rate drifts:
minutes with many requests follow each other, so that requests come in bursts which fill a queue. Here the logarithm of
the rate is an autoregressive process over requests, and the gaps are gamma-distributed about it: the variance over the
mean of arrivals in 5, 50 and 300 mean gaps is 1.34, 3.76 and 14.5 in the trace, 1.35, 3.84 and 15.4 in the mean of 20
draws, and 1 in a Poisson process.

Lengths are a mixture of log-normals over (prompt, output): the trace has several kinds of requests. The rank
correlation of the two is only 0.07, but a prompt of 1,020 to 1,130 tokens is answered with about 400 and longer ones
with fewer, so they are drawn together. KS distances of as many generated requests (seed 0): prompts 0.025, outputs
0.019, both together 0.026, gaps 0.013; of one log-normal each 0.16 and 0.19.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

BLOCK_TOKENS = 512
"""Tokens that one id of a trace's file stands for."""


@dataclasses.dataclass(frozen=True)
class TraceRequest:
    """One request.

    Attributes:
      arrival: seconds after the trace's first.
      prompt_tokens, output_tokens: lengths, each at least 1.
      blocks: ids of the prompt's blocks, where it shares any: equal ids stand for equal tokens. The last block may be
        cut short, and is then the beginning of what its id stands for.
      block_tokens: tokens a block.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS


@dataclasses.dataclass(frozen=True)
class Kind:
    """One log-normal of the mixture: its share of the requests, and mean and deviation of the lengths' logarithms."""

    share: float
    prompt: float
    prompt_std: float
    output: float
    output_std: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """Distributions that a trace is drawn from.

    Attributes:
      rate: requests a second in the long run.
      gap_shape: of the gamma distribution of a gap about its momentary mean; 1 is exponential.
      rate_std: standard deviation of the logarithm of the momentary rate; 0 with `gap_shape` 1 is a Poisson process.
      rate_memory: requests after which the correlation of that logarithm has fallen to 1/e.
      longest: most prompt and output tokens; what is drawn beyond is cut.
      kinds: the mixture of lengths; shares are relative.
    """

    rate: float
    gap_shape: float
    rate_std: float
    rate_memory: int
    longest: tuple[int, int]
    kinds: tuple[Kind, ...]


CONVERSATION = Workload(
    rate=5.53,
    gap_shape=0.934,
    rate_std=0.243,
    rate_memory=720,
    longest=(14_050, 1_000),
    kinds=(
        Kind(0.275, 6.978, 0.069, 6.003, 0.048),
        Kind(0.245, 5.989, 0.043, 4.536, 0.254),
        Kind(0.204, 7.357, 0.522, 4.569, 0.499),
        Kind(0.098, 5.293, 0.089, 4.963, 0.425),
        Kind(0.075, 8.316, 0.011, 4.015, 0.459),
        Kind(0.056, 6.986, 0.067, 6.251, 0.183),
        Kind(0.027, 3.899, 1.192, 4.938, 0.334),
        Kind(0.020, 5.327, 0.501, 2.743, 0.200),
    ),
)
"""Fitted to the conversation trace named above."""


def generate_trace(count: int, seed: int, workload: Workload, rate: float | None = None) -> list[TraceRequest]:
    """Draws so many requests; equal seeds give equal traces, and a longer trace begins like a shorter one.

    Args:
      count: how many.
      seed: of all that is drawn.
      workload: the distributions.
      rate: requests a second in the long run, with bursts of as many requests; None takes the workload's own. The rate
        of a short trace differs from it as that of a short piece of a real one does.

    Raises:
      ValueError: a count or rate that is not positive.
    """
    if count < 1:
        raise ValueError(f"{count} requests cannot be generated; ask for at least 1")
    rate = workload.rate if rate is None else rate
    if not 0 < rate < math.inf:
        raise ValueError(f"the rate is {rate} requests a second; it must be positive and finite")
    of_gaps, of_rates, of_kinds, of_lengths = (np.random.default_rng([seed, stream]) for stream in range(4))

    gaps = of_gaps.standard_gamma(workload.gap_shape, count) / workload.gap_shape
    gaps *= np.exp(-_drift(workload, of_rates.standard_normal(count)) - workload.rate_std**2 / 2) / rate
    arrivals = np.cumsum(gaps) - gaps[0]

    kinds = np.array([dataclasses.astuple(kind) for kind in workload.kinds])
    edges = np.cumsum(kinds[:, 0]) / kinds[:, 0].sum()
    _, *columns = kinds[np.searchsorted(edges[:-1], of_kinds.random(count), side="right")].T
    means, stds = np.stack(columns[::2], 1), np.stack(columns[1::2], 1)
    lengths = np.rint(np.exp(means + stds * of_lengths.standard_normal((count, 2))))
    lengths = np.clip(lengths, 1, workload.longest).astype(int)
    return [TraceRequest(*request) for request in zip(arrivals.tolist(), *lengths.T.tolist(), strict=True)]


def _drift(workload: Workload, noise: np.ndarray) -> np.ndarray:
    """The logarithm of the momentary rate over the mean one: autoregressive, with noise of unit variance as input."""
    kept = math.exp(-1 / workload.rate_memory)
    fresh = math.sqrt(1 - kept**2)
    levels = [float(noise[0])]
    for new in noise[1:].tolist():
        levels.append(kept * levels[-1] + fresh * new)
    return workload.rate_std * np.array(levels)


def scale(trace: Sequence[TraceRequest], *, lengths: float, speed: float) -> list[TraceRequest]:
    """Lengths times `lengths`, at least 1; arrivals `speed` times as dense.

    Blocks are scaled, and prompts block by block, so that those that began alike still do.
    """

    def scaled(tokens: int) -> int:
        return max(1, round(tokens * lengths))

    def prompt(request: TraceRequest) -> int:
        if not request.blocks:
            return scaled(request.prompt_tokens)
        block = scaled(request.block_tokens)
        whole, rest = divmod(request.prompt_tokens, request.block_tokens)
        return max(1, whole * block + min(block, round(rest * lengths)))

    return [
        TraceRequest(r.arrival / speed, prompt(r), scaled(r.output_tokens), r.blocks, scaled(r.block_tokens))
        for r in trace
    ]


def clamp(trace: Sequence[TraceRequest], max_position: int) -> tuple[list[TraceRequest], int]:
    """Requests that fit in `max_position` positions, and how many had to be cut: the prompt first, then the output."""
    fitting = []
    for request in trace:
        output = min(request.output_tokens, max_position - 1)
        prompt = min(request.prompt_tokens, max_position - output)
        fitting.append(dataclasses.replace(request, prompt_tokens=prompt, output_tokens=output))
    return fitting, sum(before != after for before, after in zip(trace, fitting, strict=True))
