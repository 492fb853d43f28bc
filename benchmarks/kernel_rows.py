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
from typing import Any, Protocol, runtime_checkable

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

Operands = dict[str, Any]
Contender = Callable[[jax.Array, Operands], jax.Array]
Inputs = tuple[jax.Array, Operands, Sequence[Operands]]
"""What the first call is made on, what all calls share, and the sets of the rest."""


@runtime_checkable
class Row(Protocol):
    """What is timed; its string is its name."""

    @property
    def bytes(self) -> int:
        """That must be moved."""
        ...

    @property
    def flops(self) -> int:
        """That must be done."""
        ...


@dataclasses.dataclass(frozen=True)
class Kind:
    """A benchmark of kernels.

    Attributes:
      quick, full, tiny: its rows: the most telling, all, and those for a CPU.
      contenders: of a row, by name: functions of queries or activations and operands, or why there is none. "mosaic" is
        the kernel, "reference" the truth.
      inputs: of a row and a number of sets.
      forms: of a row and its inputs, the form that a contender of that name takes them in.
      advance: the next call's first operand, from this call's and its result.
      layers: calls that a contender makes in a step of the timed program.
    """

    quick: Sequence[Row]
    full: Callable[[], Sequence[Row]]
    tiny: Sequence[Row]
    contenders: Callable[[Row], dict[str, Contender | str]]
    inputs: Callable[[Row, int], Inputs]
    forms: Mapping[str, Callable[[Row, Inputs], Inputs]]
    advance: Callable[[jax.Array, jax.Array], jax.Array]
    layers: Callable[[Row, str], int]


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
    if tiny:
        results["label"] = CPU_LABEL
    for row in tqdm(rows, unit="row", disable=None, file=sys.stderr):
        if time.perf_counter() > until:
            result = {"not_run": "not run: out of time"}
        else:
            try:
                result = measure_row(kind, row, before, tiny, args.rounds)
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
    contenders, why, inputs, outs = kind.contenders(row), {}, {}, {}
    made = {None: kind.inputs(row, sets)}  # by form, each once
    for name, contender in contenders.items():
        if isinstance(contender, str):
            why[name] = contender
            continue
        try:
            form = kind.forms.get(name)
            made[form] = made.get(form) or form(row, made[None])
            x, shared, [first, *_] = inputs[name] = made[form]
            outs[name] = compiled(contender, x, shared | first)()
        except Exception as error:  # whatever keeps a contender from running is a result
            why[name] = f"failed: {reason(error)}"
    truth = next((outs[name] for name in ("reference", *contenders) if name in outs and name != "mosaic"), None)
    errors = {name: relative_error(out, truth) for name, out in outs.items() if out is not truth and truth is not None}
    for name, error in errors.items():
        if not error < BOUND:
            why[name] = f"failed: its relative error is {error:.2e}; the bound is {BOUND:.0e}"
    if "mosaic" in outs and "mosaic" not in errors:
        why["mosaic"] = "failed: nothing ran that the kernel can be held against"
    result: dict[str, Any] = {**dataclasses.asdict(row), "sets": sets, "errors": errors}
    if why.get("mosaic", "").startswith("failed"):
        return result | {"why": why, "failed": why["mosaic"]}

    turns = {}
    for name in outs.keys() - why.keys():
        layers = sets if tiny else -(-kind.layers(row, name) // sets) * sets
        steps = 1 if tiny else math.ceil(PROGRAM_SECONDS / max(least_seconds(row, roof), 2e-6) / layers)
        try:
            program = compiled(chained(contenders[name], kind.advance, steps, layers), *inputs[name])
            turns[name] = program_turn(program, steps * layers, 0 if tiny else TURN_SECONDS)
        except Exception as error:
            why[name] = f"failed: {reason(error)}"
    timed, failures = in_turns({name: turns[name] for name in contenders if name in turns}, rounds)
    why |= {name: f"failed: {error}" for name, error in failures.items()}
    result |= {"seconds": {name: dataclasses.asdict(each["call"]) for name, each in timed.items()}, "why": why}
    return result | ({"failed": why["mosaic"]} if why.get("mosaic", "").startswith("failed") else {})


def least_seconds(row: Row | Mapping[str, Any], roof: Hardware) -> float:
    """Of a call at the roof, by a row or its stored record."""
    nbytes, flops = (row["bytes"], row["flops"]) if isinstance(row, Mapping) else (row.bytes, row.flops)
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


def timed_rows(report: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, float], float]]:
    """Rows that were timed, the median seconds of each contender, and those at the roof."""
    roof = used_roof(report["roof"])
    for row in report["rows"]:
        if row.get("seconds"):
            medians = {name: spread["median"] for name, spread in row["seconds"].items()}
            yield row, medians, least_seconds(row, roof)


def served(medians: Mapping[str, float]) -> str:
    """Whose time counts: the kernel's, or where it does not run, the reference's."""
    return "mosaic" if "mosaic" in medians else "reference"


def show(report: Mapping[str, Any], peers: Sequence[str]) -> Iterator[Table | str]:
    """A table of the timed rows, then what did not run. In brackets: how often the kernel fits in a peer's time."""
    rows = []
    for row, medians, least in timed_rows(report):
        name = served(medians)
        ours = row["seconds"].get(name)
        cells = [row["row"], f"{least * 1e6:.1f}"]
        if ours is None:
            cells += ["-"] * 3
        else:
            spans = f"{ours['min'] * 1e6:.1f} - {ours['max'] * 1e6:.1f}"
            cells += [f"{ours['median'] * 1e6:.1f}", spans, f"{least / ours['median']:.3f}"]
        for peer in peers:
            over = f" ({medians[peer] / ours['median']:.2f})" if peer in medians and ours else ""
            cells.append(f"{medians[peer] * 1e6:.1f}{over}" if peer in medians else "-")
        error = row["errors"].get("mosaic")
        rows.append((*cells, "-" if error is None else f"{error:.1e}"))
    used = used_roof(report["roof"])
    title = f"{report['device']}: {used.roof('bfloat16')}"
    yield Table(
        title, ("row", "limit us", "us", "min - max", "of limit", *(f"{peer} us" for peer in peers), "error"), rows
    )
    if "label" in report:
        yield report["label"]
    for row in report["rows"]:
        if "not_run" in row:
            yield f"{row['row']}: {row['not_run']}"
