"""The quantized KV cache: what is stored, what attention sees of it, and that it is updated in place."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ridgeline as rl
from attention_cases import F32, FP8, INT8, Case, assert_close, dense
from ridgeline.decode.loop import decode_steps
from ridgeline.decode.sampling.state import make_sampling_state
from ridgeline.model.quantization import rounded
from ridgeline.model.transformer import transformer, unembed
from ridgeline.pallas_kernels.attention import causal_attention
from ridgeline.pallas_kernels.reference import _decode_in_one
from ridgeline.roofline.deployment import Deployment
from ridgeline.sharding.hlo import num_elements, parse
from tiny import tiny_config

PAGE, ROWS = 16, np.arange(3)
TOLERANCE = 1e-2
"""Of logits: where two numbers are as near, rounding differs between programs."""

LARGEST = {INT8: 127.0, FP8: 448.0}
KV = {"int8": INT8, "fp8": FP8}

on_dtypes = pytest.mark.parametrize("dtype", [INT8, FP8], ids=lambda dtype: dtype.__name__)
on_formats = pytest.mark.parametrize("kv", ["int8", "fp8"])


def quantize(x, dtype):
    """As the cache holds vectors: one scale each."""
    stored, scales = rounded(x, jnp.dtype(dtype).name)
    return stored, scales[..., 0]


def dequantized(x, dtype):
    stored, scales = quantize(x, dtype)
    return stored.astype(jnp.float32) * scales[..., None]


@pytest.fixture(scope="module")
def vectors():
    """[1, T, 3, 20] of every magnitude, the last heads with an outlier."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 64, 3, 20)) * 10.0 ** rng.uniform(-34, 36, (1, 64, 3, 1))
    x[..., 2, 7] *= 1000
    return jnp.asarray(x, jnp.float32)


@on_dtypes
def test_a_stored_number_is_the_nearest_there_is(vectors, dtype):
    stored, scales = map(np.asarray, quantize(vectors, dtype))
    assert (scales.dtype, scales.shape) == (np.float32, vectors.shape[:-1])
    np.testing.assert_allclose(scales, np.abs(vectors).max(axis=-1) / LARGEST[dtype], rtol=1e-6)
    exact = np.asarray(vectors, np.float64) / np.float64(scales)[..., None]
    expected = np.round(exact) if dtype == INT8 else exact.astype(ml_dtypes.float8_e4m3fn).astype(float)
    # Where two are as near as float32 tells, it may be either.
    differing = stored.astype(float) != expected
    assert differing.mean() < 1e-3
    error = np.abs(stored.astype(float) - exact)
    step = 1.0 if dtype == INT8 else 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-6))) - 3)
    assert (error <= step / 2 * (1 + 1e-4)).all()
    assert np.abs(stored.astype(float)).max(axis=-1).min() == LARGEST[dtype]


@on_dtypes
def test_quantizing_what_was_dequantized_changes_nothing(vectors, dtype):
    stored, scales = quantize(vectors, dtype)
    again, scales_again = quantize(dequantized(vectors, dtype), dtype)
    np.testing.assert_array_equal(stored.astype(jnp.float32), again.astype(jnp.float32))
    np.testing.assert_allclose(scales, scales_again, rtol=1e-6)


@on_dtypes
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3.4e38], ids=str)
def test_nothing_and_extremes_stay_finite(dtype, value):
    x = jnp.array([[[[0, 0, 0, 0], [value, -value, 0, 0]]]], jnp.float32)
    out = np.asarray(dequantized(x, dtype))
    np.testing.assert_allclose(out, x, rtol=1e-6, atol=127 * 1.2e-38)  # a scale is no subnormal number
    assert not out[..., 0, :].any()


@on_dtypes
def test_decode_in_one_product_is_attention_over_dequantized_pages(dtype):
    """What GPUs without a kernel get; CPUs get the form in blocks, which test_attention holds against the oracle."""
    case = Case(H=20, S=16, K=2, G=3, T=3, dtype=F32, kv=dtype, window=30, sinks=True, lengths=(1, 100, 3))
    arrays = case.arrays(5, garbage=100.0)
    expected = dense(**arrays, starts=np.asarray(case.lengths) - 3)
    q = jnp.moveaxis(arrays["q"], 1, 2)  # [B, K, T, G, H]
    rest = map(arrays.get, ("pages", "block_tables", "lengths", "sinks"))
    out = _decode_in_one(q.reshape(3, 2, -1, 20), *rest, queries=3, options=case.options)
    assert_close(jnp.moveaxis(out.reshape(q.shape), 2, 1), expected, F32)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 509, (3, 64)), jnp.int32)


@pytest.fixture(scope="module", params=["int8", "fp8"])
def quantized(request, model, tokens):
    """A format, and teacher-forced logits with the keys and values that such a cache gives back."""

    def attend(q, k, v, spec, state):
        k, v = dequantized(k, KV[request.param]), dequantized(v, KV[request.param])
        return causal_attention(q, k, v, spec), state

    @jax.jit
    def logits(params):
        x, _ = transformer(params, model.config, tokens, attend=attend)
        return unembed(params, model.config, x)

    return request.param, np.asarray(logits(model.params))


def shuffled(cache):
    """The same empty cache with its pages dealt out at random."""
    tables = np.random.default_rng(1).permutation(cache.block_tables.size).reshape(cache.block_tables.shape)
    return cache.replace(block_tables=jnp.asarray(tables, jnp.int32))


