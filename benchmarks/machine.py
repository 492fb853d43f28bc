"""This machine: what it is, what a launch costs, and the roof that every other figure is held against."""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..cli.formats import number
from ..pallas_kernels.dispatch import current_device
from ..roofline.hardware import HARDWARE, Hardware
from .harness import Table
from .limits import Figure, measured_roof
from .timing import elapsed

LAUNCHES = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", default="bfloat16,float32,int8", metavar="DTYPE,...", help="of matrix products")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    roof, device = measured_roof(args.dtypes.split(",")), current_device()
    plus, one = jax.jit(lambda x: x + 1), jnp.zeros(())
    plus(one).block_until_ready()
    waited, _ = elapsed(lambda: [plus(one).block_until_ready() for _ in range(LAUNCHES)])
    queued, _ = elapsed(lambda: jax.block_until_ready([plus(one) for _ in range(LAUNCHES)]))
    yield {
        "platform": device.platform,
        "is_hopper": device.is_hopper,
        "multiprocessors": device.multiprocessors,
        "launch_us": {"waited": waited / LAUNCHES * 1e6, "queued": queued / LAUNCHES * 1e6},
        "roof": dataclasses.asdict(roof),
    }


def data_sheet(kind: str) -> Hardware | None:
    """The row of the table that a device's name belongs to."""
    return next((row for name, row in HARDWARE.items() if name.replace("-", " ") in kind.lower()), None)


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    launch, roof = report["launch_us"], report["roof"]
    rows = [("bandwidth, GB/s", number(roof["bandwidth"] / 1e9))]
    rows += [(f"{dtype}, TFLOP/s", number(rate / 1e12)) for dtype, rate in roof["peaks"].items()]
    rows += [(f"a launch, {how}, us", number(us)) for how, us in launch.items()]
    yield Table(f"{report['device']}, {report['hardware']['cores']} cores", ("limit", "measured"), rows)
    if report["platform"] == "gpu" and not report["is_hopper"]:
        yield "The kernels need a Hopper GPU and this is none: XLA serves."


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """What was measured beside the data sheet, where the device is in the table."""
    sheet, roof = data_sheet(report["device"]), report["roof"]
    if sheet is not None:
        yield Figure("bandwidth", roof["bandwidth"] / 1e9, sheet.bandwidth / 1e9, "GB/s", rate=True)
        for dtype, rate in roof["peaks"].items():
            yield Figure(f"products in {dtype}", rate / 1e12, sheet.peak(dtype) / 1e12, "TFLOP/s", rate=True)
