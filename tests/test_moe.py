"""Routed experts against plain NumPy: which experts a token gets, and what they compute, however uneven the routing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.model.config import ExpertsConfig
from ridgeline.model.grouped import grouped_product
from ridgeline.model.moe import route
from ridgeline.model.schemes import SCHEMES
from tiny import tiny_config, tiny_model

E, K, D, F = 6, 2, 48, 32
EXPERTS = ExpertsConfig(E, K, F)
GPT_OSS = dataclasses.replace(EXPERTS, router_bias=True, mlp_bias=True, swiglu_limit=0.4)
SHARED = dataclasses.replace(EXPERTS, shared_ffn_dim=40, shared_gate=True, renormalize=False)
GLM = dataclasses.replace(
    EXPERTS, scores="sigmoid", selection_bias=True, groups=3, groups_per_token=2, scale=1.7, shared_ffn_dim=40
)
KINDS = {"mixtral": EXPERTS, "gpt_oss": GPT_OSS, "shared": SHARED, "glm": GLM}


ROPE = rl.RopeConfig(rotary_dim=20)
LAYER = rl.LayerConfig(ROPE, window=9, mlp="experts")


def moe_config(experts=EXPERTS, layers=(LAYER,), **changes):
    return tiny_config(layers=layers, experts=experts, **changes)


def moe_model(experts=EXPERTS, **changes):
    """With biases and sinks that are not zero."""
    model = tiny_model(moe_config(experts, **changes))
    rng = np.random.default_rng(3)

    def perturbed(path, leaf):
        is_bias = "bias" in jax.tree_util.keystr(path) or "sinks" in jax.tree_util.keystr(path)
        return leaf + 0.3 * rng.standard_normal(leaf.shape).astype(leaf.dtype) if is_bias else leaf

    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(perturbed, model.params))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def routed(logits, experts, bias):
    """Shares and experts of one token: by sorting, ties to the lower index."""
    scores = np.exp(logits - logits.max())
    scores = scores / scores.sum() if experts.scores == "softmax" else sigmoid(logits)
    merit = scores + (0 if bias is None else bias)
    groups = np.split(np.arange(experts.count), experts.groups)
    best = sorted(range(experts.groups), key=lambda g: -np.sort(merit[groups[g]])[-2:].sum())
    allowed = [e for g in best[: experts.groups_per_token] for e in groups[g]]
    ids = sorted(sorted(allowed), key=lambda e: -merit[e])[: experts.per_token]
    shares = scores[ids] / (scores[ids].sum() if experts.renormalize else 1)
    return shares * experts.scale, ids


def expected_mlp(x, weights, config, logits):
    """Of one token."""
    experts = config.experts
    shares, ids = routed(logits, experts, weights.get("selection_bias"))

    def mlp(gate, up, down):
        if experts.swiglu_limit is None:
            return down @ (gate * sigmoid(gate) * up)
        gate, up = np.minimum(gate, experts.swiglu_limit), np.clip(up, -experts.swiglu_limit, experts.swiglu_limit)
        return down @ ((up + 1) * gate * sigmoid(1.702 * gate))

    out = np.zeros_like(x)
    for share, e in zip(shares, ids, strict=True):
        gate, up = weights["gate_up"][e] @ x + (weights["gate_up_bias"][e] if experts.mlp_bias else 0)
        y = mlp(gate, up, weights["down"][e])
        out += share * (y + (weights["down_bias"][e] if experts.mlp_bias else 0))
    if experts.shared_ffn_dim:
        gate, up = weights["shared_gate_up"] @ x
        y = weights["shared_down"] @ (gate * sigmoid(gate) * up)
        out += y * (sigmoid(weights["shared_gate"] @ x) if experts.shared_gate else 1)
    return out


ROUTINGS = {
    "its own": None,
    "one takes all": np.where(np.arange(E) == 4, 9.0, -9.0) - np.arange(E),
    "ties": np.zeros(E),
    "ties at the border": np.array([0.0, 1, 0, 1, 0, 1]),
}


CASES = [("its own", 1), ("its own", 300), *((routing, 70) for routing in ROUTINGS)]


@pytest.mark.parametrize(("routing", "tokens"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_numpy_does(kind, routing, tokens):
    model = moe_model(KINDS[kind])
    seen, forced = {}, ROUTINGS[routing]

    def see(name, x, layer):
        if name == "router" and forced is not None:
            x = jnp.broadcast_to(jnp.asarray(forced, jnp.float32), x.shape)
        seen[name, layer] = x
        return x

    stream = []
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 509, (1, tokens)))
    rl.transformer(model.params, model.config, ids, residual=lambda x, n: stream.append(x) or x, component=see)
    weights = jax.tree.map(np.asarray, model.params["layers"][0])
    after_attention = np.asarray(stream[0] + seen["attention", 0])[0]
    x = after_attention / np.sqrt((after_attention**2).mean(-1, keepdims=True) + model.config.norm_eps)
    logits = np.asarray(seen["router", 0])[0]
    if forced is None:
        np.testing.assert_allclose(logits, x @ weights["router"].T + weights.get("router_bias", 0), atol=1e-5)
    expected = [expected_mlp(row, weights, model.config, of_row) for row, of_row in zip(x, logits, strict=True)]
    np.testing.assert_allclose(seen["mlp", 0][0], expected, atol=2e-5)
    assert seen["neurons", 0].shape == (1, tokens, K, F)
    # What nobody looks at is computed without taking it apart.
    if forced is None:
        whole = rl.transformer(model.params, model.config, ids)[0]
        np.testing.assert_allclose(whole, rl.final_norm(model.params, model.config, stream[-1]), atol=2e-5)


def test_a_component_may_put_other_neurons_and_other_experts_in_place():
    model = moe_model()
    ids = jnp.arange(12)[None]
    _, selected = route(jnp.zeros((12, E)), EXPERTS)
    assert selected.tolist() == [[0, 1]] * 12
    without = rl.forward(model.params, model.config, ids, component=lambda name, x, n: x * (name != "neurons"))
    params = dict(model.params, layers=[layer | {"down": layer["down"] * 0} for layer in model.params["layers"]])
    np.testing.assert_allclose(without, rl.forward(params, model.config, ids), atol=1e-5)


@pytest.mark.parametrize("scheme", [None, "bfloat16", "int8", "fp8", "fp8-block", "int4", "int4-32-zero", "mxfp4"])
def test_a_grouped_product_is_that_of_each_row(scheme):
    rng, inputs, outputs = np.random.default_rng(1), 256, (2, 24)
    w = jnp.asarray(rng.standard_normal((E, *outputs, inputs)), "float32") / 16
    dtype = jnp.bfloat16 if scheme == "bfloat16" else jnp.float32
    stored = w.astype(dtype) if scheme in (None, "bfloat16") else rl.quantize(w, SCHEMES[scheme])
    plain = np.asarray(stored, "float32") if scheme in (None, "bfloat16") else np.asarray(rl.dequantize(stored))
    product = jax.jit(grouped_product)
    for sizes in ([0, 0, 9, 0, 0, 0], [1, 0, 3, 0, 4, 1], [0, 0, 0, 0, 0, 2], [0] * 6, [2, 1, 1, 0, 3, 2]):
        rows = 9
        x = jnp.asarray(rng.standard_normal((rows, inputs)), dtype)
        y = product(x, stored, jnp.asarray(sizes, jnp.int32))
        expert = np.repeat(np.arange(E), sizes)
        expected = np.zeros((rows, *outputs), "float32")
        expected[: sum(sizes)] = np.einsum("roi,ri->ro", plain.reshape(E, -1, inputs)[expert], x[: sum(sizes)]).reshape(
            -1, *outputs
        )
        np.testing.assert_allclose(y, expected, atol=1e-4 if dtype == jnp.float32 else 2e-2)


def test_many_rows_go_through_blocks_of_their_expert():
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.standard_normal((E, 40, 24)), "float32")
    for sizes in ([0, 400, 0, 0, 0, 0], [1, 63, 64, 65, 0, 207]):
        x = jnp.asarray(rng.standard_normal((400, 24)), "float32")
        expected = np.einsum("roi,ri->ro", w[np.repeat(np.arange(E), sizes)], x)
        np.testing.assert_allclose(grouped_product(x, w, jnp.asarray(sizes)), expected, atol=1e-4)


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "fp8", "mxfp4"])
def test_a_program_copies_no_expert_that_is_not_hit(scheme):
    """It holds no more than some outputs of one expert beside its arguments."""
    w = jax.ShapeDtypeStruct((64, 512, 1024), jnp.float32)
    w = w if scheme is None else jax.eval_shape(lambda w: rl.quantize(w, SCHEMES[scheme]), w)
    arrays = (jax.ShapeDtypeStruct((4, 1024), jnp.float32), w, jax.ShapeDtypeStruct((64,), jnp.int32))
    compiled = jax.jit(grouped_product).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 512 * 1024 * 4
    assert "while" in compiled.as_text()


def test_derivatives_are_those_of_each_rows_product():
    rng, rows = np.random.default_rng(4), 9
    w, x = (jnp.asarray(rng.standard_normal(shape), "float32") for shape in ((3, 2, 5, 8), (rows, 8)))
    sizes = jnp.asarray([4, 0, rows - 5])  # and a row of nobody's
    expert = np.repeat([0, 1, 2], [4, 0, rows - 4])

    def plain(x, w):
        y = jnp.einsum("r...i,ri->r...", w[expert], x)
        return jnp.sum(jnp.sin(y.at[-1].set(0)))

    def grouped(x, w):
        return jnp.sum(jnp.sin(grouped_product(x, w, sizes)))

    for found, expected in zip(jax.grad(grouped, (0, 1))(x, w), jax.grad(plain, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    moved = jax.jvp(grouped, (x, w), (x * 2, w))
    np.testing.assert_allclose(moved, jax.jvp(plain, (x, w), (x * 2, w)), rtol=1e-3, atol=1e-3)
    several = jax.vmap(lambda x: grouped_product(x, w, sizes))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(several[1], 2 * grouped_product(x, w, sizes), atol=1e-4)


def test_tokens_served_are_those_of_forward():
    """With experts in the first and last of three layers."""
    layers = LAYER, rl.LayerConfig(ROPE), rl.LayerConfig(ROPE, mlp="experts")
    model = moe_model(GPT_OSS, layers=layers, attn_sinks=True)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 509, n).tolist() for n in (1, 23, 40)]
    outputs = rl.generate(model, prompts, rl.SamplingParams(temperature=0.0, max_tokens=8))
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = jnp.asarray([prompt + output.tokens])
        greedy = rl.forward(model.params, model.config, tokens)[0].argmax(-1)
        assert greedy[len(prompt) - 1 : -1].tolist() == output.tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_token": 7}, "per_token is 7; it must be at most 6"),
        ({"groups": 4}, "6 in 4 groups"),
        ({"shared_gate": True}, "shared_ffn_dim is 0"),
    ],
)
def test_experts_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXPERTS, **changes)


def test_experts_belong_to_layers_that_have_them():
    with pytest.raises(ValueError, match="only layers of experts need it"):
        tiny_config(experts=EXPERTS)
    with pytest.raises(ValueError, match="only layers of experts need it"):
        moe_config(experts=None)
