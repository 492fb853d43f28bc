"""What was measured of a model, set against the roof: fractions of it, the prediction, and where the rest of time goes.

Nothing runs here: timings come in, and every figure that leaves is computed from them, from counts and from the
measured limits. A part of a gap that no pair of measurements tells apart stays "unattributed".
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..roofline.counts import count_decode
from ..roofline.deployment import Deployment
from ..roofline.hardware import Hardware
from ..roofline.predict import Phase, predict, predict_prefill
from .timing import Spread


@dataclasses.dataclass(frozen=True)
class Cell:
    """One phase at one size, measured, predicted and explained. Counts are those of one device.

    Attributes:
      phase: "prefill", whose seconds are the TTFT, or "decode", whose seconds are a step's, the TPOT.
      tensor, batch: devices that share every layer, and rows.
      length: tokens of a prompt, or positions that a step sees in the mean, its own included.
      seconds, tokens_per_second: measured; tokens of all rows, of prompts or new ones.
      flops, bytes: that a run of the phase has to do and to move; in decode the mean step.
      predicted, bound: seconds at the roof, and what they wait for.
      mfu, mbu: FLOPs and bytes over measured seconds, over the measured peak and bandwidth.
      attributed: seconds by cause; they sum to the measured median.
      timings: what else was measured, for the attribution.
      peers, failures: other programs' seconds for the same work, or why there are none.
    """

    phase: Literal["prefill", "decode"]
    tensor: int
    batch: int
    length: int | float
    seconds: Spread
    tokens_per_second: float
    flops: float
    bytes: float
    predicted: float
    bound: str
    mfu: float
    mbu: float
    attributed: Mapping[str, float] = dataclasses.field(hash=False)
    timings: Mapping[str, Spread] = dataclasses.field(hash=False)
    peers: Mapping[str, Spread] = dataclasses.field(hash=False, default_factory=dict)
    failures: Mapping[str, str] = dataclasses.field(hash=False, default_factory=dict)

    @property
    def of_roof(self) -> float:
        """Predicted over measured seconds."""
        return self.predicted / self.seconds.median

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast as each peer: the peer's seconds over its own."""
        return {name: peer.median / self.seconds.median for name, peer in self.peers.items()}

    @property
    def name(self) -> str:
        """Such as "decode 1 x 512"."""
        shared = f", tensor {self.tensor}" if self.tensor > 1 else ""
        return f"{self.phase} {self.batch} x {self.length:,.0f}{shared}"


def cells_of(report: Mapping[str, Any]) -> list[Cell]:
    """The cells of a stored report."""

    def restored(cell: Mapping[str, Any]) -> Cell:
        spreads = {name: {what: Spread(**each) for what, each in cell[name].items()} for name in ("timings", "peers")}
        return Cell(**{**cell, **spreads, "seconds": Spread(**cell["seconds"])})

    return list(map(restored, report["cells"]))


def prefill_cell(
    deployment: Deployment,
    hardware: Hardware,
    timings: Mapping[str, Spread],
    *,
    batch: int,
    prompt: int,
    chunk: int,
    padded: int,
    **peers: Any,
) -> Cell:
    """A prefill against the roof.

    Args:
      deployment, hardware: the model, and the roof of each device.
      timings: "ttft" of the whole, and "set_up" of the engine alone.
      batch, prompt: rows, and tokens of each.
      chunk: longest run of the program, in tokens a row.
      padded: tokens a row that the programs were compiled for, at least `prompt`.
      peers: `peers` and `failures` of `Cell`.

    Its time is attributed to the predicted "products" (with weights), "attention", "memory" (where a run waits for it
    longer than for arithmetic) and "collectives"; to "padding", which is predicted too: the products of the tokens that
    fill up the program; to "set_up" as measured; and "unattributed".
    """
    roof = predict_prefill(deployment, hardware, batch=batch, prompt=prompt, chunk=chunk)
    longest = min(padded, deployment.config.max_position)
    filled = predict_prefill(deployment, hardware, batch=batch, prompt=longest, chunk=chunk)
    peak = hardware.peak(deployment.config.dtype)
    parts = {
        "products": roof.counts.weights.flops / peak,
        "attention": roof.counts.kv_read.flops / peak,
        "memory": max(0.0, roof.seconds - roof.communication_seconds - roof.compute_seconds),
        "collectives": roof.communication_seconds,
        "padding": filled.seconds - roof.seconds,
        "set_up": timings["set_up"].median,
    }
    sizes = {"batch": batch, "length": prompt}
    return _cell("prefill", deployment, hardware, roof, 1, batch * prompt, "ttft", timings, parts, **sizes, **peers)


