"""The Mosaic GPU prefill kernel: interpreted against a dense softmax in NumPy float64, and compiled for the H200."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attention_cases import F16, FP8, INT8, Case, assert_close, dense
from ridgeline.pallas_kernels.attention import prefill_attention
from ridgeline.pallas_kernels.pages import AttentionOptions, Pages
from ridgeline.pallas_kernels.prefill_mosaic import prefill_attention_mosaic
from ridgeline.sharding.targets import compile_for_target, target_mesh


def case_of(T, starts=(0,), lengths=None, **fields) -> Case:
    """Rows of T tokens from `starts`, of which those below `lengths` are real: all, unless it is given."""
    return Case(T=T, starts=starts, lengths=lengths or tuple(start + T for start in starts), **fields)


CASES = [
    # Head dims, over more than one tile and with page sizes that are less, as much and more than a tile.
    case_of(H=64, S=64, T=150),
    case_of(H=80, S=16, T=70, G=3, starts=(100,)),
    case_of(H=96, S=32, T=40, G=4, starts=(0, 97)),
    case_of(H=128, S=128, T=20, G=8, starts=(250, 3)),
    case_of(H=192, S=64, T=9, G=16, starts=(120,)),
    case_of(H=256, S=128, T=33, starts=(64, 150), K=2),
    # Ragged rows: nothing, one token, no new token, fewer than T, a whole table.
    case_of(T=16, S=16, starts=(0, 0, 40, 20, 112), lengths=(0, 1, 40, 29, 128)),
    case_of(H=192, S=128, T=140, starts=(0, 77, 116), lengths=(139, 100, 256)),
    # Rows of one prompt, whose pages they share.
    case_of(S=32, G=4, T=12, starts=(64, 64, 80), shared=2),
    # What scores go through.
    case_of(S=64, T=64, G=2, starts=(130,), window=1),
    case_of(S=16, T=40, G=3, starts=(300, 0), window=200),
    case_of(H=256, S=64, T=20, starts=(200,), window=64, sinks=True),
    case_of(S=32, T=30, G=8, soft_cap=2.0),
    case_of(T=30, G=3, K=2, sinks=True, starts=(5,)),
    case_of(T=30, scale=1.5, soft_cap=50.0),
    case_of(H=96, S=64, T=40, G=4, K=2, starts=(90, 40), window=50, soft_cap=5.0, sinks=True, scale=0.2, shared=1),
    # float16.
    case_of(dtype=F16, T=40, G=4, starts=(90,)),
    case_of(H=80, dtype=F16, T=70, window=33, soft_cap=3.0, sinks=True),
    # Quantized caches.
    case_of(kv=INT8, T=30, G=4, K=2, starts=(0, 117)),
    case_of(H=80, S=32, kv=INT8, dtype=F16, T=50, G=3, starts=(90, 17), window=40, soft_cap=10.0, sinks=True),
    case_of(H=256, S=128, kv=INT8, T=16, G=8, starts=(0, 55, 200), lengths=(0, 60, 216)),
    case_of(H=96, S=64, kv=FP8, T=40, G=2, starts=(150, 0), lengths=(190, 1)),
    case_of(H=128, S=16, kv=FP8, dtype=F16, T=20, G=4, starts=(130,), sinks=True),
    case_of(H=192, S=128, kv=FP8, T=40, starts=(80, 80), window=30),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_is_a_dense_softmax(interpreter, case):
    arrays = case.arrays(CASES.index(case))
    out = prefill_attention_mosaic(**arrays, interpret=interpreter)
    assert_close(out, dense(**arrays), case.dtype)


def test_queries_past_the_length_yield_zeros(interpreter):
    case = case_of(T=12, G=3, starts=(0, 20), lengths=(5, 20), sinks=True)
    out = prefill_attention_mosaic(**case.arrays(0), interpret=interpreter)
    assert not np.asarray(out[0, 5:], np.float32).any()
    assert not np.asarray(out[1], np.float32).any()
    assert np.asarray(out[0, :5], np.float32).any(axis=-1).all()


def test_a_scale_that_is_not_positive_is_refused():
    case = case_of(T=8, scale=-0.5)
    with pytest.raises(NotImplementedError, match=r"scale is -0\.5; the kernel takes positive scales"):
        prefill_attention(**case.arrays(0), implementation="mosaic")


@pytest.mark.parametrize("kv", [None, INT8, FP8], ids=["bf16", "int8", "fp8"])
def test_compiled_for_hopper_it_holds_no_scores_and_copies_no_pages(plugin, kv):
    place = NamedSharding(target_mesh("h200"), PartitionSpec())
    B, T, K, G, H, P, S, N = 2, 4096, 8, 4, 128, 1024, 16, 512

    def array(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    arrays = {
        "q": array(B, T, K, G, H, dtype=jnp.bfloat16),
        "block_tables": array(B, N, dtype=jnp.int32),
        "starts": array(B, dtype=jnp.int32),
        "lengths": array(B, dtype=jnp.int32),
    }
    pages = array(P, K, S, H, dtype=kv or jnp.bfloat16)
    scales = None if kv is None else array(P, K, S, dtype=jnp.float32)
    arrays["pages"] = Pages(pages, pages, scales, scales)
    op = functools.partial(prefill_attention, options=AttentionOptions(H**-0.5, 1000), implementation="mosaic")
    compiled = compile_for_target(jax.jit(op).lower(**arrays))
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 1
    assert " dot(" not in text
    queries = B * T * K * G * H * 2
    scales = 2 * 4 * B * K * N * S if kv is not None else 0  # of pages of 16 positions, gathered
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * queries + 2 * scales + 2**20
