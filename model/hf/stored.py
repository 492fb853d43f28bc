"""What a way of storing quantized matrices states, and the settings and errors that all ways share."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Any

from ..fields import CheckpointError, Fields
from ..schemes import Scheme
from .family import Piece

REMEDY = "load the checkpoint that it was quantized from, with quantize= where it is to be quantized while it is loaded"


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a checkpoint stores its quantized matrices.

    Attributes:
      scheme: that holds them as they are, but for `scale_dtype`, which only the tensors tell.
      quantizes: whether it is how the linear module of that name is stored.
      parts: (scheme, piece of the matrix, rows of it that share a scale in the parameter) -> pieces of its parts.
      dense: (scheme, piece of the matrix) -> piece of the float matrix that it stands for; None where none is needed.
    """

    scheme: Scheme
    quantizes: Callable[[str], bool]
    parts: Callable[[Scheme, Piece, int], dict[str, Piece]]
    dense: Callable[[Scheme, Piece], Piece] | None = None


def only(settings: Fields, key: str, *supported: Any) -> None:
    """Raise `CheckpointError` unless a setting is one of those supported, or absent."""
    settings.only(key, supported, f"{' or '.join(map(repr, supported)) or 'null'} is; {REMEDY}")


def group_size(settings: Fields, key: str = "group_size") -> int | None:
    """Inputs that share a scale; None is all."""
    size = settings[key]
    if size == 0:
        raise CheckpointError(f"{settings.file}: {settings.name(key)} is 0, expected a positive whole number or -1")
    return None if size == -1 else size


def all_layers_but(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a linear module is of a layer, and not within one of those."""
    names = frozenset(names)  # of hundreds, against tens of thousands of experts' modules
    return lambda module: module != "lm_head" and not is_within(module, names)


def is_within(module: str, names: Collection[str]) -> bool:
    """Whether one of the names is some of the dotted parts of the module's, under any prefix."""
    for alias in aliases(module):
        parts = alias.split(".")
        runs = itertools.combinations(range(len(parts) + 1), 2)
        if any(".".join(parts[first:last]) in names for first, last in runs):
            return True
    return False


def aliases(module: str) -> tuple[str, ...]:
    """What a module of the decoder, "model.layers..." or "lm_head", is called in text, multimodal and bare models."""
    bare = module.removeprefix("model.")
    return module, f"language_model.{module}", f"model.language_model.{bare}", bare


def beside(piece: Piece, name: str) -> str:
    """The tensor of that name in a weight's module."""
    return piece.tensor.removesuffix("weight") + name


def part(
    piece: Piece, name: str, shape: tuple[int, ...], dtype: str, unpack: Callable | None = None, step: int = 1
) -> Piece:
    """The piece of one part of a matrix, each of its rows standing for `step` of the matrix."""
    first, last = piece.rows or (0, piece.shape[0])
    return Piece(beside(piece, name), shape, piece.index, (first // step, last // step), dtype, unpack)
