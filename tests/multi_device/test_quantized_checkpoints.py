"""Checkpoints that arrive quantized, on meshes: every device reads its own shards of the stored integers and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from quantized_checkpoints import assert_stands_for, write_pair
from ridgeline.model.checkpoint import load
from ridgeline.model.loading import convert_model
from ridgeline.model.params import param_shardings


def assert_placed(model: rl.Model) -> None:
    shardings = param_shardings(model.config, model.mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, model.params) == shardings


@pytest.mark.parametrize(
    ("name", "tensor"),  # of two KV heads
    [
        ("int4 that leaves a matrix as it is", 4),
        ("awq", 2),
        ("awq", 4),
        ("gptq", 4),
        ("gptq in act order", 4),
        ("fp8 in blocks", 4),
    ],
)
def test_parameters_are_the_matrices_that_are_stored(tmp_path, name, tensor):
    mesh = rl.make_mesh(tensor=tensor)
    quantized, dense = (rl.load_model(path, mesh=mesh) for path in write_pair(tmp_path, name, vocab_size=32))
    assert quantized.params["layers"][0]["qkv"].shape[0] == tensor  # of two KV heads
    assert_placed(quantized)
    assert_stands_for(quantized.params, dense.params)


def test_inputs_in_act_order(tmp_path):
    """Activations are put in order before they are split."""
    directory, _ = write_pair(tmp_path, "gptq in act order", vocab_size=32)
    one, four = rl.load_model(directory), rl.load_model(directory, mesh=rl.make_mesh(tensor=4))
    tokens = jnp.arange(12).reshape(2, 6)
    expected = rl.forward(one.params, one.config, tokens)
    np.testing.assert_allclose(rl.forward(four.params, four.config, tokens), expected, atol=1e-4 * abs(expected).max())


def test_conversions_with_copied_kv_heads(tmp_path):
    directory, dense = write_pair(tmp_path, "awq", vocab_size=32)
    mesh = rl.make_mesh(tensor=4)
    converted = rl.load_model(convert_model(directory, tmp_path / "out"), mesh=mesh)
    assert_placed(converted)
    assert_stands_for(converted.params, rl.load_model(dense, mesh=mesh).params)


def test_every_byte_is_read_once(tmp_path, monkeypatch):
    directory, _ = write_pair(tmp_path, "awq", vocab_size=32)
    read, original = [], load.read_parameter
    monkeypatch.setattr(load, "read_parameter", lambda *args: read.append(original(*args)) or read[-1])
    model = rl.load_model(directory, mesh=rl.make_mesh(data=2, tensor=2))
    assert sum(part.nbytes for part in read) == sum(
        spec.nbytes for spec in jax.tree.leaves(rl.param_specs(model.config))
    )
