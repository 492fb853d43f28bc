"""Programs compiled for an H200 that is not there: the kernels attend over the cache, and nothing else reads it.

The models are published ones, a family each, cut to two layers of full width; nothing is executed.
"""

import functools
import math
import re
import warnings

import pytest

import ridgeline as rl
from ridgeline.programs import abstract_cache, lower_decode, lower_prefill
from ridgeline.sharding.hlo import num_elements, parse
from ridgeline.sharding.targets import compile_for_target, target_mesh

BATCH, CONTEXT = 16, 4096
MODELS = {
    "llama-2-7b": "llama",
    "llama-3.1-8b": "llama",
    "mistral-7b-v0.1": "mistral",
    "qwen2.5-7b": "qwen2",
    "qwen3-8b": "qwen3",
    "gemma-2-9b": "gemma2",
    "gemma-3-1b": "gemma3",
    "phi-3-mini-4k": "phi3",
    "olmo-2-7b": "olmo2",
}
KERNEL = re.compile(r'custom_call_target="mosaic_gpu_v2"')
PROGRAMS = {"decode": (lower_decode, 2), "prefill": (functools.partial(lower_prefill, tokens=256), 1)}
"""How each is lowered, and its kernels a layer: decode splits the cache and combines the parts."""


pytestmark = pytest.mark.usefixtures("plugin")


def compiled(name, program, target="h200", tensor=1):
    config = rl.preset(name)
    config = config.replace(layers=config.layers[:2], vocab_size=1024, dtype="bfloat16")
    mesh = target_mesh(target, tensor=tensor)
    text = compile_for_target(PROGRAMS[program][0](config, mesh, batch_size=BATCH, max_length=CONTEXT)).as_text()
    leaf = abstract_cache(config, mesh, BATCH, CONTEXT).pages[0].k
    return config, text, math.prod(leaf.sharding.shard_shape(leaf.shape))


def readers(text, elements):
    """What reads arrays of so many elements, outside fusions: opcodes, a fusion under that of its result."""
    program = parse(text)
    fused = {
        name
        for instructions in program.computations.values()
        for i in instructions.values()
        if i.opcode == "fusion"
        for name, _ in i.called
    }
    found = []
    for name, instructions in program.computations.items():
        for instruction in () if name in fused else instructions.values():
            sizes = [num_elements(instructions[o].shape) for o in instruction.operands if o in instructions]
            if elements in sizes:
                opcode = instruction.opcode
                if opcode == "fusion":
                    (root,) = [i for i in program.computations[instruction.called[0][0]].values() if i.root]
                    opcode = root.opcode
                found.append(opcode)
    return found


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_alone_attends_over_the_cache(name, program):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a refusal would be told
        config, text, elements = compiled(name, program)
    assert config.family == MODELS[name]
    kernels = PROGRAMS[program][1] * config.num_layers
    assert len(KERNEL.findall(text)) == kernels
    found = readers(text, elements)
    moved = {"tuple", "get-tuple-element", "bitcast", "call", "while", "conditional"}
    assert found.count("scatter") == 2 * config.num_layers  # the new keys and values, in place
    assert found.count("custom-call") == config.num_layers
    assert set(found) <= {"scatter", "custom-call"} | moved


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_layers_share_one_schedule(program):
    """What is worked out from the lengths is worked out once a step, however many layers there are."""
    config = rl.preset("llama-3.1-8b")
    mesh = target_mesh("h200")

    def others(layers):
        cut = config.replace(layers=config.layers[:layers], vocab_size=1024)
        lowered = PROGRAMS[program][0](cut, mesh, batch_size=BATCH, max_length=CONTEXT)
        written = parse(compile_for_target(lowered).as_text()).written()
        return sum(num_elements(shape) > 1 for _, shape in written)  # scalars are the bodies of reductions

    one, two, three = others(1), others(2), others(3)
    assert three - two == two - one
    assert two - one <= 16  # products, norms, rotation, writes of k and v, the kernels


@pytest.mark.parametrize("program", PROGRAMS)
def test_another_gpu_is_served_by_the_reference_and_says_so(program):
    from ridgeline.pallas_kernels import dispatch

    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="need a Hopper GPU and this is 'NVIDIA A100"):
        _, text, _ = compiled("llama-3.1-8b", program, target="a100")
    assert not KERNEL.search(text)
