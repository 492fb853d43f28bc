"""A memory-mapped reader of safetensors checkpoints, in one file or in shards with an index.

The format: 8 bytes of header length N (unsigned, little-endian), N bytes of JSON (name -> dtype, shape, data_offsets;
`__metadata__` is free), then the tensors back to back, row-major, little-endian.
Source: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..fields import Fields, object_of, shortened, text
from .files import CheckpointError, check_file, decode, is_there, listing, parse_object, read_object
from .kinds import other_kind
from .settings import QUANTIZATION

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER = 100_000_000
"""Bytes that a header may have, by the format."""
AXES = 8
"""That a tensor may have; none that is read has more than three."""

FLOATS = {"F32": np.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": np.dtype("float16")}
"""The element types of parameters and of scales, by their names in the header."""
DTYPES = FLOATS | {
    "F8_E4M3": jnp.dtype("float8_e4m3fn"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "I32": np.dtype("int32"),
    "I64": np.dtype("int64"),
}
"""The element types that are read: those of quantized weights too."""

_FETCH = "fetch the checkpoint again"
_REFETCH = "the file is damaged, fetch it again"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
      file: the safetensors file.
      dtype: its name in the header, such as "BF16"; only those in `DTYPES` can be read.
      shape: of the whole tensor.
      start, stop: its bytes, counted from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of one directory.

    Every header is read and checked on construction, no tensor is.

    Attributes:
      directory: where it lies.
      files: the safetensors files that make it up.
      tensors: every tensor of every file, by name; of one in two shards, that of the shard which the index names.
      absent: the shard of every tensor that the index names and that is not there; it may be one that nothing needs.

    Raises:
      CheckpointError: no weights, only pickled weights, no shard, one tensor in two shards neither of which the index
        names for it, or a file that is not valid safetensors.
    """

    directory: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    absent: dict[str, str]

    def __init__(self, directory: Path):
        self.directory = directory
        single, index = directory / SINGLE, directory / INDEX
        if is_there(single):
            self.files, weight_map = (single,), {}
        elif is_there(index):
            weight_map = read_index(index)
            shards = sorted(set(weight_map.values()))
            self.files = tuple(directory / shard for shard in shards if is_there(directory / shard))
            if not self.files:
                raise CheckpointError(f"{index} names shards that are not there: {listing(shards)}; {_FETCH}")
        else:
            raise CheckpointError(_no_weights(directory))

        self.tensors, self._maps = {}, {}
        for file in self.files:
            self._maps[file], found = _open(file)
            for name, info in found.items():
                if weight_map.get(name, file.name) != file.name:
                    continue
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor {name!r} is in both {self.tensors[name].file} and {file}, and the index does not say "
                        "which counts; one of them belongs to another checkpoint, remove it"
                    )
                self.tensors[name] = info
        self.absent = {name: shard for name, shard in weight_map.items() if name not in self.tensors}

    def require(self, names: Collection[str]) -> None:
        """Raise `CheckpointError` if the index names one of these tensors and it is not there."""
        index, missing = self.directory / INDEX, [name for name in names if name in self.absent]
        shards = sorted({self.absent[name] for name in missing})
        gone = [shard for shard in shards if not is_there(self.directory / shard)]
        if gone:
            raise CheckpointError(f"{index} names shards that are not there: {listing(gone)}; {_FETCH}")
        if missing:
            raise CheckpointError(
                f"{index} says that tensor {missing[0]!r} is in {self.absent[missing[0]]}, which lacks it; fetch both "
                "files again"
            )

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the tensor in the mapped file: nothing is copied, bytes are read when touched.

        Raises:
          CheckpointError: if its dtype is not one of `DTYPES`.
        """
        info = self.tensors[name]
        check_dtype(name, info, DTYPES)
        return self._maps[info.file][info.start : info.stop].view(DTYPES[info.dtype]).reshape(info.shape)

    def get(self, name: str) -> np.ndarray | None:
        """The same, or None where the tensor is not there."""
        return self.read(name) if name in self.tensors else None

    def same_bytes(self, a: str, b: str) -> bool:
        """Whether two tensors agree in dtype, shape and every bit."""
        x, y = self.tensors[a], self.tensors[b]
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return False
        # memoryviews compare without the array of booleans, as large as the tensor, that numpy would make.
        return memoryview(self._maps[x.file])[x.start : x.stop] == memoryview(self._maps[y.file])[y.start : y.stop]


def check_dtype(name: str, info: TensorInfo, wanted: Collection[str], quantized: bool = True) -> None:
    """Raise `CheckpointError` if a tensor is of none of the element types, by their names in the header.

    Args:
      name, info: of the tensor.
      wanted: the element types.
      quantized: whether the checkpoint's files say that its weights are quantized.
    """
    if info.dtype in wanted:
        return
    if info.dtype == "F64":
        remedy = "save the model again in float32 or bfloat16"
    elif quantized:
        remedy = (
            "config.json, whose quantization_config says how weights are quantized, belongs to another checkpoint: "
            "take all files from one place, or load the unquantized checkpoint"
        )
    else:
        remedy = (
            "weights are quantized, and config.json has no quantization_config that says how, nor is there "
            f"{' or '.join(QUANTIZATION)}: fetch what is missing, or load the unquantized checkpoint"
        )
    raise CheckpointError(
        f"{info.file}: tensor {name!r} has dtype {info.dtype}, expected one of {', '.join(wanted)}; {remedy}"
    )


def read_index(index: Path) -> dict[str, str]:
    """The shard of every tensor that an index names."""
    weight_map = Fields(read_object(index), {"weight_map": object_of(text, least=1)}, str(index))["weight_map"]
    for shard in weight_map.values():
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{index} names the shard {shortened(shard)}; a shard must lie in the index's own directory"
            )
    return weight_map


def _no_weights(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if kind := other_kind(directory):
        return kind
    if others:
        return (
            f"{directory} has neither {SINGLE} nor {INDEX}, only {listing(others)}; "
            f"rename a single file to {SINGLE}, or fetch the index that belongs to the shards"
        )
    if pickles:
        return (
            f"{directory} has its weights only as {listing(pickles)}: such files are pickles, and reading a pickle "
            "runs whatever code it holds, so Ridgeline never opens one; if you trust the checkpoint, convert it with "
            "transformers, model.save_pretrained(directory, safe_serialization=True), and load the result"
        )
    return (
        f"{directory} has no weights: neither {SINGLE} nor {INDEX} is there, only {listing(names) or 'no file at all'}"
        "; fetch the checkpoint's safetensors files"
    )


def _open(file: Path) -> tuple[np.ndarray, dict[str, TensorInfo]]:
    size = check_file(file)
    try:
        data = np.memmap(file, np.uint8, "r") if size else None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if data is None or size < 8:
        raise CheckpointError(f"{file} has {size} bytes, too few for a safetensors header; {_REFETCH}")
    if bytes(data[:8]) == b"version " and b"git-lfs" in bytes(data[:64]):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its directory")
    length = int.from_bytes(bytes(data[:8]), "little")
    if length > size - 8:
        raise CheckpointError(
            f"{file} announces a header of {length} bytes, but only {size - 8} follow; "
            "it is no safetensors file or was cut short, fetch it again"
        )
    if length > HEADER:
        raise CheckpointError(
            f"{file} announces a header of {length} bytes, more than the {HEADER} that the format allows; {_REFETCH}"
        )
    what = f"the header of {file}"
    header = parse_object(decode(bytes(data[8 : 8 + length]), what), what)
    header.pop("__metadata__", None)
    tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(file, tensors, 8 + length, size)
    return data.view(np.ndarray), tensors


def _entry(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if (
            len(shape) <= AXES and all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and start <= stop
        ):
            pass
        case _:
            raise CheckpointError(
                f"the header of {file} describes tensor {name!r} as {shortened(entry)}, expected a dtype, a shape "
                f"of at most {AXES} whole numbers and two ascending data_offsets; {_REFETCH}"
            )
    if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"the header of {file} gives tensor {name!r} {stop - start} bytes, expected "
            f"{math.prod(shape) * DTYPES[dtype].itemsize} of dtype {dtype} and shape {shape}; {_REFETCH}"
        )
    return TensorInfo(file, dtype, tuple(shape), base + start, base + stop)


def _check_layout(file: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    """Tensors must fill the file without gap or overlap, as the format asks."""
    end, before = base, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            kind = "overlaps" if info.start < end else "leaves a gap after"
            raise CheckpointError(
                f"{file}: tensor {name!r} starts at byte {info.start} and {kind} {before}, which ends at byte {end}; "
                f"{_REFETCH}"
            )
        end, before = info.stop, f"tensor {name!r}"
    if end > size:
        raise CheckpointError(
            f"{file} is truncated: {before} ends at byte {end}, the file at byte {size}; fetch it again"
        )
    if end < size:
        raise CheckpointError(f"{file} has {size - end} bytes after {before}, the last one it describes; {_REFETCH}")
