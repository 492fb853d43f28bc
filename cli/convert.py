"""`ridgeline convert`: a checkpoint in Hugging Face layout -> one that holds the parameters as this package does."""

import argparse
import time
from pathlib import Path

from ..model.loading import convert_model
from .common import OK, add_format_options, schemes


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in Ridgeline's own layout",
        description="Write a Hugging Face checkpoint with its parameters merged as Ridgeline holds them, in orbax's "
        "format. The result loads as the original does, onto one device or any mesh. OUT is there whole or not at all.",
    )
    parser.add_argument("checkpoint", metavar="HF_DIR", help="a directory with config.json and safetensors files")
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory to make; it must not exist")
    add_format_options(parser, kv=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    out = convert_model(args.checkpoint, args.out, dtype=args.dtype, **schemes(args))
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e9:.3g} GB in {seconds:.1f} s, {size / 1e9 / seconds:.3g} GB/s")
    return OK
