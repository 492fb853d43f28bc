"""Quantized weights against plain dequantize-then-multiply in float32, and models loaded in every scheme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from checkpoints import LLAMA, assert_same, save
from ridgeline.model import products
from ridgeline.model.checkpoint import load
from ridgeline.model.layers import linear
from ridgeline.model.loading import convert_model
from ridgeline.model.quantization import QuantizedArray, pack_int4, unpack_int4
from ridgeline.model.schemes import SCHEMES, Quantization, Scheme, scheme
from ridgeline.pallas_kernels.dispatch import Device
from tiny import tiny_config, weight_spec

SHAPES = {
    "plain": ((6, 256), 1),
    "grouped": ((3, 4, 8, 192), 1),
    "three inputs": ((10, 3, 2, 32), 3),
    "odd": ((5, 50), 1),
}


def weights(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape) * 0.05


def by_hand(w: np.ndarray, name: str, in_axes: int) -> np.ndarray:
    """The weight after rounding, group by group in float64, from the definition of each scheme."""
    form = SCHEMES[name]
    out = w.shape[: w.ndim - in_axes]
    flat = np.asarray(w, np.float64).reshape(*out, -1)
    result = np.empty_like(flat)
    rows = np.gcd(form.rows, out[-1])
    group = form.group or flat.shape[-1]
    for lead in np.ndindex(*out[:-1]):
        for row in range(0, out[-1], rows):
            for first in range(0, flat.shape[-1], group):
                where = (*lead, slice(row, row + rows), slice(first, first + group))
                result[where] = _rounded(flat[where], form)
    return result.reshape(w.shape)


def _rounded(block: np.ndarray, form) -> np.ndarray:
    low, high = min(block.min(), 0), max(block.max(), 0)
    peak = high if high > -low else low
    if form.dtype == "float4_e2m1fn":
        scale = 2.0 ** (np.floor(np.log2(np.abs(peak))) - 2)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = values[np.abs(np.abs(block / scale)[..., None] - values).argmin(-1)]
        return np.sign(block) * nearest * scale
    steps = {"int8": 127, "float8_e4m3fn": 448, "int4": 15 if form.zero_points else 8}[form.dtype]
    scale = (high - low if form.zero_points else abs(peak)) / steps
    scale = float(jnp.asarray(scale, form.scale_dtype)) or 1.0
    if form.dtype == "float8_e4m3fn":
        return np.asarray(jnp.asarray(block / scale, jnp.float8_e4m3fn), np.float64) * scale
    if form.dtype == "int8":
        return np.round(block / scale) * scale
    if form.zero_points:
        zero = np.round(-low / scale)
        return (np.clip(np.round(block / scale) + zero, 0, 15) - zero) * scale
    scale = -scale if peak > 0 else scale
    return np.clip(np.round(block / scale), -8, 7) * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_is_the_scheme_s(name, shape):
    size, in_axes = SHAPES[shape]
    w = weights(size)
    stored = rl.quantize(w, SCHEMES[name], in_axes)
    assert stored.shape == size
    restored, expected = np.asarray(rl.dequantize(stored)), by_hand(np.asarray(w), name, in_axes)
    # A number half-way between two may go either way in float32; no more than a few do.
    assert np.mean(np.abs(restored - expected) > 1e-5) < 0.004
    again = rl.quantize(rl.dequantize(stored), SCHEMES[name], in_axes)
    np.testing.assert_array_equal(again.values, stored.values)
    np.testing.assert_allclose(again.scales.astype(jnp.float32), stored.scales.astype(jnp.float32), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_outliers_and_extreme_scales(name):
    w = np.asarray(weights((8, 256))).copy()
    w[0] = 0.0  # zero groups and rows
    w[1, :128] = 0.0
    w[2, 5] = 1e4  # an outlier spoils its own group alone
    w[3] *= 1e30
    w[4] *= 1e-30
    w[5] = np.abs(w[5])
    restored = np.asarray(rl.dequantize(rl.quantize(jnp.asarray(w), SCHEMES[name])))
    assert np.isfinite(restored).all()
    if SCHEMES[name].rows == 1:  # a block's rows share the scale of the greatest
        assert not restored[0].any()
        assert not restored[1, :128].any()
        group = SCHEMES[name].group
        for row in (3, 4, 5) if group is None else (2, 3, 4, 5):
            columns = slice(128 if row == 2 else 0, None)
            error = np.abs(restored[row, columns] - w[row, columns]).max() / np.abs(w[row, columns]).max()
            most = {"int8": 0.005, "float8_e4m3fn": 0.04, "int4": 0.13, "float4_e2m1fn": 0.25}
            assert error <= most[SCHEMES[name].dtype], row
        assert restored[2, 5] == pytest.approx(1e4, rel=0.2 if name == "mxfp4" else 0.005)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_those_of_the_dequantized_weight(name, dtype):
    w = rl.quantize(weights((4, 3, 2, 128)), SCHEMES[name], 2)
    for rows in (1, 3, 40, 70):  # each takes another way on a CPU
        x = jax.random.normal(jax.random.key(rows), (rows, 2, 128)).astype(dtype)
        y = jax.jit(lambda x, w: linear(x, w, weight_spec(w, 2), out_dtype=jnp.float32))(x, w)
        expected = np.einsum("mij,abij->mab", *(np.asarray(a, np.float64) for a in (x, rl.dequantize(w))))
        exact = dtype == "float32" or w.scheme.group is None  # groups of weights are rounded to x's dtype
        tolerance = 2e-6 if exact else 5e-3
        if w.scheme.dynamic and rows > 64:
            tolerance = {"int8": 0.02, "float8_e4m3fn": 0.05}[w.scheme.dtype]
        np.testing.assert_allclose(y, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("group", [None, 16, 48, 128, 256])
def test_groups_of_any_size(group):
    w = rl.quantize(weights((6, 192)), Scheme("int4", group, zero_points=group == 48))
    x = jax.random.normal(jax.random.key(0), (2, 192))
    for rows in (x[:1], x):
        np.testing.assert_allclose(linear(rows, w, weight_spec(w)), rows @ rl.dequantize(w).T, atol=1e-5)


def test_int8_products_of_rows_with_outliers():
    w = rl.quantize(weights((32, 128)), SCHEMES["int8"])
    x = jax.random.normal(jax.random.key(1), (4, 128)).at[0, 3].set(1e5).at[1].set(0.0)
    expected = np.asarray(x, np.float64) @ np.asarray(rl.dequantize(w), np.float64).T
    y = np.asarray(linear(x, w, weight_spec(w)))
    np.testing.assert_allclose(y[1:], expected[1:], atol=1e-5)
    # Row 0 without its outlier: what the others add is kept to a part in a thousand.
    rest = y[0] - 1e5 * np.asarray(rl.dequantize(w))[:, 3]
    np.testing.assert_allclose(rest, expected[0] - 1e5 * np.asarray(rl.dequantize(w), np.float64)[:, 3], atol=2e-2)


@pytest.mark.parametrize("name", ["int8-dynamic", "fp8-dynamic"])
def test_dynamic_schemes_multiply_in_8_bits_where_rows_are_many(name):
    w = rl.quantize(weights((8, 64)), SCHEMES[name])

    def dtypes(rows):
        program = jax.make_jaxpr(lambda x: linear(x, w, weight_spec(w)))(jnp.ones((rows, 64), jnp.bfloat16))
        (product,) = [e for e in program.eqns if e.primitive.name == "custom_jvp_call"]
        dots = [e for e in product.params["call_jaxpr"].eqns if e.primitive.name == "dot_general"]
        return {v.aval.dtype.name for e in dots for v in e.invars}

    assert dtypes(65) == {SCHEMES[name].dtype}
    assert SCHEMES[name].dtype not in dtypes(64)


def test_products_of_every_e4m3_number():
    values = jnp.arange(256, dtype=jnp.uint8).view(jnp.float8_e4m3fn)
    values = jnp.where(jnp.isnan(values.astype(jnp.float32)), 0, values.astype(jnp.float32)).astype(jnp.float8_e4m3fn)
    w = QuantizedArray(jnp.tile(values[:, None], 32), jnp.ones((256, 1)), None, SCHEMES["fp8"])
    np.testing.assert_array_equal(linear(jnp.eye(32)[:1], w, weight_spec(w))[0], values.astype(jnp.float32))


def test_two_to_a_byte():
    values = jnp.arange(16, dtype=jnp.uint8)
    packed = pack_int4(values)
    assert packed[1] == 3 * 16 + 2
    np.testing.assert_array_equal(unpack_int4(packed), values)
    with pytest.raises(ValueError, match=r"shape \(4, 33\) cannot be stored two to a byte: its last axis is odd"):
        rl.quantize(weights((4, 33)), SCHEMES["int4"])


@pytest.mark.parametrize("rows", [3, 70])  # few, and so many that they may be rounded too
@pytest.mark.parametrize("name", [*SCHEMES, "int8-static"])
def test_gradients_are_those_of_the_weight_that_is_stored(name, rows):
    w = rl.quantize(weights((4, 3, 2, 128)), SCHEMES[name.removesuffix("-static")], 2)
    if name == "int8-static":
        w = w.replace(scheme=Scheme("int8", static=True), input_scale=jnp.full(1, 0.03))
    x, toward, weight = (jax.random.normal(jax.random.key(rows + n), (rows, 2, 128)) for n in range(3))
    weight = weight[:, 0, :12].reshape(rows, 4, 3)

    def score(x, scales):
        return jnp.sum(weight * jnp.tanh(linear(x, w.replace(scales=scales), weight_spec(w, 2))))

    def plain(x, scales):
        return jnp.sum(weight * jnp.tanh(jnp.einsum("mij,abij->mab", x, rl.dequantize(w.replace(scales=scales)))))

    floats = (0,) if name == "mxfp4" else (0, 1)  # whose scales are bytes
    dx, *dscales = jax.jit(jax.grad(score, argnums=floats))(x, w.scales)
    expected = jax.jit(jax.grad(plain, argnums=floats))(x, w.scales)
    rounds = rows > 64 and (w.scheme.dynamic or w.scheme.static)  # whose steps have no slope
    tolerance = 0.1 if rounds else 0.02 if w.scales.dtype == jnp.bfloat16 else 1e-4
    for gradient, exact in zip((dx, *dscales), expected, strict=True):
        gradient, exact = (np.asarray(array, np.float32) for array in (gradient, exact))
        np.testing.assert_allclose(gradient, exact, atol=tolerance * np.abs(exact).max())
    if not rounds:
        at = jax.jit(lambda step: score(x + step * toward, w.scales))
        np.testing.assert_allclose(jnp.vdot(dx, toward), (at(1e-2) - at(-1e-2)) / 2e-2, rtol=2e-3, atol=1e-3)


def test_gradients_of_the_way_of_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(products, "current_device", lambda mesh: Device("gpu", "NVIDIA H200", None))
    w = rl.quantize(weights((8, 64)), SCHEMES["int4-32"])
    dx = jax.grad(lambda x: linear(x, w, weight_spec(w)).sum())(jnp.ones((2, 64)))  # the kernel gives way here
    np.testing.assert_allclose(dx[0], rl.dequantize(w).sum(0), rtol=1e-5)


# --- models ---


@pytest.mark.parametrize("name", ["int8", "fp8-block", "int4-32-zero"])
def test_loading_quantizes_each_parameter(tmp_path, name):
    save(tmp_path)
    whole, model = rl.load_model(tmp_path), rl.load_model(tmp_path, quantize=name, quantize_output="int8")
    form = SCHEMES[name]
    assert model.config.quantization == Quantization(form, SCHEMES["int8"])
    for layer, whole_layer in zip(model.params["layers"], whole.params["layers"], strict=True):
        for part, in_axes in (("qkv", 1), ("out", 3), ("gate_up", 1), ("down", 1)):
            assert_same(layer[part], rl.quantize(whole_layer[part], form, in_axes))
        np.testing.assert_array_equal(layer["attn_norm"], whole_layer["attn_norm"])
    assert_same(model.params["unembedding"], rl.quantize(whole.params["unembedding"], SCHEMES["int8"]))
    np.testing.assert_array_equal(model.params["embedding"], whole.params["embedding"])
    specs = rl.param_specs(model.config)
    assert jax.tree.structure(model.params) == jax.tree.structure(specs)
    for array, spec in zip(jax.tree.leaves(model.params), jax.tree.leaves(specs), strict=True):
        assert (array.shape, array.dtype.name) == (spec.shape, spec.dtype)


def test_the_float_weights_are_never_there_together(tmp_path, monkeypatch):
    hf = LLAMA | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    save(tmp_path, hf)
    quantizer, held = load._quantizer, []
    layer = 4 * (128 * 12 * 4 + 128 * 6 * 4 + 3 * 128 * 512)

    def watched(*args):
        held.append(sum(a.nbytes for a in jax.live_arrays() if a.dtype == jnp.float32 and 128 in a.shape))
        return quantizer(*args)

    before = sum(a.nbytes for a in jax.live_arrays() if a.dtype == jnp.float32 and 128 in a.shape)
    monkeypatch.setattr(load, "_quantizer", watched)
    rl.load_model(tmp_path, quantize="int8")
    assert len(held) == 6 * 4
    assert max(held) - before < 2 * layer  # of six


@pytest.mark.parametrize("name", ["int8", "int4-32", "fp8"])
def test_conversions_keep_the_quantized_weights(tmp_path, name):
    hf, out = tmp_path / "hf", tmp_path / "out"
    hf.mkdir()
    save(hf)
    model = rl.load_model(hf, quantize=name)
    convert_model(hf, out, quantize=name)
    converted = rl.load_model(out)
    assert converted.config == model.config
    assert_same(converted.params, model.params)
    with pytest.raises(rl.CheckpointError, match="is a converted checkpoint, whose weights are quantized when it is"):
        rl.load_model(out, quantize="fp8-block")


def test_a_tied_output_is_quantized_beside_the_embedding(bundled):
    model = rl.load_model("bundled", dtype="float32", quantize_output="int8")
    assert model.config.quantization == Quantization(None, SCHEMES["int8"])
    np.testing.assert_array_equal(model.params["embedding"], bundled.params["embedding"])
    tokens = jnp.arange(40)[None]
    logits, expected = (rl.forward(m.params, m.config, tokens) for m in (model, bundled))
    assert 0 < jnp.abs(logits - expected).max() < 0.05 * jnp.abs(expected).max()


def test_random_parameters_and_their_count():
    config = tiny_config()
    quantized = config.replace(quantization=Quantization(SCHEMES["int8"], skip=("layers.1.down",)))
    params, whole = (rl.init_params(c, jax.random.key(3)) for c in (quantized, config))
    assert_same(params["layers"][0]["down"], rl.quantize(whole["layers"][0]["down"], SCHEMES["int8"]))
    np.testing.assert_array_equal(params["layers"][1]["down"], whole["layers"][1]["down"])
    assert rl.count_parameters(quantized) == rl.count_parameters(config)


def test_unknown_schemes_are_refused():
    message = "quantization scheme 'int3' is not known; known: int8, int8-dynamic, fp8"
    with pytest.raises(ValueError, match=message):
        scheme("int3")
    with pytest.raises(ValueError, match=message):
        rl.load_model("bundled", quantize="int3")


@pytest.mark.parametrize("name", ["int8", "int4-32", "fp8"])
def test_quantized_models_still_tell_the_story(bundled, name):
    """Decode step by step gives the logits of one forward pass, and greedy text stays that of float32 for a while."""
    model = rl.load_model("bundled", dtype="float32", quantize=name)
    greedy = rl.SamplingParams(max_tokens=24, temperature=0.0)
    output, expected = (rl.generate(m, ["Once upon a time"], greedy)[0] for m in (model, bundled))
    agreed = next((i for i, (a, b) in enumerate(zip(output.tokens, expected.tokens, strict=True)) if a != b), 24)
    assert agreed >= 8
    prompt = model.tokenizer.encode("Once upon a time")
    tokens = jnp.asarray([prompt + output.tokens])
    logits = rl.forward(model.params, model.config, tokens)[0]
    np.testing.assert_array_equal(jnp.argmax(logits[len(prompt) - 1 : -1], axis=-1), output.tokens)
