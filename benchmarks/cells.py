"""What was measured, set against the roof: fractions of it, the prediction, and where the rest of the time goes.

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

Seconds = Sequence[float]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeated timings of one thing, in seconds.

    Attributes:
      median: the figure that counts.
      low, high: the quartiles, interpolated.
      min, max: the extremes.
      runs: all of them, in order.
    """

    median: float
    low: float
    high: float
    min: float
    max: float
    runs: tuple[float, ...]


def spread(runs: Seconds) -> Spread:
    """Summary of at least one timing."""
    low, median, high = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else [runs[0]] * 3
    return Spread(median, low, high, min(runs), max(runs), tuple(runs))


@dataclasses.dataclass(frozen=True)
class BenchCell:
    """One phase at one size, measured, predicted and explained. Counts are those of one device.

    Attributes:
      phase: "prefill", whose seconds are the TTFT, or "decode", whose seconds are a step's, the TPOT.
      tensor: devices that share every layer.
      batch: rows.
      length: tokens of a prompt, or positions that a step sees in the mean, its own included.
      seconds: measured.
      tokens_per_second: of all rows: prompt tokens of a prefill, new tokens of decode.
      flops, bytes: that a run of the phase has to do and to move; in decode the mean step.
      predicted: seconds at the roof.
      bound: what the prediction waits for.
      of_roof: predicted over measured seconds.
      mfu, mbu: FLOPs and bytes over measured seconds, over the measured peak and bandwidth.
      attributed: seconds by cause; they sum to the measured median.
      timings: what else was measured, by name, for the attribution.
      peers: other programs' seconds for the same work, by name.
      failures: why a peer has none, by name.
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
    of_roof: float
    mfu: float
    mbu: float
    attributed: Mapping[str, float] = dataclasses.field(hash=False)
    timings: Mapping[str, Spread] = dataclasses.field(hash=False)
    peers: Mapping[str, Spread] = dataclasses.field(hash=False, default_factory=dict)
    failures: Mapping[str, str] = dataclasses.field(hash=False, default_factory=dict)


def better(first: Hardware, second: Hardware) -> Hardware:
    """One machine measured twice: the better figure of each, since a roof is what the machine can reach."""

    def pick(name: str, choose: Any) -> Any:
        values = [getattr(found, name) for found in (first, second)]
        return None if None in values else choose(values)

    return dataclasses.replace(
        first,
        bandwidth=pick("bandwidth", max),
        peaks={dtype: max(rate, second.peaks.get(dtype, rate)) for dtype, rate in first.peaks.items()},
        link_bandwidth=pick("link_bandwidth", max),
        start_latency=pick("start_latency", min),
    )


def drift(first: Hardware, second: Hardware, dtype: str) -> dict[str, float]:
    """By what fraction bandwidth and the peak of a dtype changed from the first to the second measurement."""
    return {
        "bandwidth": second.bandwidth / first.bandwidth - 1,
        "peak": second.peak(dtype) / first.peak(dtype) - 1,
    }


def prefill_cell(
    deployment: Deployment,
    hardware: Hardware,
    *,
    batch: int,
    prompt: int,
    chunk: int,
    padded: int,
    runs: Mapping[str, Seconds],
    peers: Mapping[str, Seconds],
    failures: Mapping[str, str],
) -> BenchCell:
    """A prefill against the roof.

    Args:
      deployment, hardware: the model, and the roof of each device.
      batch: rows.
      prompt: tokens a row.
      chunk: longest run of the program, in tokens a row.
      padded: tokens a row that the programs were compiled for, at least `prompt`.
      runs: seconds: "ttft" of the whole, "set_up" of cache and sampling state alone, "sampling" of the first token.
      peers, failures: as in `BenchCell`.

    Its time is attributed to the predicted "products" (with weights), "attention", "memory" (where a run waits for it
    longer than for arithmetic) and "collectives"; to "padding", which is predicted too: the products of the tokens that
    fill up the program; to "set_up" and "sampling" as measured; and "unattributed".
    """
    timings = {name: spread(found) for name, found in runs.items()}
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
        "sampling": timings["sampling"].median,
    }
    return _cell(
        "prefill",
        deployment,
        hardware,
        roof,
        timings.pop("ttft"),
        runs=1,
        tokens=batch * prompt,
        batch=batch,
        length=prompt,
        parts=parts,
        timings=timings,
        peers={name: spread(found) for name, found in peers.items()},
        failures=failures,
    )


def decode_cell(
    deployment: Deployment,
    hardware: Hardware,
    *,
    batch: int,
    cached: int,
    steps: int,
    block: int,
    runs: Mapping[str, Seconds],
    peers: Mapping[str, Seconds],
    failures: Mapping[str, str],
) -> BenchCell:
    """Decode steps against the roof.

    Args:
      deployment, hardware: the model, and the roof of each device.
      batch: rows.
      cached: positions a row before the first step.
      steps: that were timed together.
      block: of them, steps a dispatch.
      runs: seconds a step: "tpot" in blocks, as tokens are generated; "single" with each step dispatched alone; "step"
        likewise, without sampling.
      peers, failures: as in `BenchCell`.

    A step's time is attributed to the predicted bytes of "weights", "kv_read", "kv_write", "activations" and "logits",
    to "arithmetic" where that takes longer than all of them, and to "collectives"; then to what measurements tell
    apart. "launch": a dispatch and its way to the host and back cost c, so steps alone cost c and steps in blocks
    c / block each. "sampling": a step alone with it, less one without. A difference below zero tells
    nothing and counts as 0; none takes more than is left. `explain_growth` adds what grows with context and rows.
    """
    timings = {name: spread(found) for name, found in runs.items()}
    counts = [count_decode(deployment, batch, cached + step + 1) for step in range(steps)]
    roof = predict(counts, hardware, deployment.config.dtype, tensor=deployment.tensor)
    tpot, single, step = (timings[name].median for name in ("tpot", "single", "step"))
    names = ("weights", "kv_read", "kv_write", "activations", "logits")
    parts = {name: getattr(roof.counts, name).bytes / hardware.bandwidth / steps for name in names} | {
        "arithmetic": max(0.0, roof.seconds - roof.communication_seconds - roof.memory_seconds) / steps,
        "collectives": roof.communication_seconds / steps,
    }
    told = {"launch": (single - tpot) / (block - 1) if block > 1 else 0.0, "sampling": single - step}
    for name, seconds in told.items():
        parts[name] = min(max(0.0, seconds), max(0.0, tpot - sum(parts.values())))
    return _cell(
        "decode",
        deployment,
        hardware,
        roof,
        timings.pop("tpot"),
        runs=steps,
        tokens=batch,
        batch=batch,
        length=cached + (steps + 1) / 2,
        parts=parts,
        timings=timings,
        peers={name: spread(found) for name, found in peers.items()},
        failures=failures,
    )


def _cell(
    phase: Literal["prefill", "decode"],
    deployment: Deployment,
    hardware: Hardware,
    roof: Phase,
    seconds: Spread,
    *,
    runs: int,
    tokens: int,
    parts: dict[str, float],
    **fields: Any,
) -> BenchCell:
    flops, nbytes, predicted = roof.counts.flops / runs, roof.counts.bytes / runs, roof.seconds / runs
    measured = seconds.median
    return BenchCell(
        phase=phase,
        tensor=deployment.tensor,
        seconds=seconds,
        tokens_per_second=tokens / measured,
        flops=flops,
        bytes=nbytes,
        predicted=predicted,
        bound=roof.bound,
        of_roof=predicted / measured,
        mfu=flops / measured / hardware.peak(deployment.config.dtype),
        mbu=nbytes / measured / hardware.bandwidth,
        attributed=parts | {"unattributed": measured - sum(parts.values())},
        **fields,
    )


def explain_growth(cells: Sequence[BenchCell]) -> list[BenchCell]:
    """Decode cells of one tensor degree, with what grows beyond the prediction told apart from what does not.

    What is unattributed is fitted (least squares) over the contexts of a batch; a slope above zero, times the context,
    is "context": positions cost more than their bytes. What is left then is fitted over the batches of a context in the
    same way: "rows". Neither takes more than is there. With one context, or one batch, there is nothing to fit and the
    part stays where it was, in "unattributed"; context then stands in "rows" as far as it grows with them.
    """
    found = _grown(cells, "context", lambda cell: cell.batch, lambda cell: cell.length)
    return _grown(found, "rows", lambda cell: cell.length, lambda cell: cell.batch)


def _grown(cells: Sequence[BenchCell], name: str, group: Any, size: Any) -> list[BenchCell]:
    grown = []
    for cell in cells:
        peers = [other for other in cells if group(other) == group(cell)]
        rest = cell.attributed["unattributed"]
        part = 0.0
        if len({size(other) for other in peers}) > 1:
            slope = statistics.linear_regression(
                [size(other) for other in peers], [other.attributed["unattributed"] for other in peers]
            ).slope
            part = min(max(0.0, slope) * size(cell), max(0.0, rest))
        others = {cause: seconds for cause, seconds in cell.attributed.items() if cause != "unattributed"}
        attributed = others | {name: part, "unattributed": rest - part}
        grown.append(dataclasses.replace(cell, attributed=attributed))
    return grown


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A cell at one tensor degree against the same cell at the first one.

    Attributes:
      phase, tensor, batch, length: of the cell.
      speedup: seconds at the first degree over seconds at this one, measured.
      predicted: the same of the predictions.
      efficiency: the measured speed-up over the ratio of the degrees.
    """

    phase: str
    tensor: int
    batch: int
    length: int | float
    speedup: float
    predicted: float
    efficiency: float


def scaling(cells: Sequence[BenchCell]) -> list[Scaling]:
    """The speed-up of each cell over that of the same size at the first degree there is."""
    first: dict[Any, BenchCell] = {}
    rows = []
    for cell in cells:
        base = first.setdefault((cell.phase, cell.batch, cell.length), cell)
        speedup = base.seconds.median / cell.seconds.median
        rows.append(
            Scaling(
                cell.phase,
                cell.tensor,
                cell.batch,
                cell.length,
                speedup,
                base.predicted / cell.predicted,
                speedup * base.tensor / cell.tensor,
            )
        )
    return rows


def ratios(cell: BenchCell) -> dict[str, float]:
    """How many times as fast as each peer the cell is: the peer's seconds over its own."""
    return {name: found.median / cell.seconds.median for name, found in cell.peers.items()}


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios, all above zero."""
    return math.exp(statistics.fmean(map(math.log, values)))
