"""Quantized weights on meshes: the parameters and the logits of one device, in every scheme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from checkpoints import assert_same
from families import write_checkpoint
from quantized_checkpoints import write_pair
from ridgeline.model import products
from ridgeline.model.params import param_shardings
from ridgeline.model.schemes import SCHEMES, Quantization
from ridgeline.pallas_kernels.dispatch import current_device
from ridgeline.programs import lower_decode
from ridgeline.sharding.hlo import collectives, parse
from ridgeline.sharding.targets import compile_for_target, target_mesh

TOKENS = jnp.arange(80).reshape(4, 20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 64}
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama3", 8, 2, **sizes)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_mesh_computes_what_one_device_does(checkpoint, name):
    # Two devices hold whole groups of every scheme; four hold groups of 64, each with a copy of a KV head.
    small = (SCHEMES[name].group or 64) <= 64
    one = rl.load_model(checkpoint, quantize=name, quantize_output="int8")
    model = rl.load_model(
        checkpoint, quantize=name, quantize_output="int8", mesh=rl.make_mesh(data=2, tensor=4 if small else 2)
    )
    shardings = param_shardings(model.config, model.mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, model.params) == shardings
    if not small:
        assert_same(model.params, one.params)
    dynamic = SCHEMES[name].dynamic
    for rows in (4, 1) if dynamic else (1,):  # 80 tokens multiply rounded activations in dynamic schemes, 20 do not
        logits, expected = (np.asarray(rl.forward(m.params, m.config, TOKENS[:rows])) for m in (model, one))
        if dynamic and rows == 4:
            # Sums in another order round some activations to the next number.
            assert np.abs(logits - expected).mean() < 0.01 * np.abs(expected).mean()
        else:
            np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_static_scales_lie_on_every_device(tmp_path):
    directory, _ = write_pair(tmp_path, "int8 of eight-bit products, static", vocab_size=32)
    mesh = rl.make_mesh(data=2, tensor=4)  # with copies of KV heads, which come from the same matrices
    one, model = rl.load_model(directory), rl.load_model(directory, mesh=mesh)
    scales = [m.params["layers"][0]["qkv"].input_scale for m in (one, model)]
    assert scales[1].sharding.is_fully_replicated
    assert scales[0] == scales[1]
    expected, logits = (np.asarray(rl.forward(m.params, m.config, TOKENS % 32)) for m in (one, model))
    assert np.abs(logits - expected).mean() < 0.01 * np.abs(expected).mean()


def test_groups_that_devices_cannot_share_are_refused(checkpoint):
    message = r"layers.0.down.scales \(128, 4\): axis 'ffn' of size 4 does not divide over the 8 devices"
    with pytest.raises(ValueError, match=message):
        rl.load_model(checkpoint, quantize="int4", mesh=rl.make_mesh(tensor=8))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_weights_add_no_communication(name):
    program = lower_decode(two_layers(name, "float32"), rl.make_mesh(tensor=8), batch_size=16, max_length=1024)
    assert communicated(program.compile()) == {"all-reduce": 5}


@pytest.mark.parametrize("name", ["fp8-block", "int4"])
def test_a_decode_step_of_h200s_is_kernels_that_read_the_stored_weights(plugin, name):
    mesh = target_mesh("h200", tensor=4)
    config = two_layers(name, "bfloat16")
    program = compile_for_target(lower_decode(config, mesh, batch_size=16, max_length=1024))
    (reduced,) = collectives(parse(program.as_text()))
    assert (reduced.kind, reduced.count, reduced.bytes) == ("all-reduce", 5, 5 * 16 * config.embed_dim * 2)
    # Four products and two kernels of attention a layer, and the output's product.
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 13
    # No weight is widened: the smallest of a layer would take 8 MiB on each device.
    smallest = config.embed_dim * config.num_heads * config.head_dim // 4 * 2
    assert program.memory_analysis().temp_size_in_bytes < smallest


def two_layers(name: str, dtype: str) -> rl.ModelConfig:
    config = rl.preset("llama-3.1-8b")
    quantization = Quantization(SCHEMES[name], SCHEMES["int8"])
    return config.replace(layers=config.layers[:2], dtype=dtype, quantization=quantization)


def communicated(program) -> dict[str, int]:
    return {c.kind: c.count for c in collectives(parse(program.as_text()))}


@pytest.mark.parametrize("name", ["int8", "fp8-block", "int4-64", "int4-32-zero"])
def test_kernels_see_each_device_s_part(checkpoint, name, monkeypatch):
    """The way of Hopper GPUs, its kernel replaced by plain jnp: parts are cut and sums reduced as without it."""
    one = rl.load_model(checkpoint, quantize=name, quantize_output="int8")
    tokens, lengths = TOKENS[:2, :11], jnp.full((2,), 11, jnp.int32)
    expected = rl.forward(one.params, one.config, tokens)[:, -1]
    hopper = current_device()._replace(platform="gpu", kind="NVIDIA H200")
    monkeypatch.setattr(products, "current_device", lambda mesh: hopper)
    model = rl.load_model(checkpoint, quantize=name, quantize_output="int8", mesh=rl.make_mesh(data=2, tensor=2))
    cache = rl.init_cache(model.config, 2, 64, mesh=model.mesh)
    program = rl.prefill.lower(model.params, model.config, tokens, lengths, cache).compile()
    assert communicated(program)["all-reduce"] == 2 * model.config.num_layers + 1
    logits, _ = rl.prefill(model.params, model.config, tokens, lengths, cache)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    odd = rl.forward(model.params, model.config, tokens[:1])[:, -1]  # 11 rows, which two devices cannot share
    np.testing.assert_allclose(odd, expected[:1], atol=1e-4)
