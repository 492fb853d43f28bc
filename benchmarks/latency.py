"""Seconds that one batch of requests takes from beginning to end, again and again.

The arguments, the lines printed and the JSON keys are those of `vllm bench latency`.

    ridgeline bench latency bundled --input-len 32 --output-len 128 --batch-size 8
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from .harness import Table
from .limits import Figure
from .offline import Offline, add_sizes
from .timing import elapsed

PERCENTAGES = (10, 25, 50, 75, 90, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = add_sizes(parser, input_len=32, output_len=128)
    add("--batch-size", type=int, default=8, metavar="B", help="requests (default: %(default)s)")
    add("--num-iters-warmup", type=int, default=3, metavar="N", help="runs before it counts (default: %(default)s)")
    add("--num-iters", type=int, default=10, metavar="N", help="runs that count (default: %(default)s)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    offline = Offline(args, "batch_size", "num_iters")
    prompts = offline.prompts(args.batch_size)
    with offline.engine(args.batch_size, prompts) as engine:
        runs = range(-args.num_iters_warmup, args.num_iters)
        timed = [elapsed(lambda: offline.run(engine, prompts))[0] for _ in tqdm(runs, disable=None, leave=False)]
    latencies = timed[args.num_iters_warmup :]
    yield offline.settings | {
        "batch_size": args.batch_size,
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {str(p): float(np.percentile(latencies, p)) for p in PERCENTAGES},
    }


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    yield f"Avg latency: {report['avg_latency']} seconds"
    for percentage, latency in report["percentiles"].items():
        yield f"{percentage}% percentile latency: {latency} seconds"


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    return iter(())
