"""Checkpoints that arrive quantized: what `quantization_config` in config.json says, and the tensors that it leads to.

A matrix that one is said to hold quantized is read as it is: its integers or fp8 numbers and its scales in the dtypes
that they are stored in, rearranged and never computed again.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from ..config import ModelConfig
from ..params import ParamSpec, float_specs, param_name
from ..schemes import Quantization, Scheme
from . import packing
from .common import refuse
from .family import HFConfig, Implied, Piece, TensorMap

_REMEDY = (
    "load the checkpoint that it was quantized from, with quantize= where it is to be quantized while it is loaded"
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a checkpoint stores its quantized matrices.

    Attributes:
      scheme: that holds them as they are, but for `scale_dtype`, which only the tensors tell.
      quantizes: whether it is how the linear module of that name is stored.
      parts: (scheme, piece of the matrix, rows of it that share a scale in the parameter) -> pieces of its parts.
    """

    scheme: Scheme
    quantizes: Callable[[str], bool]
    parts: Callable[[Scheme, Piece, int], dict[str, Piece]]


def stored_quantization(hf: HFConfig, config: ModelConfig, floats: TensorMap) -> Quantization | None:
    """Which parameters a checkpoint holds quantized, and how; None where config.json says nothing of it.

    Args:
      hf: the contents of config.json.
      config: the model, before it is quantized.
      floats: where its parameters would lie if none were.

    Raises:
      ValueError: a method, or a setting of one, that is not supported.
    """
    stored = _stored(hf)
    if stored is None:
        return None
    found = {name: _is_stored(stored, name, floats) for name, _ in _matrices(config, floats)}
    output = found.pop("unembedding", False)
    skip = tuple(name for name, is_stored in found.items() if not is_stored)
    return Quantization(stored.scheme, stored.scheme if output else None, skip)


def stored_tensors(hf: HFConfig, config: ModelConfig, floats: TensorMap) -> TensorMap:
    """Where a checkpoint keeps each parameter, and each part of those that it holds quantized.

    Args:
      hf: the contents of config.json.
      config: the model, whose schemes have the scales' dtypes.
      floats: where its parameters would lie if none were quantized.
    """
    stored = _stored(hf)
    if stored is None:
        return floats
    found = dict(floats)
    for name, spec in _matrices(config, floats):
        if not _is_stored(stored, name, floats):
            continue
        scheme = config.quantization.scheme_of(name)
        step = scheme.block_rows(spec.shape[-spec.in_axes - 1])
        parts = [stored.parts(scheme, piece, step) for piece in found.pop(name)]
        found |= {f"{name}.{part}": tuple(pieces[part] for pieces in parts) for part in parts[0]}
    return found


def _matrices(config: ModelConfig, floats: TensorMap) -> list[tuple[str, ParamSpec]]:
    """The parameters that may be quantized, by name: those of linear modules."""
    named = [(param_name(path), spec) for path, spec in jax.tree_util.tree_leaves_with_path(float_specs(config))]
    # An output projection that is tied to the embedding is stored as the embedding.
    return [(name, spec) for name, spec in named if spec.in_axes and floats[name] != floats["embedding"]]


def _is_stored(stored: Stored, name: str, floats: TensorMap) -> bool:
    modules = dict.fromkeys(piece.tensor.removesuffix(".weight") for piece in floats[name])
    left = [module for module in modules if not stored.quantizes(module)]
    if left and len(left) < len(modules):
        raise ValueError(
            f"quantization_config in config.json leaves {', '.join(left)} as they are and quantizes the rest of "
            f"{', '.join(modules)}, which are one parameter here ({name!r}): {_REMEDY}"
        )
    return not left


def _stored(hf: HFConfig) -> Stored | None:
    stated = hf.get("quantization_config")
    if stated is None:
        return None
    if not isinstance(stated, dict):
        raise ValueError(f"quantization_config in config.json is {stated!r}; it must be an object or null")
    method = stated.get("quant_method")
    if method not in _METHODS:
        raise ValueError(
            f"quantization_config in config.json has quant_method {method!r}, which is not supported; supported: "
            f"{', '.join(_METHODS)}; {_REMEDY}"
        )
    return _METHODS[method](stated)


# --- compressed-tensors ---
# Source: compressors/pack_quantized and naive_quantized, and quantization/, of neuralmagic/compressed-tensors.

_FORMATS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "pack-quantized": ({"num_bits": 4, "type": "int"}, ("group", "channel")),
    "int-quantized": ({"num_bits": 8, "type": "int", "symmetric": True}, ("channel", "tensor")),
    "float-quantized": ({"num_bits": 8, "type": "float", "symmetric": True}, ("channel", "tensor", "block")),
}
"""What the weights of each format must be, and what may share a scale."""


