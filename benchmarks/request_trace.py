"""Request traces: read from a file, or generated after distributions fitted to a real one.

The source of the fit is the conversation trace of "Azure LLM inference trace 2023" (Azure/AzurePublicDataset on GitHub,
CC-BY Attribution License): 19,366 requests within an hour to language models in Azure. It is described in Patel,
Choukse, Zhang, Shah, Goiri, Maleki and Bianchini, "Splitwise: Efficient generative LLM inference using phase
splitting", ISCA 2024. The trace itself is not part of this package; `ridgeline bench replay --fit FILE` fits anew, and
prints the table below for any trace.

Arrivals are no Poisson process. One gap alone is nearly exponential (a KS distance of 0.022), but the rate drifts:
minutes with many requests follow each other, so that requests come in bursts which fill a queue. Gamma-distributed
gaps that do not know of each other fit a single gap a little better (0.019) and the bursts no better. Here the
logarithm of the rate is an autoregressive process over requests, and the gaps are gamma-distributed about it.

Lengths are a mixture of log-normals over (prompt, output). One log-normal each is far off (KS 0.16 and 0.19): the trace
has several kinds of requests. The rank correlation of the two lengths is only 0.07, but a prompt of 1,020 to 1,130
tokens is answered with about 400 and longer ones with fewer, so the two are drawn together. That a request resembles
the one before it (correlation of outputs 0.10) is left out.

The trace beside as many generated requests (seed 0):

                                        p10     p50     p90     p99      KS
    gap / mean gap         trace      0.089   0.655   2.326   4.920
                           generator  0.082   0.650   2.347   5.117   0.013
    prompt tokens          trace        207    1020    2734    4142
                           generator    207    1016    2922    4162   0.025
    output tokens          trace         54     129     424     601
                           generator     58     126     422     611   0.019
    prompt + output        trace        368    1412    2820    4259
                           generator    367    1398    3036    4239   0.026

    median output, by quarter of prompts                  trace 98, 108, 406, 89     generator 108, 108, 407, 86
    variance / mean of arrivals in 5, 50, 300 mean gaps   trace 1.34, 3.76, 14.5     generator 1.35, 3.84, 15.4

The last line's figures of the generator are means of 20 draws: so few bursts fit in an hour that single draws range
from 1.20 to 1.57, from 2.3 to 5.9 and from 6 to 28. A Poisson process has 1 in all three, as have independent gamma
gaps nearly (1.14, 1.06, 1.01).
"""

import csv
import dataclasses
import datetime
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclasses.dataclass(frozen=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
      arrival: seconds after the trace's first request.
      prompt_tokens, output_tokens: lengths, each at least 1.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int


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
        Kind(share=0.275, prompt=6.978, prompt_std=0.069, output=6.003, output_std=0.048),
        Kind(share=0.245, prompt=5.989, prompt_std=0.043, output=4.536, output_std=0.254),
        Kind(share=0.204, prompt=7.357, prompt_std=0.522, output=4.569, output_std=0.499),
        Kind(share=0.098, prompt=5.293, prompt_std=0.089, output=4.963, output_std=0.425),
        Kind(share=0.075, prompt=8.316, prompt_std=0.011, output=4.015, output_std=0.459),
        Kind(share=0.056, prompt=6.986, prompt_std=0.067, output=6.251, output_std=0.183),
        Kind(share=0.027, prompt=3.899, prompt_std=1.192, output=4.938, output_std=0.334),
        Kind(share=0.020, prompt=5.327, prompt_std=0.501, output=2.743, output_std=0.200),
    ),
)
"""Fitted to the conversation trace named above; lengths are natural logarithms of tokens."""


def read_trace(path: Path) -> list[TraceRequest]:
    """Reads a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens, in order of time.

    A timestamp is a date and time as in ISO 8601, or a number of seconds.

    Raises:
      ValueError: a column or value that is missing or wrong, naming the file, the line and the remedy.
    """
    requests: list[tuple[float, int, int]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path.name}, line 1: no column {missing[0]}, found {rows.fieldnames or 'nothing'}; "
                f"the first line must name the columns {', '.join(COLUMNS)}"
            )
        for row in rows:
            where = f"{path.name}, line {rows.line_num}"
            time = _time(row["TIMESTAMP"], where)
            lengths = [_length(row[name], name, where) for name in COLUMNS[1:]]
            if requests and time < requests[-1][0]:
                raise ValueError(
                    f"{where}: TIMESTAMP {row['TIMESTAMP']!r} is before that of the request above; sort the file by it"
                )
            requests.append((time, *lengths))
    if not requests:
        raise ValueError(f"{path.name} has no requests; give one a line, below the names of the columns")
    return [TraceRequest(time - requests[0][0], *lengths) for time, *lengths in requests]


def _time(value: str | None, where: str) -> float:
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            moment = datetime.datetime.fromisoformat(value or "")
        except ValueError:
            seconds = math.nan
        else:  # in UTC where no zone is told: an hour is never skipped
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(f"{where}: TIMESTAMP is {value!r}; write it as 2023-11-16 18:15:46.68, or as seconds")
    return seconds


def _length(value: str | None, name: str, where: str) -> int:
    if value is None or not value.strip().isdecimal() or int(value) == 0:
        raise ValueError(f"{where}: {name} is {value!r}; it must be a whole number of tokens, at least 1")
    return int(value)


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
    level, levels = float(noise[0]), [float(noise[0])]
    for new in noise[1:].tolist():
        level = kept * level + fresh * new
        levels.append(level)
    return workload.rate_std * np.array(levels)


def scale(trace: Sequence[TraceRequest], *, lengths: float, speed: float) -> list[TraceRequest]:
    """Lengths times `lengths`, at least 1; arrivals `speed` times as dense."""
    return [
        TraceRequest(
            request.arrival / speed,
            max(1, round(request.prompt_tokens * lengths)),
            max(1, round(request.output_tokens * lengths)),
        )
        for request in trace
    ]


def clamp(trace: Sequence[TraceRequest], max_position: int) -> tuple[list[TraceRequest], int]:
    """Requests that fit in `max_position` positions, and how many had to be cut: the prompt first, then the output."""
    fitting = []
    for request in trace:
        output = min(request.output_tokens, max_position - 1)
        prompt = min(request.prompt_tokens, max_position - output)
        fitting.append(TraceRequest(request.arrival, prompt, output))
    return fitting, sum(before != after for before, after in zip(trace, fitting, strict=True))
