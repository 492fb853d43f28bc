"""Loading onto meshes of eight devices, straight from a checkpoint and from its conversion."""

from pathlib import Path

import jax
import numpy as np
import pytest

import ridgeline as rl
from checkpoints import LLAMA, PHI3, assert_same, random_tensors, save
from families import write_checkpoint
from ridgeline.model.checkpoint import load
from ridgeline.model.loading import convert_model, load_model
from ridgeline.model.params import param_name, param_shardings
from ridgeline.sharding.mesh import make_mesh

SIZES = {"vocab_size": 32, "intermediate_size": 32, "num_attention_heads": 16, "num_key_value_heads": 8}
OLMO2 = LLAMA | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False}
FAMILIES = {"llama": LLAMA | SIZES, "phi3": PHI3 | SIZES, "olmo2": OLMO2 | SIZES}
MESHES = {
    "tensor 1": {},
    "tensor 8": {"tensor": 8},
    "data 2 x tensor 2": {"data": 2, "tensor": 2},
}


@pytest.fixture(params=["as it came", "converted"])
def source(request, tmp_path):
    """A function that writes a checkpoint and gives the directory to load."""

    def make(hf: dict, dtype: str = "bfloat16") -> Path:
        (tmp_path / "hf").mkdir()
        save(tmp_path / "hf", hf | {"torch_dtype": dtype}, random_tensors(hf, dtype))
        return tmp_path / "hf" if request.param == "as it came" else convert_model(tmp_path / "hf", tmp_path / "out")

    return make


def assert_placed(model: rl.Model, mesh) -> None:
    """Every parameter split as the rules say, each device holding its own part and no more."""
    specs = rl.param_specs(model.config, mesh.shape["tensor"])
    shardings = param_shardings(model.config, mesh)
    for (path, array), spec, sharding in zip(
        jax.tree_util.tree_leaves_with_path(model.params),
        jax.tree.leaves(specs),
        jax.tree.leaves(shardings),
        strict=True,
    ):
        assert (array.shape, array.dtype.name) == (spec.shape, spec.dtype), param_name(path)
        assert array.sharding == sharding, param_name(path)
        split = any(axis in ("vocab", "kv_heads", "ffn") for axis in spec.axes)
        for shard in array.addressable_shards:
            assert shard.data.size == spec.size // (mesh.shape["tensor"] if split else 1), param_name(path)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_that_of_one_device(source, family, sizes):
    directory = source(FAMILIES[family])
    mesh = make_mesh(**sizes)
    whole, split = load_model(directory.parent / "hf"), load_model(directory, mesh=mesh)
    assert split.config == whole.config
    assert (split.mesh, whole.mesh) == (mesh, None)
    assert_placed(split, mesh)
    jax.tree.map(np.testing.assert_array_equal, split.params, whole.params)


@pytest.mark.parametrize(("heads", "sizes"), [(2, {"tensor": 4}), (2, {"tensor": 8}), (1, {"data": 2, "tensor": 4})])
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_heads_are_copied_to_the_devices_that_share_them(source, family, heads, sizes):
    """Written out head by head: copy r of a KV head serves the r-th part of its query heads."""
    directory = source(FAMILIES[family] | {"num_key_value_heads": heads})
    mesh = make_mesh(**sizes)
    whole, split = load_model(directory.parent / "hf"), load_model(directory, mesh=mesh)
    copies = sizes["tensor"] // heads
    assert split.config == whole.config
    assert_placed(split, mesh)
    own = 16 // sizes["tensor"]
    for before, after in zip(whole.params["layers"], split.params["layers"], strict=True):
        for head in range(sizes["tensor"]):
            k, g = head // copies, slice(head % copies * own, head % copies * own + own)
            for name in ("qkv", "qkv_bias")[: 1 + whole.config.qkv_bias]:
                np.testing.assert_array_equal(after[name][head, :own], before[name][k, g])
                np.testing.assert_array_equal(after[name][head, own:], before[name][k, -2:])
            np.testing.assert_array_equal(after["out"][:, head], before["out"][:, k, g])
            if whole.config.qk_norm == "full":
                np.testing.assert_array_equal(after["q_norm"][head], before["q_norm"][k, g])
                np.testing.assert_array_equal(after["k_norm"][head], before["k_norm"][k])
        for name in before.keys() - {"qkv", "qkv_bias", "out", "q_norm", "k_norm"}:
            np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(split.params["unembedding"], whole.params["unembedding"])


