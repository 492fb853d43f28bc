"""Pictures of a replay: latencies of the servers, goodput over speed, and prefix hits over the size of the pool."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..roofline.plot import new_figure, save_figure

_COLORS = {"static": "C1", "engine": "C0"}

Runs = Sequence[Mapping[str, Any]]


def plot(report: Mapping[str, Any], path: Path) -> None:
    """The shares of requests whose TTFT and TPOT are at most so long, at the first speed, with the limits; and what
    changes with speed, and with the size of the pool, where there are several.
    """
    runs = report["runs"]
    speeds = dict.fromkeys(run["speed"] for run in runs)
    pools = dict.fromkeys(run["cache_tokens"] for run in runs if run["server"] == "engine")
    panels = 2 + (len(speeds) > 1) + (len(pools) > 1)
    figure = new_figure(figsize=(4.5 * panels, 3.6))
    first, second, *others = figure.subplots(1, panels)
    largest = [run for run in runs if run["server"] == "static" or run["cache_tokens"] == max(pools)]
    _latencies((first, second), report["limits"], [run for run in largest if run["speed"] == next(iter(speeds))])
    if len(speeds) > 1:
        _goodput(others.pop(0), largest)
    if len(pools) > 1:
        _hits(others.pop(0), report["trace"]["prefix_hit_rate"], [run for run in runs if run["server"] == "engine"])
    save_figure(figure, path, dpi=150)


def _latencies(panels: Sequence[Any], limits: Mapping[str, float], runs: Runs) -> None:
    for axes, (key, limit) in zip(panels, limits.items(), strict=True):
        for run in runs:
            if run[key]:
                axes.ecdf([1e3 * value for value in run[key]], label=run["server"], color=_COLORS[run["server"]])
        axes.axvline(1e3 * limit, color="tab:red", linestyle="--", label=f"limit, {1e3 * limit:g} ms")
        x = f"{key.upper()} at speed {runs[0]['speed']:g} (ms)"
        axes.set(xlabel=x, ylabel="share of requests", xlim=(0, None), ylim=(0, 1.02))
        _finish(axes, "lower right")


def _goodput(axes: Any, runs: Runs) -> None:
    for server, color in _COLORS.items():
        line = sorted((run["speed"], run["result"]["request_goodput"]) for run in runs if run["server"] == server)
        if line:
            axes.plot(*zip(*line, strict=True), marker="o", color=color, label=server)
    axes.set(xlabel="speed, times the trace's", ylabel="goodput, requests/s", xlim=(0, None), ylim=(0, None))
    _finish(axes)


def _hits(axes: Any, allowed: float, runs: Runs) -> None:
    for speed in dict.fromkeys(run["speed"] for run in runs):
        line = sorted((run["cache_tokens"], run["prefix_hit_rate"]) for run in runs if run["speed"] == speed)
        axes.plot(*zip(*line, strict=True), marker="o", label=f"speed {speed:g}")
    axes.axhline(allowed, color="grey", linestyle="--", label="a pool without end")
    axes.set(xlabel="positions of the pool", ylabel="prompt tokens found in it", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    _finish(axes)


def _finish(axes: Any, place: str = "best") -> None:
    axes.grid(alpha=0.3)
    axes.legend(loc=place, fontsize=8)
