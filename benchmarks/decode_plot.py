"""Pictures of a bench: TTFT and TPOT beside their predictions, the points under the measured roof, and the peers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..roofline.hardware import Hardware
from ..roofline.plot import new_figure, save_figure
from .cells import Cell, cells_of
from .decode_tables import title_of
from .limits import used_roof

_COLORS = dict(weights="C0", kv_read="C1", kv_write="gold", activations="C2", logits="C9", arithmetic="C5")
_COLORS |= dict(
    collectives="C3", host="C4", sampling="C6", context="C8", rows="darkslategrey", unattributed="lightgrey"
)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write a picture of all cells of a report."""
    cells = cells_of(report)
    roofs = {int(tensor): used_roof(roof) for tensor, roof in report["roofs"].items()}
    prefills, decodes = ([cell for cell in cells if cell.phase == phase] for phase in ("prefill", "decode"))
    figure = new_figure(figsize=(16, 10))
    figure.suptitle(title_of(report), fontsize=14)
    ttft, over_batch, over_context, roofline, causes, peers = figure.subplots(2, 3).flat
    _lines(ttft, prefills, lambda cell: f"tensor {cell.tensor}", lambda cell: cell.length)
    _label(ttft, "TTFT over prompt length", "prompt, tokens a row", "time to first token (TTFT), ms")
    tpot = "time per output token (TPOT), ms"
    _lines(over_batch, decodes, lambda c: f"tensor {c.tensor}, context {c.length:,.0f}", lambda cell: cell.batch)
    _label(over_batch, "TPOT over batch", "batch, rows", tpot)
    _lines(over_context, decodes, lambda cell: f"tensor {cell.tensor}, batch {cell.batch}", lambda cell: cell.length)
    _label(over_context, "TPOT over context", "context, positions", tpot)
    _roofline(roofline, roofs, report["model"]["dtype"], cells)
    _causes(causes, decodes)
    compared = [cell for cell in cells if cell.peers]
    _peers(peers, compared) if compared else peers.remove()
    save_figure(figure, path, dpi=130)


def _lines(axes: Any, cells: Sequence[Cell], group: Callable[[Cell], str], size: Callable[[Cell], int | float]) -> None:
    """Measured medians with their extremes, and the prediction dashed in the same color; milliseconds over sizes."""
    for index, label in enumerate(dict.fromkeys(map(group, cells))):
        line = sorted((cell for cell in cells if group(cell) == label), key=size)
        sizes, seconds = [size(cell) for cell in line], [cell.seconds for cell in line]
        spans = [[(s.median - s.min) * 1e3 for s in seconds], [(s.max - s.median) * 1e3 for s in seconds]]
        look = {"color": f"C{index % 10}"}
        axes.errorbar(sizes, [s.median * 1e3 for s in seconds], spans, marker="o", capsize=3, label=label, **look)
        axes.plot(sizes, [cell.predicted * 1e3 for cell in line], linestyle="--", marker="_", alpha=0.7, **look)
    axes.plot([], [], color="grey", linestyle="--", label="predicted at the roof")
    sizes = sorted({size(cell) for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{value:,.0f}" for value in sizes])
    axes.set_xticks([], minor=True)
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.get_minor_locator().set_params(subs=())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _label(axes: Any, title: str, x: str, y: str, **legend: Any) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, **legend)


def _roofline(axes: Any, roofs: Mapping[int, Hardware], dtype: str, cells: Sequence[Cell]) -> None:
    """Every cell at its arithmetic intensity and the FLOP/s that it reached, under its degree's roof."""
    intensities = [cell.flops / cell.bytes for cell in cells]
    for index, (tensor, roof) in enumerate(roofs.items()):
        peak, ridge, color = roof.peak(dtype), roof.ridge(dtype), f"C{index % 10}"
        low, high = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
        heights = [roof.bandwidth * low / 1e9, peak / 1e9, peak / 1e9]
        axes.loglog([low, ridge, high], heights, color=color, label=f"roof, tensor {tensor}")
        for phase, marker in (("prefill", "^"), ("decode", "o")):
            points = [cell for cell in cells if (cell.tensor, cell.phase) == (tensor, phase)]
            x, y = [cell.flops / cell.bytes for cell in points], [cell.flops / cell.seconds.median for cell in points]
            look = {"marker": marker, "linestyle": "", "color": color, "alpha": 0.7}
            axes.plot(x, [rate / 1e9 for rate in y], label=f"{phase}, tensor {tensor}", **look)
    title = f"Under the measured roof, {dtype}, each device"
    _label(axes, title, "arithmetic intensity, FLOP/byte", "GFLOP/s of one device")


def _causes(axes: Any, cells: Sequence[Cell]) -> None:
    """Where a decode step goes, stacked; what is below zero (a run that beat its prediction) is left out."""
    labels = [f"{cell.tensor} x {cell.batch} x {cell.length:,.0f}" for cell in cells]
    bottoms = [0.0] * len(cells)
    for name in cells[0].attributed:
        heights = [max(0.0, cell.attributed[name]) * 1e3 for cell in cells]
        if any(heights):
            axes.bar(labels, heights, bottom=bottoms, label=name.replace("_", " "), color=_COLORS[name])
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    measured = [cell.seconds.median * 1e3 for cell in cells]
    axes.plot(labels, measured, linestyle="", marker="_", markersize=20, color="black", label="measured")
    title = "Where a decode step goes"
    _label(axes, title, "tensor x batch x context", "ms a step", loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", rotation=40, labelsize=8)


def _peers(axes: Any, cells: Sequence[Cell]) -> None:
    names = list(dict.fromkeys(name for cell in cells for name in cell.peers))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [at for at, cell in enumerate(cells) if name in cell.peers]
        heights = [cells[at].ratios[name] for at in places]
        bars = axes.bar([at + (index - (len(names) - 1) / 2) * width for at in places], heights, width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(cells)), [cell.name for cell in cells], rotation=40, ha="right", fontsize=8)
    _label(axes, "How many times as fast as transformers", "phase, batch x prompt or context", "peer's time over ours")
