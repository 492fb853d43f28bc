"""The roof of the machine at hand: what its memory, its arithmetic and the links between its devices reach.

Every figure is the median of repeats, with all local devices at work at once, for one device: devices that share a
memory, as those forced on a CPU do, share its bandwidth too.
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


def measure(
    devices: Sequence[jax.Device] | None = None,
    *,
    read_bytes: int | None = None,
    width: int | None = None,
    reduce_bytes: int = 1 << 26,
    dtypes: Sequence[str] | None = None,
    repeats: int = 7,
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

    told("memory bandwidth")
    bandwidth = _read_bandwidth(mesh, read_bytes, repeats)
    peaks = {}
    for dtype in dtypes:
        told(f"matrix products in {dtype}")
        try:
            peaks[dtype] = _matmul_peak(mesh, width, dtype, repeats)
        except jax.errors.JaxRuntimeError:  # the backend has no such product
            continue
    links: dict[str, Any] = {}
    if count > 1:
        told("links between devices")
        links = _links(mesh, reduce_bytes, repeats)
    kind = devices[0].device_kind
    return Hardware(
        name=f"this machine ({kind}{f', {count} devices' if count > 1 else ''})",
        memory=memory,
        bandwidth=bandwidth,
        peaks=peaks,
        sources=(f"measured: read of {read_bytes:,} bytes, products of width {width:,}, median of {repeats}",),
        **links,
    )


def _memory(devices: Sequence[jax.Device]) -> int:
    """Bytes of memory of one device; of a GPU, those that JAX may take."""
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def _read_bandwidth(mesh: Mesh, nbytes: int, repeats: int) -> float:
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
    seconds = min(_median(functools.partial(read, arrays), repeats) for read in reads)
    return sum(array.nbytes for array in arrays) / mesh.size / seconds


def _matmul_peak(mesh: Mesh, width: int, dtype: str, repeats: int) -> float:
    """FLOP/s of one device that multiplies square matrices."""

    def random(key: jax.Array) -> jax.Array:  # constants would draw less power, and let a GPU clock higher
        values = jax.random.uniform(key, (mesh.size * width, width), minval=-100, maxval=100)
        return values.astype(_NAMES.get(dtype, dtype))

    def product(x: Any, w: Any) -> Any:  # the orientation of `linear`
        return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=_ACCUMULATOR.get(dtype, "float32"))

    operands = jax.jit(lambda: tuple(map(random, jax.random.split(jax.random.key(0)))), out_shardings=_over(mesh))()
    run = _each(mesh, product)
    return 2 * width**3 / _median(lambda: run(*operands), repeats)


def _links(mesh: Mesh, nbytes: int, repeats: int) -> dict[str, float]:
    """Bytes/s of each device's link and seconds of an all-reduce of next to nothing, by the model of `Hardware`."""

    def seconds(elements: int, times: int = 1) -> float:
        def reduce(x: jax.Array) -> jax.Array:
            for _ in range(times):  # of different values on each device: XLA knows the sum of equal ones
                x = lax.psum(x + lax.axis_index("devices"), "devices")
            return x

        run = _each(mesh, reduce)
        x = jax.jit(lambda: jnp.ones((mesh.size, elements)), out_shardings=_over(mesh))()
        return _median(lambda: run(x), repeats)

    # One after the other in a program, as in a decode step: what its dispatch takes is not the links'.
    one, elements = seconds(1), max(2, nbytes // 4)
    more = (seconds(1, _REDUCTIONS) - one) / (_REDUCTIONS - 1)
    sent = 2 * (mesh.size - 1) / mesh.size * elements * 4
    transfer = seconds(elements) - one
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


def _median(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a run, after one that compiles and warms up; each is waited for before the next."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