@pytest.mark.parametrize("arrange", [lambda cache: cache, shuffled], ids=["dense", "paged"])
def test_prefill_in_one_and_in_chunks_and_decode_see_the_same_cache(model, tokens, quantized, arrange):
    kv, expected = quantized
    lengths = np.array([60, 24, 5], np.int32)
    empty = functools.partial(rl.init_cache, model.config, 3, 100, page_size=PAGE, kv_dtype=kv)

    def prefilled(chunk):
        cache = arrange(empty())
        for start in range(0, 64, chunk):
            part = tokens[:, start : start + chunk]
            logits, cache = rl.prefill(model.params, model.config, part, np.clip(lengths - start, 0, chunk), cache)
            ends = (lengths > start) & (lengths <= start + chunk)
            np.testing.assert_allclose(logits[ends], expected[ROWS, lengths - 1][ends], atol=TOLERANCE)
        return cache

    whole, cache = prefilled(64), prefilled(32)
    np.testing.assert_array_equal(cache.lengths, lengths)
    for one, other in zip(whole.pages, cache.pages, strict=True):
        np.testing.assert_allclose(one.k_scales, other.k_scales, rtol=1e-4)
        numbers = other.numbers()
        for pages, scales in ((numbers.k, other.k_scales), (numbers.v, other.v_scales)):
            filled = np.zeros(scales.shape, bool)  # padding left no trace, in pages and in scales
            for row, length in enumerate(lengths):
                for position in range(length):
                    filled[cache.block_tables[row, position // PAGE], :, position % PAGE] = True
            np.testing.assert_array_equal(np.asarray(scales) > 0, filled)
            np.testing.assert_array_equal(np.asarray(pages.astype(F32)).any(axis=-1), filled)
    for step in range(4):
        logits, cache = rl.decode_step(model.params, model.config, tokens[ROWS, lengths + step], cache)
        np.testing.assert_allclose(logits, expected[ROWS, lengths + step], atol=TOLERANCE)


def test_a_full_row_leaves_no_trace_in_the_scales(model, tokens):
    cache = rl.init_cache(model.config, 3, 20, page_size=PAGE, kv_dtype="int8")
    cache = cache.replace(max_lengths=jnp.array([20, 0, 20], jnp.int32))
    _, cache = rl.decode_step(model.params, model.config, tokens[:, 0], cache)
    for leaf in jax.tree.leaves(cache.pages):
        assert np.asarray(leaf).reshape(3, -1).any(axis=1).tolist() == [True, False, True]


@on_formats
def test_the_bundled_model_tells_the_same_story(bundled, kv):
    greedy = rl.SamplingParams(temperature=0.0, max_tokens=17)
    prompts = ["The old king", "The sea was"]
    expected, found = rl.generate(bundled, prompts, greedy), rl.generate(bundled, prompts, greedy, kv_dtype=kv)
    for one, other in zip(expected, found, strict=True):
        assert one.tokens == other.tokens


def test_an_unknown_format_is_refused_before_any_work(model):
    known = r"kv_dtype 'int3' is not known; known: float32, bfloat16, float16, int8, fp8"
    with pytest.raises(ValueError, match=known):
        rl.init_cache(model.config, 1, 8, kv_dtype="int3")
    with pytest.raises(ValueError, match=known):
        rl.stream(model, [[1]], kv_dtype="int3")
    with pytest.raises(ValueError, match="int16"):
        rl.init_cache(model.config, 1, 8, kv_dtype=jnp.int16)


@pytest.mark.parametrize("kv", ["float16", "int8", "fp8"])
def test_bytes_are_those_of_the_plan(kv):
    config = tiny_config()
    cache = rl.init_cache(config, 3, 50, page_size=16, kv_dtype=kv)
    assert cache.nbytes == Deployment(config, kv=kv, page_size=16).cache_bytes(3, 50)
    assert len(jax.tree.leaves(cache)) == 3 + config.num_layers * (2 if kv == "float16" else 4)


@pytest.mark.parametrize(("kv", "B"), [("int8", 1), ("fp8", 4)])  # of one row XLA makes an update, of four a scatter
def test_decode_updates_pages_and_scales_in_place(kv, B):
    config = tiny_config()
    params = jax.eval_shape(lambda: rl.init_params(config, jax.random.key(0)))
    cache = jax.eval_shape(lambda: rl.init_cache(config, B, 2048, kv_dtype=kv))
    state, plan = make_sampling_state([rl.SamplingParams()] * B, [[]] * B, [0] * B, config.vocab_size, (), batch_size=B)
    last = jax.ShapeDtypeStruct((B,), jnp.int32)
    compiled = decode_steps.lower(params, config, last, cache, state, plan, steps=4).compile()
    memory = compiled.memory_analysis()
    aliased = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache, state)))
    assert memory.alias_size_in_bytes == aliased
    leaf = cache.pages[1].k  # of the layer that keeps all positions
    assert memory.temp_size_in_bytes < 2 * leaf.size  # blocks of it as float32; all of it would take four
    sizes = {leaf.size for leaf in jax.tree.leaves(cache.pages)}
    written = [made for made, shape in parse(compiled.as_text()).written() if num_elements(shape) in sizes]
    assert sorted(written) == ["dynamic-update-slice" if B == 1 else "scatter"] * 4 * config.num_layers
