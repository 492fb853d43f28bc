"""Meshes, rules and their errors: nothing here needs more than one device."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import ridgeline as rl
from ridgeline.model.kv_specs import kv_specs
from ridgeline.model.params import kv_replicas, param_shardings
from ridgeline.sharding.mesh import AXES
from ridgeline.sharding.rules import RULES, partition_spec
from tiny import tiny_config


def mesh(data=1, expert=1, tensor=1):
    return AbstractMesh((data, expert, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def test_one_device_is_a_mesh_of_ones():
    made = rl.make_mesh()
    assert dict(made.shape) == {"data": 1, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 0}, "tensor is 0; it must be at least 1"),
        ({"data": 10**6}, "needs 1000000 devices and there are"),
        ({"data": 1000, "tensor": 8}, "data 1000 x expert 1 x tensor 8"),
    ],
)
def test_meshes_that_cannot_be_made(sizes, message):
    with pytest.raises(ValueError, match=message):
        rl.make_mesh(**sizes)


def test_every_parameter_has_rules():
    for changes in ({}, {"qk_norm": "full", "norm_position": "sandwich"}, {"qkv_bias": True, "mlp_bias": True}):
        for spec in jax.tree.leaves(rl.param_specs(tiny_config(out_bias=True, **changes))):
            assert {axis for axis in spec.axes if axis is not None} <= set(RULES)


def test_rules_split_what_the_mesh_splits():
    spec = partition_spec("qkv", (8, 4, 16, 64), ("kv_heads", "q_per_kv", "head_dim", "embed"), mesh(tensor=4))
    assert spec == PartitionSpec("tensor", None, None, None)
    assert partition_spec("norm", (64,), ("embed",), mesh(data=2, tensor=4)) == PartitionSpec(None)


def test_errors_name_parameter_shape_axis_and_remedy():
    with pytest.raises(
        ValueError, match=r"layers.3.down \(48, 66\): axis 'ffn' of size 66 .* 4 devices .* one of 1, 2, 3"
    ):
        partition_spec("layers.3.down", (48, 66), ("embed", "ffn"), mesh(tensor=4))
    with pytest.raises(ValueError, match=r"'kv_heads' and 'ffn' both map to mesh axis 'tensor'"):
        partition_spec("x", (4, 4), ("kv_heads", "ffn"), mesh(tensor=2))
    with pytest.raises(ValueError, match=r"no rule for logical axis 'heads'"):
        partition_spec("x", (4,), ("heads",), mesh())


def test_indivisible_models_are_refused_by_name():
    with pytest.raises(ValueError, match=r"layers.0.down \(48, 64\): axis 'ffn' of size 64"):
        param_shardings(tiny_config(), mesh(tensor=3))


@pytest.mark.parametrize(("heads", "devices", "expected"), [(2, 8, (8, 1, 4)), (2, 2, (2, 4, 1)), (1, 4, (4, 2, 4))])
def test_kv_heads_are_copied_for_more_devices(heads, devices, expected):
    config = tiny_config(num_heads=8, num_kv_heads=heads)
    K, slots, *_ = rl.param_specs(config, devices)["layers"][0]["qkv"].shape
    assert (K, slots - 2, kv_replicas(config, devices)) == expected
    assert dict(kv_specs(config, tensor=devices)[0].k.sizes)["kv_heads"] == K


@pytest.mark.parametrize(("heads", "devices"), [(3, 4), (2, 16), (3, 9)])
def test_kv_heads_that_cannot_be_shared(heads, devices):
    with pytest.raises(ValueError, match=f"num_kv_heads {heads} .* tensor axis of {devices}"):
        kv_replicas(tiny_config(num_heads=6, num_kv_heads=heads), devices)


def test_copied_kv_heads_compute_the_same(model):
    # One device suffices to see it: copies of weights, query heads shared out among them.
    config = tiny_config(num_heads=6, num_kv_heads=3)
    params = rl.init_params(config, jax.random.key(4))
    tokens = np.arange(40).reshape(2, 20)

    def copy(layer):
        q, kv = layer["qkv"][:, :2], layer["qkv"][:, 2:]
        qkv = np.concatenate([q.reshape(6, 1, 20, 48), np.repeat(kv, 2, axis=0)], axis=1)
        return layer | {"qkv": jax.numpy.asarray(qkv), "out": layer["out"].reshape(48, 6, 1, 20)}

    expected = rl.forward(params, config, jax.numpy.asarray(tokens))
    out = rl.forward(params | {"layers": [copy(p) for p in params["layers"]]}, config, jax.numpy.asarray(tokens))
    np.testing.assert_allclose(out, expected, atol=1e-5)
