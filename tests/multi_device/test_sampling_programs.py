"""What sampling on a vocabulary split over eight devices communicates: candidates, not logits."""

import jax
import jax.numpy as jnp
import pytest

import ridgeline as rl
from ridgeline.sharding.hlo import collectives, parse

B, V = 4, 4096
MESH = {"tensor": 8}


def communicated(params: rl.SamplingParams) -> int:
    """Bytes that the largest kind of collective of one `sample` moves, on each device."""
    mesh = rl.make_mesh(**MESH)
    state, plan = rl.make_sampling_state([params] * B, [[1]] * B, [0] * B, V, mesh=mesh)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    logits = jax.ShapeDtypeStruct((B, V), jnp.float32, sharding=sharding)
    positions = jax.ShapeDtypeStruct((B,), jnp.int32)
    program = jax.jit(rl.sample, static_argnames="plan").lower(logits, state, positions, plan).compile()
    return max(found.bytes for found in collectives(parse(program.as_text())))


@pytest.mark.parametrize(
    "params",
    [
        rl.SamplingParams(temperature=0.0),
        rl.SamplingParams(temperature=0.7),
        rl.SamplingParams(top_k=20, top_p=0.9, min_p=0.1),
        rl.SamplingParams(temperature=0.0, logprobs=3, repetition_penalty=1.2),
    ],
    ids=["greedy", "plain", "top-k", "logprobs and penalties"],
)
def test_only_candidates_are_gathered(params):
    shard = B * V * 4 // 8
    assert communicated(params) < shard / 2


def test_top_p_alone_gathers_the_logits_once():
    shard = B * V * 4 // 8
    assert shard <= communicated(rl.SamplingParams(top_p=0.9)) < 2 * shard
