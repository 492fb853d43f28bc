"""A decode step with the same weights in several formats, in turns: what fewer bytes a token are worth.

Formats are a dtype, with a scheme of the layers' weights behind a slash and one of the output projection behind a plus:
float32, bfloat16, bfloat16/int8, bfloat16/int4-32+int8.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .. import roofline
from ..cli.common import OK, UsageError
from ..cli.formats import integers
from ..model.config import DTYPES
from .environment import RESULTS, Others, hardware, now, store, versions
from .steps import Contest, Turn, decode_turn, in_turns, plan_steps
from .subject import SETTABLE, find_subject, make_model

FORMATS = ("float32", "bfloat16", "float32/int8+int8", "bfloat16/int8+int8", "bfloat16/int4+int8", "bfloat16/fp8+fp8")


def parse(text: str) -> dict[str, str | None]:
    """The arguments of `find_subject` that a format stands for."""
    dtype, _, schemes = text.partition("/")
    layers, _, output = schemes.partition("+")
    if dtype not in DTYPES:
        raise ValueError(f"format {text!r} begins with none of {', '.join(DTYPES)}; such as bfloat16/int4+int8")
    return {"dtype": dtype, "quantize": layers or None, "quantize_output": output or None}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every format and batch: seconds a step, and the bytes of weights that it reads."""
    steps = plan_steps(args.context, args.tokens)
    subjects = {name: find_subject(args.model, args.layers, args.set, **parse(name)) for name in args.formats}
    models = {name: make_model(subject, None, None) for name, subject in subjects.items()}
    read = {
        name: roofline.count_decode(roofline.Deployment(subject.config), 1, args.context).weights.bytes
        for name, subject in subjects.items()
    }

    def turn(name: str, batch: int) -> Turn:
        """Its time is stored under the format's name."""
        run = decode_turn(models[name], batch, steps, None)
        return lambda: {name: run()["tpot"]}

    contests = [
        Contest("decode", batch, args.context, {name: turn(name, batch) for name in models}) for batch in args.batch
    ]
    total = len(models) * len(contests) * (args.repeats + 1)
    with tqdm(total=total, unit="turn", disable=None, leave=False) as bar:
        in_turns(contests, args.repeats, lambda what: bar.update())
    rows = []
    for contest in contests:
        if contest.failures:
            raise RuntimeError(f"batch {contest.batch}: {contest.failures}")
        for name in models:
            times = contest.runs[name]
            rows.append(
                {
                    "format": name,
                    "batch": contest.batch,
                    "weight_bytes": read[name],
                    "seconds": statistics.median(times),
                    "seconds_min": min(times),
                    "seconds_max": max(times),
                }
            )
    return rows


def table(rows: list[dict[str, Any]], bandwidth: float) -> Table:
    """The rows as they are printed; speed-ups are of medians, over the first two formats."""
    found = Table(box=box.SIMPLE_HEAD, padding=0)
    found.add_column("format", no_wrap=True)
    first = [row["format"] for row in rows][:2]
    for name in ("batch", "MB", "ms", "tok/s", "GB/s", "of read", *(f"x {name}" for name in first)):
        found.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        speed = row["weight_bytes"] / row["seconds"]
        base = [r["seconds"] for r in rows if r["batch"] == row["batch"] and r["format"] in first]
        found.add_row(
            row["format"],
            str(row["batch"]),
            f"{row['weight_bytes'] / 1e6:,.1f}",
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['batch'] / row['seconds']:,.0f}",
            f"{speed / 1e9:.1f}",
            f"{speed / bandwidth:.2f}",
            *(f"{seconds / row['seconds']:.2f}" for seconds in base),
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", default="llama-3.2-1b", help="a preset, with random weights (default: %(default)s)")
    add("--layers", type=int, metavar="N", help="run N layers")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help=f"change a size: {', '.join(SETTABLE)}")
    add("--formats", type=lambda text: text.split(","), default=list(FORMATS), metavar="FORMAT,...")
    add("--batch", type=integers, default=[1, 8], metavar="B,...", help="rows (default: 1,8)")
    add("--context", type=int, default=512, metavar="S", help="positions a step sees (default: %(default)s)")
    add("--tokens", type=int, default=32, metavar="N", help="steps that are timed together (default: %(default)s)")
    add("--repeats", type=int, default=7, metavar="N", help="timings of each, in turns (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="where the results are stored")


def run(args: argparse.Namespace) -> int:
    others = Others()
    before = roofline.measure(dtypes=[])
    try:
        rows = measure(args)
    except ValueError as error:
        raise UsageError(str(error)) from None
    after = roofline.measure(dtypes=[])
    bandwidth = max(before.bandwidth, after.bandwidth)
    out = args.output or RESULTS / f"formats-{Path(args.model).name}-{jax.default_backend()}.json"
    report = {
        "benchmark": "formats",
        "date": now(),
        "command": args.command,
        "hardware": hardware() | {"device": jax.devices()[0].device_kind},
        "versions": versions("ridgeline", "jax", "jaxlib", "numpy"),
        "model": {"name": Path(args.model).name, "layers": args.layers, "set": args.set},
        "context": args.context,
        "bandwidth": {"before": before.bandwidth, "after": after.bandwidth},
        "cores_busy_with_others": others.cores(),
        "rows": rows,
    }
    store(report, out)
    console = Console()
    console.print(table(rows, bandwidth))
    console.print(
        f"Memory is read at {before.bandwidth / 1e9:.1f} GB/s before and {after.bandwidth / 1e9:.1f} after; "
        f"{report['cores_busy_with_others']} cores were busy with others; stored in {out.name}.",
        highlight=False,
        soft_wrap=True,
    )
    return OK
