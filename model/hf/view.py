"""Parameters under Hugging Face's names and in its shapes, and back: the loader's own table, read the other way."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from .. import arguments
from ..config import ModelConfig
from ..params import (
    Params,
    ParamSpec,
    float_specs,
    kv_replicas,
    param_name,
    param_shardings,
    param_specs,
    scheme_of,
    store,
)
from ..quantization import QuantizedArray, stored_shapes
from . import family_of
from .family import Piece, TensorMap
from .tensors import with_copied_heads

Tensor = Array | np.ndarray | QuantizedArray
_OF_VOCABULARY = ("embedding", "unembedding")
HFView = dict[str, Tensor]
"""Every tensor of a checkpoint by its name, such as "model.layers.0.self_attn.q_proj.weight"."""


@arguments.arguments(params=arguments.parameters, config=arguments.config)
def hf_view(params: Params, config: ModelConfig) -> HFView:
    """The parameters by the names, and in the shapes, of Hugging Face's model of that family.

    Under jit they are slices and reshapes that cost nothing. Of KV heads that are copied over devices, one copy is
    shown, of a vocabulary that is padded, the tokens; an output projection that is tied to the embedding is not. Each
    expert is shown by itself, where the family does not have them as one tensor.

    Args:
      params: as `param_specs(config)`; arrays of JAX or of NumPy.
      config: the model.

    Returns:
      A new dictionary, whose entries may be exchanged for others and taken back by `from_hf_view`. Matrices are
      [out, in]; quantized ones are `QuantizedArray`s, whatever form the checkpoint had.
    """
    view = {}
    for _, array, pieces in parameters(params, config):
        view |= hf_tensors(array, pieces)
    return view


@arguments.arguments(view=arguments.instance(Mapping), config=arguments.config, mesh=arguments.mesh)
def from_hf_view(view: Mapping[str, Any], config: ModelConfig, mesh: Mesh | None = None) -> Params:
    """The parameters that `hf_view` showed, or those of any model of the family by its tensors; differentiable.

    Args:
      view: arrays by Hugging Face's names, of any float dtype, which they keep, or `QuantizedArray`s where the
        configuration quantizes the matrix (`rl.quantize(array, scheme)` makes one).
      config: the model.
      mesh: where they are to lie, as `make_mesh` returns it; None leaves them where the view's are.

    Raises:
      ValueError: a tensor that is missing, of another shape, or a float where the configuration quantizes; or one that
        the model does not have.
    """
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    tensors = with_copied_heads(config, family_of(config).tensors(config), kv_replicas(config, tensor))
    _check(view, tensors)

    def parameter(path: tuple, spec: ParamSpec) -> Array | QuantizedArray:
        name = param_name(path)
        scheme = scheme_of(config, name, spec)
        parts = [(piece, view[piece.tensor]) for piece in tensors[name]]
        if _is_tied(name, tensors):
            return store(parts[0][1], config, name, spec)
        if scheme is None:
            return _put_together(spec.shape, parts)
        for piece, matrix in parts:
            if not isinstance(matrix, QuantizedArray):
                raise ValueError(
                    f"{piece.tensor!r} is a float array, and the configuration stores it in {scheme.dtype}; put "
                    "rl.quantize(array, scheme) there, or take a configuration without quantization"
                )
        values, scales = stored_shapes(spec.shape, scheme, spec.in_axes)
        shapes = {"values": values, "scales": scales} | ({"zeros": scales} if scheme.zero_points else {})
        return parts[0][1].replace(
            **{
                part: _put_together(shape, [(_in_place(piece), getattr(matrix, part)) for piece, matrix in parts])
                for part, shape in shapes.items()
            }
        )

    unpadded = {name: spec for name, spec in float_specs(config).items() if name in _OF_VOCABULARY}
    params = jax.tree_util.tree_map_with_path(parameter, float_specs(config, tensor) | unpadded)
    if mesh is None:
        return params
    params = jax.tree.map(_padded, params, param_specs(config, tensor))
    return jax.device_put(params, param_shardings(config, mesh))


def parameters(params: Params, config: ModelConfig) -> list[tuple[str, Tensor, tuple[Piece, ...]]]:
    """Each parameter that a checkpoint holds: its dotted name, the array, and where it lies in the checkpoint."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    named = {param_name(path): leaf for path, leaf in leaves}
    named |= {name: _tokens_of(named[name], config) for name in _OF_VOCABULARY if name in named}
    copies = named["layers.0.qkv"].shape[0] // config.num_kv_heads
    tensors = with_copied_heads(config, family_of(config).tensors(config), copies)
    return [(name, leaf, tensors[name]) for name, leaf in named.items() if not _is_tied(name, tensors)]


