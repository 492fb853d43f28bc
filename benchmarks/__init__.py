"""Everything that measures, behind `ridgeline bench NAME`; `results/` holds one JSON a run."""

import argparse
import functools
from collections.abc import Sequence

from . import (
    attention,
    correctness,
    decode,
    formats,
    gguf,
    harness,
    kernel_resources,
    latency,
    loading,
    machine,
    matmul,
    products,
    profile,
    quality,
    replay,
    speculation,
    stages,
    throughput,
)
from .environment import command

BENCHMARKS = {
    "decode": decode,
    "attention": attention,
    "matmul": matmul,
    "formats": formats,
    "products": products,
    "gguf": gguf,
    "latency": latency,
    "throughput": throughput,
    "replay": replay,
    "speculation": speculation,
    "loading": loading,
    "quality": quality,
    "resources": kernel_resources,
    "machine": machine,
    "correctness": correctness,
    "profile": profile,
}
"""By the name on the command line; `harness` says what they have in common."""


def add_parsers(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add a command for each benchmark, and one for all; `arguments` is the command line, which goes with results."""
    names = parser.add_subparsers(title="benchmarks", required=True, metavar="NAME")
    for name, module in {**BENCHMARKS, "all": stages}.items():
        texts = {"help": module.__doc__.partition("\n")[0], "description": module.__doc__}
        one = names.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
        module.add_arguments(one)
        one.set_defaults(command=command(arguments), run=stages.run)
        if module is not stages:
            harness.add_arguments(one)
            one.set_defaults(run=functools.partial(harness.run, module))
