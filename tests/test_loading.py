"""Loading: what `load_model` returns, how it reads slices, and every error it can meet."""

import itertools
import json
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ridgeline as rl
from ridgeline.model.checkpoint import Checkpoint, CheckpointError, read_parameter
from ridgeline.model.hf import config_from_hf, family_of
from ridgeline.model.hf.family import Piece
from ridgeline.model.loading import BUNDLED, GenerationDefaults, generation_defaults, load_model
from ridgeline.model.params import ParamSpec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "float64": "F64", "uint8": "U8"}
FIXTURES = Path(__file__).parent / "fixtures" / "parity"
EMBEDDING, DOWN = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"


def random_tensors(hf: dict, dtype="float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor that the configuration calls for; small multiples of 1/8, which all three dtypes hold exactly."""
    config, rng = config_from_hf(hf), np.random.default_rng(seed)
    shapes = {p.tensor: p.shape for pieces in family_of(config).tensors(config).values() for p in pieces}
    return {name: (rng.integers(-40, 40, shape) / 8).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def write(file: Path, tensors: dict[str, np.ndarray], edit=None, cut: int = 0, tail: bytes = b"") -> None:
    """A safetensors file, by the format's text; `edit` changes the header before it is written."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    if edit is not None:
        edit(header)
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + b"".join(t.tobytes() for t in tensors.values()) + tail
    file.write_bytes(data[: len(data) - cut])


def save(directory: Path, hf: dict = LLAMA, tensors: dict | None = None, **options) -> dict[str, np.ndarray]:
    tensors = random_tensors(hf) if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(hf))
    write(directory / "model.safetensors", tensors, **options)
    return tensors


def save_shards(directory: Path, hf: dict = LLAMA, tensors: dict | None = None, shards: int = 3) -> dict:
    """Sharded, one tensor after the other in turn; returns the index."""
    tensors = random_tensors(hf) if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(hf))
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        write(directory / file, dict(list(tensors.items())[i::shards]))
    index = {"metadata": {}, "weight_map": dict(zip(tensors, itertools.cycle(files)))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def refused(directory: Path | str, *patterns: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    message = str(caught.value)
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"
    assert "\n" not in message
    return message


# --- what is loaded ---


def test_parameters_lie_where_the_forward_pass_reads_them(tmp_path):
    """Written out head by head, so that it shares no index arithmetic with the reader."""
    t = save(tmp_path)
    params = load_model(tmp_path).params
    H, G = 4, 2
    for i, layer in enumerate(params["layers"]):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for head in range(6):
            rows = slice(head * H, head * H + H)
            k, g = divmod(head, G)
            np.testing.assert_array_equal(layer["qkv"][k, g], t[attn + "q_proj.weight"][rows])
            np.testing.assert_array_equal(layer["qkv_bias"][k, g], t[attn + "q_proj.bias"][rows])
            np.testing.assert_array_equal(layer["out"][:, k, g], t[attn + "o_proj.weight"][:, rows])
        for k in range(3):
            rows = slice(k * H, k * H + H)
            for offset, name in ((0, "k"), (1, "v")):
                np.testing.assert_array_equal(layer["qkv"][k, G + offset], t[f"{attn}{name}_proj.weight"][rows])
                np.testing.assert_array_equal(layer["qkv_bias"][k, G + offset], t[f"{attn}{name}_proj.bias"][rows])
        np.testing.assert_array_equal(layer["gate_up"][0], t[mlp + "gate_proj.weight"])
        np.testing.assert_array_equal(layer["gate_up"][1], t[mlp + "up_proj.weight"])
        np.testing.assert_array_equal(layer["down"], t[mlp + "down_proj.weight"])
        np.testing.assert_array_equal(layer["out_bias"], t[attn + "o_proj.bias"])
        np.testing.assert_array_equal(layer["attn_norm"], t[f"model.layers.{i}.input_layernorm.weight"])
    np.testing.assert_array_equal(params["embedding"], t[EMBEDDING])
    np.testing.assert_array_equal(params["unembedding"], t["lm_head.weight"])
    np.testing.assert_array_equal(params["final_norm"], t["model.norm.weight"])


def test_loaded_tree_is_that_of_param_specs(tmp_path):
    save(tmp_path)
    model = load_model(str(tmp_path))
    specs = rl.param_specs(model.config)
    assert jax.tree.structure(model.params) == jax.tree.structure(specs)
    for array, spec in zip(jax.tree.leaves(model.params), jax.tree.leaves(specs), strict=True):
        assert (array.shape, array.dtype.name) == (spec.shape, spec.dtype)
        assert isinstance(array, jax.Array)
    assert model.config == config_from_hf(LLAMA)
    assert (model.directory, model.name, model.tokenizer) == (tmp_path, tmp_path.name, None)
    tokens = jnp.arange(5)[None]
    assert bool(jnp.isfinite(rl.forward(model.params, model.config, tokens)).all())


def test_fused_tensors_are_taken_apart(tmp_path):
    t = save(tmp_path, PHI3)
    layer = load_model(tmp_path).params["layers"][1]
    fused, gate_up = t["model.layers.1.self_attn.qkv_proj.weight"], t["model.layers.1.mlp.gate_up_proj.weight"]
    for head in range(6):
        np.testing.assert_array_equal(layer["qkv"][head // 2, head % 2], fused[head * 4 : head * 4 + 4])
    for k in range(3):
        np.testing.assert_array_equal(layer["qkv"][k, 2], fused[24 + k * 4 : 28 + k * 4])
        np.testing.assert_array_equal(layer["qkv"][k, 3], fused[36 + k * 4 : 40 + k * 4])
    np.testing.assert_array_equal(layer["gate_up"][0], gate_up[:20])
    np.testing.assert_array_equal(layer["gate_up"][1], gate_up[20:])


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", [None, "float32", jnp.bfloat16, np.float16])
def test_dtypes(tmp_path, stored, asked):
    t = save(tmp_path, LLAMA | {"torch_dtype": stored}, random_tensors(LLAMA, stored))
    model = load_model(tmp_path, dtype=asked)
    expected = jnp.dtype(asked or stored).name
    assert model.config.dtype == expected
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {expected}
    np.testing.assert_array_equal(model.params["layers"][1]["down"].astype("float32"), t[DOWN].astype("float32"))


def test_without_a_stated_dtype_it_is_that_of_the_tensors(tmp_path):
    hf = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    save(tmp_path, hf, random_tensors(LLAMA, "bfloat16"))
    assert load_model(tmp_path).config.dtype == "bfloat16"


def test_float32_is_rounded_to_nearest(tmp_path):
    t = random_tensors(LLAMA)
    t[DOWN] = np.random.default_rng(1).normal(size=t[DOWN].shape).astype("float32")
    save(tmp_path, tensors=t)
    np.testing.assert_array_equal(
        load_model(tmp_path, dtype="bfloat16").params["layers"][1]["down"], jnp.asarray(t[DOWN]).astype("bfloat16")
    )


def test_shards_load_as_one_file_does(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    save(tmp_path / "one")
    save_shards(tmp_path / "many")
    assert_same(load_model(tmp_path / "one").params, load_model(tmp_path / "many").params)


def test_parameters_outlive_the_file(tmp_path):
    """They must not alias the mapped file, whose bytes may change under them."""
    t = save(tmp_path)
    params = load_model(tmp_path).params
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as f:
        f.write(b"\0" * file.stat().st_size)
    np.testing.assert_array_equal(params["embedding"], t[EMBEDDING])
    np.testing.assert_array_equal(params["final_norm"], t["model.norm.weight"])


def test_reading_a_tensor_copies_nothing(tmp_path):
    t = save(tmp_path)
    view = Checkpoint(tmp_path).read(EMBEDDING)
    assert not view.flags.writeable
    assert not view.flags.owndata
    np.testing.assert_array_equal(view, t[EMBEDDING])


def test_buffers_that_the_config_determines_are_ignored(tmp_path):
    t = random_tensors(LLAMA)
    t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, "float32")
    save(tmp_path, tensors=t)
    assert load_model(tmp_path).config.num_layers == 2


def test_tied_unembedding_may_be_stored_too(tmp_path):
    tied = LLAMA | {"tie_word_embeddings": True}
    t = random_tensors(tied)
    t["lm_head.weight"] = t[EMBEDDING].copy()
    save(tmp_path, tied, t)
    assert "unembedding" not in load_model(tmp_path).params
    t["lm_head.weight"][3, 4] += 1
    save(tmp_path, tied, t)
    refused(tmp_path, r"model\.safetensors: .*'lm_head\.weight' differs from '.*embed_tokens.*set tie_word_embeddings")


# --- the seam: any slice of a parameter ---


@pytest.mark.parametrize("hf", [LLAMA, PHI3], ids=["separate", "fused"])
def test_any_slice_of_any_parameter(tmp_path, hf):
    save(tmp_path, hf, random_tensors(hf, "bfloat16"))
    model, checkpoint, rng = load_model(tmp_path), Checkpoint(tmp_path), np.random.default_rng(2)
    tensors = family_of(model.config).tensors(model.config)
    specs = jax.tree_util.tree_leaves_with_path(rl.param_specs(model.config))
    for (path, spec), full in zip(specs, jax.tree.leaves(model.params), strict=True):
        pieces = tensors[jax.tree_util.keystr(path, simple=True, separator=".")]
        for _ in range(8):
            bounds = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in spec.shape]
            index = tuple(slice(*b) for b in bounds)
            part = read_parameter(checkpoint, spec, pieces, index)
            np.testing.assert_array_equal(part, full[index])
            assert part.dtype.name == spec.dtype


def test_slices_serve_make_array_from_callback(tmp_path):
    """As multi-device placement will call it: each device's shard of qkv, by KV head, straight from the file."""
    save(tmp_path, PHI3)
    model, checkpoint = load_model(tmp_path), Checkpoint(tmp_path)
    spec = rl.param_specs(model.config)["layers"][0]["qkv"]
    pieces = family_of(model.config).tensors(model.config)["layers.0.qkv"]
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
    array = jax.make_array_from_callback(spec.shape, sharding, lambda i: read_parameter(checkpoint, spec, pieces, i))
    np.testing.assert_array_equal(array, model.params["layers"][0]["qkv"])


def test_a_slice_reads_only_its_own_pieces(tmp_path):
    """Value rows are not asked for, so a value tensor that cannot be read goes unseen."""
    save(tmp_path)
    checkpoint, config = Checkpoint(tmp_path), config_from_hf(LLAMA)
    spec, pieces = rl.param_specs(config)["layers"][0]["qkv"], family_of(config).tensors(config)["layers.0.qkv"]
    del checkpoint.tensors["model.layers.0.self_attn.v_proj.weight"]
    part = read_parameter(checkpoint, spec, pieces, (slice(1, 2), slice(0, 3), slice(None), slice(None)))
    assert part.shape == (1, 3, 4, 24)
    with pytest.raises(KeyError):
        read_parameter(checkpoint, spec, pieces, (slice(None),) * 4)


def test_incomplete_pieces_and_steps_are_refused(tmp_path):
    save(tmp_path)
    spec, piece = ParamSpec((30, 24), "float32", ("vocab", "embed")), Piece(EMBEDDING, (29, 24), (slice(0, 29),))
    with pytest.raises(ValueError, match=r"cover 696 of the 720 elements .* tensor map is wrong"):
        read_parameter(Checkpoint(tmp_path), spec, (piece,), (slice(None), slice(None)))
    with pytest.raises(ValueError, match="step of 2"):
        read_parameter(Checkpoint(tmp_path), spec, (piece,), (slice(0, 20, 2), slice(None)))


# --- generation defaults ---


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (None, GenerationDefaults((2,), 1)),
        ({"eos_token_id": [5, 7], "pad_token_id": 3}, GenerationDefaults((5, 7), 1, 3)),
        ({"eos_token_id": 9, "bos_token_id": 8}, GenerationDefaults((9,), 8)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0, "repetition_penalty": 1.1},
            GenerationDefaults((2,), 1, None, 0.6, 0.9, 20, 0.0, 1.1),
        ),
        ({"do_sample": False, "temperature": 0.6, "top_k": None}, GenerationDefaults((2,), 1, temperature=0.0)),
    ],
)
def test_generation_defaults(tmp_path, stated, expected):
    save(tmp_path)
    if stated is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert load_model(tmp_path).generation == expected == generation_defaults(tmp_path)


