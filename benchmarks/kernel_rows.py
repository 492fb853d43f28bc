"""How kernels are timed, row by row: checked first, then in turns with whatever does the same.

A timed program makes many calls, each on the result of the one before, over operands that are several times the L2
cache (in turns over several sets where one is smaller). A barrier ties a set to the call, so that nothing is gathered,
transposed or converted once for all calls. On a CPU tiny shapes prove that the program works, and nothing else.
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tqdm import tqdm

from ..cli.common import UsageError
from ..pallas_kernels.dispatch import current_device
from ..roofline.hardware import Hardware
from .harness import Table
from .limits import measured_roof, roof_record, used_roof
from .timing import in_turns, program_turn, reason

BOUND = 2e-2  # relative error, as norms
ROTATED = 256e6  # bytes of operands that a program goes through before it meets the first again: five L2 caches
MOST_SETS = 32
MOST_BYTES = 60e9  # of a program, in and out and between
PROGRAM_SECONDS = 0.04  # so that what it takes to start one is lost in it
TURN_SECONDS = 0.1
CPU_LABEL = "cpu, tiny shapes: proves the program, not the kernel"

Row = Any
"""A dataclass whose string is its name, with the `bytes` that must be moved and the `flops` that must be done."""

Operands = dict[str, Any]
Contender = Callable[[jax.Array, Operands], jax.Array]
Inputs = tuple[jax.Array, Operands, Sequence[Operands]]
"""What the first call is made on, what all calls share, and the sets of the rest."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A benchmark of kernels.

    Attributes:
      quick, full, tiny: its rows: the most telling, all, and those for a CPU.
      contenders: of a row, by name: functions, or why there is none. "mosaic" is the kernel, "reference" the truth.
      inputs: of a row and a number of sets.
      advance: the next call's first operand, from this call's and its result.
      layers: calls in a step of the timed program, of a row and a contender.
      forms: of a row and its inputs, the form in which the contender of that name takes them.
    """

    quick: Sequence[Row]
    full: Callable[[], Sequence[Row]]
    tiny: Sequence[Row]
    contenders: Callable[[Row], dict[str, Contender | str]]
    inputs: Callable[[Row, int], Inputs]
    advance: Callable[[jax.Array, jax.Array], jax.Array]
    layers: Callable[[Row, str], int]
    forms: Mapping[str, Callable[[Row, Inputs], Inputs]] = dataclasses.field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help="the most telling rows alone")
    add("--only", default="", metavar="TEXT", help="rows whose name contains this")
    add("--minutes", type=float, default=math.inf, metavar="M", help="begin no row later")
    add("--rounds", type=int, default=3, metavar="N", help="turns of each, from 2 on (default: %(default)s)")


def measure(kind: Kind, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results so far, after each row."""
    if args.rounds < 2:
        raise UsageError(f"--rounds is {args.rounds}; from 2 on the rounds show how far timings agree")
    tiny, until = jax.default_backend() == "cpu", time.perf_counter() + 60 * args.minutes
    rows = [row for row in (kind.tiny if tiny else kind.quick if args.quick else kind.full()) if args.only in str(row)]
    if not rows:
        raise UsageError(
            f"--only is {args.only!r}, which no row has in its name; names look like {str(kind.tiny[0])!r}"
        )
    before = measured_roof(["bfloat16"], jax.devices()[:1], tiny)
    results: dict[str, Any] = {"subject": "tiny" if tiny else "quick" if args.quick else "", "rows": [], "failures": []}
    results |= {"label": CPU_LABEL} if tiny else {}
    for row in tqdm(rows, unit="row", disable=None, file=sys.stderr):
        try:
            late = time.perf_counter() > until
            result = {"not_run": "out of time"} if late else measure_row(kind, row, before, tiny, args.rounds)
        except Exception as error:  # the rows after it may still run
            result = {"failed": reason(error)}
        results["rows"].append({"row": str(row), "bytes": row.bytes, "flops": row.flops} | result)
        if "failed" in result:
            results["failures"].append(f"{row}: {result['failed']}")
        yield results | {"roof": roof_record(before, before, "bfloat16")}
    after = before if tiny else measured_roof(["bfloat16"], jax.devices()[:1])
    yield results | {"roof": roof_record(before, after, "bfloat16")}


