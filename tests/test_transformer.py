"""The seams of the forward pass: what `residual` and `component` see and change, and what the defaults stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.model.products import weight_product
from tiny import tiny_config, tiny_model

T = 12


@pytest.fixture(scope="module")
def model():
    rope = rl.RopeConfig(rotary_dim=20)
    return tiny_model(tiny_config(layers=(rl.LayerConfig(rope),) * 3))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 509, (2, T)), jnp.int32)


def logits(model, tokens, **options):
    x, _ = rl.transformer(model.params, model.config, tokens, **options)
    return rl.unembed(model.params, model.config, x)


def stream(model, tokens):
    """The residual stream: after no layer, after one, ..."""
    seen = []

    def residual(x, n):
        assert n == len(seen)
        seen.append(x)
        return x

    np.testing.assert_allclose(
        logits(model, tokens, residual=residual), rl.forward(model.params, model.config, tokens), atol=1e-5
    )
    return seen


def test_residual_sees_the_stream_from_the_embeddings_to_the_last_layer(model, tokens):
    seen = stream(model, tokens)
    assert len(seen) == 4
    np.testing.assert_array_equal(seen[0], model.params["embedding"][tokens])
    # A model that stops after n layers, with a last norm and an output that change nothing but the scale.
    for n in (1, 2, 3):
        config = model.config.replace(layers=model.config.layers[:n])
        short = model.params | {"layers": model.params["layers"][:n], "final_norm": jnp.ones(config.embed_dim)}
        x, _ = rl.transformer(short, config, tokens)
        rms = jnp.sqrt(jnp.mean(seen[n] ** 2, axis=-1, keepdims=True) + config.norm_eps)
        np.testing.assert_allclose(x, seen[n] / rms, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_stream_put_in_at_any_depth_decides_all_that_follows(model, tokens, depth):
    donor = stream(model, tokens[:1])[depth]
    patched = logits(model, tokens[1:], residual=lambda x, n: donor if n == depth else x)
    np.testing.assert_allclose(patched, rl.forward(model.params, model.config, tokens[:1]), atol=1e-5)


def test_the_gradient_with_respect_to_the_stream_is_the_slope(model, tokens):
    @jax.jit
    def score(added):
        return logits(model, tokens[:1], residual=lambda x, n: x + added if n == 1 else x)[0, -1, 7]

    direction = jnp.asarray(np.random.default_rng(1).standard_normal((T, model.config.embed_dim)), jnp.float32)
    slope = jnp.vdot(jax.grad(score)(jnp.zeros_like(direction)), direction)
    step = 1e-2
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, (score(step * direction) - score(-step * direction)) / (2 * step), rtol=2e-2)


@pytest.mark.parametrize("norm_position", ["pre", "sandwich"])
def test_components_add_up_to_the_stream(model, tokens, norm_position):
    given = tiny_model(model.config.replace(norm_position=norm_position))
    seen = {}

    def component(name, x, layer):
        seen[layer, name] = x
        return x

    depths = []
    out = logits(given, tokens, component=component, residual=lambda x, n: depths.append(x) or x)
    np.testing.assert_array_equal(out, logits(given, tokens))
    np.testing.assert_array_equal(
        rl.unembed(given.params, given.config, rl.final_norm(given.params, given.config, depths[-1])), out
    )
    assert list(seen) == [(n, name) for n in range(3) for name in ("heads", "attention", "neurons", "mlp")]
    assert seen[1, "heads"].shape == (2, T, 3, 2, 20)
    total = depths[0]
    for n in range(3):
        total = total + seen[n, "attention"] + seen[n, "mlp"]
        np.testing.assert_allclose(total, depths[n + 1], atol=1e-5)


@pytest.mark.parametrize("name", ["heads", "neurons"])
def test_what_is_ablated_is_as_if_nothing_read_it(model, tokens, name):
    weight, at = {"heads": ("out", np.s_[:, 1, 1]), "neurons": ("down", np.s_[:, 7])}[name]
    layers = list(model.params["layers"])
    layers[2] = layers[2] | {weight: layers[2][weight].at[at].set(0)}
    expected = rl.forward(model.params | {"layers": layers}, model.config, tokens)

    def ablated(which, x, layer):
        return x.at[:, :, *at[1:]].set(0) if (which, layer) == (name, 2) else x

    assert abs(expected - logits(model, tokens)).max() > 1e-2
    np.testing.assert_allclose(rl.forward(model.params, model.config, tokens, component=ablated), expected, atol=1e-5)


def test_a_seam_that_changes_nothing_adds_no_operation(model, tokens):
    def traced(**seams):
        return str(jax.make_jaxpr(lambda tokens: logits(model, tokens, **seams))(tokens))

    assert traced(component=lambda name, x, layer: x, residual=lambda x, n: x) == traced()


def test_the_defaults_are_teacher_forcing_from_position_0(model, tokens):
    given = {
        "positions": jnp.broadcast_to(jnp.arange(T), (2, T)),
        "attend": rl.attend_to_tokens,
        "state": (None,) * 3,
        "contexts": jnp.full(2, T),
    }
    np.testing.assert_array_equal(logits(model, tokens), logits(model, tokens, **given))
    later = given | {"positions": given["positions"] + 1}  # rotations are relative: the same but for rounding
    np.testing.assert_allclose(logits(model, tokens, **later), logits(model, tokens), atol=1e-4)


def test_every_weight_product_is_the_one_given_and_learns_its_axes_from_the_specs(model, tokens):
    seen = []

    def product(x, w, axes):
        seen.append(axes)
        return weight_product(x, w, axes)

    x, _ = rl.transformer(model.params, model.config, tokens, product=product)
    np.testing.assert_array_equal(rl.unembed(model.params, model.config, x, product), logits(model, tokens))
    qkv, out = ("kv_heads", "q_per_kv", "head_dim", "embed"), ("embed", "kv_heads")
    gate_up, down = (None, "ffn", "embed"), ("embed", "ffn")
    assert seen == [qkv, out, gate_up, down] * 3 + [("vocab", "embed")]
