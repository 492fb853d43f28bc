"""Checkpoints that arrive quantized: what `quantization_config` in config.json says, and the tensors that it leads to.

A matrix that one is said to hold quantized is read as it is: its integers or fp8 numbers and its scales in the dtypes
that they are stored in, rearranged and never computed again.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from ..config import ModelConfig
from ..fields import CheckpointError, Fields
from ..params import ParamSpec, float_specs, param_name
from ..schemes import Quantization
from . import packing
from .compressed import compressed_tensors
from .declared import QUANTIZATION
from .family import Implied, Piece, TensorMap
from .fp8 import fp8, modelopt
from .gptq import awq, gptq
from .mxfp4 import mxfp4
from .stored import REMEDY, Stored

_METHODS: dict[str, Callable[[Fields], Stored]] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gptq": gptq,
    "fp8": fp8,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
}


def stored_quantization(
    hf: Fields, config: ModelConfig, tensors: Callable[[ModelConfig], TensorMap]
) -> Quantization | None:
    """Which parameters a checkpoint holds quantized, and how; None where config.json says nothing of it.

    Args:
      hf: the contents of config.json.
      config: the model, before it is quantized.
      tensors: the family's, which say where its parameters would lie if none were.

    Raises:
      ValueError: a method, or a setting of one, that is not supported.
    """
    stored = _stored(hf)
    if stored is None:
        return None
    floats = tensors(config)
    is_stored = {name: _is_stored(stored, name, floats) for name, _ in _matrices(config, floats)}
    output = is_stored.pop("unembedding", False)
    skip = tuple(name for name, stored_so in is_stored.items() if not stored_so)
    return Quantization(stored.scheme, stored.scheme if output else None, skip)


def stored_tensors(hf: Fields, config: ModelConfig, floats: TensorMap) -> TensorMap:
    """Where a checkpoint keeps each parameter, and each part of those that it holds quantized.

    Args:
      hf: the contents of config.json.
      config: the model, whose schemes have the scales' dtypes.
      floats: where its parameters would lie if none were quantized.
    """
    stored = _stored(hf)
    if stored is None:
        return floats
    tensors = dict(floats)
    for name, spec in _matrices(config, floats):
        if not _is_stored(stored, name, floats):
            continue
        scheme = config.quantization.scheme_of(name)
        if scheme is None:  # held quantized, and kept as floats: see `in_other_orders`
            tensors[name] = tuple(stored.dense(stored.scheme, piece) for piece in tensors[name])
            continue
        step = scheme.block_rows(spec.shape[-spec.in_axes - 1])
        parts = [stored.parts(scheme, piece, step) for piece in tensors.pop(name)]
        tensors |= {f"{name}.{part}": tuple(pieces[part] for pieces in parts) for part in parts[0]}
        if "order" in parts[0]:
            tensors[f"{name}.order"] = (_one_order([pieces["order"] for pieces in parts]),)
        if "input_scale" in parts[0]:
            tensors[f"{name}.input_scale"] = (_largest([pieces["input_scale"] for pieces in parts]),)
    return tensors


def in_other_orders(hf: Fields, tensors: TensorMap, get: Callable[[str], np.ndarray | None]) -> tuple[str, ...]:
    """The parameters that have to be kept as floats: the inputs of their matrices are sorted in different orders.

    Args:
      hf: the contents of config.json.
      tensors: where the parameters lie.
      get: the contents of a tensor by its name, None where it is not there.
    """
    stored = _stored(hf)
    if stored is None or stored.dense is None:
        return ()
    orders = {name.removesuffix(".order"): pieces[0] for name, pieces in tensors.items() if name.endswith(".order")}
    return tuple(
        name
        for name, order in orders.items()
        if not all(np.array_equal(get(other.tensor), get(order.tensor)) for other in order.implied)
    )


def _one_order(orders: list[Piece]) -> Piece:
    """The order of the inputs of matrices that are one parameter here, which must share it."""
    first, *others = dict.fromkeys(orders)
    same = tuple(
        Implied(
            other.tensor,
            np.array_equal,
            f"its inputs are regrouped otherwise than those of {first.tensor!r}, with which it is one parameter here: "
            f"{REMEDY}",
            first.tensor,
        )
        for other in others
        if other.tensor != first.tensor
    )
    return dataclasses.replace(first, implied=(*first.implied, *same))


def _largest(scales: list[Piece]) -> Piece:
    """The one scale of the inputs of matrices that are one parameter here; as a rule they have the same one.

    As in vLLM it is the largest, which clips the least.
    """
    first, *others = dict.fromkeys(scales)
    same = tuple(
        Implied(other.tensor, lambda stored, _: stored.size == 1, "a scale for each of several inputs is not supported")
        for other in others
    )
    return dataclasses.replace(
        first, unpack=packing.largest, beside=tuple(other.tensor for other in others), implied=same
    )


def _matrices(config: ModelConfig, floats: TensorMap) -> list[tuple[str, ParamSpec]]:
    """The parameters that may be quantized, by name: those of linear modules."""
    named = [(param_name(path), spec) for path, spec in jax.tree_util.tree_leaves_with_path(float_specs(config))]
    # An output projection that is tied to the embedding is stored as the embedding.
    weights = [(name, spec) for name, spec in named if spec.in_axes and spec.quantizable]
    return [(name, spec) for name, spec in weights if floats[name] != floats["embedding"]]


def _is_stored(stored: Stored, name: str, floats: TensorMap) -> bool:
    modules = dict.fromkeys(piece.tensor.removesuffix(".weight") for piece in floats[name])
    left = [module for module in modules if not stored.quantizes(module)]
    if left and len(left) < len(modules):
        raise ValueError(
            f"quantization_config in config.json leaves {', '.join(left)} as they are and quantizes the rest of "
            f"{', '.join(modules)}, which are one parameter here ({name!r}): {REMEDY}"
        )
    return not left


def _stored(hf: Fields) -> Stored | None:
    settings = hf.get("quantization_config", hf.get("compression_config"))  # the oldest of compressed-tensors
    if settings is None:
        return None
    if "file" in settings:
        settings = Fields(settings.values, QUANTIZATION, f"{settings['file']} beside {hf.file}")
    method = settings.get("quant_method") or _method(settings)
    if method not in _METHODS:
        raise CheckpointError(
            f"{settings.file}: {settings.name('quant_method')} is {method!r}, which is not supported; supported: "
            f"{', '.join(_METHODS)}; {REMEDY}"
        )
    return _METHODS[method](settings)


def _method(settings: Fields) -> str | None:
    """The method of settings that do not name it, by keys that no other's have."""
    if "config_groups" in settings:
        return "compressed-tensors"
    if "quantization" in settings or "quant_algo" in settings:
        return "modelopt"
    if "w_bit" in settings or "zero_point" in settings:
        return "awq"
    if "desc_act" in settings or "sym" in settings:
        return "gptq"
    return "mlx" if "bits" in settings and "group_size" in settings else None
