"""Derivatives in both modes, and `vmap`, of what runs over a cache: against `forward` and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.model.quantization import QuantizedArray
from ridgeline.model.schemes import SCHEMES, Quantization
from tiny import tiny_config, tiny_model

LENGTHS = np.array([11, 6])
NEXT = jnp.array([3, 5])


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 509, (2, 11)))


def through_cache(params, config, tokens, **cache):
    """Logits after the prompt and after one more token: [2, B, V]."""
    cache = rl.init_cache(config, 2, 16, page_size=4, **cache)
    first, cache = rl.prefill(params, config, tokens, jnp.asarray(LENGTHS), cache)
    return jnp.stack([first, rl.decode_step(params, config, NEXT, cache)[0]])


def at_once(params, config, tokens):
    """The same by `forward`."""
    rows = np.arange(2)
    texts = jnp.pad(tokens, ((0, 0), (0, 1))).at[rows, LENGTHS].set(NEXT)
    logits = rl.forward(params, config, texts)
    return jnp.stack([logits[rows, LENGTHS - 1], logits[rows, LENGTHS]])


def score(logits):
    return jnp.sum(jnp.sin(jnp.arange(logits.size)).reshape(logits.shape) * jnp.tanh(logits))


@pytest.mark.parametrize(("tables", "jit"), [(None, False), ([[3, 0, 6, 1], [7, 2, 5, 4]], True)])
def test_the_gradient_through_a_cache_is_that_of_forward(model, tokens, tables, jit):
    def of(logits_of, **cache):
        gradient = jax.grad(lambda params: score(logits_of(params, model.config, tokens, **cache)))
        return (jax.jit(gradient) if jit else gradient)(model.params)

    found, expected = of(through_cache, block_tables=tables), of(at_once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max())), found, expected)


def test_derivatives_are_the_slope(tokens):
    """Of a family with windows and caps on scores, by finite differences; forward mode agrees with reverse mode."""
    model = tiny_model(tiny_config(attn_soft_cap=3.0))

    @jax.jit
    def at(step):
        params = jax.tree.map(lambda a, b: a + step * b, model.params, toward)
        return score(through_cache(params, model.config, tokens))

    toward = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape) * 0.02, model.params)
    slope = (at(0.05) - at(-0.05)) / 0.1
    np.testing.assert_allclose(jax.jvp(at, (0.0,), (1.0,))[1], slope, rtol=1e-2)
    np.testing.assert_allclose(jax.grad(at)(0.0), slope, rtol=1e-2)


def test_keys_and_values_of_8_bits_have_no_derivative(model, tokens):
    with pytest.raises(NotImplementedError, match=r"cache holds in int8; make it with kv_dtype='float32'"):
        jax.grad(lambda p: score(through_cache(p, model.config, tokens, kv_dtype="int8")))(model.params)


def test_through_quantized_weights_it_is_that_of_the_weights_they_stand_for(tokens):
    model = tiny_model(tiny_config(quantization=Quantization(SCHEMES["int8"])))
    dense = jax.tree.map(
        lambda leaf: rl.dequantize(leaf) if isinstance(leaf, QuantizedArray) else leaf,
        model.params,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedArray),
    )

    def of(logits_of, params):
        return jax.grad(lambda x: score(logits_of(params | {"embedding": x}, model.config, tokens)))(
            params["embedding"]
        )

    expected = of(at_once, dense)
    np.testing.assert_allclose(of(through_cache, model.params), expected, atol=1e-3 * float(jnp.abs(expected).max()))


def test_vmap_over_tokens_and_caches(model, tokens):
    batches, lengths = jnp.stack([tokens, tokens[::-1]]), jnp.asarray(LENGTHS)
    empty = rl.init_cache(model.config, 2, 16, page_size=4)

    @jax.vmap
    def mapped(tokens, cache):
        first, cache = rl.prefill(model.params, model.config, tokens, lengths, cache)
        return first, *rl.decode_step(model.params, model.config, NEXT, cache)

    first, second, cache = mapped(batches, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), empty))
    for batch, *logits in zip(batches, first, second, strict=True):
        np.testing.assert_allclose(jnp.stack(logits), through_cache(model.params, model.config, batch), atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [lengths + 1] * 2)