@pytest.mark.parametrize("asked", ["float32", "float16"])
def test_dtypes_on_a_mesh(source, asked):
    directory, mesh = source(FAMILIES["phi3"], "float16"), make_mesh(data=2, tensor=4)
    split, whole = load_model(directory, mesh=mesh, dtype=asked), load_model(directory, dtype=asked)
    assert split.config.dtype == asked
    assert_placed(split, mesh)
    jax.tree.map(np.testing.assert_array_equal, split.params, whole.params)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_every_element_is_read_once_and_replicas_not_again(tmp_path, monkeypatch, sizes):
    save(tmp_path, FAMILIES["phi3"])
    read, original = [], load.read_parameter
    monkeypatch.setattr(load, "read_parameter", lambda *args: read.append(original(*args)) or read[-1])
    model = load_model(tmp_path, mesh=make_mesh(**sizes))
    assert sum(part.size for part in read) == rl.count_parameters(model.config)
    if sizes.get("tensor", 1) > 1:
        assert max(part.size for part in read) < max(
            spec.size for spec in jax.tree.leaves(rl.param_specs(model.config))
        )


def test_what_does_not_divide_is_said_before_anything_is_read(source, monkeypatch):
    directory = source(FAMILIES["llama"] | {"intermediate_size": 30})
    monkeypatch.setattr(load, "read_parameter", lambda *args: pytest.fail("read"))
    with pytest.raises(
        ValueError, match=r"layers.0.down \(24, 30\): axis 'ffn' of size 30 does not divide over the 4 "
    ):
        load_model(directory, mesh=make_mesh(tensor=4))


def test_kv_heads_that_cannot_be_shared(source):
    directory = source(FAMILIES["llama"] | {"num_attention_heads": 12, "num_key_value_heads": 4})
    with pytest.raises(
        ValueError, match="num_kv_heads 4 with 3 query heads each cannot be shared by a tensor axis of 8"
    ):
        load_model(directory, mesh=make_mesh(tensor=8))


def test_a_mesh_of_other_axes_is_refused(source):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(
        ValueError, match=r"the mesh has axes \('x',\), expected \('data', 'expert', 'tensor'\); make it"
    ):
        load_model(source(FAMILIES["llama"]), mesh=mesh)


def test_the_default_device_of_the_calling_thread_is_used(source):
    device = jax.devices()[3]
    with jax.default_device(device):
        model = load_model(source(FAMILIES["llama"]))
    assert {d for leaf in jax.tree.leaves(model.params) for d in leaf.devices()} == {device}


def test_a_value_beyond_float16_is_told_from_whichever_thread(tmp_path):
    tensors = random_tensors(FAMILIES["llama"])
    tensors["model.layers.1.mlp.down_proj.weight"][5, 30] = 1e6
    save(tmp_path, FAMILIES["llama"], tensors)
    with pytest.raises(rl.CheckpointError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' holds values beyond"):
        load_model(tmp_path, mesh=make_mesh(tensor=8), dtype="float16")


def test_a_model_on_a_mesh_is_saved_and_shown_as_it_was_read(tmp_path):
    directory, mesh = write_checkpoint(tmp_path / "checkpoint", "olmo2", 16, 4), rl.make_mesh(tensor=8)
    model, whole = rl.load_model(directory, mesh=mesh), rl.load_model(directory)  # each KV head twice on the mesh
    assert_same(rl.load_model(rl.save_model(model, tmp_path / "out")).params, whole.params)
    restored = rl.from_hf_view(rl.hf_view(whole.params, whole.config), whole.config, mesh)
    assert_same(restored, model.params)
    assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, model.params)
