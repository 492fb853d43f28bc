"""A decode step with the same weights in several formats, in turns: what fewer bytes a token are worth.

Then each product of a layer by itself, beside the speed of memory, worst first.

Formats are a dtype, with a scheme of the layers' weights behind a slash and one of the output projection behind a plus:
float32, bfloat16, bfloat16/int8, bfloat16/int4-32+int8.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from .. import roofline
from ..cli.common import usage_errors
from ..cli.formats import integers, number
from ..model.config import DTYPES
from . import subject as subjects
from .harness import Table, milliseconds
from .limits import Figure, measured_roof, roof_record
from .products import measured, of_layer, table
from .steps import decode_turn, plan_steps
from .subject import find_subject, make_model
from .timing import Turn, in_turns

FORMATS = "float32,bfloat16,float32/int8+int8,bfloat16/int8+int8,bfloat16/int4+int8,bfloat16/fp8+fp8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects.add_arguments(parser, default="llama-3.2-1b")
    add = parser.add_argument
    add("--formats", type=lambda text: text.split(","), default=FORMATS.split(","), metavar="FORMAT,...")
    add("--batch", type=integers, default=[1, 8], metavar="B,...", help="rows (default: 1,8)")
    add("--context", type=int, default=512, metavar="S", help="positions a step sees (default: %(default)s)")
    add("--tokens", type=int, default=32, metavar="N", help="steps that are timed together (default: %(default)s)")
    add("--repeats", type=int, default=7, metavar="N", help="timings of each, in turns (default: %(default)s)")


def parse(text: str) -> dict[str, str | None]:
    """The arguments of `find_subject` that a format stands for."""
    dtype, _, schemes = text.partition("/")
    layers, _, output = schemes.partition("+")
    if dtype not in DTYPES:
        raise ValueError(f"format {text!r} begins with none of {', '.join(DTYPES)}; such as bfloat16/int4+int8")
    return {"dtype": dtype, "quantize": layers or None, "quantize_output": output or None}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with usage_errors():
        steps = plan_steps(args.context, args.tokens)
        named = {name: find_subject(args.model, args.layers, args.set, **parse(name)) for name in args.formats}
    before = measured_roof(["bfloat16"])
    models = {name: make_model(subject) for name, subject in named.items()}

    def turn(name: str, batch: int) -> Turn:
        return decode_turn(models[name], batch, steps, None)

    turns = {(name, batch): turn(name, batch) for batch in args.batch for name in models}
    with tqdm(total=len(turns) * (args.repeats + 1), unit="turn", disable=None, leave=False) as bar:
        timed, _ = in_turns(turns, args.repeats, turns, lambda _: bar.update())
    after = measured_roof(["bfloat16"])
    stored = dict.fromkeys(parsed["quantize"] or parsed["dtype"] for parsed in map(parse, args.formats))
    layer = of_layer(next(iter(named.values())).config)
    read = {name: roofline.Deployment(subject.config) for name, subject in named.items()}
    yield {
        "subject": next(iter(named.values())).title,
        "model": {"name": args.model, "layers": args.layers, "set": args.set},
        "context": args.context,
        "roof": roof_record(before, after, "bfloat16"),
        "rows": [
            {
                "format": name,
                "batch": batch,
                "weight_bytes": roofline.count_decode(read[name], 1, args.context).weights.bytes,
                "seconds": dataclasses.asdict(spreads["tpot"]),
            }
            for (name, batch), spreads in timed.items()
        ],
        "products": measured(layer, list(stored), args.batch, args.repeats),
    }


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """Speed-ups are of medians, over the first two formats."""
    first, rows = list(dict.fromkeys(row["format"] for row in report["rows"]))[:2], []
    for row in report["rows"]:
        seconds = row["seconds"]["median"]
        base = {r["format"]: r["seconds"]["median"] for r in report["rows"] if r["batch"] == row["batch"]}
        rows.append(
            (
                *(row["format"], str(row["batch"]), f"{row['weight_bytes'] / 1e6:,.1f}", milliseconds(seconds)),
                *(number(row["batch"] / seconds), number(row["weight_bytes"] / seconds / 1e9)),
                *(f"{base[name] / seconds:.2f}" for name in first),
            )
        )
    columns = ("format", "batch", "MB", "ms", "tok/s", "GB/s", *(f"x {name}" for name in first))
    yield Table("", columns, rows)
    yield table(report["products"])
    before, after = (report["roof"][when]["bandwidth"] / 1e9 for when in ("before", "after"))
    yield f"Memory is read at {before:.1f} GB/s before and {after:.1f} after."


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """A step beside the time that its weights take to be read."""
    bandwidth = report["roof"]["used"]["bandwidth"]
    for row in report["rows"]:
        limit = row["weight_bytes"] / bandwidth * 1e3
        yield Figure(f"{row['format']}, batch {row['batch']}", row["seconds"]["median"] * 1e3, limit, "ms")
