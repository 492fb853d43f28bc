"""What the compiled programs of eight devices must and must not do, on CPU devices and on H200s that are not there.

The models are published ones cut to two layers of full width; nothing is executed.
"""

import functools
from importlib import metadata

import jax
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.programs import abstract_cache, abstract_params, bytes_per_device, lower_decode, lower_prefill
from ridgeline.sharding.hlo import collectives, num_elements, parse
from ridgeline.sharding.targets import compile_for_target, target_mesh

BATCH, CONTEXT, PROMPT = 16, 8192, 64
COPIES = {"copy", "copy-start", "transpose", "convert", "concatenate", "pad", "all-gather", "all-gather-start"}
NO_PLUGIN = not any(plugin.name.startswith("xla_cuda") for plugin in metadata.entry_points(group="jax_plugins"))
PLATFORMS = ["cpu", pytest.param("h200", marks=pytest.mark.skipif(NO_PLUGIN, reason="no CUDA plugin of JAX"))]
MODELS = ["llama-3.1-8b", "llama-3.1-70b"]

on_platforms = pytest.mark.parametrize("platform", PLATFORMS)
on_models = pytest.mark.parametrize("name", MODELS)
# With all KV heads on one device an unfit layout of the cache shows; with one head a device it costs nothing.
on_devices = pytest.mark.parametrize("tensor", [1, 8])


def compiled(name, platform, program="decode", data=1, tensor=8):
    """The config, its cache on the mesh, and the compiled program."""
    return _compiled(name, platform, program, data, tensor)


@functools.cache
def _compiled(name, platform, program, data, tensor, expert=1):
    on_cpu = platform == "cpu"
    sizes = {"data": data, "expert": expert, "tensor": tensor}
    mesh = rl.make_mesh(**sizes) if on_cpu else target_mesh(platform, **sizes)
    config = rl.preset(name)
    # XLA:CPU has no 16-bit products: it would convert every weight.
    config = config.replace(layers=config.layers[:2], dtype="float32" if on_cpu else "bfloat16")
    lower = lower_decode if program == "decode" else functools.partial(lower_prefill, tokens=PROMPT)
    lowered = lower(config, mesh, batch_size=BATCH, max_length=CONTEXT)
    cache = abstract_cache(config, mesh, BATCH, CONTEXT)
    return config, cache, lowered.compile() if on_cpu else compile_for_target(lowered)


def communicated(program):
    return {found.kind: (found.count, found.bytes) for found in collectives(parse(program.as_text()))}


def elements(leaf):
    """Elements of a leaf on each device."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape)))


@on_platforms
@on_devices
@on_models
def test_decode_updates_exactly_the_cache_in_place(name, tensor, platform):
    _, cache, program = compiled(name, platform, tensor=tensor)
    assert program.memory_analysis().alias_size_in_bytes == bytes_per_device(cache)


@on_platforms
@on_devices
@on_models
def test_decode_needs_room_for_activations_only(name, tensor, platform):
    config, cache, program = compiled(name, platform, tensor=tensor)
    pages = CONTEXT // cache.page_size
    attention = config.num_heads // tensor * (CONTEXT + pages * config.head_dim)  # scores, and the output of each page
    layer = 4 * BATCH * (attention + (2 * config.ffn_dim + config.vocab_size) // tensor + config.embed_dim)
    assert 2 * layer < bytes_per_device(cache.pages[0].k)  # or a copy of the cache would go unnoticed
    assert program.memory_analysis().temp_size_in_bytes < 2 * layer


@on_platforms
@on_devices
@on_models
def test_decode_writes_no_copy_of_a_weight_or_of_the_cache(name, tensor, platform):
    config, cache, program = compiled(name, platform, tensor=tensor)
    weights = [leaf for leaf in jax.tree.leaves(abstract_params(config, cache.lengths.sharding.mesh)) if leaf.ndim > 1]
    big = {elements(leaf) for leaf in (*jax.tree.leaves(cache.pages), *weights)}
    written = list(parse(program.as_text()).written())
    assert not [(made, shape) for made, shape in written if made in COPIES and num_elements(shape) in big]
    # What is looked for is there to be found: each layer's k and v are written, in place.
    pages = [made for made, shape in written if num_elements(shape) == elements(cache.pages[0].k)]
    assert len(pages) == 2 * config.num_layers


@on_platforms
@on_models
@pytest.mark.parametrize("mesh", [(1, 8), (2, 4)], ids=["tensor8", "data2-tensor4"])
def test_decode_reduces_twice_a_layer_and_once_for_the_embedding(name, mesh, platform):
    config, _, program = compiled(name, platform, data=mesh[0], tensor=mesh[1])
    found = communicated(program)
    reductions = 2 * config.num_layers + 1
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"][0] == reductions
    # Each is one activation of the device's rows, in float32 at the most.
    assert found["all-reduce"][1] <= reductions * BATCH // mesh[0] * config.embed_dim * 4


@on_platforms
@pytest.mark.parametrize(("program", "expert", "tensor"), [("decode", 4, 2), ("prefill", 4, 2), ("decode", 1, 8)])
def test_experts_reduce_as_often_as_dense_layers_and_are_not_gathered(program, expert, tensor, platform):
    config, _, compiled_program = _compiled("mixtral-8x7b", platform, program, 1, tensor, expert)
    found = communicated(compiled_program)
    assert found.keys() == {"all-reduce"}
    # Attention and the embedding are split over tensor alone.
    assert found["all-reduce"][0] == config.num_layers * (1 + (tensor > 1)) + (tensor > 1)


@on_platforms
def test_prefill_reduces_as_often_as_decode(platform):
    config, cache, program = compiled("llama-3.1-8b", platform, "prefill")
    found = communicated(program)
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"][0] == 2 * config.num_layers + 1
    assert program.memory_analysis().alias_size_in_bytes == bytes_per_device(cache)


@on_platforms
def test_norms_over_all_heads_add_one_small_reduction_a_layer(platform):
    config, _, program = compiled("olmo-2-7b", platform)
    found = communicated(program)
    plain = 2 * config.num_layers + 1
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"][0] == plain + config.num_layers
    # A sum of squares of q and one of k, a row.
    assert found["all-reduce"][1] <= plain * BATCH * config.embed_dim * 4 + config.num_layers * 2 * BATCH * 4


@on_platforms
def test_one_device_communicates_nothing(platform):
    _, _, program = compiled("llama-3.1-8b", platform, tensor=1)
    assert communicated(program) == {}


def test_abstract_arguments_lie_where_the_real_ones_do():
    mesh = rl.make_mesh(data=2, tensor=4)
    config = rl.preset("llama-3.2-1b")
    config = config.replace(layers=config.layers[:1], vocab_size=256, ffn_dim=64, embed_dim=64)

    def described(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape)), tree)

    assert described(abstract_cache(config, mesh, 4, 128)) == described(rl.init_cache(config, 4, 128, mesh=mesh))
    params = rl.init_params(config, jax.random.key(0), mesh)
    assert described(abstract_params(config, mesh)) == described(params)
    assert bytes_per_device(params) == sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
