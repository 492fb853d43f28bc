"""What a figure is held against: a limit, most often that of this machine, measured in the same run."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ..cli.common import terminal
from ..roofline.hardware import Hardware
from ..roofline.measure import measure

TINY = {"read_bytes": 1 << 24, "width": 256, "repeats": 2}
"""Sizes of `measure` that a CPU is done with at once, and that say nothing."""

REHEARSAL = "RIDGELINE_REHEARSE" in os.environ
"""Whether only that everything runs is to be shown: set for the stages of `ridgeline bench all --rehearse`."""


class Figure(NamedTuple):
    """A measured value beside its limit.

    Attributes:
      what: was measured.
      value, limit: in the unit.
      unit: of both.
      wanted: the share of the limit that it is to reach, where there is such a target.
      rate: whether more is better; otherwise less is, as of seconds.
    """

    what: str
    value: float
    limit: float
    unit: str
    wanted: float | None = None
    rate: bool = False

    @property
    def share(self) -> float:
        """Of the limit: 1 reaches it."""
        return self.value / self.limit if self.rate else self.limit / self.value

    def as_dict(self) -> dict[str, Any]:
        """Every field, the share, and whether the target is met."""
        met = None if self.wanted is None else self.share >= self.wanted
        return self._asdict() | {"share": self.share, "met": met}


def measured_roof(dtypes: Sequence[str], devices: Sequence[jax.Device] | None = None, tiny: bool = False) -> Hardware:
    """`measure` of these devices, told on the terminal meanwhile."""
    sizes = TINY if tiny or REHEARSAL else {}
    with terminal(stderr=True).status("measuring") as status:
        return measure(devices, dtypes=dtypes, progress=lambda what: status.update(f"measuring {what}"), **sizes)


def better(first: Hardware, second: Hardware) -> Hardware:
    """One machine measured twice: the better figure of each, since a roof is what the machine can reach."""

    def pick(name: str, choose: Any) -> Any:
        values = [getattr(one, name) for one in (first, second)]
        return None if None in values else choose(values)

    return dataclasses.replace(
        first,
        bandwidth=pick("bandwidth", max),
        peaks={dtype: max(rate, second.peaks.get(dtype, rate)) for dtype, rate in first.peaks.items()},
        link_bandwidth=pick("link_bandwidth", max),
        start_latency=pick("start_latency", min),
    )


def used_roof(record: Mapping[str, Any]) -> Hardware:
    """The roof of a stored `roof_record`."""
    return Hardware(**{**record["used"], "sources": ()})


def roof_record(before: Hardware, after: Hardware, dtype: str) -> dict[str, Any]:
    """The roof that is used, what it was made of, and by what fraction bandwidth and the dtype's peak changed."""
    moved = {
        "bandwidth": after.bandwidth / before.bandwidth - 1,
        "peak": after.peak(dtype) / before.peak(dtype) - 1,
    }
    used = {"used": better(before, after), "before": before, "after": after}
    return {name: dataclasses.asdict(roof) for name, roof in used.items()} | {"drift": moved}
