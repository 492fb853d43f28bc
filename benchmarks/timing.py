"""How everything is timed: contenders in turns, many calls before one waits, and what the timings come to."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from typing import Any

import jax

MOST_RUNS = 100  # a turn

Turn = Callable[[], Mapping[str, int | float]]
"""Runs something once; seconds (or what else is measured) by what was timed."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeated timings of one thing, in seconds: the median, which counts, the extremes, and all of them."""

    median: float
    min: float
    max: float
    runs: Sequence[float]


def spread(runs: Sequence[int | float]) -> Spread:
    """Summary of at least one timing."""
    runs = list(map(float, runs))
    return Spread(statistics.median(runs), min(runs), max(runs), runs)


def in_turns(
    turns: Mapping[Hashable, Turn],
    rounds: int,
    required: Container[Hashable] = (),
    tick: Callable[[Hashable], None] = lambda name: None,
) -> tuple[dict[Hashable, dict[str, Spread]], dict[Hashable, str]]:
    """Lets every contender run once to compile, then `rounds` times in turns; each round begins with another.

    A slow minute of the machine so falls on all. A contender that fails is out.

    Args:
      turns: by contender.
      rounds: that count.
      required: contenders whose failure is raised.
      tick: told of every turn.

    Returns:
      What was timed, by contender; and why a contender is out.
    """
    names, failures = list(turns), {}
    runs: dict[Hashable, dict[str, list[int | float]]] = {name: {} for name in names}
    for turn in range(rounds + 1):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            tick(name)
            if name in failures:
                continue
            try:
                timed = turns[name]()
            except Exception as error:  # whatever another program raises is a result
                if name in required:
                    raise
                failures[name] = reason(error)
                continue
            for what, seconds in timed.items() if turn else ():
                runs[name].setdefault(what, []).append(seconds)
    done = {name: timed for name, timed in runs.items() if name not in failures}
    return {name: {what: spread(each) for what, each in timed.items()} for name, timed in done.items()}, failures


def program_turn(program: Callable[[], Any], calls: int, seconds: int | float) -> Turn:
    """A turn of a program that starts so many calls and returns what to wait for: "call", the median of one's seconds.

    The program is repeated for so many seconds, three times at least.
    """

    def turn() -> Mapping[str, float]:
        jax.block_until_ready(program())  # the device's clock and caches are this program's
        runs: list[float] = []
        until = time.perf_counter() + seconds
        while len(runs) < 3 or (time.perf_counter() < until and len(runs) < MOST_RUNS):
            runs.append(elapsed(lambda: jax.block_until_ready(program()))[0] / calls)
        return {"call": statistics.median(runs)}

    return turn


def elapsed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a function takes, and what it returns."""
    started = time.perf_counter()
    out = run()
    return time.perf_counter() - started, out


def reason(error: Exception) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
