"""Checkpoints of routed experts: both layouts, MXFP4, quantized experts, and what is left out."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import ridgeline as rl
from checkpoints import FIXTURES, assert_same
from families import write_checkpoint
from quantized_checkpoints import assert_stands_for, dequantized
from ridgeline.model.schemes import SCHEMES

# What each four bits of e2m1 stand for; OCP Microscaling Formats 1.0, table 4.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def rewrite(source, out, change):
    """The checkpoint with other tensors, and config.json with what `change` returns besides."""
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    hf = json.loads((source / "config.json").read_text())
    hf |= change(tensors) or {}
    out.mkdir()
    (out / "config.json").write_text(json.dumps(hf))
    safetensors.numpy.save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def fuse(tensors, module="mlp", names=("gate_proj", "up_proj", "down_proj")):
    """Put all experts of a layer in one tensor, as transformers 5 holds them."""
    experts = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for layer in sorted({name.split(f".{module}.")[0] for name in experts}):
        count = sum(name.startswith(f"{layer}.{module}.") and name.endswith(f"{names[0]}.weight") for name in experts)
        gate, up, down = (
            np.stack([experts[f"{layer}.{module}.experts.{e}.{name}.weight"] for e in range(count)]) for name in names
        )
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{layer}.mlp.experts.down_proj"] = down
        tensors[f"{layer}.mlp.gate.weight"] = tensors.pop(f"{layer}.{module}.gate.weight")


@pytest.mark.parametrize(
    ("family", "options"),
    [("mixtral", {"module": "block_sparse_moe", "names": ("w1", "w3", "w2")}), ("qwen2_moe", {}), ("glm4_moe", {})],
)
def test_experts_in_one_tensor_are_those_one_by_one(tmp_path, family, options):
    out = rewrite(FIXTURES / family, tmp_path / "fused", lambda tensors: fuse(tensors, **options))
    fused, apart = rl.load_model(out), rl.load_model(FIXTURES / family)
    assert_same(fused.params, apart.params)
    assert fused.config == apart.config


def in_blocks(experts):
    """[E, out, in] as blocks, scales and the numbers that they stand for."""
    rng = np.random.default_rng(experts.size)
    E, outputs, inputs = experts.shape
    blocks = rng.integers(0, 256, (E, outputs, inputs // 32, 16)).astype(np.uint8)
    scales = rng.integers(119, 124, (E, outputs, inputs // 32)).astype(np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(E, outputs, -1, 32)
    numbers = E2M1[codes] * 2.0 ** (scales.astype(np.float32)[..., None] - 127)
    return blocks, scales, numbers.reshape(E, outputs, inputs)


@pytest.fixture(scope="module")
def mxfp4_pair(tmp_path_factory):
    """A gpt-oss in MXFP4, and the same with the floats that it stands for."""
    root = tmp_path_factory.mktemp("mxfp4")
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    floats = write_checkpoint(root / "any", "gpt_oss", heads=4, kv_heads=2, **sizes)
    numbers = {}

    def quantized(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            blocks, scales, numbers[name] = in_blocks(tensors.pop(name).swapaxes(1, 2))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        return {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}

    def plain(tensors):
        for name, values in numbers.items():
            tensors[name] = np.ascontiguousarray(values.swapaxes(1, 2))

    mxfp4 = rewrite(floats, root / "mxfp4", quantized)
    return mxfp4, rewrite(floats, root / "floats", plain)


def test_mxfp4_is_read_as_it_is(mxfp4_pair):
    quantized, floats = (rl.load_model(directory) for directory in mxfp4_pair)
    assert quantized.config.quantization.layers == SCHEMES["mxfp4"]
    assert quantized.params["layers"][0]["down"].values.dtype == jnp.uint8
    assert_same(dequantized(quantized.params), floats.params)
    tokens = jnp.arange(20)[None]
    logits = [rl.forward(model.params, model.config, tokens) for model in (quantized, floats)]
    np.testing.assert_allclose(*logits, atol=2e-4)


def test_mxfp4_is_what_transformers_takes_it_for(mxfp4_pair):
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = safetensors.numpy.load_file(mxfp4_pair[0] / "model.safetensors")
    floats = safetensors.numpy.load_file(mxfp4_pair[1] / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    parts = (torch.tensor(tensors[f"{name}_{part}"]) for part in ("blocks", "scales"))
    theirs = mxfp4.convert_moe_packed_tensors(*parts, dtype=torch.float32)
    np.testing.assert_array_equal(theirs.numpy(), floats[name])


def test_mxfp4_is_saved_as_it_was_read(mxfp4_pair, tmp_path):
    model = rl.load_model(mxfp4_pair[0])
    view = rl.hf_view(model.params, model.config)
    assert_same(rl.from_hf_view(view, model.config), model.params)
    out = rl.save_model(model, tmp_path / "out")
    assert_same(rl.load_model(out).params, model.params)
    written, read = (safetensors.numpy.load_file(path / "model.safetensors") for path in (out, mxfp4_pair[0]))
    assert written.keys() == read.keys()
    experts = [name for name in read if "experts" in name]
    assert_same(*({name: tensors[name] for name in experts} for tensors in (written, read)))


def test_numbers_of_mxfp4_are_quantized_to_themselves():
    *_, numbers = in_blocks(np.zeros((2, 8, 64)))
    quantized = rl.quantize(jnp.asarray(numbers), SCHEMES["mxfp4"])
    np.testing.assert_array_equal(rl.dequantize(quantized), numbers)
    # Ties to even, saturation, and a block of zeros.
    block = np.zeros((2, 32), np.float32)
    block[0, :9] = [7.9, -6.5, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, -0.25]
    found = rl.dequantize(rl.quantize(jnp.asarray(block), SCHEMES["mxfp4"]))
    np.testing.assert_array_equal(found[0, :9], [6, -6, 4, 4, 2, 2, 1, 1, 0])
    np.testing.assert_array_equal(found[1], 0)


@pytest.mark.parametrize("scheme", ["fp8-block", "int4-32-zero"])
def test_quantized_experts_keep_their_numbers(tmp_path, scheme):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    source = write_checkpoint(tmp_path / "source", "qwen2_moe", heads=2, kv_heads=1, **sizes, intermediate_size=64)
    model = rl.load_model(source, quantize=scheme)
    assert model.params["layers"][0]["router"].dtype == jnp.float32
    assert model.params["layers"][0]["gate_up"].scheme == SCHEMES[scheme]
    loaded = rl.load_model(rl.save_model(model, tmp_path / "out"))
    assert_stands_for(loaded.params, dequantized(model.params))
    tokens = jnp.arange(20)[None]
    plain = dequantized(model.params), model.config.replace(quantization=None)
    np.testing.assert_allclose(rl.forward(loaded.params, loaded.config, tokens), rl.forward(*plain, tokens), atol=2e-3)


def test_layouts_that_cannot_hold_a_scheme_are_refused(tmp_path):
    model = rl.load_model(FIXTURES / "gpt_oss", quantize="int8")
    with pytest.raises(ValueError, match="layout of gpt-oss has experts in mxfp4 and nothing else"):
        rl.save_model(model, tmp_path / "out")
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    source = write_checkpoint(tmp_path / "source", "mixtral", heads=2, kv_heads=1, **sizes)
    with pytest.raises(ValueError, match="no mxfp4 but of gpt-oss"):
        rl.save_model(rl.load_model(source, quantize="mxfp4"), tmp_path / "out")


def test_the_layer_that_drafts_is_left_out_and_said(tmp_path):
    def add(tensors):
        tensors["model.layers.3.eh_proj.weight"] = np.ones((4, 4), np.float32)

    out = rewrite(FIXTURES / "glm4_moe", tmp_path / "out", add)
    with pytest.warns(UserWarning, match=r"the 1 tensors of model.layers.3, which drafts tokens, are not used"):
        loaded = rl.load_model(out)
    assert_same(loaded.params, rl.load_model(FIXTURES / "glm4_moe").params)


def test_the_bias_that_selects_stays_in_float32(tmp_path):
    model = rl.load_model(FIXTURES / "glm4_moe", dtype="bfloat16")
    bias = rl.load_model(FIXTURES / "glm4_moe").params["layers"][1]["selection_bias"]
    loaded = rl.load_model(rl.save_model(model, tmp_path / "out"))
    assert loaded.params["layers"][1]["router"].dtype == jnp.bfloat16
    assert_same(loaded.params["layers"][1]["selection_bias"], bias)


def test_a_conversion_keeps_experts(tmp_path):
    out = rl.model.loading.convert_model(FIXTURES / "gpt_oss", tmp_path / "out", quantize="int8")
    loaded, model = rl.load_model(out), rl.load_model(FIXTURES / "gpt_oss", quantize="int8")
    assert loaded.config == model.config
    assert_same(loaded.params, model.params)
