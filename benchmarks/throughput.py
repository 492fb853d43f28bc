"""Requests and tokens a second where all requests are there at the beginning.

The arguments, the lines printed and the JSON keys are those of `vllm bench throughput`.

    ridgeline bench throughput bundled --num-prompts 100 --input-len 128 --output-len 128
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from .harness import Table
from .limits import Figure
from .offline import Offline, add_sizes
from .timing import elapsed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = add_sizes(parser, input_len=128, output_len=128)
    add("--num-prompts", type=int, default=100, metavar="N", help="requests (default: %(default)s)")
    add("--max-num-seqs", type=int, default=16, metavar="B", help="requests that run together (default: %(default)s)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    offline = Offline(args, "num_prompts", "max_num_seqs")
    prompts = offline.prompts(args.num_prompts)
    with offline.engine(args.max_num_seqs, prompts) as engine:
        offline.run(engine, prompts[:1])
        seconds, tokens = elapsed(lambda: offline.run(engine, prompts))
    total = tokens + args.num_prompts * args.input_len
    yield offline.settings | {
        "max_num_seqs": args.max_num_seqs,
        "elapsed_time": seconds,
        "num_requests": args.num_prompts,
        "total_num_tokens": total,
        "requests_per_second": args.num_prompts / seconds,
        "tokens_per_second": total / seconds,
    }


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    prompts = report["num_requests"] * report["input_len"]
    outputs = report["total_num_tokens"] - prompts
    total, made = report["tokens_per_second"], outputs / report["elapsed_time"]
    requests = report["requests_per_second"]
    yield f"Throughput: {requests:.2f} requests/s, {total:.2f} total tokens/s, {made:.2f} output tokens/s"
    yield f"Total num prompt tokens:  {prompts}"
    yield f"Total num output tokens:  {outputs}"


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    return iter(())
