"""What sampling on a vocabulary split over eight devices communicates: candidates, not logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.decode.sampling.layout import request_arrays
from ridgeline.decode.sampling.state import insert
from ridgeline.sharding.hlo import COLLECTIVES, collectives, num_bytes, parse

B, V = 4, 65536
MESH = {"tensor": 8}


def communicated(params: rl.SamplingParams) -> tuple[int, int]:
    """Bytes of the largest collective of one `sample` on each device: always, and where the candidates are too few."""
    mesh = rl.make_mesh(**MESH)
    state, plan = rl.make_sampling_state([params] * B, [[1]] * B, [0] * B, V, mesh=mesh)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    logits = jax.ShapeDtypeStruct((B, V), jnp.float32, sharding=sharding)
    positions = jax.ShapeDtypeStruct((B,), jnp.int32)
    program = jax.jit(rl.sample, static_argnames="plan").lower(logits, state, positions, plan).compile()
    largest = [0, 0]
    for instructions in parse(program.as_text()).computations.values():
        for found in instructions.values():
            if found.opcode.removesuffix("-start") in COLLECTIVES:
                size = sum(num_bytes(instructions[operand].shape) for operand in found.operands)
                rare = "whole_vocabulary" in found.origin
                largest[rare] = max(largest[rare], size)
    return largest[0], largest[1]


@pytest.mark.parametrize(
    "params",
    [
        rl.SamplingParams(temperature=0.0),
        rl.SamplingParams(temperature=0.7),
        rl.SamplingParams(top_k=20, top_p=0.9, min_p=0.1),
        rl.SamplingParams(temperature=0.0, logprobs=3, repetition_penalty=1.2),
    ],
    ids=["greedy", "plain", "filters", "logprobs and penalties"],
)
def test_only_candidates_are_gathered(params):
    shard = B * V * 4 // 8
    always, rarely = communicated(params)
    assert always < shard / 8
    assert rarely == (0 if params == rl.SamplingParams(temperature=0.0) else shard)


def test_requests_enter_tables_that_stay_split():
    mesh = rl.make_mesh(data=2, tensor=4)
    state, _ = rl.make_sampling_state([rl.SamplingParams(repetition_penalty=1.2)] * B, [[1]] * B, [0] * B, V, mesh=mesh)
    arrays = request_arrays([rl.SamplingParams(logit_bias={3: 1.0})], [[5, 6]], [1])
    program = insert.lower(state, np.array([2], np.int32), arrays).compile()
    assert sum(found.bytes for found in collectives(parse(program.as_text()))) < 1024
    state = program(state, np.array([2], np.int32), arrays)
    assert state.bias.sharding.spec == state.output_counts.sharding.spec == jax.sharding.PartitionSpec("data", "tensor")
    assert np.argwhere(np.asarray(state.bias)).tolist() == [[2, 3]]