def decode_cell(
    deployment: Deployment,
    hardware: Hardware,
    timings: Mapping[str, Spread],
    *,
    batch: int,
    cached: int,
    steps: int,
    **peers: Any,
) -> Cell:
    """Decode steps against the roof.

    Args:
      deployment, hardware: the model, and the roof of each device.
      timings: of a step: "tpot" as tokens are generated; "queued" with the host reading them at the end alone; "step"
        likewise, without sampling.
      batch, cached: rows, and positions of each before the first step.
      steps: that were timed together.
      peers: `peers` and `failures` of `Cell`.

    A step's time is attributed to the predicted bytes of "weights", "kv_read", "kv_write", "activations" and "logits",
    to "arithmetic" where that takes longer than all of them, and to "collectives"; then to what measurements tell
    apart: "host", which reads the tokens and launches what follows, is what a step takes longer than a queued one;
    "sampling", what a queued step takes longer than one without it. A difference below zero tells nothing and counts
    as 0; none takes more than is left. `explain_growth` adds what grows with context and rows.
    """
    counts = [count_decode(deployment, batch, cached + step + 1) for step in range(steps)]
    roof = predict(counts, hardware, deployment.config.dtype, tensor=deployment.tensor)
    tpot, queued, step = (timings[name].median for name in ("tpot", "queued", "step"))
    names = ("weights", "kv_read", "kv_write", "activations", "logits")
    parts = {name: getattr(roof.counts, name).bytes / hardware.bandwidth / steps for name in names} | {
        "arithmetic": max(0.0, roof.seconds - roof.communication_seconds - roof.memory_seconds) / steps,
        "collectives": roof.communication_seconds / steps,
    }
    for name, seconds in {"host": tpot - queued, "sampling": queued - step}.items():
        parts[name] = min(max(0.0, seconds), max(0.0, tpot - sum(parts.values())))
    sizes = {"batch": batch, "length": cached + (steps + 1) / 2}
    return _cell("decode", deployment, hardware, roof, steps, batch, "tpot", timings, parts, **sizes, **peers)


def _cell(
    phase: Literal["prefill", "decode"],
    deployment: Deployment,
    hardware: Hardware,
    roof: Phase,
    runs: int,
    tokens: int,
    measured: str,
    timings: Mapping[str, Spread],
    parts: Mapping[str, float],
    **fields: Any,
) -> Cell:
    """A cell of which `roof` predicts so many runs, each of so many tokens; the timing named `measured` counts."""
    flops, nbytes, seconds = roof.counts.flops / runs, roof.counts.bytes / runs, timings[measured].median
    return Cell(
        phase=phase,
        tensor=deployment.tensor,
        seconds=timings[measured],
        tokens_per_second=tokens / seconds,
        flops=flops,
        bytes=nbytes,
        predicted=roof.seconds / runs,
        bound=roof.bound,
        mfu=flops / seconds / hardware.peak(deployment.config.dtype),
        mbu=nbytes / seconds / hardware.bandwidth,
        attributed=dict(parts) | {"unattributed": seconds - sum(parts.values())},
        timings={name: timing for name, timing in timings.items() if name != measured},
        **fields,
    )


def explain_growth(cells: Sequence[Cell]) -> list[Cell]:
    """Decode cells of one tensor degree, with what grows beyond the prediction told apart from what does not.

    What is unattributed is fitted (least squares) over the contexts of a batch; a slope above zero, times the context,
    is "context": positions cost more than their bytes. What is left then is fitted over the batches of a context in the
    same way: "rows". Neither takes more than is there. With one context, or one batch, there is nothing to fit and the
    part stays where it was, in "unattributed"; context then stands in "rows" as far as it grows with them.
    """
    by_context = _grown(cells, "context", lambda cell: cell.batch, lambda cell: cell.length)
    return _grown(by_context, "rows", lambda cell: cell.length, lambda cell: cell.batch)


def _grown(cells: Sequence[Cell], name: str, group: Any, size: Any) -> list[Cell]:
    grown = []
    for cell in cells:
        alike = [other for other in cells if group(other) == group(cell)]
        rest, part = cell.attributed["unattributed"], 0.0
        if len({size(other) for other in alike}) > 1:
            rests = [other.attributed["unattributed"] for other in alike]
            slope = statistics.linear_regression(list(map(size, alike)), rests).slope
            part = min(max(0.0, slope) * size(cell), max(0.0, rest))
        others = {cause: seconds for cause, seconds in cell.attributed.items() if cause != "unattributed"}
        grown.append(dataclasses.replace(cell, attributed=others | {name: part, "unattributed": rest - part}))
    return grown


def scaling(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Each cell over that of the same size at the first tensor degree there is.

    Returns:
      "phase", "tensor", "batch", "length" of the cell; "speedup", measured; "predicted", that of the predictions; and
      "efficiency", the speed-up over the ratio of the degrees.
    """
    first: dict[Any, Cell] = {}
    rows = []
    for cell in cells:
        base = first.setdefault((cell.phase, cell.batch, cell.length), cell)
        speedup = base.seconds.median / cell.seconds.median
        row = {name: getattr(cell, name) for name in ("phase", "batch", "length", "tensor")}
        speeds = {"speedup": speedup, "predicted": base.predicted / cell.predicted}
        rows.append(row | speeds | {"efficiency": speedup * base.tensor / cell.tensor})
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios, all above zero."""
    return math.exp(statistics.fmean(map(math.log, values)))