def _compressed_tensors(stated: HFConfig) -> Stored:
    _only(stated, "kv_cache_scheme")
    _only(stated, "transform_config", {})
    if (stated.get("sparsity_config") or {}).get("format", "dense") != "dense":
        _only(stated, "sparsity_config")
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"quantization_config in config.json has config_groups {groups!r}; it must name one or more")
    read = [_compressed_group(group, group.get("format") or stated.get("format")) for group in groups.values()]
    if any(other[:2] != read[0][:2] for other in read):
        raise ValueError(
            f"config_groups {', '.join(groups)} of quantization_config in config.json differ, and one scheme for all "
            f"layers is supported: {_REMEDY}"
        )
    scheme, per_tensor, _ = read[0]
    targets, ignored = [name for *_, targets in read for name in targets], stated.get("ignore") or ()
    parts = _packed_parts if scheme.dtype == "int4" else functools.partial(_plain_parts, "weight_scale", per_tensor)
    return Stored(scheme, lambda module: _matches(module, targets) and not _matches(module, ignored), parts)


def _compressed_group(group: HFConfig, form: str | None) -> tuple[Scheme, bool, list[str]]:
    """The scheme of a group, whether a whole tensor shares a scale, and the modules that it is for."""
    _only({"format": form or "dense"}, "format", *_FORMATS)
    required, strategies = _FORMATS[form]
    weights = {"num_bits": 8, "type": "int", "symmetric": True} | (group.get("weights") or {})
    for key, value in required.items():
        _only(weights, key, value)
    _only(weights, "dynamic", False)
    _only(weights, "actorder", False, "weight", "static")
    _only(group, "output_activations")
    inputs = group.get("input_activations")
    if inputs is not None:
        _only({"input_activations.dynamic": inputs.get("dynamic", False)}, "input_activations.dynamic", True)
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    _only({"strategy": strategy}, "strategy", *strategies)
    rows, columns = _block(weights, "block_structure") if strategy == "block" else (1, None)
    scheme = Scheme(
        {4: "int4", 8: "int8" if weights["type"] == "int" else "float8_e4m3fn"}[weights["num_bits"]],
        group=_group_size(weights) if strategy == "group" else columns,
        rows=rows,
        zero_points=not weights["symmetric"],
        scale_dtype="bfloat16",
        # Only these products are made in 8 bits; for the others activations are kept as they are, which is closer.
        dynamic=inputs is not None and form != "pack-quantized" and strategy != "block",
    )
    return scheme, strategy == "tensor", group.get("targets") or []


def _matches(module: str, names: Iterable[str]) -> bool:
    """Whether a linear module is among them: by its name, by a pattern for the start of it, or as every one."""
    return any(
        name in ("Linear", module) or (name.startswith("re:") and re.match(name[3:], module) is not None)
        for name in names
    )


def _packed_parts(scheme: Scheme, piece: Piece, step: int) -> dict[str, Piece]:
    outputs, inputs = piece.shape
    N = scheme.groups(inputs)
    shape = Implied(
        _beside(piece, "weight_shape"),
        lambda: np.array([outputs, inputs]),
        f"config.json calls for [{outputs}, {inputs}] and belongs to another checkpoint",
    )
    values = _part(piece, "weight_packed", (outputs, math.ceil(inputs / 8)), "int32", packing.row_words)
    found = {
        "values": dataclasses.replace(values, implied=(shape,)),
        "scales": _part(piece, "weight_scale", (outputs, N), scheme.scale_dtype),
    }
    if scheme.zero_points:
        found["zeros"] = _part(piece, "weight_zero_point", (math.ceil(outputs / 8), N), "int32", packing.row_zeros)
    return found


def _plain_parts(scales: str, per_tensor: bool, scheme: Scheme, piece: Piece, step: int) -> dict[str, Piece]:
    """A byte a value in a tensor of the weight's own name and shape."""
    outputs, inputs = piece.shape
    shape = (1,) if per_tensor else (math.ceil(outputs / scheme.rows), scheme.groups(inputs))
    # Blocks of the tensor's rows may reach over heads. Those of the parameter start and end where a head does and
    # divide them, so that each lies in one.
    blocks = functools.partial(packing.block_rows, block=scheme.rows, step=step)
    return {
        "values": _part(piece, "weight", piece.shape, scheme.dtype),
        "scales": _part(piece, scales, shape, scheme.scale_dtype, packing.spread if per_tensor else blocks, step),
    }


# --- AutoAWQ ---
# Source: awq/modules/linear/gemm.py and awq/models/_config.py of casper-hansen/AutoAWQ.


def _awq(stated: HFConfig) -> Stored:
    _only(stated, "bits", 4)
    _only({"version": (stated.get("version") or stated.get("format") or "gemm").lower()}, "version", "gemm")
    _only(stated, "zero_point", True)
    if stated.get("backend") == "llm-awq":  # which packs otherwise
        _only(stated, "backend", "autoawq")
    scheme = Scheme("int4", group=_group_size(stated), zero_points=True, scale_dtype="float16")
    return Stored(scheme, _all_layers_but(stated.get("modules_to_not_convert") or ()), _awq_parts)


