"""Request traces: read from a file, or generated after distributions fitted to a real one.

The source of the fit is the conversation trace of "Azure LLM inference trace 2023" (Azure/AzurePublicDataset on GitHub,
CC-BY Attribution License): 19,366 requests within an hour to language models in Azure. It is described in Patel,
Choukse, Zhang, Shah, Goiri, Maleki and Bianchini, "Splitwise: Efficient generative LLM inference using phase
splitting", ISCA 2024. The trace itself is not part of this package; `python benchmarks/replay.py --fit FILE` fits anew,
and prints the table below for any trace.

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
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
FEWEST_TO_FIT = 500
QUANTILES = (0.1, 0.5, 0.9, 0.99)
WINDOWS = (5, 50, 300)


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


# --- reading ---


def read_trace(path: Path) -> list[TraceRequest]:
    """Reads a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens, in order of time.

    A timestamp is a date and time as in ISO 8601, or a number of seconds.

    Raises:
      ValueError: a column or value that is missing or wrong, naming the file, the line and the remedy.
    """
    found: list[tuple[float, int, int]] = []
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
            if found and time < found[-1][0]:
                raise ValueError(
                    f"{where}: TIMESTAMP {row['TIMESTAMP']!r} is before that of the request above; sort the file by it"
                )
            found.append((time, *lengths))
    if not found:
        raise ValueError(f"{path.name} has no requests; give one a line, below the names of the columns")
    return [TraceRequest(time - found[0][0], *lengths) for time, *lengths in found]


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


# --- generating ---


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


# --- fitting ---


def fit_workload(trace: Sequence[TraceRequest], kinds: int = 8) -> Workload:
    """The workload that a trace was likely drawn from.

    The drift of the rate is fitted to the autocovariance of the gaps, which for log-normal levels is, in units of the
    mean gap, exp(s^2 r^lag) - 1; the shape then to their variance, (1 + 1/shape) exp(s^2) - 1. The mixture is fitted by
    expectation-maximization (Dempster, Laird and Rubin 1977), the best of a few starts.

    Raises:
      ValueError: too few requests, or all at one time.
    """
    if len(trace) < FEWEST_TO_FIT:
        raise ValueError(f"the trace has {len(trace)} requests; to fit it takes at least {FEWEST_TO_FIT}")
    times, lengths = _arrays(trace)
    if times[-1] == 0:
        raise ValueError("all requests of the trace arrive at one time; to fit arrivals they must differ")
    gaps = np.diff(times)
    variance, memory = _fit_drift(gaps / gaps.mean())
    shape = 1 / max((1 + (gaps / gaps.mean()).var()) / math.exp(variance) - 1, 1e-3)

    rng = np.random.default_rng(0)
    # A length is whole: spread over its unit, so that one that is frequent is no point of infinite density.
    logs = np.log(lengths + rng.uniform(-0.5, 0.5, lengths.shape))
    _, mixture = max((_fit_mixture(logs, kinds, rng) for _ in range(3)), key=lambda found: found[0])
    order = np.argsort(-mixture[:, 0])
    return Workload(
        rate=round(1 / float(gaps.mean()), 3),
        gap_shape=round(float(shape), 3),
        rate_std=round(math.sqrt(variance), 3),
        rate_memory=round(memory),
        longest=tuple(lengths.max(0).astype(int).tolist()),
        kinds=tuple(Kind(*row) for row in mixture[order].round(3).tolist()),
    )


def _arrays(trace: Sequence[TraceRequest]) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals [requests] and lengths [requests, 2]."""
    rows = np.array([dataclasses.astuple(request) for request in trace])
    return rows[:, 0], rows[:, 1:]