@pytest.mark.parametrize(
    ("stated", "pattern"),
    [
        ({"eos_token_id": "</s>"}, r"generation_config\.json: eos_token_id is '</s>', expected a token id or a list"),
        ({"eos_token_id": [1, True]}, r"eos_token_id is \[1, True\]"),
        ({"top_p": 1.5}, r"generation_config\.json: top_p is 1\.5, expected a number from 0 to 1"),
        ({"temperature": -1}, r"temperature is -1, expected a number from 0 to inf"),
        ({"top_k": 2.5}, r"top_k is 2\.5, expected an integer"),
        ([], r"generation_config\.json holds a JSON list, expected an object"),
    ],
)
def test_bad_generation_defaults(tmp_path, stated, pattern):
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    refused(tmp_path, pattern)


# --- errors: the directory ---


def test_no_such_directory(tmp_path):
    refused(tmp_path / "absent", r"no such directory: .*absent; give a directory .* bundled, bundled-draft")
    save(tmp_path)
    refused(tmp_path / "model.safetensors", r"model\.safetensors is a file; give the directory")


def test_hub_name_says_how_to_download():
    refused("meta-llama/Llama-3.2-1B", r"meta-llama/Llama-3.2-1B is no directory", r"hf download meta-llama/Llama-3.2")


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8' is not supported; supported: float32, bfloat16, float16"):
        load_model(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="dtype 'bf16' is not supported"):
        load_model(tmp_path, dtype="bf16")