def _awq_parts(scheme: Scheme, piece: Piece, step: int) -> dict[str, Piece]:
    outputs, inputs = piece.shape
    N, words = scheme.groups(inputs), math.ceil(outputs / 8)
    return {
        "values": _part(piece, "qweight", (inputs, words), "int32", packing.awq_words),
        "scales": _part(piece, "scales", (N, outputs), scheme.scale_dtype, packing.transposed),
        "zeros": _part(piece, "qzeros", (N, words), "int32", packing.awq_zeros),
    }


# --- GPTQ ---
# Source: auto_gptq/nn_modules/qlinear and quantization/config.py of AutoGPTQ, gptqmodel/utils/model.py of GPTQModel.


def _gptq(stated: HFConfig) -> Stored:
    _only(stated, "bits", 4)
    _only(stated, "is_marlin_format", False)
    _only(stated, "dynamic", {})  # other settings for some modules
    form = {"checkpoint_format": stated.get("checkpoint_format") or stated.get("format") or "gptq"}
    _only(form, "checkpoint_format", "gptq", "gptq_v2")
    zeros = packing.gptq_v1_zeros if form["checkpoint_format"] == "gptq" else packing.gptq_zeros
    chosen = [name for names in stated.get("modules_in_block_to_quantize") or () for name in names]

    def quantizes(module: str) -> bool:
        return bool(stated.get("lm_head")) if module == "lm_head" else not chosen or _is_within(module, chosen)

    scheme = Scheme("int4", group=_group_size(stated), zero_points=True, scale_dtype="float16")
    return Stored(scheme, quantizes, functools.partial(_gptq_parts, zeros))


def _gptq_parts(zeros: Callable, scheme: Scheme, piece: Piece, step: int) -> dict[str, Piece]:
    outputs, inputs = piece.shape
    N = scheme.groups(inputs)
    order = Implied(
        _beside(piece, "g_idx"),
        lambda: np.arange(inputs) // (scheme.group or inputs),
        f"its inputs were regrouped by activation (desc_act), which is not supported: {_REMEDY}",
    )
    values = _part(piece, "qweight", (math.ceil(inputs / 8), outputs), "int32", packing.column_words)
    return {
        "values": dataclasses.replace(values, implied=(order,)),
        "scales": _part(piece, "scales", (N, outputs), scheme.scale_dtype, packing.transposed),
        "zeros": _part(piece, "qzeros", (N, math.ceil(outputs / 8)), "int32", zeros),
    }


# --- fp8 in blocks, as of DeepSeek-V3 and Qwen3 ---
# Source: integrations/finegrained_fp8.py of transformers.


def _fp8(stated: HFConfig) -> Stored:
    _only(stated, "fmt", "e4m3")
    _only({"activation_scheme": stated.get("activation_scheme", "dynamic")}, "activation_scheme", "dynamic")
    rows, columns = _block(stated, "weight_block_size")
    skipped = stated.get("modules_to_not_convert") or stated.get("ignored_layers") or ()
    parts = functools.partial(_plain_parts, "weight_scale_inv", False)
    return Stored(Scheme("float8_e4m3fn", group=columns, rows=rows), _all_layers_but(skipped), parts)


_METHODS: dict[str, Callable[[HFConfig], Stored]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
}


# --- shared ---


def _only(stated: HFConfig, key: str, *supported: Any) -> None:
    """Raise ValueError unless a setting of quantization_config is one of those supported, absent, or null."""
    name = f"quantization_config.{key}"
    refuse({name: stated.get(key)}, name, supported, f"{' or '.join(map(repr, supported)) or 'null'} is; {_REMEDY}")


def _group_size(stated: HFConfig) -> int | None:
    """Inputs that share a scale; None is all."""
    size = stated.get("group_size")
    if type(size) is not int or (size <= 0 and size != -1):
        raise ValueError(f"group_size in quantization_config of config.json is {size!r}; it must be positive or -1")
    return None if size == -1 else size


def _block(stated: HFConfig, key: str) -> tuple[int, int]:
    match stated.get(key):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(
        f"{key} in quantization_config of config.json is {stated.get(key)!r}; two positive numbers are supported, such "
        f"as [128, 128]: {_REMEDY}"
    )


def _all_layers_but(names: Iterable[str]) -> Callable[[str], bool]:
    return lambda module: module != "lm_head" and not _is_within(module, names)


def _is_within(module: str, names: Iterable[str]) -> bool:
    """Whether one of the names is some of the dotted parts of the module's."""
    return any(f".{name}." in f".{module}." for name in names)


def _beside(piece: Piece, name: str) -> str:
    return piece.tensor.removesuffix("weight") + name


def _part(
    piece: Piece, name: str, shape: tuple[int, ...], dtype: str, unpack: Callable | None = None, step: int = 1
) -> Piece:
    """The piece of one part of a matrix, each of its rows standing for `step` of the matrix."""
    first, last = piece.rows or (0, piece.shape[0])
    return Piece(_beside(piece, name), shape, piece.index, (first // step, last // step), dtype, unpack)
