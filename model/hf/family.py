"""What a family file states: which architectures it serves, how its config maps, how its tensors are named."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..config import ModelConfig

HFConfig = Mapping[str, Any]
"""The contents of a checkpoint's config.json."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a parameter that one checkpoint tensor holds.

    `parameter[index] == tensor[rows].reshape(parameter[index].shape)`.

    Attributes:
      tensor: its name in the checkpoint.
      shape: the tensor's full shape in the checkpoint.
      index: where it goes in the parameter; () is all of it.
      rows: which rows of the tensor it is; None is all of them.
    """

    tensor: str
    shape: tuple[int, ...]
    index: tuple[slice | int, ...] = ()
    rows: tuple[int, int] | None = None


TensorMap = dict[str, tuple[Piece, ...]]
"""Pieces of every parameter, by its dotted path in the parameter tree, such as "layers.0.qkv"."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
      name: the family's name, which `ModelConfig.family` repeats.
      architectures: the names in config.json's `architectures` that it serves.
      model_types: the `model_type` that stands in where a config.json names no architecture.
      config: config.json -> ModelConfig.
      tensors: ModelConfig -> where each parameter lies in the checkpoint.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    config: Callable[[HFConfig], ModelConfig]
    tensors: Callable[[ModelConfig], TensorMap]
