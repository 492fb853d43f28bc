"""A quantized KV cache on meshes of eight devices: what one device computes, split like the pages, updated in place."""

import functools
from importlib import metadata

import jax
import numpy as np
import pytest

import ridgeline as rl
from families import write_checkpoint
from ridgeline.programs import abstract_cache, bytes_per_device, lower_decode
from ridgeline.sharding.hlo import collectives, num_elements, parse
from ridgeline.sharding.targets import compile_for_target, target_mesh

TOLERANCE = 1e-2
"""Of logits: where two numbers are as near, rounding differs between programs."""

PROMPTS = [list(range(1, 24)), [5], [7, 11, 300, 2], list(range(200, 212))]
NO_PLUGIN = not any(plugin.name.startswith("xla_cuda") for plugin in metadata.entry_points(group="jax_plugins"))
H200 = pytest.mark.skipif(NO_PLUGIN, reason="no CUDA plugin of JAX")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model with a window, of two KV heads, which four devices hold twice."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "gemma2", "gemma2", 8, 2)


def outputs(model: rl.Model, kv: str) -> tuple[np.ndarray, list[list[int]], rl.KVCache]:
    """Logits of a prefill, greedy tokens, and the cache."""
    tokens, lengths = np.zeros((4, 32), np.int32), np.array([len(p) for p in PROMPTS], np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    cache = rl.init_cache(model.config, 4, 64, mesh=model.mesh, kv_dtype=kv)
    logits, cache = jax.block_until_ready(rl.prefill(model.params, model.config, tokens, lengths, cache))
    greedy = rl.SamplingParams(temperature=0.0, max_tokens=8)
    return np.asarray(logits), [out.tokens for out in rl.generate(model, PROMPTS, greedy, kv_dtype=kv)], cache


@pytest.mark.parametrize(("kv", "mesh"), [("int8", {"data": 2, "tensor": 4}), ("fp8", {"tensor": 2})], ids=str)
def test_a_mesh_computes_what_one_device_does(directory, kv, mesh):
    expected, tokens, _ = outputs(rl.load_model(directory), kv)
    model = rl.load_model(directory, mesh=rl.make_mesh(**mesh))
    found, found_tokens, cache = outputs(model, kv)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert found_tokens == tokens
    for layer in cache.pages:
        for pages, scales in ((layer.k, layer.k_scales), (layer.v, layer.v_scales)):
            assert scales.sharding.shard_shape(scales.shape) == pages.sharding.shard_shape(pages.shape)[:3]
    described = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype, a.sharding.shard_shape(a.shape)))
    assert described(abstract_cache(model.config, model.mesh, 4, 64, kv)) == described(cache)


@pytest.mark.parametrize(
    ("kv", "platform", "tensor"),
    [("int8", "cpu", 8), ("fp8", "cpu", 1), pytest.param("fp8", "h200", 1, marks=H200)],
)
def test_decode_updates_the_cache_in_place_and_communicates_no_more(kv, platform, tensor):
    mesh = rl.make_mesh(tensor=tensor) if platform == "cpu" else target_mesh(platform, tensor=tensor)
    config = rl.preset("llama-3.1-8b")
    config = config.replace(layers=config.layers[:2], dtype="float32" if platform == "cpu" else "bfloat16")
    lowered = lower_decode(config, mesh, batch_size=16, max_length=8192, kv_dtype=kv)
    program = lowered.compile() if platform == "cpu" else compile_for_target(lowered)
    cache = abstract_cache(config, mesh, 16, 8192, kv)
    memory, text = program.memory_analysis(), parse(program.as_text())
    assert memory.alias_size_in_bytes == bytes_per_device(cache)
    assert memory.temp_size_in_bytes < bytes_per_device(cache.pages[0].k)
    sizes = {int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(cache.pages)}
    written = [made for made, shape in text.written() if num_elements(shape) in sizes]
    assert written == ["scatter"] * 4 * config.num_layers
    assert [(found.kind, found.count) for found in collectives(text)] == ([] if tensor == 1 else [("all-reduce", 5)])
