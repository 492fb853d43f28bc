"""What `load_model` returns, how it reads slices, and real checkpoints."""

import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from checkpoints import DOWN, EMBEDDING, FIXTURES, LLAMA, PHI3, assert_same, random_tensors, refused, save, save_shards
from ridgeline.model.checkpoint import Checkpoint, load, read_parameter
from ridgeline.model.hf import config_from_hf, family_of
from ridgeline.model.hf.family import Piece
from ridgeline.model.loading import BUNDLED, load_model
from ridgeline.model.params import ParamSpec

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


def test_a_model_says_what_it_is_in_a_few_lines(tmp_path):
    count = sum(tensor.size for tensor in save(tmp_path).values())
    lines = repr(load_model(tmp_path, quantize="int8")).splitlines()
    assert [len(line) < 160 for line in lines] == [True] * 3
    assert lines[0].startswith(f"Model '{tmp_path.name}': llama, 2 layers, {count:,} parameters in int8 and float32, ")


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


def test_large_slices_are_read_in_blocks(tmp_path, monkeypatch):
    """Whichever axis a block boundary falls on, by one thread or by several."""
    save(tmp_path, PHI3)
    whole = load_model(tmp_path).params
    for block in (1, 100, 1000):
        monkeypatch.setattr(load, "BLOCK", block)
        assert_same(load_model(tmp_path).params, whole)


def test_progress_shows_gigabytes_and_their_rate(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    with load.progress("loading llama", 16_000_000_000) as bar:
        bar.n, bar.start_t = 4_000_000_000, bar.start_t - 2
        assert re.fullmatch(r"loading llama:  25%\|.*\| 4\.00GB of 16\.0GB, [12]\.\d+GB/s, 00:0\d left", str(bar))
    assert terminal.getvalue().strip("\r") == ""  # not drawn within its first second
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert load.progress("loading llama", 100).disable


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