def _fit_drift(gaps: np.ndarray) -> tuple[float, float]:
    """Variance of the logarithm of the rate, and its memory in requests, from gaps whose mean is 1."""
    count = len(gaps)
    spectrum = np.abs(np.fft.rfft(gaps - 1, 2 * count)) ** 2
    covariance = np.fft.irfft(spectrum)[:count] / count
    edges = [edge for edge in 2 ** np.arange(12) if edge <= count // 10]
    bands = list(itertools.pairwise(edges))  # of lags, each of equal weight: one lag alone is noise
    logs = np.array([math.log1p(max(covariance[low:high].mean(), 0.0)) for low, high in bands])
    best = (math.inf, 0.0, 1.0)
    for memory in np.geomspace(1, count / 10, 200):
        decay = np.array([np.exp(-np.arange(low, high) / memory).mean() for low, high in bands])
        variance = max(float(decay @ logs / (decay @ decay)), 0.0)
        best = min(best, (float(((logs - variance * decay) ** 2).sum()), variance, float(memory)))
    return best[1], best[2]


def _fit_mixture(logs: np.ndarray, kinds: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Log-likelihood, and a row of share, prompt, prompt_std, output, output_std for each kind."""
    centres = [rng.choice(logs)]  # far from one another, as in k-means++
    while len(centres) < kinds:
        distance = np.min([((logs - centre) ** 2).sum(1) for centre in centres], 0)
        centres.append(rng.choice(logs, p=distance / distance.sum()))
    means, stds = np.array(centres), np.tile(logs.std(0) / 2, (kinds, 1))
    shares, before = np.full(kinds, 1 / kinds), -math.inf
    while True:
        scaled = (logs - means[:, None]) / stds[:, None]  # [kinds, requests, 2]
        density = np.log(shares / stds.prod(1) / (2 * math.pi))[:, None] - (scaled**2).sum(2) / 2
        total = np.logaddexp.reduce(density, 0)
        likelihood = float(total.sum())
        if likelihood - before < 1e-5 * len(logs):
            return likelihood, np.column_stack([shares, means[:, 0], stds[:, 0], means[:, 1], stds[:, 1]])
        before, belongs = likelihood, np.exp(density - total)
        size = belongs.sum(1) + 1e-9
        shares, means = size / size.sum(), belongs @ logs / size[:, None]
        spread = (belongs[:, :, None] * (logs - means[:, None]) ** 2).sum(1) / size[:, None]
        stds = np.sqrt(spread + 0.01**2)  # a hundredth of a length: none shrinks to a point


# --- how good the fit is ---


def ks_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The two-sample Kolmogorov-Smirnov distance: the largest difference of the cumulative distributions."""
    points = np.concatenate([one, other])
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (one, other)]
    return float(np.abs(below[0] - below[1]).max())


def dispersion(times: np.ndarray, window: int | float) -> float:
    """Variance over mean of the number of arrivals in windows of so many mean gaps; 1 for a Poisson process."""
    counts, _ = np.histogram(times, np.arange(0, times[-1], window * times[-1] / (len(times) - 1)))
    return float(counts.var() / counts.mean())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A quantity in a trace and in a generated one.

    Attributes:
      name: of the quantity.
      columns: names of the figures.
      real, drawn: its figures in both.
      ks: the Kolmogorov-Smirnov distance of the two; None where the figures are not quantiles.
    """

    name: str
    columns: tuple[str, ...]
    real: list[float]
    drawn: list[float]
    ks: float | None = None


def compare(real: Sequence[TraceRequest], drawn: Sequence[TraceRequest]) -> list[Comparison]:
    """Quantiles of gaps and lengths; the dispersion; and how the output depends on the prompt."""
    (times, lengths), (drawn_times, drawn_lengths) = _arrays(real), _arrays(drawn)
    gaps, drawn_gaps = np.diff(times), np.diff(drawn_times)
    quantiles = tuple(f"p{100 * q:g}" for q in QUANTILES)
    rows = [
        Comparison(
            name,
            quantiles,
            np.quantile(one, QUANTILES).tolist(),
            np.quantile(other, QUANTILES).tolist(),
            ks_distance(one, other),
        )
        for name, one, other in (
            ("gap / mean gap", gaps / gaps.mean(), drawn_gaps / drawn_gaps.mean()),
            ("prompt tokens", lengths[:, 0], drawn_lengths[:, 0]),
            ("output tokens", lengths[:, 1], drawn_lengths[:, 1]),
            ("prompt + output tokens", lengths.sum(1), drawn_lengths.sum(1)),
        )
    ]
    windows = tuple(f"{window} gaps" for window in WINDOWS)
    spread = ([dispersion(each, window) for window in WINDOWS] for each in (times, drawn_times))
    rows.append(Comparison("arrivals' variance / mean in", windows, *spread))
    edges = np.quantile(lengths[:, 0], (0.25, 0.5, 0.75))
    medians = (_medians_by_quarter(each, edges) for each in (lengths, drawn_lengths))
    rows.append(Comparison("median output of prompt quarter", ("1", "2", "3", "4"), *medians))
    return rows


def _medians_by_quarter(lengths: np.ndarray, edges: np.ndarray) -> list[float]:
    """nan for a quarter that has none."""
    quarter = np.searchsorted(edges, lengths[:, 0], side="right")
    parts = [lengths[quarter == index, 1] for index in range(4)]
    return [float(np.median(part)) if len(part) else math.nan for part in parts]


def comparison_table(title: str, real: Sequence[TraceRequest], workload: Workload) -> Table:
    """`compare` with as many requests of the workload, drawn with seed 0."""
    table = Table(title=title, title_justify="left")
    for column in ("", "trace", "generator", "KS"):
        table.add_column(column, justify="right" if table.columns else "left")
    for row in compare(real, generate_trace(len(real), 0, workload)):
        for index, (column, *figures) in enumerate(zip(row.columns, row.real, row.drawn, strict=True)):
            name = f"{row.name}, {column}" if row.ks is not None else f"{row.name} {column}"
            distance = f"{row.ks:.3f}" if row.ks is not None and not index else ""
            table.add_row(name, *(f"{figure:.4g}" for figure in figures), distance)
        table.add_section()
    return table
