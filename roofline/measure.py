"""The roof of the machine at hand: what its memory, its arithmetic and the links between its devices reach.

Every figure is that of one device with all local devices at work at once: devices that share a memory, as those forced
on a CPU do, share its bandwidth too.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .hardware import Hardware

_ACCUMULATOR = {"int8": "int32"}  # float32 for the others
_NAMES = {"fp8": "float8_e4m3fn"}
_READ_ARRAYS = 4
_REDUCTIONS = 9
_QUEUED = 16
"""Runs of about a millisecond that an accelerator is given before they are waited for: a launch and the way to the host
and back, some tens of microseconds, would else be in each, and every share of such a roof too high. A CPU is given one:
it takes longer, and programs of several devices that are queued there may wait for each other for ever."""

_Timer = Callable[[Callable[[], Any]], float]
"""What a run takes, by the repeats and the statistic that `measure` was asked for."""


def measure(
    devices: Sequence[jax.Device] | None = None,
    *,
    read_bytes: int | None = None,
    width: int | None = None,
    reduce_bytes: int = 1 << 26,
    dtypes: Sequence[str] | None = None,
    repeats: int = 7,
    best: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Hardware:
    """Measure this machine; it takes a few seconds and nothing else should run meanwhile.

    Args:
      devices: of one host and one kind; `jax.local_devices()` by default.
      read_bytes: that each device streams from memory, well over its last cache: by default 1 GiB on a CPU (all of its
        devices together) and 4 GiB elsewhere, at most a quarter of the memory.
      width: of the square matrices; 2048 on a CPU and 8192 elsewhere by default.
      reduce_bytes: that each device reduces over the links.
      dtypes: of the matrix products, by the names of `Hardware.peaks`: by default "float32", "bfloat16" and "int8", and
        elsewhere than on a CPU "float16" and "fp8". One that the backend cannot multiply is left out.
      repeats: runs of each, of which the median counts; one more is made first.
      best: whether the best run counts instead: on a machine that does other things too, what it can do at most. Set
        it against the best of several runs of a program, and the median against the median.
      progress: told what is measured next.

    Raises:
      ValueError: a size that is not positive.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    for name, value in (
        ("read_bytes", read_bytes),
        ("width", width),
        ("reduce_bytes", reduce_bytes),
        ("repeats", repeats),
    ):
        if value is not None and value < 1:
            raise ValueError(f"measure: {name} is {value}; it must be at least 1")
    count, on_cpu = len(devices), devices[0].platform == "cpu"
    memory = _memory(devices)
    read_bytes = read_bytes or min((1 << 30) // count if on_cpu else 4 << 30, memory // 4)
    width = width or (2048 if on_cpu else 8192)
    dtypes = dtypes or ("float32", "bfloat16", "int8") + (() if on_cpu else ("float16", "fp8"))
    mesh = Mesh(devices, ("devices",), axis_types=(AxisType.Auto,))
    told = progress or (lambda what: None)
    seconds = functools.partial(_seconds, repeats=repeats, statistic=min if best else statistics.median)
    queued = functools.partial(seconds, queued=1 if on_cpu else _QUEUED)

    told("memory bandwidth")
    bandwidth = _read_bandwidth(mesh, read_bytes, queued)
    peaks = {}
    for dtype in dtypes:
        told(f"matrix products in {dtype}")
        try:
            peaks[dtype] = _matmul_peak(mesh, width, dtype, queued)
        except jax.errors.JaxRuntimeError:  # the backend has no such product
            continue
    links: dict[str, Any] = {}
    if count > 1:
        told("links between devices")
        links = _links(mesh, reduce_bytes, seconds)
    kind, statistic = devices[0].device_kind, "best" if best else "median"
    return Hardware(
        name=f"this machine ({kind}{f', {count} devices' if count > 1 else ''})",
        memory=memory,
        bandwidth=bandwidth,
        peaks=peaks,
        sources=(f"measured: read of {read_bytes:,} bytes, products of width {width:,}, {statistic} of {repeats}",),
        **links,
    )


def _memory(devices: Sequence[jax.Device]) -> int:
    """Bytes of memory of one device; of a GPU, those that JAX may take."""
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def _read_bandwidth(mesh: Mesh, nbytes: int, seconds: _Timer) -> float:
    """Bytes/s of one device that sums arrays of float32, of `nbytes` together."""
    columns = 1024
    rows = max(1, nbytes // (4 * columns * _READ_ARRAYS))
    make = jax.jit(
        lambda: tuple(jnp.full((mesh.size * rows, columns), 1.0 + i) for i in range(_READ_ARRAYS)),
        out_shardings=_over(mesh),
    )

    arrays, vector = make(), jnp.ones(columns)
    # By rows, so that every thread and every device has a part. Which of the two is compiled to the better loop
    # depends on the backend, and decode is a row of products.
    reads = [
        jax.jit(lambda arrays: [array.sum(axis=1) for array in arrays], out_shardings=_over(mesh)),
        jax.jit(lambda arrays: [array @ vector for array in arrays], out_shardings=_over(mesh)),
    ]
    fastest = min(seconds(functools.partial(read, arrays)) for read in reads)
    return sum(array.nbytes for array in arrays) / mesh.size / fastest


def _matmul_peak(mesh: Mesh, width: int, dtype: str, seconds: _Timer) -> float:
    """FLOP/s of one device that multiplies square matrices."""

    def random(key: jax.Array) -> jax.Array:  # constants would draw less power, and let a GPU clock higher
        values = jax.random.uniform(key, (mesh.size * width, width), minval=-100, maxval=100)
        return values.astype(_NAMES.get(dtype, dtype))

    def product(x: Any, w: Any) -> Any:  # the orientation of `linear`
        return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=_ACCUMULATOR.get(dtype, "float32"))

    operands = jax.jit(lambda: tuple(map(random, jax.random.split(jax.random.key(0)))), out_shardings=_over(mesh))()
    run = _each(mesh, product)
    return 2 * width**3 / seconds(lambda: run(*operands))


def _links(mesh: Mesh, nbytes: int, seconds: _Timer) -> dict[str, float]:
    """Bytes/s of each device's link and seconds of an all-reduce of next to nothing, by the model of `Hardware`."""

    def reducing(elements: int, times: int = 1) -> float:
        def reduce(x: jax.Array) -> jax.Array:
            for _ in range(times):  # of different values on each device: XLA knows the sum of equal ones
                x = lax.psum(x + lax.axis_index("devices"), "devices")
            return x

        run = _each(mesh, reduce)
        x = jax.jit(lambda: jnp.ones((mesh.size, elements)), out_shardings=_over(mesh))()
        return seconds(lambda: run(x))

    # One after the other in a program, as in a decode step: what its dispatch takes is not the links'.
    one, elements = reducing(1), max(2, nbytes // 4)
    more = (reducing(1, _REDUCTIONS) - one) / (_REDUCTIONS - 1)
    sent = 2 * (mesh.size - 1) / mesh.size * elements * 4
    transfer = reducing(elements) - one
    # Where a difference drowns in noise the whole time counts: an upper bound of latency, a lower one of bandwidth.
    return {
        "link_bandwidth": sent / (transfer if transfer > 0 else transfer + one),
        "start_latency": more if more > 0 else one,
    }


def _each(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled program in which every device runs a function on its own part of the arguments."""
    spec = PartitionSpec("devices")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _over(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("devices"))


def _seconds(run: Callable[[], Any], repeats: int, statistic: Callable[[list[float]], float], queued: int = 1) -> float:
    """Seconds of a run, `queued` of which are started before they are waited for; the first time warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _ in range(queued):
            out = run()  # what the run before made is let go
        jax.block_until_ready(out)
        times.append((time.perf_counter() - started) / queued)
    return statistic(times[1:])
