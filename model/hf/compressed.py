"""Quantized matrices as compressed-tensors stores them.

Source: compressors/pack_quantized and naive_quantized, and quantization/, of neuralmagic/compressed-tensors.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..fields import Fields
from ..schemes import Scheme
from . import packing
from .family import Implied, Piece
from .gptq import order_part, ordered
from .stored import REMEDY, Stored, aliases, beside, group_size, only, part

_FORMATS: dict[str, tuple[dict[str, tuple[Any, ...]], tuple[str, ...]]] = {
    "pack-quantized": ({"num_bits": (4, 8), "type": ("int",)}, ("group", "channel")),
    "int-quantized": ({"num_bits": (8,), "type": ("int",), "symmetric": (True,)}, ("channel", "tensor")),
    "float-quantized": ({"num_bits": (8,), "type": ("float",), "symmetric": (True,)}, ("channel", "tensor", "block")),
}
"""What the weights of each format must be, and what may share a scale."""


def compressed_tensors(settings: Fields) -> Stored:
    """How matrices are stored by settings of compressed-tensors."""
    only(settings, "transform_config", {})
    only(settings.object("sparsity_config"), "format", "dense")
    groups = settings["config_groups"]
    read = [_group(group, group.get("format") or settings.get("format")) for group in groups.values()]
    if any(other[:3] != read[0][:3] for other in read):
        raise ValueError(
            f"config_groups {', '.join(groups)} of quantization_config in config.json differ, and one scheme for all "
            f"layers is supported: {REMEDY}"
        )
    scheme, per_tensor, packed, _ = read[0]
    targets, ignored = [name for *_, names in read for name in names], settings.get("ignore") or ()
    parts = _packed_parts if packed else functools.partial(plain_parts, "weight_scale", per_tensor)
    return Stored(scheme, lambda module: _matches(module, targets) and not _matches(module, ignored), parts)


def plain_parts(scales: str, per_tensor: bool, scheme: Scheme, piece: Piece, step: int) -> dict[str, Piece]:
    """The pieces of a matrix that has a byte a value in a tensor of the weight's own name and shape."""
    outputs, inputs = piece.shape
    shape = (1,) if per_tensor else (math.ceil(outputs / scheme.rows), scheme.groups(inputs))
    # Blocks of the tensor's rows may reach over heads. Those of the parameter start and end where a head does and
    # divide them, so that each lies in one.
    blocks = functools.partial(packing.block_rows, block=scheme.rows, step=step)
    parts = {
        "values": part(piece, "weight", piece.shape, scheme.dtype),
        "scales": part(piece, scales, shape, scheme.scale_dtype, packing.spread if per_tensor else blocks, step),
    }
    if scheme.static:
        parts["input_scale"] = Piece(beside(piece, "input_scale"), (1,), (), (0, 1))
    return parts


def _group(group: Fields, form: str | None) -> tuple[Scheme, bool, bool, tuple[str, ...]]:
    """The scheme of a group, whether a whole tensor shares a scale, whether it is packed, and whom it is for."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True} | group.object("weights")
    if form == "naive-quantized":
        form = f"{weights['type']}-quantized"
    only(group | {"format": form or "dense"}, "format", *_FORMATS)
    required, strategies = _FORMATS[form]
    for key, values in required.items():
        only(weights, key, *values)
    only(weights, "dynamic", False)
    only(weights, "actorder", False, "weight", "static", "group")
    only(group, "output_activations")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    only(weights | {"strategy": strategy}, "strategy", *strategies)
    rows, columns = weights["block_structure"] if strategy == "block" else (1, None)
    scheme = Scheme(
        {4: "int4", 8: "int8" if weights["type"] == "int" else "float8_e4m3fn"}[weights["num_bits"]],
        group=group_size(weights) if strategy == "group" else columns,
        rows=rows,
        zero_points=not weights["symmetric"],
        scale_dtype="bfloat16",
        sorted_inputs=weights.get("actorder") == "group",
    )
    inputs = group.object("input_activations")
    # Only these products are made in 8 bits; for the others activations are kept as they are, which is closer.
    if inputs and scheme.scales_outputs and form != "pack-quantized":
        dynamic = bool(inputs.get("dynamic"))
        one_scale = inputs.get("symmetric", True) and inputs.get("strategy") in (None, "tensor")
        scheme = dataclasses.replace(scheme, dynamic=dynamic, static=one_scale and not dynamic)
    return scheme, strategy == "tensor", form == "pack-quantized", group.get("targets", ())


def _matches(module: str, names: Iterable[str]) -> bool:
    """Whether a linear module is among them: by its name, by a pattern for the start of it, or as every one."""
    return any(
        name in ("Linear", alias) or (name.startswith("re:") and re.match(name[3:], alias) is not None)
        for name in names
        for alias in aliases(module)
    )


def _packed_parts(scheme: Scheme, piece: Piece, step: int) -> dict[str, Piece]:
    outputs, inputs = piece.shape
    N, a_word = scheme.groups(inputs), 8 if scheme.dtype == "int4" else 4
    shape = Implied(
        beside(piece, "weight_shape"),
        lambda stored, _: np.array_equal(stored, [outputs, inputs]),
        f"config.json calls for [{outputs}, {inputs}] and belongs to another checkpoint",
    )
    words = packing.row_words if a_word == 8 else packing.row_bytes
    zeros = packing.row_zeros if a_word == 8 else packing.row_byte_zeros
    values = part(piece, "weight_packed", (outputs, math.ceil(inputs / a_word)), "int32", words)
    parts = {
        "values": dataclasses.replace(values, implied=(shape,)),
        "scales": part(piece, "weight_scale", (outputs, N), scheme.scale_dtype),
    }
    if scheme.zero_points:
        parts["zeros"] = part(piece, "weight_zero_point", (math.ceil(outputs / a_word), N), "int32", zeros)
    if scheme.sorted_inputs:
        parts["values"] = ordered(parts["values"], beside(piece, "weight_g_idx"))
        parts["order"] = order_part(piece, "weight_g_idx", scheme)
    return parts
