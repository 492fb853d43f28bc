"""The forward pass of every family. It knows no cache: `attend` decides what attention sees and what it keeps."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..pallas_kernels.attention import causal_attention
from ..pallas_kernels.pages import AttentionOptions
from . import arguments
from .config import ModelConfig
from .layers import gated_mlp, linear, rms_norm, soft_cap
from .moe import experts_mlp
from .params import Params, ParamSpec, float_specs
from .products import Product, weight_product
from .promotion import own_promotion
from .rope import apply_rope, rope_tables


@dataclasses.dataclass(frozen=True)
class AttentionSpec(AttentionOptions):
    """What one layer asks of attention, besides q, k and v. Static under jit, but for the sinks.

    Attributes:
      scale, window, soft_cap: as in `AttentionOptions`.
      layer: its index.
      sinks: [K, G], as the attention ops take them; None where the layer has none.
    """

    layer: int = 0
    sinks: Any = dataclasses.field(default=None, compare=False)

    @property
    def options(self) -> AttentionOptions:
        """What kernels are compiled for: the same for all layers that ask for the same."""
        return AttentionOptions(self.scale, self.window, self.soft_cap)


Attend = Callable[
    [Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"], AttentionSpec, Any],
    tuple[Float[Array, "B T K G H"], Any],
]
"""attend(q, k, v, spec, state) -> (output, state): q and k come rotated, state is this layer's own."""


class LayerwiseAttend:
    """Base of `Attend`s that are pytrees, and that do for equal layers the same: such layers are traced once.

    Of several equal layers, the first one's index stands in the `AttentionSpec`, unless there is a `component`.
    """


Residual = Callable[[Float[Array, "B T D"], int], Float[Array, "B T D"]]
"""residual(x, n) -> x: the residual stream after n layers, the token embeddings where n is 0.

For n < L it is `hidden_states[n]` of transformers, embeddings scaled where the family scales them. Their last one,
`hidden_states[L]`, is after the last norm: `final_norm` of residual's.
"""

Component = Callable[[str, Float[Array, "B T ..."], int], Float[Array, "B T ..."]]
"""component(name, x, layer) -> x: what a part of a layer has computed; layers count from 0.

| name | x |
| --- | --- |
| "heads" | [B, T, K, G, H], what each head brings, before the output projection |
| "attention" | [B, T, D], what attention adds to the stream: after the projection, and a norm where one follows |
| "neurons" | [B, T, F], the MLP's inner activations: activation(gate) * up; of experts [B, T, k, F], the best first |
| "router" | [B, T, E] float32, the logits by which a layer's experts are selected; `moe.route` says how |
| "shared_neurons" | [B, T, F], the inner activations of an expert that all tokens go through |
| "mlp" | [B, T, D], what the MLP adds to the stream |

The stream after the last layer is the embeddings and the sum of all "attention" and "mlp". The names are those of
attribution by component (Elhage et al. 2021) and of its literature: heads and neurons are the units that are ablated.
"""


def attend_to_tokens(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    spec: AttentionSpec,
    state: Any,
) -> tuple[Float[Array, "B T K G H"], Any]:
    """An `Attend` whose keys and values are those of the tokens themselves: teacher forcing, without a cache."""
    return causal_attention(q, k, v, spec, sinks=spec.sinks), state


