"""Rotary frequencies of every kind against transformers' (committed and live), and their exact properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ridgeline.model.config import ROPE_KINDS, RopeConfig
from ridgeline.model.fields import Fields
from ridgeline.model.hf.declared import CONFIG
from ridgeline.model.hf.rope import rope_from_hf
from ridgeline.model.rope import apply_rope, rope_frequencies, rope_tables

HEAD_DIM, MAX_POSITION = 12, 512
_SHORT, _LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.5, 2.0, 4.0, 8.0, 16.0, 20.0]
_FACTORS = {"short_factor": _SHORT, "long_factor": _LONG, "original_max_position_embeddings": 128}

PARAMETERS = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 200,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn_stated": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.8,
    },
    "longrope": {"rope_type": "longrope", "rope_theta": 10_000.0, **_FACTORS},
    "longrope_factor": {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 32.0, **_FACTORS},
}

_BASE = [1.0, 0.215443447, 0.046415884, 0.00999999978, 0.00215443433, 0.000464158948]
_YARN = [1.0, 0.134652153, 0.011603971, 0.00249999994, 0.000538608583, 0.000116039737]
_STRETCHED_LONG = [0.666666687, 0.107721724, 0.011603971, 0.00124999997, 0.000134652146, 2.32079474e-05]
_STRETCHED_SHORT = [1.0, 0.195857689, 0.0386799015, 0.0076923077, 0.00153888157, 0.000309439318]

# (parameters, the row's length) -> frequencies and attention factor; from ROPE_INIT_FUNCTIONS of transformers 5.23.
TRANSFORMERS = [
    ("default", 100, _BASE, 1.0),
    ("linear", 100, [0.400000006, 0.0861773789, 0.0185663532, 0.00399999972, 0.000861773733, 0.000185663579], 1.0),
    ("dynamic", 100, _BASE, 1.0),
    ("dynamic", 512, _BASE, 1.0),
    ("dynamic", 1300, [1.0, 0.152556077, 0.0232733581, 0.00355049293, 0.000541649177, 8.26319229e-05], 1.0),
    ("llama3", 100, [1.0, 0.0561540797, 0.00157490105, 0.000176776681, 1.98425078e-05, 2.22724748e-06], 1.0),
    ("yarn", 100, _YARN, 1.138629436111989),
    (
        "yarn_mscale",
        100,
        [1.0, 0.129861966, 0.00116039708, 0.000250000012, 5.38608547e-05, 1.16039737e-05],
        0.8521510516131852,
    ),
    ("yarn_stated", 100, _YARN, 0.8),
    ("longrope", 128, _STRETCHED_SHORT, 1.1338934190276817),
    ("longrope", 129, _STRETCHED_LONG, 1.1338934190276817),
    ("longrope_factor", 100, _STRETCHED_SHORT, 1.3093073414159544),
]


def _read(parameters, head_dim=HEAD_DIM):
    hf = Fields({"max_position_embeddings": MAX_POSITION, "rope_scaling": parameters}, CONFIG, "config.json")
    return rope_from_hf(hf, hf["rope_scaling"], head_dim)


def _rope(name):
    return _read(PARAMETERS[name])


def _frequencies(rope, length):
    return np.asarray(rope_frequencies(rope, jnp.array([length]))).reshape(-1)


@pytest.mark.parametrize(("name", "length", "frequencies", "attention_factor"), TRANSFORMERS)
def test_frequencies_are_those_of_transformers(name, length, frequencies, attention_factor):
    rope = _rope(name)
    np.testing.assert_allclose(_frequencies(rope, length), frequencies, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_every_kind_is_compared():
    assert {_rope(name).kind for name, *_ in TRANSFORMERS} == set(ROPE_KINDS)


@pytest.mark.parametrize(("name", "length"), [case[:2] for case in TRANSFORMERS if case[0] != "default"])
def test_frequencies_live(name, length):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # Larger than the committed constants: 64 frequencies.
    head_dim, parameters = 128, dict(PARAMETERS[name])
    for key in ("short_factor", "long_factor"):
        if key in parameters:
            parameters[key] = np.linspace(parameters[key][0], parameters[key][-1], head_dim // 2).tolist()
    rope = _read(parameters, head_dim)
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=parameters,
    )
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    np.testing.assert_allclose(_frequencies(rope, length), frequencies.numpy(), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_llama3_keeps_short_wavelengths_and_divides_long_ones():
    rope = RopeConfig(64, 10_000.0, "llama3", factor=8.0, original_max_position=256)
    base = _frequencies(RopeConfig(64), 1)
    ratio = _frequencies(rope, 1) / base
    wavelengths = 2 * np.pi / base
    np.testing.assert_allclose(ratio[wavelengths < 256 / 4], 1.0, rtol=1e-12)
    np.testing.assert_allclose(ratio[wavelengths > 256], 1 / 8, rtol=1e-12)
    between = ratio[(wavelengths > 256 / 4) & (wavelengths < 256)]
    assert len(between) > 2
    assert (np.diff(between) < 0).all()


def test_yarn_keeps_fast_dimensions_and_divides_slow_ones():
    rope = RopeConfig(64, 10_000.0, "yarn", factor=4.0, original_max_position=4096)
    ratio = _frequencies(rope, 1) / _frequencies(RopeConfig(64), 1)
    turns = 4096 * _frequencies(RopeConfig(64), 1) / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 45], 1.0, rtol=1e-12)
    np.testing.assert_allclose(ratio[turns < 0.7], 0.25, rtol=1e-12)
    assert (np.diff(ratio) <= 1e-12).all()


def test_linear_is_default_at_divided_positions():
    positions, lengths = jnp.arange(0, 40, 4)[None], jnp.array([64])
    stretched = rope_tables(RopeConfig(16, kind="linear", factor=4.0), positions, lengths)
    plain = rope_tables(RopeConfig(16), positions // 4, lengths)
    np.testing.assert_allclose(stretched, plain, atol=1e-6)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rows_pick_frequencies_by_their_own_length(name):
    rope, positions = _rope(name), jnp.broadcast_to(jnp.arange(9), (3, 9))
    lengths = jnp.array([100, 2000, 100])
    cos, sin = rope_tables(rope, positions, lengths)
    for row in range(3):
        alone = rope_tables(rope, positions[row : row + 1], lengths[row : row + 1])
        np.testing.assert_array_equal((cos[row], sin[row]), (alone[0][0], alone[1][0]))
    assert np.abs(cos[0] - cos[1]).max() > 1e-2


@pytest.mark.parametrize("name", PARAMETERS)
def test_tables_do_not_depend_on_the_chunk(name):
    rope, positions, lengths = _rope(name), jnp.arange(200)[None], jnp.array([200])
    whole = rope_tables(rope, positions, lengths)
    part = rope_tables(rope, positions[:, 150:], lengths)
    np.testing.assert_array_equal([table[:, 150:] for table in whole], part)


def test_scores_depend_on_relative_positions_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 16))
    rope = RopeConfig(16)

    def score(query_position, key_position):
        def turned(x, position):
            return apply_rope(x, *rope_tables(rope, jnp.array([[position]]), jnp.array([64])))

        return np.asarray((turned(q, query_position) * turned(k, key_position)).sum(-1))

    np.testing.assert_allclose(score(7, 3), score(40, 36), atol=1e-5)
    assert np.abs(score(7, 3) - score(7, 4)).max() > 1e-2


def test_rotation_pairs_the_two_halves():
    x = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)
    cos, sin = rope_tables(RopeConfig(6, theta=100.0), jnp.array([[5]]), jnp.array([8]))
    angles = 5 * 100.0 ** (-np.arange(3) / 3)
    turned = (np.array([1, 2, 3]) + 1j * np.array([4, 5, 6])) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag, [7, 8]])
    np.testing.assert_allclose(apply_rope(x, cos, sin).reshape(-1), expected, rtol=1e-5)


def test_rotation_keeps_dtype_and_computes_in_float32():
    x = jax.random.normal(jax.random.key(1), (2, 5, 3, 2, 16), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(1000, 1005), (2, 5))
    cos, sin = rope_tables(RopeConfig(16), positions, jnp.array([2000, 2000]))
    assert cos.dtype == sin.dtype == jnp.float32
    turned = apply_rope(x, cos, sin)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, apply_rope(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16))


def test_attention_factor_scales_the_tables():
    rope = _rope("yarn_stated")
    cos, sin = rope_tables(rope, jnp.arange(30)[None], jnp.array([30]))
    np.testing.assert_allclose(np.hypot(cos, sin), 0.8, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim is 7"),
        ({"kind": "llama3"}, "'llama3' needs original_max_position"),
        ({"kind": "llama3", "original_max_position": 8, "low_freq_factor": 4.0}, "high_freq_factor 4.0 .* 4.0"),
        ({"kind": "dynamic", "original_max_position": 8, "rotary_dim": 2}, "rotary_dim"),
        ({"kind": "longrope", "original_max_position": 8, "short_factor": (1.0,)}, "short_factor has 1 entries"),
    ],
)
def test_bad_rope_is_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(RopeConfig(8), **changes)
    assert "\n" not in str(error.value)
