"""Quantized matrices written as compressed-tensors stores them: what `compressed` reads, under the names it reads."""

import math
from collections.abc import Mapping

import numpy as np

from ..config import ModelConfig
from ..fields import Fields
from ..quantization import QuantizedArray
from ..schemes import SCHEMES, Scheme
from . import packing
from .compressed import compressed_tensors
from .declared import QUANTIZATION
from .family import HFConfig, Piece
from .mxfp4 import SETTINGS, in_blocks


def quantization_settings(config: ModelConfig, left: list[str]) -> HFConfig:
    """The `quantization_config` of config.json.

    Args:
      config: the model, quantized.
      left: the linear modules that are not, by Hugging Face's names.

    Raises:
      ValueError: a quantization that the layout cannot say.
    """
    layers, output = config.quantization.layers, config.quantization.output
    if config.family == "gpt_oss":
        return SETTINGS
    if SCHEMES["mxfp4"] in (layers, output):
        raise ValueError("the layout that is written has no mxfp4 but of gpt-oss; save the model in another scheme")
    if output is not None and config.tie_embeddings:
        raise ValueError(
            "the output projection is quantized beside the embedding that it is tied to, and Hugging Face's layout "
            "holds one of them; save the model without quantize_output"
        )
    schemes = [scheme for scheme in (layers, output) if scheme is not None]
    weights, *others = [_weights(scheme, config) | {"activations": _activations(scheme)} for scheme in schemes]
    if others and others != [weights]:
        raise ValueError(
            f"layers are stored in {layers.dtype} and the output projection otherwise, in {output.dtype}; the layout "
            "that is read has one scheme for both: save the model with one, or without quantize_output"
        )
    activations, form = weights.pop("activations"), _form(schemes[0])
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": left,
    }


def compressed(settings: HFConfig, name: str, matrix: QuantizedArray) -> dict[str, np.ndarray]:
    """The tensors that a matrix [out, in] of NumPy arrays is stored as.

    Args:
      settings: as `quantization_settings` returns them.
      name: of the matrix if it were not quantized, "... .weight".
      matrix: as `hf_view` has it.
    """
    if settings == SETTINGS:
        return in_blocks(name, matrix)
    stored = compressed_tensors(Fields(settings, QUANTIZATION, "config.json", "quantization_config."))
    scheme, (outputs, inputs) = stored.scheme, matrix.shape
    pieces = stored.parts(scheme, Piece(name, matrix.shape), scheme.rows)
    values, zeros = matrix.values, matrix.zeros
    tensors = {}
    if matrix.order is not None:
        groups = np.empty(inputs, np.int32)
        groups[matrix.order] = np.arange(inputs) // (scheme.group or inputs)
        tensors["order"] = groups
        values = packing.in_order(values, matrix.order)
    if settings["format"] == "pack-quantized":
        values = packing.to_row_words(values)
        zeros = zeros if zeros is None else packing.to_column_words(zeros)
    tensors |= {"values": values, "scales": _blocks(matrix.scales, math.ceil(outputs / scheme.rows))}
    tensors |= {} if zeros is None else {"zeros": zeros}
    tensors |= {} if matrix.input_scale is None else {"input_scale": matrix.input_scale}
    shape = {implied.tensor: np.array([outputs, inputs]) for implied in pieces["values"].implied}
    return {pieces[part].tensor: tensor for part, tensor in tensors.items()} | shape


def _form(scheme: Scheme) -> str:
    if scheme.dtype == "float8_e4m3fn":
        return "float-quantized"
    return "int-quantized" if scheme.scales_outputs else "pack-quantized"


def _weights(scheme: Scheme, config: ModelConfig) -> Mapping[str, object]:
    weights = {
        "num_bits": 4 if scheme.dtype == "int4" else 8,
        "type": "float" if scheme.dtype == "float8_e4m3fn" else "int",
        "symmetric": not scheme.zero_points,
        "strategy": "channel",
        "dynamic": False,
    }
    if scheme.dtype == "float8_e4m3fn" and scheme.group is not None:
        # Blocks of query, key and value matrices end where heads do; all matrices have blocks of one size.
        outputs = [config.head_dim, config.ffn_dim, config.embed_dim]
        outputs += [config.vocab_size] if config.quantization.output else []
        outputs += [config.experts.ffn_dim, config.experts.shared_ffn_dim] if config.experts else []
        rows = math.gcd(scheme.rows, *outputs)
        weights |= {"strategy": "block", "block_structure": [rows, scheme.group]}
    elif scheme.group is not None:
        weights |= {"strategy": "group", "group_size": scheme.group}
    return weights | ({"actorder": "group"} if scheme.sorted_inputs else {})


def _activations(scheme: Scheme) -> Mapping[str, object] | None:
    if not scheme.dynamic and not scheme.static:
        return None
    kind = {"num_bits": 8, "type": "int" if scheme.dtype == "int8" else "float", "symmetric": True}
    return kind | {"strategy": "token" if scheme.dynamic else "tensor", "dynamic": scheme.dynamic}


def _blocks(scales: np.ndarray, count: int) -> np.ndarray:
    """Scales of so many blocks of rows, into which those that are there are cut."""
    return scales if len(scales) == count else np.repeat(scales, count // len(scales), axis=0)