@own_promotion
@arguments.arguments(
    params=arguments.parameters, config=arguments.config, tokens=arguments.array("iu", "B T"), **arguments.seams
)
def transformer(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    attend: Attend = attend_to_tokens,
    state: Sequence[Any] | None = None,
    contexts: Int[Array, "B"] | None = None,
    residual: Residual | None = None,
    product: Product = weight_product,
    component: Component | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """Run every layer.

    Args:
      params: as `param_specs(config)`.
      config: the model.
      tokens: token ids.
      positions: absolute position of each token in its row; 0 to T - 1 by default.
      attend: attention over whatever keys and values it has; see `Attend`.
      state: one entry a layer, threaded through `attend`; by default each is None.
      contexts: the length of each row that length-dependent RoPE kinds read; T by default.
      residual: sees the residual stream before the first layer and after each, and may put another in its place.
      product: what multiplies by weights; see `Product`.
      component: sees what each part of a layer computes, and may put another in its place; see `Component`.

    Returns:
      The final hidden states after the last norm, ready for `unembed`, and the new states.
    """
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions is None else positions
    state = (None,) * config.num_layers if state is None else state
    contexts = jnp.full((B,), T) if contexts is None else contexts
    residual = residual or (lambda x, n: x)

    with jax.named_scope("embed"):
        x = residual(embed(params, config, tokens), 0)
    with jax.named_scope("rope"):
        ropes = {layer.rope: rope_tables(layer.rope, positions, contexts) for layer in config.layers}
    new_state = []
    for index, (layer, weights) in enumerate(zip(config.layers, params["layers"], strict=True)):
        run, place = functools.partial(_layer, component=component), index
        if isinstance(attend, LayerwiseAttend) and component is None:  # which is told its own layer
            run, place = _layer_traced_once, config.layers.index(layer)
        with jax.named_scope(f"layer_{index}"):
            x, kept = run(x, weights, ropes[layer.rope], attend, state[index], config, place, product)
            x = residual(x, index + 1)
        new_state.append(kept)
    return final_norm(params, config, x), tuple(new_state)


def embed(params: Params, config: ModelConfig, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Token embeddings, scaled where the family scales them."""
    x = params["embedding"][tokens]
    # The scale is rounded to the activations' dtype first, as the families that have one were trained.
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, x.dtype)


@arguments.arguments(params=arguments.parameters, config=arguments.config, x=arguments.array("f", "... D"))
def final_norm(params: Params, config: ModelConfig, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The norm between the last layer and `unembed`: of the stream at any depth, for a logit lens."""
    _check_width("final_norm", x, config)
    with jax.named_scope("final_norm"):
        return rms_norm(x, params["final_norm"], config.norm_eps, config.norm_offset)


@own_promotion
@arguments.arguments(params=arguments.parameters, config=arguments.config, x=arguments.array("f", "... D"))
def unembed(
    params: Params, config: ModelConfig, x: Float[Array, "... D"], product: Product = weight_product
) -> Float[Array, "... V"]:
    """Logits in float32 of final hidden states; `product` as in `transformer`."""
    _check_width("unembed", x, config)
    with jax.named_scope("unembed"):
        name = "unembedding" if config.has_unembedding else "embedding"
        logits = linear(x, params[name], float_specs(config)[name], out_dtype=jnp.float32, product=product)
        # Over devices the vocabulary may be padded, to parts of one size.
        return soft_cap(logits[..., : config.vocab_size], config.logit_soft_cap)


def _check_width(function, x, config):
    if x.shape[-1] != config.embed_dim:
        raise ValueError(f"{function}: x has {x.shape[-1]} features; embed_dim is {config.embed_dim}")


def _layer(x, weights, rope, attend, state, config, index, product, component=None):
    layer, specs = config.layers[index], float_specs(config)["layers"][index]
    spec = AttentionSpec(config.query_scale, layer.window, config.attn_soft_cap, index, weights.get("sinks"))

    def see(name: str, x: Array) -> Array:
        return x if component is None else component(name, x, index)

    def attend_and_see(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        out, kept = attend(q, k, v, spec, state)
        return see("heads", out), kept

    norm = functools.partial(rms_norm, eps=config.norm_eps, offset=config.norm_offset)
    before, after = config.norm_position != "post", config.norm_position != "pre"

    with jax.named_scope("attention"):
        h = norm(x, weights["attn_norm"]) if before else x
        h, state = _ATTENTION[layer.attention](h, weights, specs, config, norm, rope, attend_and_see, product)
        x = x + see("attention", norm(h, weights["post_attn_norm"]) if after else h)
    with jax.named_scope("mlp"):
        h = norm(x, weights["mlp_norm"]) if before else x
        h = _MLP[layer.mlp](h, weights, specs, config, product, None if component is None else see)
        x = x + see("mlp", norm(h, weights["post_mlp_norm"]) if after else h)
    return x, state


# Equal layers are one function to JAX; XLA inlines it wherever it is called.
_layer_traced_once = jax.jit(_layer, static_argnames=("config", "index", "product"))


def grouped_attention(
    x: Float[Array, "B T I"],
    weights: Params,
    specs: dict[str, ParamSpec],
    config: ModelConfig,
    norm: Callable[..., Array],
    rope: tuple[Array, Array],
    attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    product: Product,
) -> tuple[Float[Array, "B T D"], Any]:
    """Attention with grouped queries, from the norm before it to the projection after it.

    Args:
      x: what queries, keys and values are made of.
      weights, specs: of a layer.
      config: the model.
      norm: `rms_norm` of it, of queries and keys.
      rope: as `rope_tables` makes them.
      attend: an `Attend` of q, k and v alone.
      product: as in `linear`.
    """
    qkv = linear(x, weights["qkv"], specs["qkv"], weights.get("qkv_bias"), product=product)  # [B, T, K, G + 2, H]
    G = qkv.shape[-2] - 2  # fewer than the configuration's where KV heads are copied
    q, k, v = qkv[..., :G, :], qkv[..., G, :], qkv[..., G + 1, :]
    if config.qk_norm is not None:
        q, k = norm(q, weights["q_norm"]), norm(k, weights["k_norm"])
    q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    out, state = attend(q, k, v)
    return linear(out, weights["out"], specs["out"], weights.get("out_bias"), product=product), state


def _dense_mlp(x, weights, specs, config, product, see):
    neurons = {} if see is None else {"neurons": functools.partial(see, "neurons")}
    return gated_mlp(x, weights, specs, config.activation, product, **neurons)


_ATTENTION = {"grouped": grouped_attention}
"""What computes a layer's attention, by `LayerConfig.attention`."""
_MLP = {"dense": _dense_mlp, "experts": experts_mlp}
"""What computes its MLP, by `LayerConfig.mlp`."""
_STATIC = ("config", "residual", "component")


@functools.partial(arguments.known_ids, static=_STATIC)
@functools.partial(jax.jit, static_argnames=_STATIC)
@arguments.arguments(
    params=arguments.parameters, config=arguments.config, tokens=arguments.array("iu", "B T"), **arguments.seams
)
def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    residual: Residual | None = None,
    component: Component | None = None,
) -> Float[Array, "B T V"]:
    """Teacher-forced logits, float32, of every position: no cache, differentiable.

    Args:
      params: as `param_specs(config)`.
      config: the model.
      tokens: token ids; shorter rows are padded on the right, which no earlier position sees. Ids outside the
        vocabulary are refused where the array is on the host or a CPU; under a trace, or on an accelerator, they are
        the caller's.
      residual, component: as in `transformer` (static).
    """
    x, _ = transformer(params, config, tokens, residual=residual, component=component)
    return unembed(params, config, x)
