"""linear, norms and the MLP against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ridgeline.model.layers import ACTIVATION_FUNCTIONS, gated_mlp, linear, rms_norm, soft_cap
from tiny import weight_spec

rng = np.random.default_rng(0)


def random(*shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(1,), (2,), (3, 5), ()])
def test_linear(rows, dtype):
    x, w, bias = random(*rows, 24), random(3, 4, 24), random(3, 4)
    spec = weight_spec(w)
    out = linear(*(jnp.asarray(a, dtype) for a in (x, w)), spec, jnp.asarray(bias, dtype))
    x, w, bias = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, w, bias))
    assert out.dtype == dtype
    expected = np.einsum("...i,abi->...ab", x, w) + bias
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-4
    )


def test_linear_contracts_several_axes_and_keeps_float32_on_request():
    x, w = random(2, 3, 4, 5), random(7, 3, 4, 5)
    out = linear(jnp.asarray(x, "bfloat16"), jnp.asarray(w, "bfloat16"), weight_spec(w, 3), out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, np.einsum("bxyz,oxyz->bo", x, w), atol=0.2)
    with pytest.raises(ValueError, match=r"contracts \(5,\) of x with \(4,\) of w"):
        linear(jnp.ones((2, 5)), jnp.ones((3, 4)), weight_spec(jnp.ones((3, 4))))


def test_one_row_of_16_bit_weights_makes_no_copy_of_them_on_a_cpu():
    w = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 1024), jnp.bfloat16)
    memory = jax.jit(linear, static_argnums=2).lower(x, w, weight_spec(w)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 1024 // 4


@pytest.mark.parametrize("size", [64, 96, 768, 2048, 4096, 4160])
def test_one_row_of_16_bit_weights(size):
    x, w = (jnp.asarray(random(*shape), "bfloat16") for shape in ((size,), (2, 5, size)))
    expected = np.einsum("i,abi->ab", np.asarray(x, np.float64), np.asarray(w, np.float64))
    y = jax.jit(lambda x, w: linear(x, w, weight_spec(w), out_dtype=jnp.float32))(x, w)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-3)


def test_a_loop_does_not_widen_16_bit_weights_beforehand():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (linear(x, w, weight_spec(w)), None), x, length=4)[0]

    w = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)
    memory = jax.jit(loop).lower(jax.ShapeDtypeStruct((1, 2048), jnp.bfloat16), w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 2048 // 4


@pytest.mark.parametrize("rows", [1, 3, 65])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_linear_has_the_gradient_of_a_product(rows, dtype):
    x, w = jnp.asarray(random(rows, 64), dtype), jnp.asarray(random(2, 3, 64), dtype)
    spec = weight_spec(w)
    dx, dw = jax.grad(lambda x, w: jnp.sum(linear(x, w, spec, out_dtype=jnp.float32)), argnums=(0, 1))(x, w)
    tolerance = {"rtol": 1e-2, "atol": 0.1} if dtype != "float32" else {"rtol": 1e-5, "atol": 1e-4}
    wide_x, wide_w = (np.asarray(a, np.float32) for a in (x, w))
    np.testing.assert_allclose(np.asarray(dx, np.float32), np.tile(wide_w.sum((0, 1)), (rows, 1)), **tolerance)
    np.testing.assert_allclose(np.asarray(dw, np.float32), np.tile(wide_x.sum(0), (2, 3, 1)), **tolerance)


def test_linear_is_differentiable():
    x, w = jnp.asarray(random(3, 8)), jnp.asarray(random(5, 8))
    dx, dw = jax.grad(lambda x, w: jnp.sum(linear(x, w, weight_spec(w)) ** 2), argnums=(0, 1))(x, w)
    y = x @ w.T
    np.testing.assert_allclose(dx, 2 * y @ w, rtol=1e-4)
    np.testing.assert_allclose(dw, 2 * y.T @ x, rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_over_the_axes_of_its_weight(offset):
    x, weight = random(2, 3, 4, 5), random(4, 5)
    expected = x / np.sqrt((x**2).mean((2, 3), keepdims=True) + 1e-5) * (weight + offset)
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5, offset), expected, rtol=1e-5)


def test_soft_cap():
    x = jnp.asarray(random(10) * 100)
    np.testing.assert_allclose(soft_cap(x, 30.0), 30 * np.tanh(x / 30), rtol=1e-5)
    assert soft_cap(x, None) is x


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
def test_gated_mlp(activation):
    from scipy.special import erf

    formulas = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    }
    x, gate_up, down = random(1, 2, 6), random(2, 9, 6), random(6, 9)
    weights = {"gate_up": jnp.asarray(gate_up), "down": jnp.asarray(down)}
    specs = {name: weight_spec(w) for name, w in weights.items()}
    expected = formulas[activation](x @ gate_up[0].T) * (x @ gate_up[1].T) @ down.T
    np.testing.assert_allclose(gated_mlp(jnp.asarray(x), weights, specs, activation), expected, rtol=1e-4, atol=1e-4)
