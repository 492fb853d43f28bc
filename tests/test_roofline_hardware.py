"""The hardware table, and what is worked out from a row of it."""

import ast
import dataclasses
import pathlib

import pytest

from ridgeline.roofline import hardware as module
from ridgeline.roofline.hardware import HARDWARE, Hardware, find_hardware
from ridgeline.sharding.targets.chips import CHIPS

BOTH = {"h200": "h200", "h100": "h100", "a100-80gb": "a100", "b200": "b200"}


@pytest.mark.parametrize(("name", "chip"), BOTH.items())
def test_agrees_with_the_compile_targets(name, chip):
    assert HARDWARE[name].memory == CHIPS[chip].memory
    assert HARDWARE[name].bandwidth == pytest.approx(CHIPS[chip].bandwidth, rel=0.05)  # data sheets round


def test_every_target_has_a_row():
    assert set(BOTH.values()) == set(CHIPS)


@pytest.mark.parametrize("name", BOTH)
def test_float32_peak_is_lanes_times_clock(name):
    chip = CHIPS[BOTH[name]]
    flops = 2 * chip.multiprocessors * chip.fp32_lanes * chip.clock_ghz * 1e9
    assert HARDWARE[name].peaks["float32"] == pytest.approx(flops, rel=0.08)  # boost clocks differ by board


@pytest.mark.parametrize("name", HARDWARE)
def test_rows_are_dense_and_ordered(name):
    row = HARDWARE[name]
    peaks = row.peaks
    assert peaks["bfloat16"] == peaks["float16"]
    assert peaks["bfloat16"] == pytest.approx(2 * peaks["tf32"], rel=0.03)
    assert peaks["int8"] == pytest.approx((4 if name == "rtx-4090" else 2) * peaks["bfloat16"], rel=0.03)
    assert ("fp8" in peaks) != name.startswith("a100")
    assert row.sources
    assert row.link_bandwidth < row.bandwidth


def test_it_imports_nothing_of_the_package():
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 and not (node.module or "").startswith("ridgeline") for node in imports)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"hardware 'h900' is not known; known: a100-40gb, .*rtx-4090"):
        find_hardware("h900")


def test_float32_products_are_tf32_where_there_is_tf32():
    assert HARDWARE["h100"].peak("float32") == 494.7e12
    cpu = Hardware("cpu", memory=1, bandwidth=1.0, peaks={"float32": 7.0})
    assert cpu.peak("float32") == 7.0


def test_a_missing_peak_names_those_that_there_are():
    with pytest.raises(ValueError, match="A100 SXM 80 GB has no peak for dtype 'fp8'; it has float32, tf32"):
        HARDWARE["a100-80gb"].peak("fp8")


def test_all_reduce_is_a_ring():
    row = Hardware("x", 1, 1.0, {}, link_bandwidth=100.0, start_latency=3.0, step_latency=0.5)
    assert row.all_reduce_seconds(1, 1e9, 5) == 0
    assert row.all_reduce_seconds(4, 800.0, 2) == pytest.approx(2 * 3 / 4 * 800 / 100 + 2 * (3 + 6 * 0.5))


def test_without_a_link_there_is_one_device():
    alone = dataclasses.replace(HARDWARE["h100"], link_bandwidth=None)
    with pytest.raises(ValueError, match="has no link to other devices and 2 were asked for"):
        alone.all_reduce_seconds(2, 1.0)


def test_figures_are_positive():
    with pytest.raises(ValueError, match=r"broken: peaks\['int8'\] is 0; it must be positive"):
        Hardware("broken", 1, 1.0, {"int8": 0})
