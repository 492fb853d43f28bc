"""Everything that measures, behind `ridgeline bench NAME`; `results/` holds one JSON a run."""

import argparse
from collections.abc import Sequence

from . import attention, decode, formats, kernel_resources, loading, matmul, quality, replay
from .environment import command

BENCHMARKS = {
    "decode": decode,
    "attention": attention,
    "matmul": matmul,
    "formats": formats,
    "replay": replay,
    "loading": loading,
    "quality": quality,
    "resources": kernel_resources,
}
"""By the name on the command line: a module with `add_arguments(parser)` and `run(args)`, told by its docstring."""


def add_parsers(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add a command for each benchmark; `arguments` is the command line, which results are stored with."""
    names = parser.add_subparsers(title="benchmarks", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        summary = module.__doc__.partition("\n")[0]
        one = names.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(one)
        one.set_defaults(run=module.run, command=command(arguments))
