"""Checkpoints that arrive quantized, each beside one of the float matrices that it stands for.

The packers follow the loops of the programs that write such checkpoints: `WQLinear_GEMM.from_linear` of AutoAWQ,
`QuantLinear.pack` of AutoGPTQ, `pack_to_int32` of compressed-tensors.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ridgeline as rl
from checkpoints import LLAMA, PHI3, random_tensors, save
from ridgeline.model.params import Params
from ridgeline.model.quantization import QuantizedArray

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
HF, FUSED = LLAMA | SIZES, PHI3 | SIZES

Matrix = Callable[[np.random.Generator, int, int], tuple[dict[str, np.ndarray], np.ndarray]]
"""(random numbers, outputs, inputs) -> the stored tensors by the last part of their names, the matrix."""


def words(values: np.ndarray, axis: int, order: Iterable[int] = range(8), bits: int = 4) -> np.ndarray:
    """Numbers of some bits in int32 words along an axis: number `order[i]` of a word in bits i * `bits` and after."""
    order = list(order)[: 32 // bits]
    values = np.moveaxis(values, axis, -1)
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % len(order))]).astype(np.uint32)
    packed = np.zeros((*values.shape[:-1], values.shape[-1] // len(order)), np.uint32)
    for word in range(packed.shape[-1]):
        for i, number in enumerate(order):
            packed[..., word] |= values[..., len(order) * word + number] << np.uint32(bits * i)
    return np.ascontiguousarray(np.moveaxis(packed.view(np.int32), -1, axis))


def _integers(rng, outputs: int, of: np.ndarray, scale_dtype: str, zeros: np.ndarray | None = None, bits: int = 4):
    """Values [O, I], scales and zeros [O, N], and the matrix, whose inputs are in the groups `of`."""
    values = rng.integers(0, 2**bits, (outputs, len(of)))
    scales = rng.uniform(0.01, 0.1, (outputs, of.max() + 1)).astype(jnp.dtype(scale_dtype))
    zeros = rng.integers(0, 2**bits, scales.shape) if zeros is None else np.broadcast_to(zeros, scales.shape)
    return values, scales, zeros, ((values - zeros[:, of]) * scales.astype(np.float32)[:, of]).astype(np.float32)


def packed(symmetric: bool, group: int, scale_dtype: str, bits: int = 4, act_order: bool = False) -> Matrix:
    """compressed-tensors, pack-quantized."""

    def matrix(rng, outputs, inputs):
        of = _groups(inputs, group, "shared" if act_order else None, rng)
        values, scales, zeros, dense = _integers(
            rng, outputs, of, scale_dtype, 2 ** (bits - 1) if symmetric else None, bits
        )
        tensors = {"weight_packed": words(values, 1, bits=bits), "weight_scale": scales}
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros, 0, bits=bits)
        if act_order:
            tensors["weight_g_idx"] = of.astype(np.int32)
        return tensors | {"weight_shape": np.array([outputs, inputs])}, dense

    return matrix


def _groups(inputs: int, group: int, act_order: str | None, rng) -> np.ndarray:
    """The group of each input: of all matrices with the same inputs alike ("shared"), or of each its own ("own")."""
    of = np.arange(inputs) // group
    return (
        of if act_order is None else (np.random.default_rng(inputs) if act_order == "shared" else rng).permutation(of)
    )


def _awq(rng, outputs, inputs):
    values, scales, zeros, dense = _integers(rng, outputs, np.arange(inputs) // 8, "float16")
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {"qweight": words(values.T, 1, order), "qzeros": words(zeros.T, 1, order), "scales": scales.T.copy()}, dense


def gptq(
    group: int | None, v1: bool = True, bits: int = 4, act_order: str | None = None, symmetric: bool = False
) -> Matrix:
    def matrix(rng, outputs, inputs):
        of = _groups(inputs, group or inputs, act_order, rng)
        zeros = 2 ** (bits - 1) if symmetric else None
        values, scales, zeros, dense = _integers(rng, outputs, of, "float16", zeros, bits)
        tensors = {"qweight": words(values.T, 0, bits=bits), "qzeros": words(zeros.T, 1, bits=bits)}
        if v1:  # as `convert_gptq_v2_to_v1_format_module` of GPTQModel does; AutoGPTQ wrote a bias of zeros besides
            one = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
            tensors["qzeros"] = (tensors["qzeros"].view(np.uint32) - one).view(np.int32)
            tensors["bias"] = np.zeros(outputs, np.float16)
        return tensors | {"scales": scales.T.copy(), "g_idx": of.astype(np.int32)}, dense

    return matrix


def with_input_scale(matrix: Matrix, flat: bool = False, names: dict[str, str] | None = None) -> Matrix:
    """The same with a scale of activations, each its own; with `flat` no scale has an axis; with other names."""

    def scaled(rng, outputs, inputs):
        tensors, dense = matrix(rng, outputs, inputs)
        tensors["input_scale"] = rng.uniform(0.005, 0.02, 1).astype("float32")
        tensors = {(names or {}).get(name, name): t for name, t in tensors.items()}
        return {name: t.reshape(()) if flat and t.size == 1 else t for name, t in tensors.items()}, dense

    return scaled


def plain(dtype: str, rows: int | None, columns: int | None, scale: str, scale_dtype: str) -> Matrix:
    """A byte a value; a scale a block, None being all; the scale of everything is [1]."""

    def matrix(rng, outputs, inputs):
        values = rng.integers(-127, 128, (outputs, inputs)) if dtype == "int8" else rng.normal(0, 99, (outputs, inputs))
        values = values.astype(jnp.dtype(dtype))
        blocks = (math.ceil(outputs / (rows or outputs)), math.ceil(inputs / (columns or inputs)))
        scales = rng.uniform(0.001, 0.01, blocks).astype(jnp.dtype(scale_dtype))
        each = scales.astype(np.float32).repeat(rows or outputs, 0).repeat(columns or inputs, 1)[:outputs, :inputs]
        stored = scales if (rows, columns) != (None, None) else scales[0]
        return {"weight": values, scale: stored}, values.astype(np.float32) * each

    return matrix


def compressed(form: str, weights: dict, inputs: dict | None = None, ignore=("lm_head",)) -> dict:
    weights = {"dynamic": False, "symmetric": True, "actorder": None, "observer": "minmax"} | weights
    inputs = inputs and {"num_bits": 8, "type": weights["type"], "symmetric": True} | inputs
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
DYNAMIC, STATIC = {"dynamic": True, "strategy": "token"}, {"dynamic": False, "strategy": "tensor"}
FP8 = {"num_bits": 8, "type": "float"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "GEMM"}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 8,
    "desc_act": False,
    "sym": False,
    "checkpoint_format": "gptq",
}
BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}

CHECKPOINTS: dict[str, tuple[dict, dict, Matrix]] = {
    "int4 that leaves a matrix as it is": (
        HF,
        compressed("pack-quantized", INT4, ignore=["lm_head", r"re:.*\.layers\.1\.mlp\.down_proj$"]),
        packed(True, 8, "bfloat16"),
    ),
    "int4 with zero points, output too": (
        FUSED,
        compressed("pack-quantized", INT4 | {"symmetric": False}, ignore=[]),
        packed(False, 8, "float32"),
    ),
    "int8 of eight-bit products": (
        HF,
        compressed("int-quantized", INT8, DYNAMIC),
        plain("int8", 1, None, "weight_scale", "bfloat16"),
    ),
    "int8 of eight-bit products, static": (
        HF,
        compressed("int-quantized", INT8, STATIC),
        with_input_scale(plain("int8", 1, None, "weight_scale", "bfloat16")),
    ),
    "fp8 with one scale": (
        FUSED,
        compressed("float-quantized", FP8 | {"strategy": "tensor"}),
        plain("float8_e4m3fn", None, None, "weight_scale", "float32"),
    ),
    "awq": (HF, AWQ | {"modules_to_not_convert": ["layers.1.mlp"]}, _awq),
    "gptq": (FUSED, GPTQ, gptq(8)),
    "gptq of one group": (
        HF,
        GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1},
        gptq(None, v1=False),
    ),
    "gptq of 8 bits": (FUSED, GPTQ | {"bits": 8}, gptq(8, bits=8)),
    "gptq of 8 bits and one group": (HF, GPTQ | {"bits": 8, "group_size": -1}, gptq(None, bits=8)),
    "gptq, symmetric": (FUSED, GPTQ | {"sym": True}, gptq(8, symmetric=True)),
    "gptq of 8 bits, symmetric": (HF, GPTQ | {"bits": 8, "sym": True}, gptq(8, bits=8, symmetric=True)),
    "gptq of 8 bits and one group, symmetric": (
        HF,
        GPTQ | {"bits": 8, "sym": True, "group_size": -1, "desc_act": True, "checkpoint_format": "gptq_v2"},
        gptq(None, v1=False, bits=8, symmetric=True),
    ),
    "gptq in act order": (HF, GPTQ | {"desc_act": True}, gptq(8, act_order="shared")),
    "gptq of 8 bits in act order": (FUSED, GPTQ | {"bits": 8, "desc_act": True}, gptq(8, bits=8, act_order="shared")),
    "int4 in act order": (
        HF,
        compressed("pack-quantized", INT4 | {"actorder": "group"}),
        packed(True, 8, "bfloat16", act_order=True),
    ),
    "int8, packed, with zero points": (
        FUSED,
        compressed("pack-quantized", INT4 | {"num_bits": 8, "symmetric": False}),
        packed(False, 8, "bfloat16", bits=8),
    ),
    "int8, packed, in act order": (
        FUSED,
        compressed("pack-quantized", INT4 | {"num_bits": 8, "actorder": "group"}),
        packed(True, 8, "float32", bits=8, act_order=True),
    ),
    "fp8 with one scale, flat": (
        FUSED,
        compressed("float-quantized", FP8 | {"strategy": "tensor"}),
        with_input_scale(plain("float8_e4m3fn", None, None, "weight_scale", "float32"), flat=True),
    ),
    "fp8 of AutoFP8": (
        HF,
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        with_input_scale(plain("float8_e4m3fn", None, None, "weight_scale", "float32"), flat=True),
    ),
    "fp8 of transformers": (
        HF,
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        with_input_scale(
            plain("float8_e4m3fn", None, None, "weight_scale_inv", "bfloat16"),
            flat=True,
            names={"input_scale": "activation_scale"},
        ),
    ),
    "fp8 of ModelOpt": (
        FUSED,
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        with_input_scale(plain("float8_e4m3fn", None, None, "weight_scale", "float32")),
    ),
    "fp8 in blocks": (HF, BLOCK_FP8, plain("float8_e4m3fn", 16, 8, "weight_scale_inv", "bfloat16")),
    "fp8 in blocks that are cut off": (
        FUSED | {"intermediate_size": 40},
        compressed("float-quantized", FP8 | {"strategy": "block", "block_structure": [16, 16]}),
        plain("float8_e4m3fn", 16, 16, "weight_scale", "float32"),
    ),
}
"""config.json, its quantization_config, and how matrices are stored."""

LEFT = {
    "int4 that leaves a matrix as it is": ("lm_head", "layers.1.mlp.down"),
    "int4 with zero points, output too": (),
    "awq": ("lm_head", "layers.1.mlp"),
}
"""What stays float, by parts of its name; else it is the output projection."""


def write_pair(directory: Path, name: str, **sizes: int) -> tuple[Path, Path]:
    """A quantized checkpoint, and one of the matrices that it stands for, in float32."""
    hf, quantization, matrix = CHECKPOINTS[name]
    hf = hf | sizes
    rng, tensors, dense = np.random.default_rng(1), {}, random_tensors(hf)
    for tensor, array in dense.items():
        left = (
            array.ndim == 1 or "embed_tokens" in tensor or any(part in tensor for part in LEFT.get(name, ("lm_head",)))
        )
        if left:
            tensors[tensor] = array
        else:
            parts, dense[tensor] = matrix(rng, *array.shape)
            tensors |= {tensor.removesuffix("weight") + part: stored for part, stored in parts.items()}
    paths = directory / "quantized", directory / "dense"
    for path, config, content in zip(
        paths, (hf | {"quantization_config": quantization}, hf), (tensors, dense), strict=True
    ):
        path.mkdir()
        save(path, config, content)
    return paths


def assert_stands_for(params: Params, dense: Params) -> None:
    """Every parameter is the matrix that it was packed from, exactly."""
    arrays = jax.tree.map(np.asarray, params)
    found = dequantized(arrays)
    assert jax.tree.structure(found) == jax.tree.structure(dense)
    jax.tree.map(np.testing.assert_array_equal, found, dense)


@jax.jit
def dequantized(params):
    def one(leaf):
        return rl.dequantize(leaf) if isinstance(leaf, QuantizedArray) else leaf

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
