"""The tables and notes of `ridgeline bench`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from ..cli.formats import number, simple_table
from ..roofline.hardware import Hardware
from .cells import BenchCell, geometric_mean, ratios, scaling
from .peers import PEERS

_CAUSES = {
    "prefill": {
        "products": ("products",),
        "attn": ("attention",),
        "memory": ("memory",),
        "links": ("collectives",),
        "padding": ("padding",),
        "set-up": ("set_up",),
        "sample": ("sampling",),
        "rest": ("unattributed",),
    },
    "decode": {
        "weights": ("weights",),
        "KV": ("kv_read", "kv_write"),
        "other": ("activations", "logits", "arithmetic"),
        "links": ("collectives",),
        "host": ("launch",),
        "sample": ("sampling",),
        "context": ("context",),
        "rows": ("rows",),
        "rest": ("unattributed",),
    },
}
"""Columns of the attribution, by phase, and what each sums."""


def tables(title: str, cells: Sequence[BenchCell]) -> Iterator[Table]:
    """The tables, in order, under a title; cells of all tensor degrees."""
    for phase in ("prefill", "decode"):
        found = [cell for cell in cells if cell.phase == phase]
        yield _speeds(f"{title}\n\n{_TITLES[phase]}" if phase == "prefill" else _TITLES[phase], phase, found)
        yield _gaps(phase, found)
    if len({cell.tensor for cell in cells}) > 1:
        yield _scaling(cells)
    if any(cell.peers or cell.failures for cell in cells):
        yield _comparison(cells)


_QUIET = 0.1  # cores
_TITLES = {"prefill": "Prefill, measured", "decode": "Decode, measured"}
_LENGTHS = {"prefill": "prompt", "decode": "context"}
_TIMES = {"prefill": "TTFT", "decode": "TPOT"}


def _speeds(title: str, phase: str, cells: Sequence[BenchCell]) -> Table:
    columns = (f"{_TIMES[phase]} ms", "min", "max", "tok/s", "at best", "of roof", "MFU", "MBU")
    table = simple_table(title, "tensor", "batch", _LENGTHS[phase], *columns)
    for cell in cells:
        seconds = cell.seconds
        table.add_row(
            *_sizes(cell),
            *map(_milliseconds, (seconds.median, seconds.min, seconds.max)),
            number(cell.tokens_per_second),
            _milliseconds(cell.predicted),
            *map(_share, (cell.of_roof, cell.mfu, cell.mbu)),
        )
    return table


def _gaps(phase: str, cells: Sequence[BenchCell]) -> Table:
    causes = _CAUSES[phase]
    title = f"Where the {_TIMES[phase]} goes, % of it"
    table = simple_table(title, "tensor", "batch", _LENGTHS[phase], *causes)
    for cell in cells:
        shares = (sum(cell.attributed[name] for name in names) / cell.seconds.median * 100 for names in causes.values())
        table.add_row(*_sizes(cell), *("-" if share == 0 else f"{share:.1f}" for share in shares))
    return table


def _scaling(cells: Sequence[BenchCell]) -> Table:
    table = simple_table(
        "Scaling over devices", "phase", "batch", "length", "tensor", "speed-up", "at best", "efficiency"
    )
    order = {"prefill": 0, "decode": 1}
    for row in sorted(scaling(cells), key=lambda row: (order[row.phase], row.batch, row.length, row.tensor)):
        sizes = (str(row.batch), f"{row.length:,.0f}", str(row.tensor))
        table.add_row(row.phase, *sizes, f"{row.speedup:.2f}", f"{row.predicted:.2f}", _share(row.efficiency))
    return table


def _comparison(cells: Sequence[BenchCell]) -> Table:
    names = [name for name in PEERS if any(name in (*cell.peers, *cell.failures) for cell in cells)]
    columns = [column for name in names for column in (name.removeprefix("transformers "), "x")]
    title = "Against transformers, ms; x: its time over Ridgeline's"
    table = simple_table(title, "phase", "batch", "length", "ridgeline", *columns)
    for cell in cells:
        if not (cell.peers or cell.failures):
            continue
        found = ratios(cell)
        figures = []
        for name in names:
            if name in cell.peers:
                figures += [_milliseconds(cell.peers[name].median), f"{found[name]:.2f}"]
            else:
                figures += ["failed", "-"]
        table.add_row(cell.phase, *_sizes(cell)[1:], _milliseconds(cell.seconds.median), *figures)
    return table


def notes(report: Mapping[str, Any], cells: Sequence[BenchCell], roofs: Mapping[int, Hardware]) -> Iterator[str]:
    """What a reader of the tables has to know.

    Args:
      report: what is stored.
      cells: of all tensor degrees.
      roofs: measured, by tensor degree.
    """
    dtype = report["model"]["dtype"]
    if report["dry_run"]:
        yield (
            "DRY RUN: the devices are forced on a CPU and share its cores and its memory. That every degree runs is "
            "shown; how fast it would be on devices of their own is not."
        )
    for tensor, roof in roofs.items():
        moved = report["roofs"][tensor]["drift"]
        yield (
            f"Roof of each device, tensor {tensor}: {roof.roof(dtype)}, the better of before and after the run; "
            f"between them bandwidth changed by {moved['bandwidth']:+.1%}, the peak by {moved['peak']:+.1%}."
        )
    others = report["cores_busy_with_others"]
    if others is not None and others > _QUIET:
        yield (
            f"BUSY MACHINE: other processes kept {others:.2f} of {report['hardware']['cores']} cores busy meanwhile. "
            "Times are too long, those of peers on a CPU most, whose threads wait for each other: run it again alone."
        )
    yield (
        f"Medians of {report['repeats']} runs in turns. TTFT: from token ids to the first token, cache made on the "
        "way. TPOT: decode steps as they are generated, several a dispatch, each block read by the host. MFU and MBU: "
        "FLOPs and bytes that the work needs, over the time, over the measured limits."
    )
    yield (
        "Weights, KV, other (activations, logits, arithmetic beyond memory) and links are what the roof predicts. "
        "Host (launching, and reading tokens), sample and set-up are measured by leaving them out; padding is "
        "predicted; context and rows are what grows with them beyond the prediction; rest is what no measurement tells "
        "apart, below 0 where the run beat the prediction."
    )
    names = [name for name in PEERS if any(name in cell.peers for cell in cells)]
    for name in names:
        for phase in ("prefill", "decode"):
            found = [ratios(cell)[name] for cell in cells if cell.phase == phase and name in cell.peers]
            if found:
                yield f"{phase.capitalize()}: {geometric_mean(found):.2f} times as fast as {name} (geometric mean)."
    for name, reason in dict.fromkeys(pair for cell in cells for pair in cell.failures.items()):
        yield f"{name} failed: {reason}"
    agreement = report["agreement"]
    if agreement is not None:
        for name in PEERS:
            found = agreement[name]
            if "failure" in found:
                yield f"Greedy tokens of {name}: failed: {found['failure']}"
            else:
                yield f"Greedy tokens equal to those of {name}: {found['equal']} of {agreement['tokens']} in {dtype}."


def _sizes(cell: BenchCell) -> tuple[str, str, str]:
    return str(cell.tensor), str(cell.batch), f"{cell.length:,.0f}"


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3f}" if value < 1 else number(value)


def _share(share: float) -> str:
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"
