"""Pictures of a plan: both phases on the roofline, and what batching does to TPOT and throughput."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .hardware import Hardware
from .plan import PlanRow

_FORMATS = (".png", ".pdf", ".svg")


def check_plot(path: Path) -> None:
    """Refuse what `plot_plan` could not write, before anything is worked out.

    Raises:
      ValueError: a name with another ending, or in no directory.
      RuntimeError: matplotlib is not installed.
    """
    if path.suffix not in _FORMATS:
        raise ValueError(f"plot {str(path)!r} ends in {path.suffix!r}; end it in one of {', '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"plot {str(path)!r} is in no directory that exists; make {str(path.absolute().parent)!r} first"
        )
    new_figure()


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as a file that is whole or not there, however drawing ends."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format=path.suffix[1:])
    path.write_bytes(drawn.getvalue())


def plot_plan(path: Path, title: str, hardware: Hardware, dtype: str, rows: Sequence[PlanRow]) -> None:
    """Write a picture of the rows that fit.

    Args:
      path: ends in .png, .pdf or .svg.
      title: of the whole.
      hardware: whose roof is drawn.
      dtype: of the products.
      rows: of `plan`, in the order of tensor degrees and batches.

    Raises:
      ValueError: no row fits, or a path as in `check_plot`.
      RuntimeError: matplotlib is not installed.
    """
    check_plot(path)
    fitting: dict[int, list[PlanRow]] = {}
    for row in rows:
        if row.fits:
            fitting.setdefault(row.tensor, []).append(row)
    if not fitting:
        raise ValueError(f"plot {str(path)!r} would be empty, since nothing fits; take more devices or a smaller batch")
    figure = new_figure(figsize=(15, 5))
    roof, tpot, throughput = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    figure.suptitle(title)
    plot_roofline(roof, hardware, dtype, fitting)
    _over_batch(tpot, fitting, "time per output token (TPOT), ms", lambda row: row.tpot * 1e3)
    _over_batch(throughput, fitting, "tokens/s, all rows", lambda row: row.tokens_per_second)
    tpot.set_ylim(bottom=0)
    throughput.set_yscale("log")
    throughput.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    throughput.yaxis.get_minor_locator().set_params(subs=())
    for axes in (tpot, throughput):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    throughput.set_title("Throughput over batch")
    tpot.set_title("TPOT over batch")
    save_figure(figure, path, dpi=150)


def plot_roofline(axes: Any, hardware: Hardware, dtype: str, rows: dict[int, list[PlanRow]]) -> None:
    """Draw a roof and both phases of each row under it; collectives are what keeps a point from the roof.

    Args:
      axes: of matplotlib.
      hardware: whose roof it is.
      dtype: of the products.
      rows: by tensor degree; all fit.
    """
    peak, ridge = hardware.peak(dtype), hardware.ridge(dtype)
    phases = [phase for degree in rows.values() for row in degree for phase in (row.prefill, row.decode)]
    low = min(ridge / 30, *(phase.intensity / 2 for phase in phases))
    high = max(ridge * 30, *(phase.intensity * 2 for phase in phases))
    axes.loglog([low, ridge, high], [hardware.bandwidth * low / 1e12, peak / 1e12, peak / 1e12], color="black")
    axes.axvline(ridge, color="grey", linestyle=":", linewidth=1)
    text = f"ridge: {hardware.roof(dtype)}".replace(" (", "\n(")
    axes.text(0.03, 0.97, text, transform=axes.transAxes, fontsize=9, va="top")
    labelled = max(reversed(rows), key=lambda tensor: len(rows[tensor]))  # the degrees lie close together
    for index, (tensor, degree) in enumerate(rows.items()):
        for name, marker, line in (("prefill", "^", ""), ("decode", "o", ":")):
            found = [getattr(row, name) for row in degree]
            rates = [phase.counts.flops / phase.seconds / 1e12 for phase in found]
            label = f"{name}, tensor {tensor}"
            intensities = [phase.intensity for phase in found]
            axes.plot(intensities, rates, marker=marker, linestyle=line, color=f"C{index}", label=label, alpha=0.8)
        if tensor == labelled:
            for row in degree:
                point = (row.decode.intensity, row.decode.counts.flops / row.decode.seconds / 1e12)
                axes.annotate(f"batch {row.batch}", point, (7, -9), textcoords="offset points", fontsize=8)
    axes.set_xlabel("arithmetic intensity, FLOP/byte")
    axes.set_ylabel("TFLOP/s of one device")
    axes.set_title(f"Roofline in {dtype}: {hardware.name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")


def _over_batch(axes: Any, rows: dict[int, list[PlanRow]], label: str, value: Any) -> None:
    for index, (tensor, degree) in enumerate(rows.items()):
        ordered = sorted(degree, key=lambda row: row.batch)
        batches, values = [row.batch for row in ordered], [value(row) for row in ordered]
        axes.plot(batches, values, marker="o", markersize=4, color=f"C{index}", label=f"tensor {tensor}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda batch, _: f"{batch:g}")
    axes.set_xlabel("batch, rows")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def new_figure(**options: Any) -> Any:
    """An empty figure of matplotlib.

    Raises:
      RuntimeError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: it needs no display and keeps no state
    except ImportError:
        raise RuntimeError(
            "plots need matplotlib, which is not installed: pip install 'ridgeline[notebooks]', or matplotlib alone"
        ) from None
    return Figure(layout="constrained", **options)
