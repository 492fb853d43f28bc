"""Routed experts: each token goes through the few of many MLPs that a router selects for it. No token is dropped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float, Int

from ..sharding.rules import RULES, is_split, mesh_of, shard_map
from .config import ExpertsConfig, ModelConfig
from .layers import ACTIVATION_FUNCTIONS, gated_mlp, grouped_linear, linear
from .params import Params, ParamSpec
from .products import Product
from .quantization import QuantizedArray, scale_axes

See = Callable[[str, Array], Array]
_TOKENS = ("batch", None)
_COUNTED = 512  # pairs of a token and an expert that are sorted by comparing all of them, in one pass


def experts_mlp(
    x: Float[Array, "B T D"],
    weights: Params,
    specs: dict[str, ParamSpec],
    config: ModelConfig,
    product: Product,
    see: See | None = None,
) -> Float[Array, "B T D"]:
    """The sum of a token's experts by their weights, and of the expert that all tokens go through.

    On a mesh each device computes what its experts, and its part of each, do to the tokens of its rows.

    Args:
      x: activations.
      weights, specs: those of a layer, as `param_specs` and `float_specs` have them.
      config: the model.
      product: what multiplies by router and shared expert, as `linear` takes it.
      see: sees "router", "neurons" and "shared_neurons", and may put others in their place; see `Component`.
    """
    experts = config.experts
    with jax.named_scope("router"):
        router = weights["router"].astype(jnp.float32)
        logits = linear(x.astype(jnp.float32), router, specs["router"], weights.get("router_bias"), product=product)
        logits = logits if see is None else see("router", logits)
        shares, ids = route(logits, experts, weights.get("selection_bias"))
    with jax.named_scope("experts"):
        y = _routed(x, shares, ids, weights, specs, config, see)
    if not experts.shared_ffn_dim:
        return y
    with jax.named_scope("shared_expert"):
        names = {"gate_up": "shared_gate_up", "down": "shared_down"}
        parts, their_specs = ({name: of[stored] for name, stored in names.items()} for of in (weights, specs))
        neurons = {} if see is None else {"neurons": lambda hidden: see("shared_neurons", hidden)}
        shared = gated_mlp(x, parts, their_specs, config.activation, product, **neurons)
        if experts.shared_gate:
            gate = linear(x, weights["shared_gate"], specs["shared_gate"], out_dtype=jnp.float32, product=product)
            shared = (shared.astype(jnp.float32) * jax.nn.sigmoid(gate)).astype(x.dtype)
        return y + shared


def route(
    logits: Float[Array, "*tokens E"], experts: ExpertsConfig, selection_bias: Float[Array, "E"] | None = None
) -> tuple[Float[Array, "*tokens k"], Int[Array, "*tokens k"]]:
    """The shares in which the outputs of a token's experts are added up, and which these are, the best first.

    Of equal scores the expert with the lower index is taken. Sources: Fedus, Zoph and Shazeer 2022 (softmax);
    DeepSeek-V3, 2024, section 2.1.2 (sigmoid, selection bias, groups).

    Args:
      logits: the router's, in float32.
      experts: how they are scored.
      selection_bias: is added to scores to select experts, but not to their shares.
    """
    k, groups = experts.per_token, experts.groups
    scores = jax.nn.softmax(logits, axis=-1) if experts.scores == "softmax" else jax.nn.sigmoid(logits)
    merit = scores if selection_bias is None else scores + selection_bias
    if groups > 1:
        grouped = merit.reshape(*merit.shape[:-1], groups, -1)
        _, kept = lax.top_k(jnp.sum(lax.top_k(grouped, 2)[0], axis=-1), experts.groups_per_token)
        is_kept = jnp.any(kept[..., None] == jnp.arange(groups), axis=-2)
        merit = jnp.where(is_kept[..., None], grouped, jnp.finfo(jnp.float32).min).reshape(merit.shape)
    _, ids = lax.top_k(merit, k)
    shares = jnp.take_along_axis(scores, ids, axis=-1)
    if experts.renormalize and experts.scores == "softmax":
        shares = jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)
    elif experts.renormalize:
        shares = shares / (jnp.sum(shares, axis=-1, keepdims=True) + 1e-20)
    return shares * experts.scale, ids


class _Order(NamedTuple):
    """Pairs of a token and one of its experts, sorted by expert; those of other devices' experts come last.

    Attributes:
      pairs: [R], which pair each sorted row is: token * k + place among its experts.
      rows: [R], which sorted row each pair is.
      sizes: [E], rows of each expert of this device.
    """

    pairs: Int[Array, "R"]
    rows: Int[Array, "R"]
    sizes: Int[Array, "E"]


def _sorted(ids: Int[Array, "... k"], count: int, first: int | Int[Array, ""]) -> _Order:
    local = ids.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < count), local, count)
    sizes = jnp.sum(local[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    index = jnp.arange(local.shape[0], dtype=jnp.int32)
    if local.shape[0] > _COUNTED:
        pairs = jnp.argsort(local, stable=True).astype(jnp.int32)
        return _Order(pairs, jnp.zeros_like(pairs).at[pairs].set(index), sizes)
    is_before = (local < local[:, None]) | ((local == local[:, None]) & (index < index[:, None]))
    rows = jnp.sum(is_before, axis=1, dtype=jnp.int32)
    return _Order(jnp.zeros_like(rows).at[rows].set(index), rows, sizes)


def _routed(
    x: Float[Array, "B T D"],
    shares: Float[Array, "B T k"],
    ids: Int[Array, "B T k"],
    weights: Params,
    specs: dict[str, ParamSpec],
    config: ModelConfig,
    see: See | None,
) -> Float[Array, "B T D"]:
    names = [name for name in ("gate_up", "down", "gate_up_bias", "down_bias") if name in weights]
    weights = {name: weights[name] for name in names}
    mesh = mesh_of(jax.tree.leaves(weights)[0])
    axes = {name: _axes(weights[name], specs[name]) for name in names}
    # Rows that the devices cannot share evenly are computed by all of them.
    tokens = _TOKENS if mesh is None or x.shape[0] % mesh.shape[RULES["batch"]] == 0 else ()
    local = _Local(config, mesh)
    if see is None:
        return shard_map(local.both, mesh, (tokens, tokens, tokens, axes), tokens)(x, shares, ids, weights)
    neurons = (*(tokens or (None, None)), None, "ffn")
    hidden = see("neurons", shard_map(local.neurons, mesh, (tokens, tokens, axes), neurons)(x, ids, weights))
    return shard_map(local.outputs, mesh, (neurons, tokens, tokens, axes), tokens)(hidden, shares, ids, weights)


class _Local(NamedTuple):
    """What each device does with its own rows, experts, and parts of experts."""

    config: ModelConfig
    mesh: AbstractMesh | None

    def both(self, x, shares, ids, weights):
        order = self._order(ids, weights)
        return self._down(self._up(x, order, weights), order, shares, weights)

    def neurons(self, x, ids, weights):
        order = self._order(ids, weights)
        hidden = self._up(x, order, weights)[order.rows].reshape(*ids.shape, -1)
        return self._sum(hidden, "experts")

    def outputs(self, hidden, shares, ids, weights):
        order = self._order(ids, weights)
        return self._down(hidden.reshape(-1, hidden.shape[-1])[order.pairs], order, shares, weights)

    def _order(self, ids, weights):
        count = jax.tree.leaves(weights["gate_up"])[0].shape[0]
        is_shared_out = is_split("experts", self.mesh)
        return _sorted(ids, count, lax.axis_index(RULES["experts"]) * count if is_shared_out else 0)

    def _up(self, x, order, weights):
        rows = x.reshape(-1, x.shape[-1])[order.pairs // self.config.experts.per_token]
        bias = weights.get("gate_up_bias")
        gate_up = grouped_linear(rows, weights["gate_up"], order.sizes, bias)
        return _gated(gate_up[:, 0], gate_up[:, 1], self.config)

    def _down(self, hidden, order, shares, weights):
        bias = weights.get("down_bias")
        if bias is not None and is_split("ffn", self.mesh):  # of devices that share an expert one adds it
            bias = jnp.where(lax.axis_index(RULES["ffn"]) == 0, bias, 0)
        y = grouped_linear(hidden, weights["down"], order.sizes, bias, out_dtype=jnp.float32)
        y = jnp.einsum("...kd,...k->...d", y[order.rows].reshape(*shares.shape, -1), shares)
        return self._sum(y.astype(hidden.dtype), "experts", "ffn")

    def _sum(self, x, *logical):
        names = tuple(RULES[name] for name in logical if is_split(name, self.mesh))
        return lax.psum(x, names) if names else x


def _gated(gate: Float[Array, "R F"], up: Float[Array, "R F"], config: ModelConfig) -> Float[Array, "R F"]:
    limit, dtype = config.experts.swiglu_limit, up.dtype
    gate = gate.astype(jnp.float32)
    if limit is None:
        return ACTIVATION_FUNCTIONS[config.activation](gate).astype(dtype) * up
    gate, up = jnp.minimum(gate, limit), jnp.clip(up.astype(jnp.float32), -limit, limit)
    return ((up + 1) * gate * jax.nn.sigmoid(config.experts.swiglu_alpha * gate)).astype(dtype)


def _axes(w: Array | QuantizedArray, spec: ParamSpec) -> Any:
    """The logical axes of a weight, or those of each of its parts."""
    if not isinstance(w, QuantizedArray):
        return spec.axes
    entries = scale_axes(spec.axes, spec.in_axes, w.scales.shape)
    axes = {"values": spec.axes, "scales": entries, "zeros": entries, "order": (None,), "input_scale": (None,)}
    return w.replace(**{name: None if getattr(w, name) is None else of for name, of in axes.items()})
