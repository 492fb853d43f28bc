"""The tables and notes of `ridgeline bench decode`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..cli.formats import number, percent
from .cells import Cell, cells_of, geometric_mean
from .harness import Table, milliseconds
from .limits import used_roof
from .peers import PEERS

_CAUSES = {
    "prefill": "products attn=attention memory links=collectives padding set-up=set_up rest=unattributed",
    "decode": "weights KV=kv_read,kv_write other=activations,logits,arithmetic links=collectives host sample=sampling "
    "context rows rest=unattributed",
}
"""Columns of the attribution, by phase, and after "=" what each sums where that has other names."""

_MEANINGS = (
    "TTFT: from token ids to the first token, the engine made on the way. TPOT: decode steps as they are generated, "
    "several a dispatch, each block read by the host while the next runs. MFU and MBU: FLOPs and bytes that the work "
    "needs, over the time, over the measured limits. Weights, KV, other (activations, logits, arithmetic beyond "
    "memory), links and padding are what the roof predicts. Host (reading tokens, launching what follows), sample and "
    "set-up are measured by leaving them out; context and rows are what grows with them beyond the prediction; rest is "
    "what no measurement tells apart, below 0 where a run beat it."
)
_QUIET = 0.1  # cores
_LENGTHS = {"prefill": "prompt", "decode": "context"}
_TIMES = {"prefill": "TTFT", "decode": "TPOT"}


def title_of(report: Mapping[str, Any]) -> str:
    """The model and its numbers."""
    model = report["model"]
    weights = f"{model['quantize']} in {model['dtype']}" if model["quantize"] else model["dtype"]
    output = f", output {model['quantize_output']}" if model["quantize_output"] else ""
    size = f"{model['parameters'] / 1e6:,.3g} M parameters, {weights}{output}, KV {model['kv']}"
    return f"{model['name']}{' scaled to' if model['changes'] else ':'} {size}"


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """The tables, then what their reader has to know."""
    cells, title = cells_of(report), title_of(report) + "\n\n"
    for phase in ("prefill", "decode"):
        ours = [cell for cell in cells if cell.phase == phase]
        yield _speeds(title if phase == "prefill" else "", phase, ours)
        yield _gaps(phase, ours)
    if report["scaling"]:
        yield _scaling(report["scaling"])
    if any(cell.peers or cell.failures for cell in cells):
        yield _comparison(cells)
    yield from _notes(report, cells)


def _speeds(title: str, phase: str, cells: Sequence[Cell]) -> Table:
    columns = (f"{_TIMES[phase]} ms", "min", "max", "tok/s", "at best", "of roof", "MFU", "MBU")
    rows = [
        (
            *_sizes(cell),
            *map(milliseconds, (cell.seconds.median, cell.seconds.min, cell.seconds.max)),
            number(cell.tokens_per_second),
            milliseconds(cell.predicted),
            *map(percent, (cell.of_roof, cell.mfu, cell.mbu)),
        )
        for cell in cells
    ]
    heading = f"{title}{phase.capitalize()}, measured"
    return Table(heading, ("tensor", "batch", _LENGTHS[phase], *columns), rows, names=0)


def _gaps(phase: str, cells: Sequence[Cell]) -> Table:
    columns = [column.partition("=") for column in _CAUSES[phase].split()]
    causes = {name: (parts or name).split(",") for name, _, parts in columns}
    rows = []
    for cell in cells:
        shares = (sum(cell.attributed[name] for name in names) / cell.seconds.median * 100 for names in causes.values())
        rows.append((*_sizes(cell), *("-" if share == 0 else f"{share:.1f}" for share in shares)))
    title = f"Where the {_TIMES[phase]} goes, % of it"
    return Table(title, ("tensor", "batch", _LENGTHS[phase], *causes), rows, names=0)


def _scaling(scaling: Sequence[Mapping[str, Any]]) -> Table:
    order = {"prefill": 0, "decode": 1}
    rows = [
        (
            *(row["phase"], str(row["batch"]), f"{row['length']:,.0f}", str(row["tensor"])),
            *(f"{row['speedup']:.2f}", f"{row['predicted']:.2f}", percent(row["efficiency"])),
        )
        for row in sorted(scaling, key=lambda row: (order[row["phase"]], row["batch"], row["length"], row["tensor"]))
    ]
    columns = ("phase", "batch", "length", "tensor", "speed-up", "at best", "efficiency")
    return Table("Scaling over devices", columns, rows)


def _comparison(cells: Sequence[Cell]) -> Table:
    names = [name for name in PEERS if any(name in (*cell.peers, *cell.failures) for cell in cells)]
    columns = [column for name in names for column in (name.removeprefix("transformers "), "x")]
    rows = []
    for cell in cells:
        if not (cell.peers or cell.failures):
            continue
        times = []
        for name in names:
            peer = cell.peers.get(name)
            times += ["failed", "-"] if peer is None else [milliseconds(peer.median), f"{cell.ratios[name]:.2f}"]
        rows.append((cell.phase, *_sizes(cell)[1:], milliseconds(cell.seconds.median), *times))
    title = "Against transformers, ms; x: its time over Ridgeline's"
    return Table(title, ("phase", "batch", "length", "ridgeline", *columns), rows)


def _notes(report: Mapping[str, Any], cells: Sequence[Cell]) -> Iterator[str]:
    dtype = report["model"]["dtype"]
    if report["dry_run"]:
        yield (
            "DRY RUN: the devices are forced on a CPU and share its cores and its memory. That every degree runs is "
            "shown; how fast it would be on devices of their own is not."
        )
    for tensor, roof in report["roofs"].items():
        moved = roof["drift"]
        yield (
            f"Roof of each device, tensor {tensor}: {used_roof(roof).roof(dtype)}, the better of before and "
            f"after the run; between them bandwidth changed by {moved['bandwidth']:+.1%}, the peak by "
            f"{moved['peak']:+.1%}."
        )
    others = report["cores_busy_with_others"]
    if others is not None and others > _QUIET:
        yield (
            f"BUSY MACHINE: other processes kept {others:.2f} of {report['hardware']['cores']} cores busy meanwhile. "
            "Times are too long, those of peers on a CPU most, whose threads wait for each other: run it again alone."
        )
    yield f"Medians of {report['repeats']} runs in turns. {_MEANINGS}"
    for name in PEERS:
        for phase in ("prefill", "decode"):
            ratios = [cell.ratios[name] for cell in cells if cell.phase == phase and name in cell.peers]
            if ratios:
                yield f"{phase.capitalize()}: {geometric_mean(ratios):.2f} times as fast as {name} (geometric mean)."
    for name, reason in dict.fromkeys(pair for cell in cells for pair in cell.failures.items()):
        yield f"{name} failed: {reason}"
    for name in PEERS if report["agreement"] else ():
        made, count = report["agreement"][name], report["agreement"]["tokens"]
        if "failure" in made:
            yield f"Greedy tokens of {name}: failed: {made['failure']}"
        else:
            yield f"Greedy tokens equal to those of {name}: {made['equal']} of {count} in {dtype}."


def _sizes(cell: Cell) -> tuple[str, str, str]:
    return str(cell.tensor), str(cell.batch), f"{cell.length:,.0f}"
