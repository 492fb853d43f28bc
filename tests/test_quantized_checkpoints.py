"""Checkpoints that arrive quantized: every format is read as it is, and what is not read is said."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from checkpoints import assert_same, refused, save
from quantized_checkpoints import (
    AWQ,
    BLOCK_FP8,
    CHECKPOINTS,
    FP8,
    GPTQ,
    HF,
    INT4,
    INT8,
    assert_stands_for,
    compressed,
    gptq,
    write_pair,
)
from ridgeline.model.checkpoint import Checkpoint, read_parameter
from ridgeline.model.hf import config_from_hf, tensors_of
from ridgeline.model.layers import linear
from ridgeline.model.loading import convert_model, load_model
from ridgeline.model.params import float_specs, param_name
from ridgeline.model.schemes import Quantization, Scheme

SCHEMES = {
    "int4 that leaves a matrix as it is": Scheme("int4", group=8, scale_dtype="bfloat16"),
    "int4 with zero points, output too": Scheme("int4", group=8, zero_points=True),
    "int8 of eight-bit products": Scheme("int8", scale_dtype="bfloat16", dynamic=True),
    "int8 of eight-bit products, static": Scheme("int8", scale_dtype="bfloat16", static=True),
    "fp8 with one scale": Scheme("float8_e4m3fn"),
    "awq": Scheme("int4", group=8, zero_points=True, scale_dtype="float16"),
    "gptq": Scheme("int4", group=8, zero_points=True, scale_dtype="float16"),
    "gptq of one group": Scheme("int4", zero_points=True, scale_dtype="float16"),
    "gptq of 8 bits": Scheme("int8", group=8, zero_points=True, scale_dtype="float16"),
    "gptq of 8 bits and one group": Scheme("int8", zero_points=True, scale_dtype="float16"),
    "gptq, symmetric": Scheme("int4", group=8, scale_dtype="float16"),
    "gptq of 8 bits, symmetric": Scheme("int8", group=8, scale_dtype="float16"),
    "gptq of 8 bits and one group, symmetric": Scheme("int8", scale_dtype="float16"),
    "gptq in act order": Scheme("int4", group=8, zero_points=True, scale_dtype="float16", sorted_inputs=True),
    "gptq of 8 bits in act order": Scheme("int8", group=8, zero_points=True, scale_dtype="float16", sorted_inputs=True),
    "int4 in act order": Scheme("int4", group=8, scale_dtype="bfloat16", sorted_inputs=True),
    "int8, packed, with zero points": Scheme("int8", group=8, zero_points=True, scale_dtype="bfloat16"),
    "int8, packed, in act order": Scheme("int8", group=8, sorted_inputs=True),
    "fp8 with one scale, flat": Scheme("float8_e4m3fn"),
    "fp8 of AutoFP8": Scheme("float8_e4m3fn", static=True),
    "fp8 of transformers": Scheme("float8_e4m3fn", scale_dtype="bfloat16", static=True),
    "fp8 of ModelOpt": Scheme("float8_e4m3fn", static=True),
    "fp8 in blocks": Scheme("float8_e4m3fn", group=8, rows=16, scale_dtype="bfloat16"),
    "fp8 in blocks that are cut off": Scheme("float8_e4m3fn", group=16, rows=16),
}
SKIPPED = {
    "int4 that leaves a matrix as it is": ("layers.1.down",),
    "awq": ("layers.1.down", "layers.1.gate_up"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_the_matrices_that_are_stored(tmp_path, name):
    quantized, dense = map(load_model, write_pair(tmp_path, name))
    output = SCHEMES[name] if name == "int4 with zero points, output too" else None
    assert quantized.config.quantization == Quantization(SCHEMES[name], output, SKIPPED.get(name, ()))
    specs = rl.param_specs(quantized.config)
    assert jax.tree.structure(quantized.params) == jax.tree.structure(specs)
    for leaf, spec in zip(jax.tree.leaves(quantized.params), jax.tree.leaves(specs), strict=True):
        assert (leaf.shape, leaf.dtype.name) == (spec.shape, spec.dtype)

    assert_stands_for(quantized.params, dense.params)


@pytest.mark.parametrize(
    "name",
    [
        "awq",
        "int8 of eight-bit products",
        "gptq of 8 bits",
        "gptq of 8 bits and one group",
        "gptq in act order",
        "int8, packed, in act order",
    ],
)
@pytest.mark.parametrize("rows", [1, 12])
def test_logits_are_those_of_the_matrices(tmp_path, name, rows):
    tokens = jnp.arange(rows).reshape(-1, min(rows, 6))
    quantized, dense = (rl.forward(m.params, m.config, tokens) for m in map(load_model, write_pair(tmp_path, name)))
    np.testing.assert_allclose(quantized, dense, rtol=0, atol=1e-5 * float(jnp.abs(dense).max()))


@pytest.mark.parametrize(
    "name",
    [
        "int4 with zero points, output too",
        "awq",
        "gptq",
        "gptq of 8 bits",
        "gptq of 8 bits in act order",
        "int4 in act order",
        "int8, packed, in act order",
        "fp8 in blocks",
        "fp8 of AutoFP8",
    ],
)
def test_any_slice_of_any_part(tmp_path, name):
    directory, _ = write_pair(tmp_path, name)
    model, checkpoint, rng = load_model(directory), Checkpoint(directory), np.random.default_rng(2)
    tensors = tensors_of(model.config, json.loads((directory / "config.json").read_text()))
    specs = jax.tree_util.tree_leaves_with_path(rl.param_specs(model.config)["layers"][0])
    for (path, spec), full in zip(specs, jax.tree.leaves(model.params["layers"][0]), strict=True):
        for _ in range(6):
            index = tuple(slice(*sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in spec.shape)
            part = read_parameter(checkpoint, spec, tensors[f"layers.0.{param_name(path)}"], index)
            np.testing.assert_array_equal(part, np.asarray(full)[index])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("int8 of eight-bit products, static", ["input_scale"] * 3),
        ("fp8 of AutoFP8", ["input_scale"] * 3),
        ("fp8 of transformers", ["activation_scale"] * 3),
        ("fp8 of ModelOpt", ["input_scale"]),
    ],
)
def test_static_scales_round_the_inputs_of_many_rows(tmp_path, name, parts):
    """By the largest scale of the matrices that are one here; what lies beyond the dtype's range becomes its end."""
    directory, _ = write_pair(tmp_path, name)
    checkpoint, model = Checkpoint(directory), load_model(directory)
    modules = [f"model.layers.1.self_attn.{module}_proj" for module in (["qkv"] if len(parts) == 1 else "qkv")]
    stored = [checkpoint.read(f"{module}.{part}") for module, part in zip(modules, parts, strict=True)]
    scale = max(float(one.reshape(())) for one in stored)
    weight, spec = model.params["layers"][1]["qkv"], float_specs(model.config)["layers"][1]["qkv"]
    assert weight.input_scale == scale

    dtype, dense = weight.scheme.dtype, np.asarray(rl.dequantize(weight), np.float64)
    largest = {"int8": 127, "float8_e4m3fn": 448}[dtype]
    x = np.random.default_rng(3).normal(0, 1, (65, 32)).astype("float32")
    x[:, 7], x[5, 8] = 0.0, 2 * largest * scale
    numbers = np.clip(x / np.float32(scale), -largest, largest)
    rounded = (np.rint(numbers) if dtype == "int8" else numbers.astype(jnp.float8_e4m3fn)).astype(np.float64) * scale
    for rows, inputs in ((65, rounded), (64, x)):
        expected = np.einsum("mi,kghi->mkgh", inputs[:rows], dense)
        y = linear(jnp.asarray(x[:rows]), weight, spec)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_static_scales_that_are_not_there(tmp_path):
    directory, _ = write_pair(tmp_path, "fp8 of AutoFP8")
    checkpoint = Checkpoint(directory)
    gone = "model.layers.0.self_attn.k_proj.input_scale"
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors if name != gone}
    save(directory, json.loads((directory / "config.json").read_text()), tensors)
    refused(directory, rf"lacks 1 of the \d+ tensors .*: {gone}")


