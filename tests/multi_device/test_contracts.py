"""What the compiled programs of eight devices must and must not do, on CPU devices and on H200s that are not there.

The models are published ones cut to a few layers, in their full width; nothing is executed.
"""

import functools
from importlib import metadata

import jax
import pytest

import ridgeline as rl
from ridgeline.decode.lowering import abstract_cache, abstract_params, bytes_per_device, lower_decode, lower_prefill
from ridgeline.sharding.hlo import collectives, num_elements, parse
from ridgeline.sharding.targets import target_mesh

BATCH, CONTEXT = 16, 8192
COPIES = {"copy", "copy-start", "transpose", "convert", "concatenate", "pad", "all-gather", "all-gather-start"}
NO_PLUGIN = not any(plugin.name.startswith("xla_cuda") for plugin in metadata.entry_points(group="jax_plugins"))
PLATFORMS = ["cpu", pytest.param("h200", marks=pytest.mark.skipif(NO_PLUGIN, reason="no CUDA plugin of JAX"))]
MODELS = ["llama-3.1-8b", "llama-3.1-70b"]


def cut(name, platform, devices=8):
    # XLA:CPU has no 16-bit products: it would convert every weight.
    dtype = "float32" if platform == "cpu" else "bfloat16"
    config = rl.preset(name)
    return config.replace(layers=config.layers[:2], dtype=dtype).replicate_kv_heads(devices)


@functools.cache
def compiled(name, platform, program="decode", data=1, tensor=8):
    """The config, the mesh and the compiled program."""
    mesh = (
        rl.make_mesh(data=data, tensor=tensor) if platform == "cpu" else target_mesh(platform, data=data, tensor=tensor)
    )
    config = cut(name, platform, tensor)
    lower = lower_decode if program == "decode" else functools.partial(lower_prefill, tokens=64)
    return config, mesh, lower(config, mesh, batch_size=BATCH, max_length=CONTEXT).compile()


def communicated(program):
    return {found.kind: (found.count, found.bytes) for found in collectives(parse(program.as_text()))}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", MODELS)
def test_decode_updates_exactly_the_cache_in_place(name, platform):
    config, mesh, program = compiled(name, platform)
    cache = abstract_cache(config, mesh, BATCH, CONTEXT)
    assert program.memory_analysis().alias_size_in_bytes == bytes_per_device(cache)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", MODELS)
def test_decode_needs_room_for_activations_only(name, platform):
    config, mesh, program = compiled(name, platform)
    cache = abstract_cache(config, mesh, BATCH, CONTEXT)
    heads, pages = config.num_heads // 8, CONTEXT // cache.page_size
    scores = heads * (CONTEXT + pages * config.head_dim)  # and the output of each page, before they are summed
    layer = 4 * BATCH * (scores + (2 * config.ffn_dim + config.vocab_size) // 8 + config.embed_dim)
    allowed = 2 * layer
    assert allowed < bytes_per_device(cache.k[0])  # or a copy of the cache would go unnoticed
    assert program.memory_analysis().temp_size_in_bytes < allowed


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", MODELS)
def test_decode_writes_no_copy_of_a_weight_or_of_the_cache(name, platform):
    config, mesh, program = compiled(name, platform)
    cache = abstract_cache(config, mesh, BATCH, CONTEXT)
    big = {bytes_per_device(leaf) // leaf.dtype.itemsize for leaf in cache.k}
    big |= {
        bytes_per_device(leaf) // leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract_params(config, mesh))
        if leaf.ndim > 1
    }
    written = list(parse(program.as_text()).written())
    assert not [(made, shape) for made, shape in written if made in COPIES and num_elements(shape) in big]
    # What is looked for is there to be found: the cache is written, by a scatter.
    assert sum(num_elements(shape) == max(big) for _, shape in written) >= 1


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("mesh", [(1, 8), (2, 4)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_decode_reduces_twice_a_layer_and_once_for_the_embedding(name, mesh, platform):
    config, _, program = compiled(name, platform, data=mesh[0], tensor=mesh[1])
    one = BATCH // mesh[0] * config.embed_dim * 4  # partial sums are float32
    (kind, (count, size)), *others = communicated(program).items()
    assert (kind, count, others) == ("all-reduce", 2 * config.num_layers + 1, [])
    assert size <= count * one


@pytest.mark.parametrize("platform", PLATFORMS)
def test_prefill_communicates_as_often_as_decode(platform):
    config, mesh, program = compiled("llama-3.1-8b", platform, "prefill")
    (kind, (count, _)), *others = communicated(program).items()
    assert (kind, count, others) == ("all-reduce", 2 * config.num_layers + 1, [])
    cache = abstract_cache(config, mesh, BATCH, CONTEXT)
    assert program.memory_analysis().alias_size_in_bytes == bytes_per_device(cache)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_norms_over_all_heads_add_one_small_reduction_a_layer(platform):
    config, _, program = compiled("olmo-2-7b", platform)
    found = communicated(program)
    print(found)
    assert found.keys() == {"all-reduce"}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_one_device_communicates_nothing(platform):
    _, _, program = compiled("llama-3.1-8b", platform, tensor=1)
    assert communicated(program) == {}
