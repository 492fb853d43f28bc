"""Counts against what XLA says of the compiled programs, and against arithmetic by hand."""

import dataclasses
import json
import math
import pathlib

import jax
import pytest

from ridgeline.decode.cache import init_cache
from ridgeline.decode.prefill import prefill
from ridgeline.decode.step import decode_step
from ridgeline.model.config import LayerConfig
from ridgeline.model.hf import FAMILIES as HF_FAMILIES
from ridgeline.model.hf import config_from_hf
from ridgeline.model.params import count_parameters, param_specs
from ridgeline.model.presets import PRESETS, preset
from ridgeline.programs import abstract_cache, abstract_params, bytes_per_device, lower_decode, lower_prefill
from ridgeline.roofline import Deployment, count_decode, count_prefill, count_step
from ridgeline.sharding import targets
from ridgeline.sharding.hlo import collectives, parse
from tiny import tiny_config

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "parity"
FAMILIES = ("gemma2", "gemma3", "llama3", "llama_bias", "mistral", "olmo2", "phi3_partial", "qwen2", "qwen3")
SIZES = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
B, C = 2, 64


def family_config(family):
    """A fixture's configuration with sizes at which products are nearly all of the arithmetic."""
    hf = json.loads((FIXTURES / family / "config.json").read_text()) | SIZES | HEADS | {"torch_dtype": "float32"}
    if "layer_types" in hf:
        hf["layer_types"] = hf["layer_types"][-2:]
    if family == "phi3_partial":
        hf["rope_parameters"]["partial_rotary_factor"] = 0.75  # of 32 dimensions, an even number
    return config_from_hf(hf)


def compiled(config, program):
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), param_specs(config))
    cache = jax.eval_shape(lambda: init_cache(config, B, C, kv_dtype="float32"))
    rows = jax.ShapeDtypeStruct((B,), "int32")
    if program == "decode":
        return decode_step.lower(params, config, rows, cache).compile()
    return prefill.lower(params, config, jax.ShapeDtypeStruct((B, C), "int32"), rows, cache).compile()


