"""`save_model` and `hf_view`: what is written reads back as the same arrays, here and in transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import ridgeline as rl
from checkpoints import FIXTURES, LLAMA, assert_same, save
from families import write_checkpoint
from quantized_checkpoints import CHECKPOINTS, assert_stands_for, dequantized, write_pair
from ridgeline.model.generation import GenerationDefaults
from ridgeline.model.hf import config_from_hf
from ridgeline.model.schemes import SCHEMES, Quantization
from tiny import tiny_model

FAMILIES = sorted(path.name for path in FIXTURES.iterdir() if (path / "model.safetensors").exists())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_view_is_the_checkpoint_and_goes_back(family):
    model = rl.load_model(FIXTURES / family)
    view = rl.hf_view(model.params, model.config)
    stored = safetensors.numpy.load_file(FIXTURES / family / "model.safetensors")
    assert view.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(view[name], tensor.astype(view[name].dtype))
    assert_same(rl.from_hf_view(view, model.config), model.params)


@pytest.mark.parametrize("family", ["gemma3", "llama_bias", "phi3_longrope"])
def test_a_model_that_was_saved_loads_as_it_was(tmp_path, family):
    model = rl.load_model(FIXTURES / family)
    loaded = rl.load_model(rl.save_model(model, tmp_path / "out"))
    assert loaded.config == model.config
    assert_same(loaded.params, model.params)


@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "gemma3", "phi3", "olmo2", "mixtral", "glm4_moe", "gpt_oss"])
def test_transformers_loads_what_was_saved(tmp_path, family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = rl.load_model(FIXTURES / family)
    other = dataclasses.replace(model, params=rl.init_params(model.config, jax.random.key(1)))
    out = rl.save_model(other, tmp_path / "out", max_shard_bytes=50_000)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12))
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **eager)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(rl.forward(other.params, model.config, tokens), expected, atol=2e-5)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "fp8", "fp8-block", "int4", "int4-32-zero"])
def test_quantized_models_keep_their_numbers(tmp_path, scheme):
    sizes = {"head_dim": 32, "hidden_size": 256, "tie_word_embeddings": scheme in ("fp8", "fp8-block")}
    source = write_checkpoint(tmp_path / "source", "llama3", heads=4, kv_heads=2, **sizes)
    model = rl.load_model(source, quantize=scheme, quantize_output=None if sizes["tie_word_embeddings"] else scheme)
    loaded = rl.load_model(rl.save_model(model, tmp_path / "out", max_shard_bytes=100_000))
    if SCHEMES[scheme].rows == 1:
        assert_same(loaded.params, model.params)
        assert loaded.config == model.config
    assert_stands_for(loaded.params, dequantized(model.params))
    view = rl.hf_view(model.params, model.config)
    assert view["model.layers.1.self_attn.k_proj.weight"].shape == (64, 256)
    assert_same(rl.from_hf_view(view, model.config), model.params)


def test_files_are_cut_and_cast_and_the_rest_is_taken_over(tmp_path, bundled):
    out = rl.save_model(bundled, tmp_path / "out", max_shard_bytes=5_000_000, dtype="bfloat16")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) > 1
    assert all(file.stat().st_size < 5_100_000 for file in files)
    assert index["metadata"]["total_size"] == 2 * rl.count_parameters(bundled.config)
    loaded = rl.load_model(out)
    assert loaded.config == bundled.config.replace(dtype="bfloat16")
    assert_same(loaded.params, jax.tree.map(lambda array: array.astype("bfloat16"), bundled.params))
    assert (loaded.generation, loaded.tokenizer.encode("A king.")) == (
        bundled.generation,
        bundled.tokenizer.encode("A king."),
    )
    with pytest.raises(rl.CheckpointError, match="out exists already"):
        rl.save_model(bundled, out)


def test_a_save_that_fails_leaves_nothing(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"tiny has no config.json, .* give its contents as hf_config="):
        rl.save_model(model, tmp_path / "out")
    save(tmp_path)
    loaded = rl.load_model(tmp_path)
    fewer = dataclasses.replace(loaded, config=loaded.config.replace(layers=loaded.config.layers[:1]))
    with pytest.raises(ValueError, match=r"config.json and the model's configuration differ in layers; give"):
        rl.save_model(fewer, tmp_path / "out")
    large = dataclasses.replace(loaded, params=jax.tree.map(lambda array: array + 1e5, loaded.params))
    with pytest.raises(rl.CheckpointError, match=r"'model\.\S+' holds values beyond float16's 65504; save it as"):
        rl.save_model(large, tmp_path / "out", dtype="float16")
    tied = rl.load_model("bundled", quantize="int8", quantize_output="int8")
    with pytest.raises(ValueError, match="output projection is quantized beside the embedding that it is tied to"):
        rl.save_model(tied, tmp_path / "out")
    two = rl.load_model(tmp_path, quantize="int8", quantize_output="fp8")
    with pytest.raises(ValueError, match="layers are stored in int8 and the output projection otherwise, in float8"):
        rl.save_model(two, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_model_from_nowhere_is_saved_with_its_config_json(tmp_path):
    config = config_from_hf(LLAMA)
    params = rl.init_params(config, jax.random.key(0))
    model = rl.Model(config, params, None, GenerationDefaults(), tmp_path / "nowhere")
    assert_same(rl.load_model(rl.save_model(model, tmp_path / "out", hf_config=LLAMA)).params, params)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_come_quantized(tmp_path, name):
    model = rl.load_model(write_pair(tmp_path, name)[0])
    loaded = rl.load_model(rl.save_model(model, tmp_path / "out"))
    assert_stands_for(loaded.params, dequantized(model.params))
    if "blocks" not in name:  # which are written as those of the smallest matrix
        assert_same(loaded.params, model.params)


def test_edits_are_taken_back_and_checked(model):
    view, name = rl.hf_view(model.params, model.config), "model.layers.1.self_attn.v_proj.weight"
    edited = rl.from_hf_view(view | {name: 2 * view[name]}, model.config)
    expected = jax.tree.map(jnp.asarray, model.params)
    expected["layers"][1]["qkv"] = expected["layers"][1]["qkv"].at[:, -1].multiply(2)
    assert_same(edited, expected)
    tokens = jnp.arange(5)[None]
    slope = jax.grad(lambda v: rl.forward(rl.from_hf_view(view | {name: v}, model.config), model.config, tokens).var())
    whole = jax.grad(lambda params: rl.forward(params, model.config, tokens).var())(model.params)
    np.testing.assert_allclose(slope(view[name]), rl.hf_view(whole, model.config)[name], atol=1e-6)
    for change, message in (
        ({name: view[name][1:]}, r"v_proj.weight' has shape \(59, 48\) in the view, expected \(60, 48\)"),
        ({"lm_head.bias": view[name]}, "the view has besides lm_head.bias, by the configuration"),
    ):
        with pytest.raises(ValueError, match=message):
            rl.from_hf_view(view | change, model.config)
    with pytest.raises(ValueError, match=f"the view lacks {name}"):
        rl.from_hf_view({n: array for n, array in view.items() if n != name}, model.config)
    quantized = model.config.replace(quantization=Quantization(SCHEMES["int8"]))
    with pytest.raises(ValueError, match=r"is a float array, and the configuration stores it in int8; put"):
        rl.from_hf_view(view, quantized)
