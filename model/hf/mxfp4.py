"""Experts in MXFP4 as gpt-oss stores them: blocks of 32 e2m1 numbers, two to a byte, and a byte for each block's scale.

Sources: OCP Microscaling Formats 1.0; integrations/mxfp4.py of transformers.
"""

import math

import numpy as np

from ..fields import Fields
from ..quantization import QuantizedArray
from ..schemes import SCHEMES, Scheme
from .family import HFConfig, Piece
from .stored import REMEDY, Stored

_MODULE = ".mlp.experts."
_BLOCK_BYTES = 16
SETTINGS: HFConfig = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""The `quantization_config` of config.json."""


def mxfp4(settings: Fields) -> Stored:
    """How matrices are stored: the experts' in blocks, all others as they are."""
    del settings  # which name the others, and leave nothing open
    return Stored(SCHEMES["mxfp4"], lambda module: _MODULE in module, _parts)


def _parts(scheme: Scheme, piece: Piece, step: int) -> dict[str, Piece]:
    if len(piece.shape) != 3 or piece.shape[1] % scheme.group:
        raise ValueError(f"{piece.tensor} of {list(piece.shape)} cannot lie in blocks of {scheme.group}: {REMEDY}")
    experts, inputs, outputs = piece.shape
    groups = inputs // scheme.group

    def part(name: str, columns: int, *shape: int) -> Piece:
        split, order = None, None
        if len(piece.split) == 4:  # gate and up take turns
            split, order = (experts, outputs // 2, 2, columns), (0, 2, 1, 3)
        return Piece(f"{piece.tensor}_{name}", (experts, outputs, *shape), dtype="uint8", split=split, order=order)

    return {"values": part("blocks", inputs // 2, groups, _BLOCK_BYTES), "scales": part("scales", groups, groups)}


def in_blocks(name: str, experts: QuantizedArray) -> dict[str, np.ndarray]:
    """The tensors that a layer's gate_up [E, 2, F, D] or down [E, D, F] is stored as."""
    if experts.scheme != SCHEMES["mxfp4"] or _MODULE not in name:
        raise ValueError(f"{name} is quantized, and the layout of gpt-oss has experts in mxfp4 and nothing else so")
    taking_turns = experts.values.ndim == 4

    def rows(part: np.ndarray) -> np.ndarray:
        part = part.swapaxes(1, 2) if taking_turns else part
        return part.reshape(len(part), -1, part.shape[-1])

    values, scales = rows(experts.values), rows(experts.scales)
    blocks = values.reshape(*scales.shape, math.prod(values.shape) // math.prod(scales.shape))
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}