def test_bad_config(tmp_path):
    refused(tmp_path, r"has no config\.json; give the directory")
    save(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    refused(tmp_path, r"config\.json is not JSON \(.*line 1 column 16.*fetch it again")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, r"config\.json is not JSON")
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, r"config\.json holds a JSON list, expected an object")
    (tmp_path / "config.json").write_text('{"vocab_size": 3, "vocab_size": 4}')
    refused(tmp_path, r"config\.json names 'vocab_size' twice")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["BertModel"]}))
    refused(tmp_path, r"config\.json: .*BertModel.* supported: LlamaForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != "hidden_size"}))
    refused(tmp_path, r"config\.json: .*hidden_size")


def test_no_weights(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    refused(tmp_path, r"neither model\.safetensors nor .*only weights\.safetensors; rename")
    (tmp_path / "weights.safetensors").unlink()
    refused(tmp_path, r"has no weights: .* only config\.json; fetch")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unopened(tmp_path, name):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(tmp_path, re.escape(name), "runs whatever code it holds", "safe_serialization=True")


# --- errors: the index ---


def test_absent_shard(tmp_path):
    save_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, r"index\.json names shards that are not there: model-00002-of-00003\.safetensors; fetch")


def test_tensor_that_its_shard_lacks(tmp_path):
    index = save_shards(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    shard = index["weight_map"]["model.norm.weight"]
    other = next(name for name in index["weight_map"].values() if name != shard)
    index["weight_map"]["model.norm.weight"] = other
    file.write_text(json.dumps(index))
    refused(tmp_path, rf"index\.json says that tensor 'model\.norm\.weight' is in {other}, which lacks it")
    index["weight_map"] |= {"model.norm.weight": shard, "ghost": shard}
    file.write_text(json.dumps(index))
    refused(tmp_path, rf"says that tensor 'ghost' is in {shard}, which lacks it")


def test_tensor_in_two_shards(tmp_path):
    t = random_tensors(LLAMA)
    index = save_shards(tmp_path, tensors=t)
    shard = next(name for name in sorted(index["weight_map"].values()) if name != index["weight_map"][EMBEDDING])
    kept = {name: t[name] for name, file in index["weight_map"].items() if file == shard}
    write(tmp_path / shard, kept | {EMBEDDING: t[EMBEDDING]})
    refused(tmp_path, rf"'{EMBEDDING}' is in both .*00001.* and .*{shard}; .*remove it")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_index_without_a_weight_map(tmp_path, text):
    save_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, r'index\.json has no "weight_map" from tensor names to shard files')


def test_index_that_leaves_the_directory(tmp_path):
    index = save_shards(tmp_path)
    index["weight_map"]["x"] = "../other/model.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, r"names the shard '\.\./other/model\.safetensors'; a shard must lie")


# --- errors: tensors against the configuration ---


def test_missing_tensors(tmp_path):
    t = random_tensors(LLAMA)
    save(tmp_path, tensors={name: v for name, v in t.items() if name != DOWN})
    refused(tmp_path, rf"model\.safetensors lacks 1 of the 29 tensors .*\(2 layers of family 'llama'\): {DOWN}; ")
    save(tmp_path, tensors={name: v for name, v in t.items() if ".layers.1." not in name})
    refused(tmp_path, r"lacks 13 of the 29 tensors", r"and 8 more; the checkpoint is incomplete or config\.json")
    save(tmp_path, tensors={"transformer." + name: v for name, v in t.items()})
    refused(tmp_path, r"it holds transformer\.model\.embed_tokens\.weight, .* instead")
    save(tmp_path, tensors={name: v for name, v in t.items() if name != "lm_head.weight"})
    refused(tmp_path, r"lacks 1 of .*: lm_head\.weight; .*if embeddings are tied, set tie_word_embeddings to true")


def test_missing_tensors_of_shards_name_the_directory(tmp_path):
    t = random_tensors(LLAMA)
    save_shards(tmp_path, tensors={name: v for name, v in t.items() if name != DOWN})
    assert refused(tmp_path).startswith(f"{tmp_path} lacks 1 of")


def test_extra_tensors(tmp_path):
    t = random_tensors(LLAMA)
    save(tmp_path, LLAMA | {"attention_bias": False}, t)
    refused(
        tmp_path,
        r"model\.safetensors: 8 tensors that nothing .*\.0\.self_attn\.q_proj\.bias, .* 3 more; .* bias settings",
    )


def test_config_with_fewer_layers(tmp_path):
    save(tmp_path, LLAMA | {"num_hidden_layers": 1}, random_tensors(LLAMA))
    refused(tmp_path, r"\(1 layers of family 'llama'\): model\.layers\.1\..* and 8 more; check num_hidden_layers")


def test_misshapen_tensor(tmp_path):
    t = random_tensors(LLAMA)
    save(tmp_path, tensors=t | {DOWN: np.ascontiguousarray(t[DOWN].T)})
    refused(tmp_path, rf"model\.safetensors: tensor '{DOWN}' has shape \[20, 24\], expected \[24, 20\] by config\.json")


def test_config_with_another_vocabulary(tmp_path):
    save(tmp_path, LLAMA | {"vocab_size": 31}, random_tensors(LLAMA))
    refused(tmp_path, rf"'{EMBEDDING}' has shape \[29, 24\], expected \[31, 24\] by config\.json \(vocab_size 31, ")


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        ("int8", r"has dtype I8, expected one of F32, BF16, F16; quantised checkpoints are not read"),
        ("float64", r"has dtype F64, expected one of F32, BF16, F16; save the model again in float32"),
    ],
)
def test_unsupported_dtype(tmp_path, dtype, pattern):
    t = random_tensors(LLAMA)
    save(tmp_path, tensors=t | {DOWN: t[DOWN].astype(dtype)})
    refused(tmp_path, rf"model\.safetensors: tensor '{DOWN}' {pattern}")