def test_conversions_hold_static_scales(tmp_path):
    directory, _ = write_pair(tmp_path, "fp8 of AutoFP8")
    again, model = load_model(convert_model(directory, tmp_path / "out")), load_model(directory)
    assert again.config == model.config
    assert_same(again.params, model.params)


def test_conversions_hold_what_was_read(tmp_path):
    """An output projection that came as it was may be quantized besides."""
    directory, _ = write_pair(tmp_path, "awq")
    model = load_model(directory, quantize_output="int8")
    assert model.config.quantization.output == rl.SCHEMES["int8"]
    assert_same(model.params["layers"], load_model(directory).params["layers"])
    again = load_model(convert_model(directory, tmp_path / "out", quantize_output="int8"))
    assert again.config == model.config
    assert_same(again.params, model.params)


def test_nothing_is_quantized_twice(tmp_path):
    directory, _ = write_pair(tmp_path, "gptq")
    for load in (load_model, lambda path, **asked: convert_model(path, tmp_path / "out", **asked)):
        with pytest.raises(rl.CheckpointError, match=r"quantized is quantized already, to int4; load it without quant"):
            load(directory, quantize="int8")


# --- errors: config.json ---


def mixed() -> dict:
    stated = compressed("pack-quantized", INT4)
    stated["config_groups"]["group_1"] = compressed("float-quantized", FP8 | {"strategy": "channel"})["config_groups"][
        "group_0"
    ] | {"format": "float-quantized"}
    return stated