@pytest.mark.parametrize("program", ["prefill", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_and_bytes_are_those_that_xla_counts(family, program):
    """XLA counts element-wise work too, hence 2 %, and 3 where a CPU's decode merges the sums of blocks; plain jnp
    attention also scores what it then masks."""
    config = family_config(family)
    deployment = Deployment(config)
    counts = count_decode(deployment, B, C) if program == "decode" else count_prefill(deployment, B, C)
    queries = 1 if program == "decode" else C
    masked = 4 * B * queries * C * config.num_heads * config.head_dim * config.num_layers
    assert counts.kv_read.flops <= masked
    found = compiled(config, program)
    xla = found.cost_analysis()
    assert xla["flops"] == pytest.approx(counts.weights.flops + masked, rel=0.03 if program == "decode" else 0.02)
    assert counts.weights.flops < xla["flops"]

    # XLA adds up every operation's operands and results, whether they leave the caches or not: an upper bound. Decode
    # comes close to it, since it reads its weights once and little else; prefill's scores are what it adds most of.
    assert counts.bytes < xla["bytes accessed"] < {"decode": 1.6, "prefill": 3.5}[program] * counts.bytes

    memory = found.memory_analysis()
    tokens = 4 * (B if program == "decode" else B * C + B)
    tables = 4 * (B * math.ceil(C / deployment.page_size) + 2 * B)
    held = deployment.parameter_bytes + deployment.cache_bytes(B, C)
    # XLA leaves arguments that a program does not read out of its sum.
    assert memory.argument_size_in_bytes - held in range(tokens, tokens + tables + 1)


def test_every_family_is_among_them():
    """But those of routed experts, of whose loops XLA counts one step."""
    routed = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe"}
    assert {family_config(family).family for family in FAMILIES} == set(HF_FAMILIES) - routed


@pytest.mark.parametrize("tensor", [1, 2])
def test_of_experts_those_are_read_that_tokens_are_expected_to_have(tensor):
    deployment = Deployment(preset("mixtral-8x7b"), tensor=tensor)
    one_expert = 32 * 3 * 4096 * 14_336 * 2 // tensor
    others = deployment.parameter_bytes - 8 * one_expert
    assert deployment.weight_bytes_read(1) == others + 2 * one_expert
    assert deployment.weight_bytes_read(2) == others + round(8 * (1 - 0.75**2) * one_expert)
    assert deployment.weight_bytes_read(1000) == deployment.parameter_bytes
    measured = dataclasses.replace(deployment, routing=(1.0, 0.5, 0.5, *[0.0] * 5))
    assert measured.weight_bytes_read(3) == others + round((1 + 2 * (1 - 0.5**3)) * one_expert)
    with pytest.raises(ValueError, match="it must be 8 fractions"):
        dataclasses.replace(deployment, routing=(1.0,))


def test_a_token_is_multiplied_by_its_own_experts_alone():
    dense = 32 * (4096 * 6144 + 4096 * 4096 + 8 * 4096)
    deployment = Deployment(preset("mixtral-8x7b"))
    assert deployment.matrix_elements == dense + 2 * 32 * 3 * 4096 * 14_336
    counts = count_decode(deployment, 4, 100)
    assert counts.weights.flops == 2 * 4 * (deployment.matrix_elements + 32_000 * 4096)
    # Of the embedding, four rows.
    assert counts.weights.bytes == deployment.weight_bytes_read(4) - 2 * 32_000 * 4096 + 4 * 4096 * 2


def test_bytes_of_parameters_and_cache_are_those_held():
    config = tiny_config()
    deployment = Deployment(config, page_size=16)
    cache = init_cache(config, 3, 50, page_size=16, kv_dtype="float32")
    assert deployment.cache_bytes(3, 50) == cache.nbytes
    assert deployment.parameter_bytes == 4 * count_parameters(config)
    assert deployment.kv_bytes_per_token == 2 * 2 * 3 * 20 * 4


@pytest.mark.parametrize("tensor", [1, 2, 8, 16])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-2-9b", "qwen2.5-7b", "olmo-2-7b"])
def test_bytes_of_a_device_are_those_of_the_mesh(plugin, name, tensor):
    config = preset(name).replace(dtype="bfloat16")
    try:
        deployment = Deployment(config, tensor=tensor)
    except ValueError:
        assert (name, tensor) in {("qwen2.5-7b", 8), ("qwen2.5-7b", 16)}  # 4 KV heads of 7 queries each
        return
    mesh = targets.target_mesh("h200", tensor=tensor)
    assert deployment.parameter_bytes == bytes_per_device(abstract_params(deployment.config, mesh))
    cache = abstract_cache(deployment.config, mesh, 4, 1000)
    assert deployment.cache_bytes(4, 1000) == bytes_per_device(cache.pages)


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_collectives_are_those_of_the_compiled_program(plugin, program):
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    deployment = Deployment(config_from_hf(PRESETS["llama-3.1-8b"] | sizes | heads), tensor=4)
    mesh, shape = targets.target_mesh("h200", tensor=4), {"batch_size": 4, "max_length": 128}
    if program == "decode":
        lowered, counts = lower_decode(deployment.config, mesh, **shape), count_decode(deployment, 4, 128)
    else:
        lowered, counts = lower_prefill(deployment.config, mesh, tokens=64, **shape), count_prefill(deployment, 4, 64)
    found = collectives(parse(targets.compile_for_target(lowered).as_text()))
    assert [(each.kind, each.count, each.bytes) for each in found] == [
        ("all-reduce", counts.all_reduces, counts.collectives.bytes)
    ]


def test_every_part_by_hand():
    config = tiny_config(dtype="bfloat16")  # D 48, F 64, K 3, G 2, H 20, V 509, L 2, windows 9 and none
    counts = count_step(Deployment(config, kv="int8"), batch=2, tokens=3, cached=10)
    layer = 3 * 4 * 20 * 48 + 48 * 6 * 20 + 2 * 64 * 48 + 48 * 64
    assert counts.weights.flops == 2 * 6 * 2 * layer + 2 * 2 * 509 * 48
    assert counts.weights.bytes == 2 * (2 * layer + 5 * 48 + 509 * 48 + 6 * 48)
    pairs, keys = (9 + 9 + 9) + (11 + 12 + 13), 11 + 13
    assert counts.kv_read.flops == 2 * pairs * 4 * 6 * 20
    token = 2 * 3 * (20 + 4)  # k and v, heads, an element a byte and a float32 scale
    assert counts.kv_read.bytes == 2 * keys * token
    assert counts.kv_write.bytes == 6 * 2 * token
    assert counts.logits.bytes == 2 * 509 * 4
    assert counts.activations.bytes == 2 * (6 * (2 * (6 * 48 + 2 * 240 + 2 * 120 + 4 * 64) + 48) + 2 * 48)
    assert counts.collectives.bytes == counts.all_reduces == 0
    assert counts.bytes == sum(
        part.bytes for part in (counts.weights, counts.kv_read, counts.kv_write, counts.activations, counts.logits)
    )


def test_a_window_bounds_what_is_read_and_not_what_is_held():
    full = tiny_config()
    layers = tuple(LayerConfig(layer.rope, window=16) for layer in full.layers)
    windowed = full.replace(layers=layers)
    unbounded = full.replace(layers=tuple(LayerConfig(layer.rope) for layer in full.layers))
    near, far = (count_decode(Deployment(windowed), 1, context) for context in (16, 400))
    assert near.kv_read == far.kv_read
    assert count_decode(Deployment(unbounded), 1, 400).kv_read.bytes == 25 * far.kv_read.bytes
    assert Deployment(windowed).cache_bytes(1, 400) == Deployment(unbounded).cache_bytes(1, 400)


def test_chunks_add_up_to_the_whole_but_for_weights():
    deployment = Deployment(tiny_config())
    whole = count_prefill(deployment, 2, 48)
    chunks = [count_prefill(deployment, 2, 16, at) for at in (0, 16, 32)]
    total = chunks[0] + chunks[1] + chunks[2]
    assert total.kv_read.flops == whole.kv_read.flops
    assert total.kv_write == whole.kv_write
    assert total.tokens == whole.tokens == 96
    assert total.weights.bytes > 2.5 * whole.weights.bytes


def test_tied_embeddings_are_held_once_and_read_whole():
    tied, untied = (Deployment(tiny_config(tie_embeddings=tie)) for tie in (True, False))
    assert untied.parameter_bytes - tied.parameter_bytes == 509 * 48 * 4
    assert count_decode(tied, 1, 5) == count_decode(untied, 1, 5)


@pytest.mark.parametrize(
    ("weights", "bytes_per_element", "scales"),
    [
        ("int8", 1, lambda out, inputs: 4 * out),
        ("fp8", 1, lambda out, inputs: 4 * out),
        ("int4", 0.5, lambda out, inputs: 2 * out * math.ceil(inputs / 128)),
        ("int4-32", 0.5, lambda out, inputs: 2 * out * math.ceil(inputs / 32)),
    ],
)
def test_quantized_weights(weights, bytes_per_element, scales):
    config = preset("llama-3.1-8b")
    matrices = [(8 * 6 * 128, 4096), (4096, 4096), (2 * 14_336, 4096), (4096, 14_336)]
    layer = sum(out * inputs * bytes_per_element + scales(out, inputs) for out, inputs in matrices)
    rest = 2 * (2 * 128_256 * 4096 + 65 * 4096)
    assert Deployment(config, weights).parameter_bytes == 32 * layer + rest
    # The products are the same ones: weights are widened on their way.
    assert count_decode(Deployment(config, weights), 1, 9).flops == count_decode(Deployment(config), 1, 9).flops


def test_groups_are_shared_out_with_their_weights():
    # Eight devices share 14,336 inputs of down: 1,792 each, 14 groups of 128; and 32 x 128 of out: 512, 4 groups.
    config = preset("llama-3.1-8b")
    eighth = Deployment(config, "int4", tensor=8)
    assert 8 * eighth.parameter_bytes - Deployment(config, "int4").parameter_bytes == 7 * 65 * 4096 * 2  # norms


def test_replicated_kv_heads_are_paid_for():
    config = preset("llama-3.1-8b")
    eight, sixteen = Deployment(config, tensor=8), Deployment(config, tensor=16)
    assert sixteen.kv_bytes_per_token == eight.kv_bytes_per_token  # a whole head each, where half would be fair
    assert (sixteen.kv_heads, sixteen.q_per_kv) == (1, 2)
    assert 16 * count_decode(sixteen, 1, 9).flops > 8 * count_decode(eight, 1, 9).flops


def test_what_fits():
    deployment = Deployment(preset("llama-3.1-8b"))
    memory = deployment.parameter_bytes + 10 * deployment.cache_bytes(1, 4096)
    assert deployment.largest_batch(memory, 4096) == 10
    assert deployment.largest_batch(memory - 1, 4096) == 9
    assert deployment.longest_context(memory, 10) == 4096
    assert deployment.longest_context(memory - 1, 10) == 4096 - 64
    assert deployment.longest_context(1e15, 1) == 131_072
    assert deployment.longest_context(1e9, 1) == deployment.largest_batch(1e9, 1) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: Deployment(c, weights="int3"), "weights 'int3' is not known; known: float32, bfloat16"),
        (lambda c: Deployment(c, kv="int4"), "kv 'int4' is not known"),
        (lambda c: Deployment(c, tensor=0), "tensor is 0; it must be at least 1"),
        (lambda c: Deployment(c, tensor=2), "num_kv_heads|does not divide"),
        (lambda c: count_decode(Deployment(c), 0, 5), "batch is 0"),
        (lambda c: count_decode(Deployment(c), 1, 0), "cached is -1"),
        (
            lambda c: count_prefill(Deployment(c), 1, 500, 13),
            r"500 new tokens are 513, and the model was .* 512",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_config())
