"""Reading compiled programs: real texts, cut to the lines that count, and a program compiled here."""

import jax
import jax.numpy as jnp
import pytest

from ridgeline.sharding.hlo import Collective, collectives, num_bytes, num_elements, parse

# XLA:GPU in JAX 0.12: a collective inside a fusion, an asynchronous pair, and one over a tuple, from XLA:CPU.
NEW = """\
HloModule jit_decode_step, is_scheduled=true, input_output_alias={ {1}: (16, {}, may-alias) }, num_partitions=8

%add.1.clone (x.2: bf16[], y.2: bf16[]) -> bf16[] {
  %x.2 = bf16[] parameter(0)
  %y.2 = bf16[] parameter(1)
  ROOT %add.9 = bf16[] add(%x.2, %y.2)
}

%fused_all-reduce.5.clone (param_0.512: bf16[16,1,4096]) -> bf16[16,1,4096] {
  %param_0.512 = bf16[16,1,4096]{2,1,0} parameter(0), metadata={scheduling_name="param_0.512"}
  ROOT %all-reduce.7 = bf16[16,1,4096]{2,1,0} all-reduce(%param_0.512), channel_id=2, replica_groups=mesh['tensor'=8] \
{'tensor'}, use_global_device_ids=true, to_apply=%add.1.clone
}

%fused_scatter (p.1: bf16[2048,1,64,128], p.2: s32[16,2], p.3: bf16[16,1,128]) -> bf16[2048,1,64,128] {
  %p.1 = bf16[2048,1,64,128]{3,2,1,0} parameter(0)
  %p.2 = s32[16,2]{1,0} parameter(1)
  %p.3 = bf16[16,1,128]{2,1,0} parameter(2)
  %convert.4 = f32[16,1,128]{2,1,0} convert(%p.3)
  %scatter.1 = bf16[2048,1,64,128]{3,2,1,0} scatter(%p.1, %p.2, %convert.4), to_apply=%add.1.clone
  ROOT %bitcast.6 = bf16[2048,1,64,128]{3,2,1,0} bitcast(%scatter.1)
}

ENTRY %main.18_spmd (param.1: bf16[16,1,4096], param.2: bf16[2048,1,64,128]) -> (bf16[16,1,4096]) {
  %param.1 = bf16[16,1,4096]{2,1,0} parameter(0)
  %param.2 = bf16[2048,1,64,128]{3,2,1,0} parameter(1)
  %param.3 = s32[16,2]{1,0} parameter(2)
  %wrapped_concatenate = f32[32]{0} concatenate(%param.3)
  %fusion.1 = bf16[16,1,4096]{2,1,0} fusion(%param.1), kind=kCustom, calls=%fused_all-reduce.5.clone
  %all-reduce-start = ((f32[32]{0}), f32[32]{0}) all-reduce-start(%wrapped_concatenate), channel_id=4, \
replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add.1.clone
  %all-reduce-done = f32[32]{0} all-reduce-done(%all-reduce-start)
  %y.1 = f32[16,1]{1,0} slice(%all-reduce-done)
  %y.2 = f32[16,1]{1,0} slice(%all-reduce-done)
  %all-reduce.9 = (f32[16,1]{1,0}, /*index=1*/f32[16,1]{1,0}) all-reduce(%y.1, %y.2), to_apply=%add.1.clone
  %fusion.2 = bf16[2048,1,64,128]{3,2,1,0} fusion(%param.2, %param.3, %fusion.1), kind=kInput, calls=%fused_scatter
  %all-gather-start = (bf16[16,1,4096]{2,1,0}, bf16[128,1,4096]{2,1,0}) all-gather-start(%fusion.1), dimensions={0}
  %all-gather-done = bf16[128,1,4096]{2,1,0} all-gather-done(%all-gather-start)
  ROOT %tuple.3 = (bf16[16,1,4096]{2,1,0}) tuple(%fusion.1), control-predecessors={%fusion.2, %all-reduce.9}
}
"""

LOOP = """\
HloModule jit_decode_steps, num_partitions=2

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %gte.0 = s32[] get-tuple-element(%p), index=0
  %gte.1 = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %reduced = f32[4,8]{1,0} all-reduce(%gte.1), replica_groups={{0,1}}, to_apply=%add
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%gte.0, %reduced)
}

%condition (p.1: (s32[], f32[4,8])) -> pred[] {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %a = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], f32[4,8]{1,0}) while(%a), condition=%condition, body=%body, TRIPS
}
"""


def test_each_kind_counts_once_an_operation_and_all_operands():
    assert collectives(parse(NEW)) == [
        Collective("all-gather", 1, 16 * 4096 * 2),
        Collective("all-reduce", 3, 16 * 4096 * 2 + 32 * 4 + 2 * 16 * 4),
    ]


def test_loops_count_as_often_as_they_run():
    known = 'backend_config={"known_trip_count":{"n":"8"},"known_init_step":{"init":"0","step":"1"}}'
    assert collectives(parse(LOOP.replace("TRIPS", known))) == [Collective("all-reduce", 8, 8 * 4 * 8 * 4)]
    assert collectives(parse(LOOP.replace("TRIPS", "backend_config={}"))) == [Collective("all-reduce", 1, 4 * 8 * 4)]


def test_a_fusion_writes_what_its_root_makes():
    written = list(parse(NEW).written())
    assert ("scatter", "bf16[2048,1,64,128]{3,2,1,0}") in written
    assert ("all-reduce", "bf16[16,1,4096]{2,1,0}") in written
    assert not [operation for operation, _ in written if operation in ("convert", "parameter", "fusion", "tuple")]


@pytest.mark.parametrize(
    ("shape", "elements", "size"),
    [
        ("bf16[16,1,4096]{2,1,0}", 65536, 131072),
        ("f32[]", 1, 4),
        ("pred[3,5]{1,0}", 15, 15),
        ("s4[7]{0}", 7, 4),
        ("f8e4m3fn[2,3]{1,0:S(5)}", 6, 6),
        ("c64[2]{0}", 2, 16),
        ("(f32[2]{0}, /*index=1*/(s32[3]{0}, token[]))", 6, 20),
    ],
)
def test_sizes(shape, elements, size):
    assert (num_elements(shape), num_bytes(shape)) == (elements, size)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match=r"no ENTRY computation; pass compiled.as_text\(\)"):
        parse("the quick brown fox")


def test_a_program_compiled_here():
    def transposed(x, y):
        return x.T @ y, jnp.tanh(x).T.copy()

    shape = jax.ShapeDtypeStruct((96, 160), jnp.float32)
    program = parse(jax.jit(transposed).lower(shape, shape).compile().as_text())
    assert collectives(program) == []
    sizes = [num_elements(shape) for operation, shape in program.written() if operation != "dot"]
    assert 96 * 160 in sizes


def test_an_instruction_tells_where_it_comes_from():
    @jax.jit
    def program(x):
        with jax.named_scope("layer_0"):
            return x @ x

    found = parse(program.lower(jnp.ones((64, 64))).compile().as_text())
    origins = [made.origin for computation in found.computations.values() for made in computation.values()]
    assert "jit(program)/layer_0/dot_general" in origins
    without = parse("ENTRY %main (p: f32[]) -> f32[] {\n  %p = f32[] parameter(0)\n}")
    assert without.computations["main"]["p"].origin == ""
