"""Fitting a workload to a trace of requests, and how good the fit is."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from .harness import Table
from .request_trace import Kind, TraceRequest, Workload, generate_trace

FEWEST_TO_FIT = 500
WINDOWS = (5, 50, 300)


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
    _, mixture = max((_fit_mixture(logs, kinds, rng) for _ in range(3)), key=lambda fit: fit[0])
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
    rows = np.array([(request.arrival, request.prompt_tokens, request.output_tokens) for request in trace])
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
    centers = [rng.choice(logs)]  # far from one another, as in k-means++
    while len(centers) < kinds:
        distance = np.min([((logs - center) ** 2).sum(1) for center in centers], 0)
        centers.append(rng.choice(logs, p=distance / distance.sum()))
    means, stds = np.array(centers), np.tile(logs.std(0) / 2, (kinds, 1))
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


def ks_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The two-sample Kolmogorov-Smirnov distance: the largest difference of the cumulative distributions."""
    points = np.concatenate([one, other])
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (one, other)]
    return float(np.abs(below[0] - below[1]).max())


def dispersion(times: np.ndarray, window: int | float) -> float:
    """Variance over mean of the number of arrivals in windows of so many mean gaps; 1 for a Poisson process."""
    counts, _ = np.histogram(times, np.arange(0, times[-1], window * times[-1] / (len(times) - 1)))
    return float(counts.var() / counts.mean())


def comparison(title: str, real: Sequence[TraceRequest], workload: Workload) -> Table:
    """A trace beside as many requests of the workload, drawn with seed 0: medians of gaps and lengths with their
    Kolmogorov-Smirnov distances, and the dispersion.
    """
    traces = real, generate_trace(len(real), 0, workload)
    (times, lengths), (drawn_times, drawn_lengths) = map(_arrays, traces)
    pairs = {
        "gap": (np.diff(times) / np.diff(times).mean(), np.diff(drawn_times) / np.diff(drawn_times).mean()),
        "prompt tokens": (lengths[:, 0], drawn_lengths[:, 0]),
        "output tokens": (lengths[:, 1], drawn_lengths[:, 1]),
        "prompt + output tokens": (lengths.sum(1), drawn_lengths.sum(1)),
    }
    rows = [
        (f"{name}, median", *(f"{np.median(each):.4g}" for each in pair), f"{ks_distance(*pair):.3f}")
        for name, pair in pairs.items()
    ]
    for window in WINDOWS:
        spreads = (f"{dispersion(each, window):.4g}" for each in (times, drawn_times))
        rows.append((f"arrivals' variance / mean in {window} gaps", *spreads, ""))
    return Table(title, ("", "trace", "generator", "KS"), rows)
