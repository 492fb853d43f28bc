"""The measured roof at sizes that are done at once: that figures come out and mean what they say, not how large."""

import importlib
import itertools
import os
import subprocess
import sys

import jax
import pytest

from ridgeline.roofline import Deployment, measure, predict_decode
from tiny import tiny_config

module = importlib.import_module("ridgeline.roofline.measure")  # the function hides the module
TINY = {"read_bytes": 1 << 16, "width": 32, "reduce_bytes": 1 << 12, "repeats": 2}


@pytest.fixture
def clock(monkeypatch):
    """A clock that is half a second on at each look."""
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks) / 2)


def test_figures_are_work_over_seconds(clock):
    found = measure(jax.devices()[:1], **TINY, dtypes=("float32", "int8"))
    assert found.bandwidth == (1 << 16) / 0.5
    assert found.peaks == {"float32": 2 * 32**3 / 0.5, "int8": 2 * 32**3 / 0.5}
    assert found.link_bandwidth is None
    assert found.name.startswith("this machine (")
    assert "65,536 bytes" in found.sources[0]


@pytest.mark.parametrize(("best", "seconds"), [(False, 2.0), (True, 1.0)])
def test_the_median_counts_or_the_best(monkeypatch, best, seconds):
    runs = itertools.cycle([9.0, 3.0, 1.0, 2.0])  # the first of four compiles
    looks = itertools.accumulate(itertools.chain.from_iterable((0.0, next(runs)) for _ in itertools.count()))
    monkeypatch.setattr("time.perf_counter", lambda: next(looks))
    found = measure(jax.devices()[:1], **(TINY | {"repeats": 3}), dtypes=("float32",), best=best)
    assert (found.bandwidth, found.peaks) == ((1 << 16) / seconds, {"float32": 2 * 32**3 / seconds})
    assert f"{'best' if best else 'median'} of 3" in found.sources[0]


def test_queued_runs_are_waited_for_once_and_share_the_time(clock, monkeypatch):
    runs, waits = [], []
    monkeypatch.setattr(jax, "block_until_ready", waits.append)
    assert module._seconds(lambda: runs.append(None), repeats=2, statistic=min, queued=16) == 0.5 / 16
    assert (len(runs), len(waits)) == (3 * 16, 3)


def test_predictions_take_it():
    told = []
    found = measure(jax.devices()[:1], **TINY, progress=told.append)
    step = predict_decode(Deployment(tiny_config(), kv="float32"), found, batch=1, context=8)
    assert step.seconds == max(step.compute_seconds, step.memory_seconds) > 0
    assert told == ["memory bandwidth", *(f"matrix products in {name}" for name in ("float32", "bfloat16", "int8"))]


def test_devices_share_what_they_share():
    """Four devices forced on a CPU: links appear, and memory is a quarter."""
    code = (
        "import jax; from ridgeline.roofline import measure\n"
        f"one, all = measure(jax.devices()[:1], **{TINY}), measure(**{TINY})\n"
        "assert one.link_bandwidth is None and all.link_bandwidth > 0 and all.start_latency > 0\n"
        "assert all.memory == one.memory // 4, (all.memory, one.memory)\n"
        "assert '4 devices' in all.name\n"
        "assert all.all_reduce_seconds(4, 4096) > all.start_latency\n"
    )
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["read_bytes", "width", "reduce_bytes", "repeats"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"measure: {name} is 0; it must be at least 1"):
        measure(**(TINY | {name: 0}))
