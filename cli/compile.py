"""`ridgeline compile`: what prefill and decode of a model take on GPUs that need not be there."""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.table import Table

from ..decode.buckets import prefill_bucket
from ..model.find import find_config
from ..model.presets import PRESETS
from ..programs import abstract_cache, abstract_params, bytes_per_device, lower_decode, lower_prefill
from ..sharding.hlo import collectives, parse
from ..sharding.targets import CHIPS, Chip, compile_for_target, find_chip, target_mesh
from .common import OK, add_format_options, at_least_one, print_notes, schemes, terminal, usage_errors
from .formats import print_json

_MEMORY_FRACTION = 0.75  # of a GPU's memory, which JAX takes at start unless it is told otherwise


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "compile",
        help="compile a model for GPUs that need not be there",
        description="Compile prefill and decode of a model for a number of GPUs of one host, on any machine and "
        "without weights, and print what they take of each GPU's memory and what the GPUs send each other.",
        epilog=f"presets: {', '.join(PRESETS)}",
    )
    add = parser.add_argument
    help = "a preset, its name on the Hub, a config.json, a directory that has one, or 'bundled'"
    add("model", metavar="MODEL", help=help)
    add("--target", choices=tuple(CHIPS), default="h200", help="the GPU (default: %(default)s)")
    add("--devices", type=int, default=1, metavar="N", help="GPUs that share every layer (default: %(default)s)")
    help = "groups of so many GPUs each, which share out the experts of a layer (default: %(default)s)"
    add("--expert", type=int, default=1, metavar="N", help=help)
    add("--batch", type=int, default=16, metavar="B", help="rows (default: %(default)s)")
    add("--context", type=int, default=8192, metavar="S", help="positions a row of the cache holds (default: 8192)")
    add("--prompt", type=int, metavar="T", help="prompt tokens a row; longer ones run in chunks (default: the context)")
    add_format_options(parser, dtype="bfloat16")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    jax.config.update("jax_platforms", "cpu")  # no GPU is used, not even one that is there
    with usage_errors():
        at_least_one(args, "devices", "expert", "batch", "context")
        prompt = args.context if args.prompt is None else args.prompt
        if not 1 <= prompt <= args.context:
            raise ValueError(f"--prompt is {prompt}; it must be between 1 and --context {args.context}")
        config = find_config(args.model, **schemes(args))
        config = config.replace(dtype=args.dtype)
    mesh = target_mesh(args.target, tensor=args.devices, expert=args.expert)
    chip = find_chip(args.target)
    sizes = {"batch_size": args.batch, "max_length": args.context, "kv_dtype": args.kv_dtype}
    with usage_errors():  # a model that so many devices cannot share
        weights = bytes_per_device(abstract_params(config, mesh))
        cache = bytes_per_device(abstract_cache(config, mesh, **sizes))

    tokens = prefill_bucket(prompt)
    with terminal(stderr=True).status("compiling"):
        programs = {
            "prefill": _compile(lambda: lower_prefill(config, mesh, tokens=tokens, **sizes), tokens, chip),
            "decode": _compile(lambda: lower_decode(config, mesh, **sizes), 1, chip),
        }
    if args.json:
        report = {name: getattr(args, name) for name in ("model", "target", "devices", "expert", "batch", "context")}
        report |= schemes(args) | {"dtype": config.dtype, "kv": args.kv_dtype or config.dtype}
        report |= {"device_memory_bytes": chip.memory, "weight_bytes": weights, "cache_bytes": cache}
        print_json(report | {"programs": programs})
        return OK
    stored = f"{args.quantize} in {config.dtype}" if args.quantize else config.dtype
    devices = f"{args.devices * args.expert} x {chip.name}"
    title = f"{args.model} in {stored} on {devices}, batch {args.batch}, context {args.context}"
    terminal().print(title, highlight=False, markup=False, style="italic")
    terminal().print(_table(weights, cache, programs))
    print_notes(_notes(programs, chip))
    return OK


def _compile(lower: Callable[[], jax.stages.Lowered], tokens: int, chip: Chip) -> dict[str, Any]:
    """What the compiler says of a program of so many new tokens a row; bytes are those of one device.

    "alias_bytes" of the arguments are reused in place, "peak_bytes" are arguments, results and temporaries together.
    """
    started = time.perf_counter()
    compiled = compile_for_target(lower())
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    # XLA's own peak counts temporaries only while they live, but they are allocated as one block for the whole run.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return {
        "tokens": tokens,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "fits": peak < chip.memory,
        "collectives": [dataclasses.asdict(each) for each in collectives(parse(compiled.as_text()))],
        "compile_seconds": seconds,
    }


def _table(weights: int, cache: int, programs: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("on each GPU")
    for name, program in programs.items():
        table.add_column(f"{name}, {program['tokens']} token{'s' * (program['tokens'] > 1)} a row", justify="right")

    def row(label: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(label, *map(value, programs.values()))

    row("weights", lambda _: _size(weights))
    row("cache", lambda _: _size(cache))
    for label, name in {"updated in place": "alias", "temporary": "temporary", "peak": "peak"}.items():
        row(label, lambda program, name=name: _size(program[f"{name}_bytes"]))
    row("fits", lambda program: "yes" if program["fits"] else "no")
    sent = {(name, each["kind"]): each for name, program in programs.items() for each in program["collectives"]}
    texts = {key: f"{each['count']} x, {_size(each['bytes'])}" for key, each in sent.items()}
    for kind in sorted({kind for _, kind in sent}):
        table.add_row(kind, *(texts.get((name, kind), "-") for name in programs))
    row("compile time", lambda program: f"{program['compile_seconds']:.1f} s")
    return table


def _notes(programs: dict[str, dict[str, Any]], chip: Chip) -> Iterator[str]:
    yield f"The memory of one {chip.name} is {_size(chip.memory)}; peak is weights, cache, logits and temporaries."
    if any(program["collectives"] for program in programs.values()):
        yield "Collectives: how many a step, and the bytes of their operands on one GPU."
    peak = max(program["peak_bytes"] for program in programs.values())
    if _MEMORY_FRACTION * chip.memory < peak < chip.memory:
        yield (
            f"JAX takes {_MEMORY_FRACTION:.0%} of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise: "
            f"this needs {peak / chip.memory:.2f} and what NCCL and CUDA keep for themselves."
        )


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
