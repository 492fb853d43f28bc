"""The reference product against NumPy float64, what operands are refused, and who serves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import CASES, Case, exact

from ridgeline.pallas_kernels import dispatch
from ridgeline.pallas_kernels.matmul import matmul


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_dequantize_then_multiply(case):
    x, weight = case.operands()
    expected = exact(x, **weight)
    out = matmul(x, **weight, out_dtype=jnp.float32, implementation="reference")
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_bias_gate_and_residual(activation):
    from scipy.special import erf

    rng = np.random.default_rng(0)
    x, values, bias, residual = (rng.normal(size=n) for n in ((3, 32), (2, 5, 32), (2, 5), (3, 5)))
    operands = {"bias": bias, "residual": residual}
    out = matmul(*(jnp.float32(a) for a in (x, values)), activation=activation, **jax.tree.map(jnp.float32, operands))
    gate, up = np.einsum("mk,tnk->tmn", x, values) + bias[:, None]
    gated = {
        "silu": gate / (1 + np.exp(-gate)),
        "gelu": gate * (1 + erf(gate / np.sqrt(2))) / 2,
        "gelu_tanh": gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2,
    }[activation]
    np.testing.assert_allclose(out, gated * up + residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scales": None}, "scales are missing"),
        ({"values": jnp.zeros((64, 64))}, "scales are given"),
        ({"scales": jnp.ones((64, 3))}, "they must divide a weight of"),
        ({"x": jnp.zeros((2, 96))}, "x has 96 inputs and the weight 64"),
        ({"zeros": jnp.zeros((64, 1), jnp.uint8)}, "zeros are .* they go with integers in uint8"),
        ({"activation": "relu"}, "relu"),
        ({"activation": "silu"}, "three axes, the first of 2"),
        ({"implementation": "mosaik"}, "mosaik"),
    ],
    ids=str,
)
def test_operands_that_make_no_product(change, reason):
    operands = {"x": jnp.zeros((2, 64)), "values": jnp.zeros((64, 64), jnp.int8), "scales": jnp.ones((64, 1))}
    with pytest.raises((ValueError, TypeError), match=reason):
        matmul(**operands | change)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("bfloat16", M=65), "65 rows of activations"),
        (Case("int8", dtype=jnp.float32), "activations are float32"),
        (Case("int8", K=96), "96 inputs of 8 bits; the kernel takes multiples of 64"),
        (Case("int8", N=96), "96 outputs; the kernel takes multiples of 64"),
        (Case("int4", K=256, group=16), "groups of 32, 64 or 128, not 16"),
        (Case("fp8", K=256, group=128, block_rows=32), "32 outputs share a scale"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_serve_is_refused(case, reason):
    x, weight = case.operands()
    with pytest.raises(NotImplementedError, match=reason):
        matmul(x, **weight, implementation="mosaic")


def test_the_kernel_serves_hopper_and_says_what_it_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "current_device", lambda: dispatch.Device("gpu", "NVIDIA H200", 132))

    def program(case):
        x, weight = case.operands()
        return str(jax.jit(functools.partial(matmul, **weight)).trace(x).jaxpr)

    assert "name=matmul" in program(Case("int8"))
    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="65 rows of activations"):
        assert "matmul_mosaic" not in program(Case("int8", M=65))
