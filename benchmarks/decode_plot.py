"""Pictures of a bench: TTFT and TPOT beside their predictions, the points under the measured roof, and the peers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..roofline.hardware import Hardware
from ..roofline.plot import _figure_class, check_plot
from .cells import BenchCell, ratios

_COLORS = {
    "weights": "C0",
    "kv_read": "C1",
    "kv_write": "gold",
    "activations": "C2",
    "logits": "C9",
    "arithmetic": "C5",
    "collectives": "C3",
    "launch": "C4",
    "sampling": "C6",
    "context": "C8",
    "rows": "darkslategrey",
}


def plot_bench(path: Path, title: str, roofs: Mapping[int, Hardware], dtype: str, cells: Sequence[BenchCell]) -> None:
    """Write a picture of all cells.

    Args:
      path: ends in .png, .pdf or .svg.
      title: of the whole.
      roofs: measured, by tensor degree.
      dtype: of the products.
      cells: of both phases.

    Raises:
      ValueError, RuntimeError: as `check_plot`.
    """
    check_plot(path)
    prefills = [cell for cell in cells if cell.phase == "prefill"]
    decodes = [cell for cell in cells if cell.phase == "decode"]
    compared = [cell for cell in cells if cell.peers]
    figure = _figure_class()(figsize=(16, 10), layout="constrained")
    figure.suptitle(title, fontsize=14)
    axes = list(figure.subplots(2, 3).flat)
    _lines(axes[0], prefills, lambda cell: (cell.tensor,), "tensor {}", _length, 1e3)
    _label(axes[0], "TTFT over prompt length", "prompt, tokens a row", "time to first token (TTFT), ms")
    _lines(axes[1], decodes, lambda cell: (cell.tensor, cell.length), "tensor {}, context {:,.0f}", _batch, 1e3)
    _label(axes[1], "TPOT over batch", "batch, rows", "time per output token (TPOT), ms")
    _lines(
        axes[2], decodes, lambda cell: (cell.tensor, cell.batch), "tensor {}, batch {}", lambda cell: cell.length, 1e3
    )
    _label(axes[2], "TPOT over context", "context, positions", "time per output token (TPOT), ms")
    _roofline(axes[3], roofs, dtype, cells)
    _causes(axes[4], decodes)
    if compared:
        _peers(axes[5], compared)
    else:
        axes[5].remove()
    figure.savefig(path, dpi=130)


def _batch(cell: BenchCell) -> int:
    return cell.batch


def _length(cell: BenchCell) -> int | float:
    return cell.length


def _lines(axes: Any, cells: Sequence[BenchCell], key: Any, label: str, size: Any, scale: int | float) -> None:
    """Measured medians with their extremes, and the prediction dashed in the same color."""
    groups: dict[Any, list[BenchCell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    for index, (values, found) in enumerate(groups.items()):
        found = sorted(found, key=size)
        sizes, medians = [size(cell) for cell in found], [cell.seconds.median * scale for cell in found]
        spans = [
            [(cell.seconds.median - cell.seconds.min) * scale for cell in found],
            [(cell.seconds.max - cell.seconds.median) * scale for cell in found],
        ]
        color = f"C{index % 10}"
        axes.errorbar(sizes, medians, spans, color=color, marker="o", capsize=3, label=label.format(*values))
        predicted = [cell.predicted * scale for cell in found]
        axes.plot(sizes, predicted, color=color, linestyle="--", marker="_", alpha=0.7)
    axes.plot([], [], color="grey", linestyle="--", label="predicted at the roof")
    sizes = sorted({size(cell) for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{value:,.0f}" for value in sizes])
    axes.xaxis.set_minor_locator(_null_locator())
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.get_minor_locator().set_params(subs=())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _null_locator() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _label(axes: Any, title: str, x: str, y: str, legend: bool = True) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=8)


def _roofline(axes: Any, roofs: Mapping[int, Hardware], dtype: str, cells: Sequence[BenchCell]) -> None:
    """Every cell at its arithmetic intensity and the FLOP/s that it reached, under its degree's roof."""
    intensities = [cell.flops / cell.bytes for cell in cells]
    for index, (tensor, roof) in enumerate(roofs.items()):
        peak, ridge, color = roof.peak(dtype), roof.ridge(dtype), f"C{index % 10}"
        low, high = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
        heights = [roof.bandwidth * low / 1e9, peak / 1e9, peak / 1e9]
        axes.loglog([low, ridge, high], heights, color=color, label=f"roof, tensor {tensor}")
        for phase, marker in (("prefill", "^"), ("decode", "o")):
            found = [cell for cell in cells if cell.tensor == tensor and cell.phase == phase]
            rates = [cell.flops / cell.seconds.median / 1e9 for cell in found]
            x = [cell.flops / cell.bytes for cell in found]
            axes.plot(x, rates, marker=marker, linestyle="", color=color, alpha=0.7, label=f"{phase}, tensor {tensor}")
    _label(
        axes,
        f"Under the measured roof, {dtype}, each device",
        "arithmetic intensity, FLOP/byte",
        "GFLOP/s of one device",
    )


def _causes(axes: Any, cells: Sequence[BenchCell]) -> None:
    """Where a decode step goes, stacked; what is below zero (a run that beat its prediction) is left out."""
    labels = [f"{cell.tensor} x {cell.batch} x {cell.length:,.0f}" for cell in cells]
    names = [name for name in cells[0].attributed if any(cell.attributed[name] > 0 for cell in cells)]
    bottoms = [0.0] * len(cells)
    for name in names:
        heights = [max(0.0, cell.attributed[name]) * 1e3 for cell in cells]
        color = "lightgrey" if name == "unattributed" else _COLORS[name]
        axes.bar(labels, heights, bottom=bottoms, label=name.replace("_", " "), color=color)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    measured = [cell.seconds.median * 1e3 for cell in cells]
    axes.plot(labels, measured, linestyle="", marker="_", markersize=20, color="black", label="measured")
    _label(axes, "Where a decode step goes", "tensor x batch x context", "ms a step", legend=False)
    axes.set_axisbelow(True)
    axes.legend(
        *(reversed(part) for part in axes.get_legend_handles_labels()),
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    axes.tick_params(axis="x", rotation=40, labelsize=8)


def _peers(axes: Any, cells: Sequence[BenchCell]) -> None:
    names = list(dict.fromkeys(name for cell in cells for name in cell.peers))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [at for at, cell in enumerate(cells) if name in cell.peers]
        heights = [ratios(cells[at])[name] for at in places]
        bars = axes.bar([at + (index - (len(names) - 1) / 2) * width for at in places], heights, width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1, color="black", linewidth=1)
    labels = [f"{cell.phase} {cell.batch} x {cell.length:,.0f}" for cell in cells]
    axes.set_xticks(range(len(cells)), labels, rotation=40, ha="right", fontsize=8)
    _label(axes, "How many times as fast as transformers", "phase, batch x prompt or context", "peer's time over ours")