def measure_row(kind: Kind, row: Row, roof: Hardware, tiny: bool, rounds: int) -> dict[str, Any]:
    """One row: errors, seconds a call, and why a contender has none; "failed" where the kernel is wrong."""
    sets = 2 if tiny else min(MOST_SETS, math.ceil(ROTATED / row.bytes))
    contenders, inputs, outs = kind.contenders(row), {}, {}
    why = {name: contender for name, contender in contenders.items() if isinstance(contender, str)}
    made = {None: kind.inputs(row, sets)}  # by form, each once
    for name in contenders.keys() - why.keys():
        try:
            form = kind.forms.get(name)
            made[form] = made.get(form) or form(row, made[None])
            x, shared, [first, *_] = inputs[name] = made[form]
            outs[name] = compiled(contenders[name], x, shared | first)()
        except Exception as error:  # whatever keeps a contender from running is a result
            why[name] = f"failed: {reason(error)}"
    truth = next((name for name in ("reference", *contenders) if name in outs and name != "mosaic"), None)
    errors = {name: relative_error(out, outs[truth]) for name, out in outs.items() if truth not in (None, name)}
    for name, error in errors.items():
        if not error < BOUND:
            why[name] = f"failed: its relative error is {error:.2e}; the bound is {BOUND:.0e}"
    if "mosaic" in outs and truth is None:
        why["mosaic"] = "failed: nothing ran that the kernel can be held against"
    result: dict[str, Any] = {**dataclasses.asdict(row), "sets": sets, "errors": errors, "why": why}
    if why.get("mosaic", "").startswith("failed"):
        return result | {"failed": why["mosaic"]}

    turns = {}
    for name in (name for name in contenders if name not in why):
        layers = sets if tiny else -(-kind.layers(row, name) // sets) * sets
        least = max(least_seconds(row.bytes, row.flops, roof), 2e-6)
        steps = 1 if tiny else math.ceil(PROGRAM_SECONDS / least / layers)
        try:
            program = compiled(chained(contenders[name], kind.advance, steps, layers), *inputs[name])
            turns[name] = program_turn(program, steps * layers, 0 if tiny else TURN_SECONDS)
        except Exception as error:
            why[name] = f"failed: {reason(error)}"
    timed, failures = in_turns(turns, rounds)
    why |= {name: f"failed: {error}" for name, error in failures.items()}
    result["seconds"] = {name: dataclasses.asdict(each["call"]) for name, each in timed.items()}
    return result | ({"failed": why["mosaic"]} if why.get("mosaic", "").startswith("failed") else {})


def least_seconds(nbytes: int | float, flops: int | float, roof: Hardware) -> float:
    """Of a call at the roof."""
    return max(nbytes / roof.bandwidth, flops / roof.peak("bfloat16"))


def chained(
    contender: Contender, advance: Callable[..., jax.Array], steps: int, calls: int
) -> Callable[..., jax.Array]:
    """So many steps of so many calls, one after the other, on each set in turn."""
    contender = jax.jit(contender)  # traced once, and not at every call

    def program(x, shared, sets):
        def step(x, _):
            for call in range(calls):
                x, tied = lax.optimization_barrier((x, sets[call % len(sets)]))
                x = advance(x, contender(x, shared | tied))
            return x, None

        return lax.scan(step, x, None, length=steps)[0]

    return program


def compiled(function: Callable[..., jax.Array], *operands: Any) -> Callable[[], jax.Array]:
    """The program, with its operands; it has run. MemoryError, before it does, where it would take too much."""
    program = jax.jit(function).lower(*operands).compile()
    sizes = program.memory_analysis()
    size = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    if size > MOST_BYTES:
        raise MemoryError(f"it would take {size / 1e9:.0f} GB; a program may take {MOST_BYTES / 1e9:.0f} GB here")
    ready = functools.partial(program, *operands)
    jax.block_until_ready(ready())
    return ready


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    """As norms."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm((out - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def kernel_reason() -> str | None:
    """Why the kernels cannot run here."""
    device = current_device()
    return None if device.is_hopper else f"not run: needs a Hopper GPU, and this is {device.kind}"


def timed_rows(report: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, float], float]]:
    """Rows that were timed; whose time counts, the kernel's or where it does not run the reference's; the median
    seconds of each contender; and those at the roof."""
    roof = used_roof(report["roof"])
    for row in report["rows"]:
        medians = {name: spread["median"] for name, spread in row.get("seconds", {}).items()}
        name = "mosaic" if "mosaic" in medians else "reference"
        if name in medians:
            yield row, name, medians, least_seconds(row["bytes"], row["flops"], roof)


def show(report: Mapping[str, Any], peers: Sequence[str]) -> Iterator[Table | str]:
    """A table of the timed rows, then what did not run. In brackets: how often the kernel fits in a peer's time."""
    rows = []
    for row, name, medians, least in timed_rows(report):
        ours, error = row["seconds"][name], row["errors"].get("mosaic")
        times = [least * 1e6, *(ours[key] * 1e6 for key in ("median", "min", "max"))]
        others = (f"{medians[p] * 1e6:.1f} ({medians[p] / medians[name]:.2f})" if p in medians else "-" for p in peers)
        cells = (f"{least / ours['median']:.3f}", *others, "-" if error is None else f"{error:.1e}")
        rows.append((row["row"], *(f"{time:.1f}" for time in times), *cells))
    columns = ("row", "limit us", "us", "min", "max", "of limit", *(f"{peer} us" for peer in peers), "error")
    yield Table(f"{report['device']}: {used_roof(report['roof']).roof('bfloat16')}", columns, rows)
    yield from [report["label"]] if "label" in report else []
    yield from (f"{row['row']}: not run, {row['not_run']}" for row in report["rows"] if "not_run" in row)
