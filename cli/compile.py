"""`ridgeline compile`: what prefill and decode of a model take on GPUs that need not be there."""

import argparse
import dataclasses
import json
import time
from typing import Any

import jax
from rich.table import Table

from ..decode.buckets import prefill_bucket
from ..model.presets import PRESETS
from ..programs import abstract_cache, abstract_params, bytes_per_device, lower_decode, lower_prefill
from ..sharding.hlo import Collective, collectives, parse
from ..sharding.targets import CHIPS, Chip, compile_for_target, find_chip, target_mesh
from .common import OK, add_format_options, model_config, quantized, terminal, usage_errors

_MEMORY_FRACTION = 0.75  # of a GPU's memory, which JAX takes at start unless it is told otherwise


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program; bytes are those of one device.

    Attributes:
      tokens: new tokens a row.
      alias_bytes: of the arguments, what the results reuse in place.
      temporary_bytes: what the program needs besides arguments and results.
      peak_bytes: arguments, results and temporaries together, what is reused counted once.
      fits: whether that is less than the device's memory.
      collectives: what one run communicates.
      compile_seconds: lowering and compiling.
    """

    tokens: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    fits: bool
    collectives: list[Collective]
    compile_seconds: float


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "compile",
        help="compile a model for GPUs that need not be there",
        description="Compile prefill and decode of a model for a number of GPUs of one host, on any machine and "
        "without weights, and print what they take of each GPU's memory and what the GPUs send each other.",
        epilog=f"presets: {', '.join(PRESETS)}",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a preset, a directory with a model's config.json, or 'bundled'")
    add("--target", choices=tuple(CHIPS), default="h200", help="the GPU (default: %(default)s)")
    add("--devices", type=int, default=1, metavar="N", help="GPUs that share every layer (default: %(default)s)")
    add("--batch", type=int, default=16, metavar="B", help="rows (default: %(default)s)")
    add("--context", type=int, default=8192, metavar="S", help="positions a row of the cache holds (default: 8192)")
    add("--prompt", type=int, metavar="T", help="prompt tokens a row; longer ones run in chunks (default: the context)")
    add_format_options(parser, dtype="bfloat16")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    jax.config.update("jax_platforms", "cpu")  # no GPU is used, not even one that is there
    with usage_errors():
        for name in ("devices", "batch", "context"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
        prompt = args.context if args.prompt is None else args.prompt
        if not 1 <= prompt <= args.context:
            raise ValueError(f"--prompt is {prompt}; it must be between 1 and --context {args.context}")
        config = model_config(args.model).replace(dtype=args.dtype)
        config = quantized(config, args.quantize, args.quantize_output)
    mesh = target_mesh(args.target, tensor=args.devices)
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
        report = {
            "model": args.model,
            "dtype": config.dtype,
            "quantize": args.quantize,
            "quantize_output": args.quantize_output,
            "kv": args.kv_dtype or config.dtype,
            "target": args.target,
            "device_memory_bytes": chip.memory,
            "devices": args.devices,
            "batch": args.batch,
            "context": args.context,
            "weight_bytes": weights,
            "cache_bytes": cache,
            "programs": {name: dataclasses.asdict(program) for name, program in programs.items()},
        }
        print(json.dumps(report))
        return OK
    stored = f"{args.quantize} in {config.dtype}" if args.quantize else config.dtype
    title = f"{args.model} in {stored} on {args.devices} x {chip.name}, batch {args.batch}, context {args.context}"
    console = terminal()
    console.print(_table(title, weights, cache, programs))
    for line in _notes(programs, chip):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    return OK


def _compile(lower: Any, tokens: int, chip: Chip) -> Compiled:
    started = time.perf_counter()
    compiled = compile_for_target(lower())
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    # XLA's own peak counts temporaries only while they live, but they are allocated as one block for the whole run.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return Compiled(
        tokens=tokens,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        fits=peak < chip.memory,
        collectives=collectives(parse(compiled.as_text())),
        compile_seconds=seconds,
    )


def _table(title: str, weights: int, cache: int, programs: dict[str, Compiled]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("on each GPU")
    for name, program in programs.items():
        table.add_column(f"{name}, {program.tokens} token{'s' * (program.tokens > 1)} a row", justify="right")

    def row(label: str, value: Any) -> None:
        table.add_row(label, *(value(program) for program in programs.values()))

    row("weights", lambda _: _size(weights))
    row("cache", lambda _: _size(cache))
    row("updated in place", lambda program: _size(program.alias_bytes))
    row("temporary", lambda program: _size(program.temporary_bytes))
    row("peak", lambda program: _size(program.peak_bytes))
    row("fits", lambda program: "yes" if program.fits else "no")
    for kind in sorted({found.kind for program in programs.values() for found in program.collectives}):
        row(kind, lambda program, kind=kind: _communication(program, kind))
    row("compile time", lambda program: f"{program.compile_seconds:.1f} s")
    return table


def _communication(program: Compiled, kind: str) -> str:
    found = [collective for collective in program.collectives if collective.kind == kind]
    return f"{found[0].count} x, {_size(found[0].bytes)}" if found else "-"


def _notes(programs: dict[str, Compiled], chip: Chip) -> list[str]:
    notes = [f"The memory of one {chip.name} is {_size(chip.memory)}; peak is weights, cache, logits and temporaries."]
    if any(program.collectives for program in programs.values()):
        notes.append("Collectives: how many a step, and the bytes of their operands on one GPU.")
    peak = max(program.peak_bytes for program in programs.values())
    if _MEMORY_FRACTION * chip.memory < peak < chip.memory:
        notes.append(
            f"JAX takes {_MEMORY_FRACTION:.0%} of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise: "
            f"this needs {peak / chip.memory:.2f} and what NCCL and CUDA keep for themselves."
        )
    return notes


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