def test_fp8_is_named(tmp_path):
    t = random_tensors(LLAMA)
    save(tmp_path, tensors=t | {DOWN: t[DOWN].astype("uint8")}, edit=lambda h: h[DOWN].update(dtype="F8_E4M3"))
    refused(tmp_path, rf"'{DOWN}' has dtype F8_E4M3, expected one of .*take the unquantised one")


def test_packed_quantised_tensors_are_named(tmp_path):
    """GPTQ and AWQ store another tensor in place of the weight: what it is says more than what is missing."""
    t = random_tensors(LLAMA)
    packed = t.pop(DOWN).astype("uint8")
    save(tmp_path, tensors=t | {"model.layers.1.mlp.down_proj.qweight": packed})
    refused(tmp_path, r"'model\.layers\.1\.mlp\.down_proj\.qweight' has dtype U8, .*take the unquantised one")


def test_values_beyond_float16(tmp_path):
    t = random_tensors(LLAMA)
    t[DOWN][0, 0] = 1e6
    save(tmp_path, tensors=t)
    assert float(load_model(tmp_path).params["layers"][1]["down"][0, 0]) == 1e6
    with pytest.raises(CheckpointError, match=rf"'{DOWN}' holds values beyond float16's 65504; load it with dtype bfl"):
        load_model(tmp_path, dtype="float16")