def _tokens_of(matrix: Tensor, config: ModelConfig) -> Tensor:
    """The rows that are tokens of a matrix that may be padded."""
    rows = matrix.shape[0]
    if rows == config.vocab_size:
        return matrix
    return _by_rows(lambda part: part[: len(part) * config.vocab_size // rows], matrix)


def _padded(array: Array, spec: ParamSpec) -> Array:
    widths = [(0, whole - size) for size, whole in zip(array.shape, spec.shape, strict=True)]
    return jnp.pad(array, widths) if any(after for _, after in widths) else array


def hf_tensors(array: Tensor, pieces: tuple[Piece, ...]) -> HFView:
    """The tensors of a checkpoint that one parameter is."""
    parts: dict[str, dict[int, Any]] = {}
    for piece in pieces:  # of copied heads, the same rows several times
        first = 0 if piece.rows is None else piece.rows[0]
        parts.setdefault(piece.tensor, {})[first] = _part_of(array, piece)
    return {
        name: _by_rows(_concatenated, *(part for _, part in sorted(rows.items(), key=lambda item: item[0])))
        for name, rows in parts.items()
    }


def _is_tied(name: str, tensors: TensorMap) -> bool:
    return name == "unembedding" and tensors[name] == tensors["embedding"]


def _part_of(array: Tensor, piece: Piece) -> Tensor:
    if not isinstance(array, QuantizedArray):
        return piece.as_in_checkpoint(array[piece.index])
    if piece.order is not None:
        return array
    outputs = array.scales.ndim - 1
    return _by_rows(lambda part: part[piece.index].reshape(-1, math.prod(part.shape[outputs:])), array)


def _by_rows(function: Callable[..., Array | np.ndarray], *arrays: Tensor) -> Tensor:
    """A function of arrays, or of each of those parts of quantized ones whose rows are outputs."""
    first = arrays[0]
    if not isinstance(first, QuantizedArray):
        return function(*arrays)
    held = [name for name in ("values", "scales", "zeros") if getattr(first, name) is not None]
    return first.replace(**{name: function(*(getattr(array, name) for array in arrays)) for name in held})


def _concatenated(*parts: Array | np.ndarray) -> Array | np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return (np if isinstance(parts[0], np.ndarray) else jnp).concatenate(parts)


def _put_together(shape: tuple[int, ...], parts: list[tuple[Piece, Any]]) -> Array:
    """A parameter, or a part of a quantized one, from tensors of which each row or block of rows stands for outputs."""
    dtype = jnp.result_type(*(tensor for _, tensor in parts))
    whole = jnp.zeros(shape, dtype)
    for piece, tensor in parts:
        wanted, tensor = whole[piece.index].shape, piece.as_in_parameter(jnp.asarray(tensor))
        first, last = (row * tensor.shape[0] // piece.shape[0] for row in piece.rows or (0, piece.shape[0]))
        rows = tensor[first:last]
        times = math.prod(wanted) // rows.size  # blocks of scales may reach over more outputs than a head has
        whole = whole.at[piece.index].set((rows if times == 1 else jnp.repeat(rows, times, axis=0)).reshape(wanted))
    return whole


def _in_place(piece: Piece) -> Piece:
    """A piece of a quantized matrix, whose axes the view leaves as they are."""
    return dataclasses.replace(piece, shape=piece.part_shape, split=None, order=None)


def _check(view: Mapping[str, Any], tensors: TensorMap) -> None:
    held = {piece.tensor: piece for pieces in tensors.values() for piece in pieces}
    for difference, names in (("lacks", held.keys() - view.keys()), ("has besides", view.keys() - held.keys())):
        if names:
            raise ValueError(f"the view {difference} {', '.join(sorted(names)[:5])}, by the configuration")
    for name, piece in held.items():
        shape = piece.part_shape if isinstance(view[name], QuantizedArray) else piece.shape
        if tuple(view[name].shape) != shape:
            raise ValueError(f"{name!r} has shape {tuple(view[name].shape)} in the view, expected {shape}")
