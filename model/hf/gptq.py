"""Quantized matrices as AutoGPTQ, GPTQModel and AutoAWQ store them: inputs first, packed in 32-bit words.

Sources: auto_gptq/nn_modules/qlinear and quantization/config.py of AutoGPTQ, gptqmodel/utils/model.py of GPTQModel;
awq/modules/linear/gemm.py and awq/models/_config.py of casper-hansen/AutoAWQ.
"""

import dataclasses
import functools
import math

import numpy as np

from ..fields import Fields
from ..quantization import ZERO_NIBBLE
from ..schemes import Scheme
from . import packing
from .family import Implied, Piece
from .stored import REMEDY, Stored, all_layers_but, beside, group_size, is_within, only, part


def awq(settings: Fields) -> Stored:
    """How matrices are stored by settings of AutoAWQ; the older ones say w_bit and q_group_size."""
    bits, size = ("w_bit", "q_group_size") if "w_bit" in settings else ("bits", "group_size")
    only(settings, bits, 4)
    version = (settings.get("version") or settings.get("format") or "gemm").lower()
    only(settings | {"version": version}, "version", "gemm")
    only(settings, "zero_point", True)
    if settings.get("backend") == "llm-awq":  # which packs otherwise
        only(settings, "backend", "autoawq")
    scheme = Scheme("int4", group=group_size(settings, size), zero_points=True, scale_dtype="float16")
    return Stored(scheme, all_layers_but(settings.get("modules_to_not_convert") or ()), _awq_parts)


def _awq_parts(scheme: Scheme, piece: Piece, step: int) -> dict[str, Piece]:
    outputs, inputs = piece.shape
    N, words = scheme.groups(inputs), math.ceil(outputs / 8)
    return {
        "values": part(piece, "qweight", (inputs, words), "int32", packing.awq_words),
        "scales": part(piece, "scales", (N, outputs), scheme.scale_dtype, packing.transposed),
        "zeros": part(piece, "qzeros", (N, words), "int32", packing.awq_zeros),
    }


def gptq(settings: Fields) -> Stored:
    """How matrices are stored by settings of AutoGPTQ and GPTQModel."""
    only(settings, "bits", 4, 8)
    only(settings, "is_marlin_format", False)
    only(settings, "dynamic", {})  # other settings for some modules
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    only(settings | {"checkpoint_format": form}, "checkpoint_format", "gptq", "gptq_v2")
    chosen = [name for names in settings.get("modules_in_block_to_quantize") or () for name in names]

    def quantizes(module: str) -> bool:
        return settings.get("lm_head", False) if module == "lm_head" else not chosen or is_within(module, chosen)

    scheme = Scheme(
        "int4" if settings.get("bits", 4) == 4 else "int8",
        group=group_size(settings),
        zero_points=not settings.get("sym"),
        scale_dtype="float16",
        sorted_inputs=settings.get("desc_act", False) and group_size(settings) is not None,
    )
    first_format = form == "gptq"
    parts, dense = (functools.partial(pieces, first_format) for pieces in (_gptq_parts, _gptq_dense))
    return Stored(scheme, quantizes, parts, dense)


def _gptq_parts(first_format: bool, scheme: Scheme, piece: Piece, step: int) -> dict[str, Piece]:
    outputs, inputs = piece.shape
    N, a_word = scheme.groups(inputs), 8 if scheme.dtype == "int4" else 4
    words, symmetric = (packing.column_words, ZERO_NIBBLE) if a_word == 8 else (packing.column_bytes, 0)
    zeros = functools.partial(packing.gptq_zeros, a_word=a_word, one_less=first_format)
    values = part(piece, "qweight", (math.ceil(inputs / a_word), outputs), "int32", words)
    in_order = Implied(
        beside(piece, "g_idx"),
        lambda stored, _: np.array_equal(stored, np.arange(inputs) // (scheme.group or inputs)),
        "its inputs were regrouped by activation, and desc_act in config.json says that they were not; set it to true",
    )
    same_zeros = Implied(
        beside(piece, "qzeros"),
        lambda stored, _: bool(np.all(zeros(stored, slice(0, outputs), slice(None)) == symmetric)),
        "its zero points are not symmetric, and sym in config.json says that they are; set it to false",
    )
    parts = {
        "values": dataclasses.replace(values, implied=(in_order,)),
        "scales": part(piece, "scales", (N, outputs), scheme.scale_dtype, packing.transposed),
    }
    if scheme.zero_points:
        parts["zeros"] = part(piece, "qzeros", (N, math.ceil(outputs / a_word)), "int32", zeros)
    else:
        parts["scales"] = dataclasses.replace(parts["scales"], implied=(same_zeros,))
    if scheme.sorted_inputs:
        parts["values"] = ordered(values, beside(piece, "g_idx"))
        parts["order"] = order_part(piece, "g_idx", scheme)
    return parts


def _gptq_dense(first_format: bool, scheme: Scheme, piece: Piece) -> Piece:
    parts = _gptq_parts(first_format, dataclasses.replace(scheme, zero_points=True), piece, 1)
    values, zeros, scales, order = (parts[name] for name in ("values", "zeros", "scales", "order"))
    return dataclasses.replace(
        values,
        unpack=functools.partial(packing.dense, **zeros.unpack.keywords),
        beside=(zeros.tensor, scales.tensor, order.tensor),
        implied=(_of_shape(zeros), _of_shape(scales), *order.implied),
    )


def _of_shape(part: Piece) -> Implied:
    """That a tensor has the shape of a piece."""
    otherwise = f"whose shape is not {list(part.shape)}, config.json belongs to another checkpoint"
    return Implied(part.tensor, lambda stored, _: stored.shape == part.shape, otherwise)


def ordered(values: Piece, groups: str) -> Piece:
    """The piece of values whose inputs are to be sorted by their groups, which a tensor names."""
    return dataclasses.replace(values, beside=(groups,))


def order_part(piece: Piece, groups: str, scheme: Scheme) -> Piece:
    """The piece of the order of a matrix' inputs by their groups."""
    inputs = piece.shape[1]
    whole_groups = Implied(
        beside(piece, groups),
        lambda stored, _: np.array_equal(np.sort(stored), np.arange(inputs) // (scheme.group or inputs)),
        f"the groups of its inputs are not of {scheme.group or inputs} each, which is not supported: {REMEDY}",
    )
    order = Piece(beside(piece, groups), (inputs,), (), (0, inputs), "int32", packing.order)
    return dataclasses.replace(order, implied=(whole_groups,))
