"""Checkpoint tensors -> parameters, read shard by shard."""

import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from ..config import ModelConfig
from ..hf.family import Piece, TensorMap
from ..params import (
    Params,
    ParamSpec,
    float_specs,
    param_name,
    param_shardings,
    param_specs,
    scheme_of,
    spec_shardings,
)
from ..quantization import QuantizedArray, quantize
from ..schemes import Scheme
from .files import CheckpointError
from .kinds import model_name
from .safetensors import Checkpoint

THREADS = 8
"""Shards read at once: a drive answers several requests at a time, and pages of a mapped file are asked for singly."""
BLOCK = 8 * 2**20
"""Bytes of a large shard that one thread reads."""

CACHED = 2**18
"""Bytes that are copied at once and then looked at, while they are in the cache of the core."""
_NOT_FINITE = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float8_e4m3fn": 0x7F}
"""The first bits, without the sign, of what is no finite number."""

_Ranges = list[tuple[int, int]]
"""[start, stop) on each axis."""


def load_params(
    checkpoint: Checkpoint,
    config: ModelConfig,
    tensors: TensorMap,
    mesh: Mesh | None = None,
    check_finite: bool = True,
) -> Params:
    """Every parameter, in the dtype of the configuration, on the default device or over a mesh.

    Each shard is a slice of the mapped file, read by several threads and put on its device; replicas of it are
    read once, shards of other processes not at all. The shards in flight never exceed the largest parameter in bytes
    (nor a shard fewer than one), which bounds host memory above the file cache. A parameter that the configuration
    quantizes is read as it is where the checkpoint holds it so; else it is quantized where it lies as soon as all of it
    is there. A progress bar is drawn on a terminal's stderr once loading has taken a second.

    Args:
      checkpoint: the open checkpoint, checked (`check_tensors`).
      config: the model; `config.dtype` may differ from the checkpoint's.
      tensors: where the family keeps each parameter.
      mesh: as `make_mesh` returns it, or None for the default device.
      check_finite: whether to refuse what is not finite.

    Raises:
      CheckpointError: a value that is not finite, or that the parameter's dtype cannot hold.
      ValueError: a parameter that the mesh does not divide; nothing has been read then.
    """
    tree = specs_read(config, tensors, 1 if mesh is None else mesh.shape["tensor"])
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names, specs = [param_name(path) for path, _ in paths], [spec for _, spec in paths]
    unpadded = jax.tree.leaves(specs_read(config, tensors))
    held = [own if spec.axes[0] == "vocab" else spec for own, spec in zip(unpadded, specs, strict=True)]
    shardings = [None] * len(specs) if mesh is None else jax.tree.leaves(spec_shardings(tree, mesh))
    final = [None] * len(specs) if mesh is None else treedef.flatten_up_to(param_shardings(config, mesh))
    default = jax.config.jax_default_device  # a thread's own setting, which the workers would not see

    def load(shard: _Shard) -> list[jax.Array]:
        pieces = tensors[names[shard.parameter]]
        host = read_parameter(checkpoint, held[shard.parameter], pieces, shard.index, readers, check_finite)
        with jax.default_device(default):
            arrays = [jax.device_put(host, device) for device in shard.devices]
        # Transfers are queued: without waiting, the host would hold more than is accounted for.
        return jax.block_until_ready(arrays)

    shards = [
        _Shard(number, index, devices, _shape_size(index, spec) * spec.nbytes // spec.size)
        for number, (spec, sharding) in enumerate(zip(specs, shardings, strict=True))
        for index, devices in _local_shards(spec, sharding)
    ]

    def bytes_of(shard: _Shard) -> int:
        spec, pieces = specs[shard.parameter], tensors[names[shard.parameter]]
        packed = any(piece.unpack is not None for piece in pieces)  # packed integers take about what they do here
        return (spec.nbytes if packed else _bytes_read(checkpoint, pieces)) * shard.nbytes // spec.nbytes

    def finish(number: int) -> Any:
        spec, sharding, parts = specs[number], shardings[number], arrays.pop(number)
        whole = parts[0] if mesh is None else jax.make_array_from_single_device_arrays(spec.shape, sharding, parts)
        scheme = scheme_of(config, names[number], spec)
        if scheme is None:
            return whole
        # Awaited, so that unquantized parameters do not pile up.
        return jax.block_until_ready(_quantizer(scheme, spec.in_axes, final[number])(whole))

    arrays: dict[int, list[jax.Array]] = {number: [] for number in range(len(specs))}
    missing = collections.Counter(shard.parameter for shard in shards)
    finished = []
    limit = max(spec.nbytes for spec in specs)
    title, total = f"loading {model_name(checkpoint.directory)}", sum(map(bytes_of, shards))
    # Readers of their own: shards that wait for their blocks must not take the threads that read them.
    with ThreadPoolExecutor(THREADS, "ridgeline-read") as readers, progress(title, total) as bar:
        for shard, loaded in _in_parallel(load, shards, limit):
            arrays[shard.parameter] += loaded
            missing[shard.parameter] -= 1
            bar.update(bytes_of(shard))
            # In order, because quantizing over several processes is a program that all of them run.
            while len(finished) < len(specs) and not missing[len(finished)]:
                finished.append(finish(len(finished)))
    return treedef.unflatten(finished)


def specs_read(config: ModelConfig, tensors: TensorMap, tensor: int = 1) -> Params:
    """What is read of a checkpoint: the parts of parameters that it holds quantized, all others before they are."""
    specs, stored = float_specs(config, tensor), param_specs(config, tensor)
    return jax.tree_util.tree_map_with_path(
        lambda path, spec, parts: spec if param_name(path) in tensors else parts, specs, stored
    )


@functools.cache
def _quantizer(scheme: Scheme, in_axes: int, shardings: Any) -> Callable[[jax.Array], QuantizedArray]:
    """`quantize` onto the shardings of its parts, compiled once for all layers."""
    return jax.jit(functools.partial(quantize, scheme=scheme, in_axes=in_axes), out_shardings=shardings)


def progress(title: str, total: int) -> tqdm:
    """A bar of `total` bytes with its rate, on a terminal's stderr once it has taken some tenths of a second."""
    return tqdm(
        total=total,
        desc=title,
        unit="B",
        unit_scale=True,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left",
        delay=0.3,
        disable=None,
        leave=False,
        file=sys.stderr,
    )


def read_parameter(
    checkpoint: Checkpoint,
    spec: ParamSpec,
    pieces: tuple[Piece, ...],
    index: tuple[slice, ...],
    pool: ThreadPoolExecutor | None = None,
    check_finite: bool = True,
) -> np.ndarray:
    """A slice of one parameter, in the parameter's dtype: only the bytes of that slice are read.

    What of it lies past the parameter's end, as where devices pad the vocabulary, is zeros.

    Args:
      checkpoint: the open checkpoint, whose tensors have the shapes that the pieces state.
      spec: the parameter.
      pieces: where its parts lie in the checkpoint.
      index: one slice an axis, of step 1, such as `jax.make_array_from_callback` asks for.
      pool: threads that share the reading of a large slice.
      check_finite: whether to refuse what is not finite.

    Returns:
      An array of its own memory, never a view of the file: XLA:CPU aliases the arrays that it is given where they are
      aligned, as this one is, and parameters must not change or vanish with the file.

    Raises:
      CheckpointError: a value that is not finite, or that the parameter's dtype cannot hold.
      ValueError: an index that is not one slice of step 1 an axis, or pieces that do not cover the slice.
    """
    whole = _ranges(index, tuple(max(size, part.stop or 0) for part, size in zip(index, spec.shape, strict=True)))
    out = _aligned(tuple(stop - start for start, stop in whole), jax.numpy.dtype(spec.dtype))
    wanted = [(min(start, size), min(stop, size)) for (start, stop), size in zip(whole, spec.shape, strict=True)]
    if wanted != whole:
        out[...] = 0
    if any(start == stop for start, stop in wanted):
        return out

    def fill(block: _Ranges) -> None:
        _fill(out[_within(block, whole)], checkpoint, spec, pieces, block, check_finite)

    blocks = _blocks(wanted, out.itemsize)
    if pool is None or len(blocks) == 1:
        fill(wanted)
    else:
        for _ in pool.map(fill, blocks):
            pass
    return out


def _fill(
    out: np.ndarray,
    checkpoint: Checkpoint,
    spec: ParamSpec,
    pieces: tuple[Piece, ...],
    wanted: _Ranges,
    check_finite: bool,
) -> None:
    """Read the ranges `wanted` of a parameter into `out`, which has their shape."""
    filled = 0
    for piece in pieces:
        index_of_piece = piece.index + (slice(None),) * (len(spec.shape) - len(piece.index))
        region = _ranges(index_of_piece, spec.shape)
        shared = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, region, strict=True)]
        if any(start >= stop for start, stop in shared):
            continue
        tensor, sizes = checkpoint.read(piece.tensor), [stop - start for start, stop in region]
        if piece.unpack is not None:
            part = _unpacked(checkpoint, piece, sizes, _within(shared, region))
        elif piece.rows is not None:
            part = tensor[slice(*piece.rows)].reshape(sizes)[_within(shared, region)]
        else:
            part = piece.as_in_parameter(tensor).reshape(sizes)[_within(shared, region)]
        checks = check_finite or out.dtype == np.float16 != part.dtype
        for source, target in _pieces(part, out[_within(shared, wanted)]):
            _copy(source, target)
            if checks and not _is_finite(target):
                raise _not_finite(checkpoint.tensors[piece.tensor].file, piece.tensor, source, target)
        filled += part.size
    if filled != out.size:
        raise ValueError(
            f"{[piece.tensor for piece in pieces]} cover {filled} of the {out.size} elements that were asked of a "
            f"parameter of shape {spec.shape}; the family's tensor map is wrong"
        )