@pytest.mark.parametrize(
    ("stated", "pattern"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "quant_method is 'bitsandbytes', which is not supported; supported: compressed-tensors, "
            "awq, gptq, fp8, modelopt, mxfp4; load the checkpoint that it was quantized from, with quantize=",
        ),
        ("awq", "quantization_config is 'awq', expected an object"),
        (GPTQ | {"bits": 3}, r"config\.json: quantization_config\.bits is 3, which is not supported: 4 or 8 is; load"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format .* 'marlin', .*: 'gptq' or 'gptq_v2' is"),
        (GPTQ | {"group_size": None}, r"has no 'quantization_config\.group_size', expected a whole number from -1"),
        (GPTQ | {"dynamic": {"-:.*down.*": {}}}, "dynamic .* not supported"),
        (
            GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]},
            r"leaves model\.layers\.0\.self_attn\.k_proj, model\.layers\.0\.self_attn\.v_proj as they are and "
            r"quantizes the rest of .*, which are one parameter here \('layers\.0\.qkv'\): load",
        ),
        (AWQ | {"version": "gemv"}, "version .* 'gemv', .*: 'gemm' is"),
        (AWQ | {"zero_point": False}, "zero_point .* False"),
        (AWQ | {"backend": "llm-awq"}, "backend .* 'llm-awq'"),
        (BLOCK_FP8 | {"weight_block_size": [128]}, r"weight_block_size is \[128\], expected a list of 2 times a whole"),
        (BLOCK_FP8 | {"activation_scheme": "token"}, "activation_scheme .* 'token', .*: 'dynamic' or 'static' is"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo .* 'NVFP4', .*: 'FP8' is"),
        ({"group_size": 64, "bits": 4}, "quant_method is 'mlx', which is not supported"),
        (
            {"bits": 3, "sym": True, "file": "quantize_config.json"},
            r"^quantize_config\.json beside config\.json: bits is 3, .*: 4 or 8 is",
        ),
        (compressed("nvfp4-pack-quantized", INT4), "format .* 'nvfp4-pack-quantized', .* 'pack-quantized' or"),
        (compressed("pack-quantized", INT4 | {"num_bits": 2}), "num_bits .* 2, .*: 4 or 8 is"),
        (compressed("pack-quantized", INT4 | {"actorder": "other"}), "actorder .* 'other'"),
        (compressed("int-quantized", INT8 | {"symmetric": False}), "symmetric .* False"),
        (compressed("int-quantized", INT8 | {"strategy": "group"}), "strategy .* 'group', .*: 'channel' or 'tensor'"),
        (mixed(), "config_groups group_0, group_1 .* differ, and one scheme for all layers is supported: load"),
        (
            compressed("pack-quantized", INT4) | {"config_groups": {}},
            "config_groups is {}, expected an object",
        ),
    ],
)
def test_what_is_not_read_is_refused(stated, pattern):
    with pytest.raises(ValueError, match=pattern):
        config_from_hf(HF | {"quantization_config": stated})


# --- errors: the tensors ---

