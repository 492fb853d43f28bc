"""Products on a CPU: right in every form, and nowhere a weight that is widened in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ridgeline.model.products_cpu import product_cpu
from ridgeline.model.quantization import QuantizedArray, dequantize, quantize
from ridgeline.model.schemes import SCHEMES, Scheme

FORMATS = ["float32", "bfloat16", "float16", *(name for name in SCHEMES if "dynamic" not in name)]


def weight(name, outputs, inputs):
    w = jax.random.normal(jax.random.key(0), (outputs, inputs)) * 0.05
    return quantize(w, SCHEMES[name]) if name in SCHEMES else w.astype(name)


@pytest.mark.parametrize("inputs", [896, 14336])
@pytest.mark.parametrize("name", FORMATS)
def test_no_weight_is_widened_in_memory(name, inputs):
    """Nor before the first of several steps, where XLA would compute what all of them share."""

    def steps(x, w):
        return lax.scan(lambda x, _: (x + product_cpu(x, w).mean().astype(x.dtype), None), x, length=2)

    w = jax.eval_shape(lambda: weight(name, (1 << 24) // inputs, inputs))
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))
    for rows in (1, 8):
        x = jax.ShapeDtypeStruct((rows, inputs), name if name not in SCHEMES else "bfloat16")
        memory = jax.jit(steps).lower(x, w).compile().memory_analysis()
        assert memory.temp_size_in_bytes < nbytes * 3 / 4, rows


def test_outputs_that_no_block_divides():
    w = weight("fp8", 1543, 1024)  # a prime number
    x = jax.random.normal(jax.random.key(1), (2, 1024))
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T
    np.testing.assert_allclose(product_cpu(x, w), expected, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize("inputs", [896, 4864])  # 7 groups of 128, and 38
@pytest.mark.parametrize("name", FORMATS)
def test_products_at_the_widths_of_models(name, inputs):
    w = weight(name, 36, inputs)
    dense = np.asarray(dequantize(w) if isinstance(w, QuantizedArray) else w, np.float64)
    for rows in (1, 3):
        x = jax.random.normal(jax.random.key(rows), (rows, inputs)).astype(name if name not in SCHEMES else "float32")
        expected = np.asarray(x, np.float64) @ dense.T
        np.testing.assert_allclose(jax.jit(product_cpu)(x, w), expected, atol=4e-6 * np.abs(expected).max())


def test_eight_bits_in_groups_with_zero_points():
    """As GPTQ stores them."""
    rng = np.random.default_rng(0)
    values, zeros = (jnp.asarray(rng.integers(-128, 128, shape), jnp.int8) for shape in ((24, 512), (24, 4)))
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (24, 4)), jnp.float32)
    w = QuantizedArray(values, scales, zeros, Scheme("int8", group=128, zero_points=True))
    for rows in (1, 5):
        x = jnp.asarray(rng.standard_normal((rows, 512)), jnp.float32)
        expected = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T
        np.testing.assert_allclose(product_cpu(x, w), expected, atol=4e-6 * np.abs(expected).max())