def _pieces(source: np.ndarray, target: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both arrays in steps of about CACHED bytes."""
    if target.nbytes <= CACHED:
        yield source, target
    elif (step := len(target) * CACHED // target.nbytes) > 1:
        for start in range(0, len(target), step):
            yield source[start : start + step], target[start : start + step]
    else:
        for row, target_row in zip(source, target, strict=True):
            yield from _pieces(row, target_row)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    if source.dtype == target.dtype:
        # numpy copies bfloat16, which is not its own, one element at a time and without letting other threads run.
        bits = f"u{target.itemsize}"
        target.view(bits)[...] = source.view(bits)
    else:
        with np.errstate(over="ignore"):
            target[...] = source


def _is_finite(values: np.ndarray) -> bool:
    """Whether no value is infinite or no number; by the largest of its bits, which numpy finds at the cache's speed."""
    first = _NOT_FINITE.get(values.dtype.name)
    if first is None or not values.size:
        return True
    signed, unsigned = values.view(f"i{values.itemsize}"), values.view(f"u{values.itemsize}")
    sign = 1 << 8 * values.itemsize - 1
    return bool(signed.max() < first and unsigned.max() < sign | first)


def _not_finite(file: Path, tensor: str, source: np.ndarray, target: np.ndarray) -> CheckpointError:
    if _is_finite(source):
        dtype = target.dtype.name
        most = "float16's 65504; load it with dtype bfloat16 or float32"
        what = f"values beyond {most if dtype == 'float16' else f'{dtype}; load it with dtype float32'}"
    else:
        what = "NaN or infinite values; fetch it again, or load it as it is with check_finite=False"
    return CheckpointError(f"{file}: tensor {tensor!r} holds {what}")


def _unpacked(checkpoint: Checkpoint, piece: Piece, sizes: list[int], wanted: tuple[slice, ...]) -> np.ndarray:
    """A slice of the array of those sizes that the rows of a packed tensor are; no more is unpacked."""
    tensor, *beside = (checkpoint.read(name) for name in (piece.tensor, *piece.beside))
    tensor, (first, last) = tensor.reshape(piece.shape), piece.rows
    out = next(axes for axes in range(len(sizes) + 1) if math.prod(sizes[:axes]) == last - first)
    rows, cols = _runs(sizes[:out], wanted[:out], first), _runs(sizes[out:], wanted[out:])
    part = np.block([[piece.unpack(tensor, r, c, *beside) for c in cols] for r in rows])
    return part.reshape([index.stop - index.start for index in wanted])


def _runs(sizes: list[int], wanted: tuple[slice, ...], first: int = 0) -> list[slice]:
    """The consecutive numbers among those of a slice's elements, where the array's are numbered from `first`."""
    numbers = np.arange(first, first + math.prod(sizes)).reshape(sizes)[wanted].ravel()
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return [slice(int(run[0]), int(run[-1]) + 1) for run in runs]


def _blocks(wanted: _Ranges, itemsize: int) -> list[_Ranges]:
    """Ranges cut into parts of about BLOCK bytes, along the first axis that all threads can share, such as experts.

    Where there is none it is the longest but the last, whose elements lie together.
    """
    sizes = [stop - start for start, stop in wanted]
    axes = range(max(1, len(sizes) - 1))
    axis = next((axis for axis in axes if sizes[axis] >= THREADS), max(axes, key=sizes.__getitem__))
    step = max(1, BLOCK * sizes[axis] // (math.prod(sizes) * itemsize))
    first, last = wanted[axis]
    return [
        [*wanted[:axis], (start, min(start + step, last)), *wanted[axis + 1 :]] for start in range(first, last, step)
    ]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One slice to read: of parameter number `parameter`, for `devices` (None is the default one)."""

    parameter: int
    index: tuple[slice, ...]
    devices: tuple[jax.Device | None, ...]
    nbytes: int


def _local_shards(
    spec: ParamSpec, sharding: NamedSharding | None
) -> list[tuple[tuple[slice, ...], tuple[jax.Device | None, ...]]]:
    """The different slices that devices of this process hold, each with the devices that hold it."""
    if sharding is None:
        return [((slice(None),) * len(spec.shape), (None,))]
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        holders.setdefault(tuple(_ranges(index, spec.shape)), []).append(device)
    return [(tuple(slice(*part) for part in ranges), tuple(devices)) for ranges, devices in holders.items()]


def _in_parallel(
    load: Callable[[_Shard], list[jax.Array]], shards: list[_Shard], limit: int
) -> Iterator[tuple[_Shard, list[jax.Array]]]:
    """Each shard and what `load` makes of it, as they come, with at most `limit` bytes under way."""
    running: dict[Future, _Shard] = {}
    with ThreadPoolExecutor(THREADS, "ridgeline-load") as pool:
        for shard in (*shards, None):
            while running and (
                shard is None
                or len(running) == 2 * THREADS
                or sum(other.nbytes for other in running.values()) + shard.nbytes > limit
            ):
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
            if shard is not None:
                running[pool.submit(load, shard)] = shard


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary: XLA:CPU takes it over as it is, and would copy any other."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _shape_size(index: tuple[slice, ...], spec: ParamSpec) -> int:
    return math.prod(stop - start for start, stop in _ranges(index, spec.shape))


def _ranges(index: tuple[slice | int, ...], shape: tuple[int, ...]) -> _Ranges:
    """The ranges of an index; an integer is a range of one."""
    ranges = []
    for part, size in zip(index, shape, strict=True):
        start, stop, step = part.indices(size) if isinstance(part, slice) else (part, part + 1, 1)
        if step != 1:
            raise ValueError(f"index {index} has a step of {step}; parameters are read in slices of step 1")
        ranges.append((start, max(start, stop)))
    return ranges


def _within(inner: _Ranges, outer: _Ranges) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))


def _bytes_read(checkpoint: Checkpoint, pieces: tuple[Piece, ...]) -> int:
    total = 0
    for piece in pieces:
        info = checkpoint.tensors[piece.tensor]
        rows = info.shape[0] if piece.rows is None else piece.rows[1] - piece.rows[0]
        total += (info.stop - info.start) // info.shape[0] * rows
    return total