DOWN = "model.layers.1.mlp.down_proj."


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            {"g_idx": np.arange(64, dtype=np.int32)[::-1] // 8},
            rf"by tensor '{DOWN}g_idx', its inputs were regrouped by activation, and desc_act .* says that they were",
        ),
        ({"qzeros": None}, rf"lacks 1 of the \d+ tensors .*: {DOWN}qzeros"),
        ({"qweight": np.zeros((8, 16), np.int32)}, rf"'{DOWN}qweight' has shape \[8, 16\], expected \[8, 32\]"),
        ({"scales": np.zeros((8, 32), np.float32)}, rf"'{DOWN}scales' has dtype F32, expected one of F16; config"),
        ({"bias": np.ones(32, np.float16)}, rf"1 tensors that nothing in config\.json calls for .*: {DOWN}bias"),
        ({"weight": np.ones((32, 64), np.float16)}, rf"1 tensors that nothing in config\.json calls .*: {DOWN}weight"),
    ],
)
def test_tensors_that_do_not_go_with_config_json(tmp_path, change, pattern):
    directory, _ = write_pair(tmp_path, "gptq")
    checkpoint = Checkpoint(directory)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    tensors |= {DOWN + name: tensor for name, tensor in change.items()}
    hf = json.loads((directory / "config.json").read_text())
    save(tmp_path, hf, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    refused(tmp_path, pattern)


def test_zero_points_that_are_not_symmetric(tmp_path):
    directory, _ = write_pair(tmp_path, "gptq of 8 bits")
    hf = json.loads((directory / "config.json").read_text())
    hf["quantization_config"]["sym"] = True
    (directory / "config.json").write_text(json.dumps(hf))
    refused(
        directory, r"qzeros', its zero points are not symmetric, and sym in config\.json says that they are; set it"
    )


def test_weights_that_no_file_calls_quantized(tmp_path):
    directory, _ = write_pair(tmp_path, "fp8 in blocks")
    (directory / "config.json").write_text(json.dumps(HF))
    refused(
        directory,
        r"o_proj\.weight' has dtype F8_E4M3, expected one of F32, BF16, F16; weights are quantized, and config\.json "
        r"has no quantization_config that says how, nor is there quantize_config\.json or quant_config\.json or hf",
    )


# --- settings in older files and keys ---


@pytest.mark.parametrize(
    ("name", "file", "settings"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 8, "desc_act": False, "sym": False, "damp": 0.1}),
        ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 8, "w_bit": 4, "version": "GEMM"}),
        ("awq", "quantize_config.json", {"zero_point": True, "q_group_size": 8, "w_bit": 4}),
        (
            "fp8 of ModelOpt",
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        ),
    ],
)
def test_settings_in_older_files(tmp_path, name, file, settings):
    directory, dense = write_pair(tmp_path, name)
    if name == "awq":
        settings |= {"modules_to_not_convert": ["layers.1.mlp"]}
    (directory / "config.json").write_text(json.dumps(CHECKPOINTS[name][0]))
    (directory / file).write_text(json.dumps(settings))
    assert_stands_for(load_model(directory).params, load_model(dense).params)
    again = load_model(convert_model(directory, tmp_path / "out"))
    assert_stands_for(again.params, load_model(dense).params)


def test_the_oldest_key_of_compressed_tensors(tmp_path):
    directory, dense = write_pair(tmp_path, "int8 of eight-bit products")
    hf = json.loads((directory / "config.json").read_text())
    hf["compression_config"] = {k: v for k, v in hf.pop("quantization_config").items() if k != "quant_method"}
    (directory / "config.json").write_text(json.dumps(hf))
    assert_stands_for(load_model(directory).params, load_model(dense).params)


# --- what is not used, and what is kept otherwise ---


def test_scales_of_activations_and_caches_are_said(tmp_path):
    """Those of caches, of outputs, and of activations that have one for each channel."""
    inputs = {"dynamic": False, "strategy": "channel"}
    quantization = compressed("float-quantized", FP8 | {"strategy": "tensor"}, inputs)
    quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    directory, dense = write_pair(tmp_path, "fp8 with one scale, flat")
    hf = json.loads((directory / "config.json").read_text()) | {"quantization_config": quantization}
    checkpoint = Checkpoint(directory)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for name in ("self_attn.k_scale", "self_attn.v_scale", "self_attn.k_proj.output_scale"):
        tensors[f"model.layers.0.{name}"] = np.ones(1, "float32")
    save(directory, hf, tensors)
    said = r"\d+ scales of activations or of the KV cache are not used \(input_scale, k_scale, output_scale, v_scale\)"
    with pytest.warns(UserWarning, match=said):
        model = load_model(directory)
    assert model.config.quantization.layers == Scheme("float8_e4m3fn")
    assert_stands_for(model.params, load_model(dense).params)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_matrices_that_are_sorted_in_different_orders(tmp_path, monkeypatch, bits, symmetric):
    """They are one parameter here, which has one order: kept as floats, the others as they are."""
    settings, matrix = GPTQ | {"bits": bits, "desc_act": True, "sym": symmetric}, gptq(8, True, bits, "own", symmetric)
    monkeypatch.setitem(CHECKPOINTS, "own orders", (HF, settings, matrix))
    directory, dense = write_pair(tmp_path, "own orders")
    with pytest.warns(UserWarning, match=r"layers\.0\.gate_up, .* are kept in float32, not in 4 or 8 bits: .*desc_act"):
        model = load_model(directory)
    assert set(model.config.quantization.skip) == {f"layers.{n}.{name}" for n in (0, 1) for name in ("qkv", "gate_up")}
    assert_stands_for(model.params, load_model(dense).params)


def test_names_of_multimodal_checkpoints_in_the_settings(tmp_path):
    """Modules to be left are named as the whole model names them."""
    ignore = ["lm_head", "model.language_model.layers.1.mlp.down_proj", "re:vision_tower.*"]
    hf = HF | {"quantization_config": compressed("pack-quantized", INT4, ignore=ignore)}
    assert config_from_hf(hf).quantization.skip == ("layers.1.down",)
    awq = AWQ | {"modules_to_not_convert": ["language_model.model.layers.0.self_attn"]}
    assert config_from_hf(HF | {"quantization_config": awq}).quantization.skip == ("layers.0.out", "layers.0.qkv")
