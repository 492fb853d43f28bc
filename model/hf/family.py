"""What a family file states: which architectures it serves, how its config maps, how its tensors are named."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..fields import Fields

HFConfig = Mapping[str, Any]
"""The contents of a checkpoint's config.json."""


@dataclasses.dataclass(frozen=True)
class Implied:
    """A tensor that may lie beside others and says what their layout takes for granted.

    Attributes:
      tensor: its name in the checkpoint.
      holds: (its contents, those of `beside`) -> whether the layout is the one that is read.
      otherwise: what other contents would mean, and the remedy.
      beside: another tensor that it is held against, or None.
    """

    tensor: str
    holds: Callable[[np.ndarray, np.ndarray | None], bool]
    otherwise: str
    beside: str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a parameter that one checkpoint tensor holds.

    `parameter[index] == tensor[rows].reshape(parameter[index].shape)`, where a packed tensor is unpacked first and one
    with an `order` is transposed.

    Attributes:
      tensor: its name in the checkpoint.
      shape: the tensor's full shape in the checkpoint.
      index: where it goes in the parameter; () is all of it.
      rows: which rows of the tensor, or of what it unpacks to, it is; None, which packed ones never have, is all.
      dtype: that the tensor must have, by its JAX name; None is any float.
      unpack: (tensor, rows, columns, *those of `beside`) -> those of the matrix that a packed tensor stands for.
      beside: further tensors that unpacking takes.
      implied: tensors that may lie beside it.
      split, order: the tensor is the parameter's part, or of a quantized one that of `values` or `scales`, once its
        axes are cut to the sizes `split` and put in this order; None where they lie as in the parameter.
    """

    tensor: str
    shape: tuple[int, ...]
    index: tuple[slice | int, ...] = ()
    rows: tuple[int, int] | None = None
    dtype: str | None = None
    unpack: Callable[..., np.ndarray] | None = None
    beside: tuple[str, ...] = ()
    implied: tuple[Implied, ...] = ()
    split: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    def as_in_parameter(self, tensor: Any) -> Any:
        """The whole tensor with its axes as those of the parameter: a view of NumPy's."""
        return tensor if self.order is None else tensor.reshape(self.split).transpose(self.order)

    def as_in_checkpoint(self, part: Any) -> Any:
        """The inverse, of the parameter's part."""
        if self.order is None:
            return part.reshape(-1, *self.shape[1:])
        part = part.reshape(self.part_shape).transpose(np.argsort(self.order))
        return part.reshape(self.shape)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of what `as_in_parameter` gives."""
        return self.shape if self.order is None else tuple(self.split[axis] for axis in self.order)

    def renamed(self, name: Callable[[str], str]) -> "Piece":
        """The same where the checkpoint has other names."""
        implied = [
            dataclasses.replace(other, tensor=name(other.tensor), beside=other.beside and name(other.beside))
            for other in self.implied
        ]
        beside = tuple(map(name, self.beside))
        return dataclasses.replace(self, tensor=name(self.tensor), beside=beside, implied=tuple(implied))


TensorMap = dict[str, tuple[Piece, ...]]
"""Pieces of every parameter, by its dotted path in the parameter tree, such as "layers.0.qkv".

Of a parameter that the checkpoint holds quantized, those of each part: "layers.0.qkv.values", ".scales", ".zeros".
"""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
      name: the family's name, which `ModelConfig.family` repeats.
      architectures: the names in config.json's `architectures` that it serves.
      model_types: the `model_type` that stands in where a config.json names no architecture.
      config: config.json -> ModelConfig.
      tensors: ModelConfig -> where each parameter lies in the checkpoint.
      unused: ModelConfig -> how the names of tensors begin that checkpoints hold and the model does not need.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    config: Callable[[Fields], ModelConfig]
    tensors: Callable[[ModelConfig], TensorMap]
    unused: Callable[[ModelConfig], str] | None = None
