"""Timing on a device: contenders in turns, many calls a program; and the ceilings that they are held against."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

MOST_RUNS = 100  # a round


def in_turns(
    programs: Mapping[str, Callable[[], Any]], calls: Mapping[str, int], *, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Times programs one after the other, `rounds` times over, each time beginning with another.

    Args:
      programs: each starts its work and returns what to wait for. They have run before.
      calls: how many calls of what is measured each program makes.
      rounds: turns of each.
      seconds: how long a program is repeated in a turn; three times at least.

    Returns:
      For each: "us", the median microseconds a call; "us_min" and "us_max"; "us_rounds", the median of each turn, whose
      spread is the noise; "runs", how many.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in programs}
    names = list(programs)
    for turn in range(rounds):
        start = turn % len(names) if names else 0
        for name in names[start:] + names[:start]:
            jax.block_until_ready(programs[name]())  # the device's clock and caches are this program's
            runs: list[float] = []
            until = time.perf_counter() + seconds
            while len(runs) < 3 or (time.perf_counter() < until and len(runs) < MOST_RUNS):
                started = time.perf_counter()
                jax.block_until_ready(programs[name]())
                runs.append((time.perf_counter() - started) / calls[name] * 1e6)
            found[name].append(runs)
    return {name: _summary(turns) for name, turns in found.items()}


def _summary(turns: list[list[float]]) -> dict[str, Any]:
    runs = [run for turn in turns for run in turn]
    return {
        "us": round(statistics.median(runs), 3),
        "us_min": round(min(runs), 3),
        "us_max": round(max(runs), 3),
        "us_rounds": [round(statistics.median(turn), 3) for turn in turns],
        "runs": len(runs),
    }


def ceilings(*, tiny: bool, rounds: int, seconds: float) -> dict[str, Any]:
    """What the device does at best: bytes/s of a copy and of a streaming read, FLOP/s of a bfloat16 matrix product.

    Args:
      tiny: sizes that a CPU is done with at once, and that say nothing.
      rounds, seconds: as in `in_turns`.

    Returns:
      "copy", "read" and "matmul", each the timing of one and its "gb_per_s" or "tflop_per_s"; "gb_per_s", the larger of
      the two bandwidths; "tflop_per_s".
    """
    size, width, repeats = (2**20, 256, 2) if tiny else (2**30, 8192, 8)
    words = jax.random.bits(jax.random.key(0), (size // 8192, 8192))  # 4 GiB of uint32

    x, w = jax.random.normal(jax.random.key(1), (2, width, width), jnp.bfloat16)
    w = (w * width**-0.5).astype(w.dtype)  # products keep their size, pass after pass
    passes = {
        "copy": (jax.jit(lambda x: ~x), words),
        "read": (jax.jit(lambda c, x: (x ^ c).sum(axis=1).sum()), jnp.uint32(0), words),
        "matmul": (jax.jit(lambda x, w: x @ w), x, w),
    }

    def repeated(one, first, *others):  # a pass takes milliseconds: the device never waits for the next to be started
        out = first
        for _ in range(repeats):
            out = one(out, *others)
        return out

    programs = {name: functools.partial(repeated, *parts) for name, parts in passes.items()}
    for program in programs.values():
        jax.block_until_ready(program())
    found = in_turns(programs, dict.fromkeys(programs, repeats), rounds=rounds, seconds=seconds)
    found["copy"]["gb_per_s"] = round(2 * words.nbytes / found["copy"]["us"] / 1e3, 2)
    found["read"]["gb_per_s"] = round(words.nbytes / found["read"]["us"] / 1e3, 2)
    found["matmul"]["tflop_per_s"] = round(2 * width**3 / found["matmul"]["us"] / 1e6, 3)
    bandwidth = max(found["copy"]["gb_per_s"], found["read"]["gb_per_s"])
    return found | {"gb_per_s": bandwidth, "tflop_per_s": found["matmul"]["tflop_per_s"]}