# --- errors: damaged files ---


def test_truncated_file(tmp_path):
    save(tmp_path, cut=100)
    refused(tmp_path, r"model\.safetensors is truncated: tensor '.*' ends at byte \d+, the file at byte \d+; fetch it")
    save(tmp_path)
    for size, pattern in ((0, "has 0 bytes, too few"), (5, "has 5 bytes"), (900, "announces a header of .* only 892")):
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:size])
        refused(tmp_path, pattern)
        (tmp_path / "model.safetensors").write_bytes(data)


def test_trailing_bytes(tmp_path):
    save(tmp_path, tail=b"12345678")
    refused(tmp_path, r"has 8 bytes after tensor '.*', the last one it describes")


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"PK\x03\x04 a zip archive, such as torch writes", r"announces a header of \d+ bytes, but only \d+ follow"),
        (struct.pack("<Q", 5) + b"{oops", r"the header of .*model\.safetensors is not JSON"),
        (struct.pack("<Q", 2) + b"[]", r"the header of .*model\.safetensors holds a JSON list, expected an object"),
        (struct.pack("<Q", 15) + b'{"a":1,"a":"2"}', r"the header of .* names 'a' twice"),
        (struct.pack("<Q", 7) + b'{"a":1}', r"describes tensor 'a' as 1, expected a dtype, a shape"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
    ],
)
def test_wrong_header(tmp_path, data, pattern):
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path, pattern)


def shifted(by: int):
    def edit(header):
        header[DOWN]["data_offsets"] = [offset + by for offset in header[DOWN]["data_offsets"]]

    return edit


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (shifted(-8), rf"tensor '{DOWN}' starts at byte \d+ and overlaps tensor '.*', which ends at byte"),
        (shifted(8), rf"tensor '{DOWN}' starts at byte \d+ and leaves a gap after tensor"),
        (shifted(10**9), "leaves a gap after"),
        (shifted(-(10**9)), rf"describes tensor '{DOWN}' as .* ascending data_offsets"),
        (lambda h: h[DOWN].update(data_offsets=[8, 4]), rf"describes tensor '{DOWN}' as .* ascending data_offsets"),
        (lambda h: h[DOWN].update(data_offsets=[1]), rf"describes tensor '{DOWN}'"),
        (lambda h: h[DOWN].update(shape=[-1, 20]), rf"describes tensor '{DOWN}'"),
        (lambda h: h[DOWN].update(dtype=None), rf"describes tensor '{DOWN}'"),
        (lambda h: h[DOWN].pop("shape"), rf"describes tensor '{DOWN}'"),
        (
            lambda h: h[DOWN].update(shape=[24, 19]),
            rf"gives tensor '{DOWN}' 1920 bytes, expected 1824 of dtype F32 and shape \[24, 19\]",
        ),
        (lambda h: h[DOWN].update(dtype="BF16"), rf"gives tensor '{DOWN}' 1920 bytes, expected 960 of dtype BF16"),
    ],
)
def test_wrong_offsets(tmp_path, edit, pattern):
    save(tmp_path, edit=edit)
    refused(tmp_path, r"model\.safetensors", pattern)


# --- real checkpoints ---


def test_files_of_the_safetensors_library_are_read(tmp_path):
    from safetensors.numpy import save_file

    t = random_tensors(LLAMA)
    save(tmp_path, tensors=t)
    ours = load_model(tmp_path).params
    save_file(t, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(load_model(tmp_path).params, ours)


def expectations(directory: Path):
    for file in sorted(directory.glob("expected*.npz")):
        expected = np.load(file)
        # Logits are for rows that reach the end of the greedy continuation, a length that some RoPE kinds read.
        tokens = np.concatenate([expected["prompts"], expected["greedy"]], axis=1)
        yield tokens, expected["positions"], expected["logits"]


@pytest.mark.parametrize("directory", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_loaded_families_give_the_expected_logits(directory):
    model = load_model(directory)
    for tokens, positions, logits in expectations(directory):
        ours = rl.forward(model.params, model.config, jnp.asarray(tokens))[:, positions]
        np.testing.assert_allclose(ours, logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_sharded_copy_gives_the_expected_logits(tmp_path, name):
    checkpoint = Checkpoint(FIXTURES / name)
    tensors = {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}
    save_shards(tmp_path, json.loads((FIXTURES / name / "config.json").read_text()), tensors)
    model = load_model(tmp_path)
    assert_same(model.params, load_model(FIXTURES / name).params)
    tokens, positions, logits = next(expectations(FIXTURES / name))
    ours = rl.forward(model.params, model.config, jnp.asarray(tokens))[:, positions]
    np.testing.assert_allclose(ours, logits, atol=2e-4, rtol=0)


def test_bfloat16_is_close_to_float32():
    model = load_model(FIXTURES / "llama3", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    tokens, positions, logits = next(expectations(FIXTURES / "llama3"))
    ours = rl.forward(model.params, model.config, jnp.asarray(tokens))[:, positions]
    assert ours.dtype == jnp.float32
    error = np.abs(ours - logits).max() / np.abs(logits).max()
    assert 1e-4 < error < 0.05  # bfloat16 keeps 8 bits; an error of nothing would mean that it was not used


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_names(name, monkeypatch, tmp_path):
    """The names lead to the package's own directories, whatever lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    save(tmp_path / name)
    monkeypatch.setitem(BUNDLED, name, FIXTURES / "llama3")
    assert load_model(name).directory == FIXTURES / "llama3"
    assert load_model(f"./{name}").config == config_from_hf(LLAMA)
    assert load_model(Path(name)).config == config_from_hf(LLAMA)
