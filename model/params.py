"""The one list of a model's parameters.

`param_specs(config)` drives initialization, placement, loading and every byte count; nothing else lists parameters.
Weights keep the checkpoint's [out, in] orientation. Query, key and value weights are one array grouped by KV head,
gate and up weights are one array: fewer launches, and both shard on their first axis. A weight that the configuration
quantizes is a `QuantizedArray` in the tree, whose leaves are parameters like any other.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from ..sharding.rules import named_sharding
from . import arguments
from .config import LayerConfig, ModelConfig
from .quantization import QuantizedArray, quantize, scale_axes, stored_dtype, stored_shapes
from .schemes import Scheme

Params = dict[str, Any]
"""A pytree of arrays with the structure of `param_specs(config)`."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter before it exists: a leaf of the tree that `param_specs` returns.

    Attributes:
      shape: its full (unsharded) shape.
      dtype: its dtype's name.
      axes: a logical name an axis, which `sharding` maps to mesh axes; None is never sharded.
      init: "normal" (fan-in scaled), "ones" or "zeros".
      in_axes: how many trailing axes a product with it contracts; 0 where there is none.
      quantizable: whether it may be stored in fewer bits; embeddings and routers never are.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    in_axes: int = 0
    quantizable: bool = True

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in rank; name every axis")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize


@arguments.arguments(config=arguments.config, tensor=arguments.whole)
def param_specs(config: ModelConfig, tensor: int = 1) -> Params:
    """The pytree of `ParamSpec` of a model: its parameters' names, shapes, dtypes, axes and initialization.

    Args:
      config: the model.
      tensor: devices that share each layer. They copy KV heads where there are more of them (`kv_replicas`), and pad
        the vocabulary (`padded_vocabulary`): placement, which files and logits know nothing of.
    """

    def stored(path: tuple, spec: ParamSpec) -> Any:
        scheme = scheme_of(config, param_name(path), spec)
        return spec if scheme is None else _quantized(spec, scheme)

    return jax.tree_util.tree_map_with_path(stored, float_specs(config, tensor))


def scheme_of(config: ModelConfig, name: str, spec: ParamSpec) -> Scheme | None:
    """How a parameter of `float_specs` is stored; None is as it is."""
    quantized = config.quantization is not None and spec.in_axes and spec.quantizable
    return config.quantization.scheme_of(name) if quantized else None


def _quantized(spec: ParamSpec, scheme: Scheme) -> QuantizedArray:
    """The specs of a weight's parts."""
    values, scales = stored_shapes(spec.shape, scheme, spec.in_axes)
    axes = scale_axes(spec.axes, spec.in_axes, scales)
    return QuantizedArray(
        values=ParamSpec(values, stored_dtype(scheme.dtype), spec.axes),
        scales=ParamSpec(scales, stored_dtype(scheme.scale_dtype), axes),
        zeros=ParamSpec(scales, stored_dtype(scheme.dtype), axes) if scheme.zero_points else None,
        scheme=scheme,
        order=ParamSpec((math.prod(spec.shape[-spec.in_axes :]),), "int32", (None,)) if scheme.sorted_inputs else None,
        input_scale=ParamSpec((1,), "float32", (None,)) if scheme.static else None,
    )


@functools.cache
def float_specs(config: ModelConfig, tensor: int = 1) -> Params:
    """`param_specs` of the model before it is quantized: what checkpoints hold and initialization makes.

    Made once a configuration and shared: not to be changed.
    """
    D, copies = config.embed_dim, kv_replicas(config, tensor)
    specs = {
        "embedding": ParamSpec(
            (padded_vocabulary(config, tensor), D), config.dtype, ("vocab", "embed"), in_axes=1, quantizable=False
        ),
        "layers": [_layer_specs(config, layer, copies) for layer in config.layers],
        "final_norm": _norm(config, (D, "embed")),
    }
    if config.has_unembedding:
        scheme = config.quantization and config.quantization.output
        rows = padded_vocabulary(config, tensor, scheme)
        specs["unembedding"] = ParamSpec((rows, D), config.dtype, ("vocab", "embed"), in_axes=1)
    return specs


def _layer_specs(config: ModelConfig, layer: LayerConfig, copies: int) -> dict[str, ParamSpec]:
    kinds = _ATTENTION[layer.attention](config, copies) | _MLP[layer.mlp](config)
    before, after = config.norm_position != "post", config.norm_position != "pre"
    names = ["attn_norm", "mlp_norm"] * before + ["post_attn_norm", "post_mlp_norm"] * after
    return kinds | {name: _norm(config, (config.embed_dim, "embed")) for name in names}


def _grouped_attention(config: ModelConfig, copies: int) -> dict[str, ParamSpec]:
    G = config.q_per_kv // copies
    kv_heads, head = (config.num_kv_heads * copies, "kv_heads"), (config.head_dim, "head_dim")
    group, qkv, embed = (G, "q_per_kv"), (G + 2, "q_per_kv"), (config.embed_dim, "embed")
    specs = {
        "qkv": _weight(config, kv_heads, qkv, head, embed),
        "out": _weight(config, embed, kv_heads, group, head, in_axes=3),
    }
    if config.qkv_bias:
        specs["qkv_bias"] = _bias(config, kv_heads, qkv, head)
    if config.out_bias:
        specs["out_bias"] = _bias(config, embed)
    if config.attn_sinks:
        specs["sinks"] = _bias(config, kv_heads, group)
    if config.qk_norm == "head":
        specs |= {"q_norm": _norm(config, head), "k_norm": _norm(config, head)}
    elif config.qk_norm == "full":
        specs |= {"q_norm": _norm(config, kv_heads, group, head), "k_norm": _norm(config, kv_heads, head)}
    return specs


def _dense_mlp(config: ModelConfig) -> dict[str, ParamSpec]:
    both, ffn, embed = (2, None), (config.ffn_dim, "ffn"), (config.embed_dim, "embed")
    specs = {"gate_up": _weight(config, both, ffn, embed), "down": _weight(config, embed, ffn)}
    if config.mlp_bias:
        specs |= {"gate_up_bias": _bias(config, both, ffn), "down_bias": _bias(config, embed)}
    return specs


def _experts(config: ModelConfig) -> dict[str, ParamSpec]:
    experts, both, embed = config.experts, (2, None), (config.embed_dim, "embed")
    count, ffn, shared = (experts.count, "experts"), (experts.ffn_dim, "ffn"), (experts.shared_ffn_dim, "ffn")
    # Every device routes, by the whole router.
    routed = (experts.count, None)
    specs = {
        "router": dataclasses.replace(_weight(config, routed, embed), quantizable=False),
        "gate_up": _weight(config, count, both, ffn, embed),
        "down": _weight(config, count, embed, ffn),
    }
    if experts.router_bias:
        specs["router_bias"] = _bias(config, routed)
    if experts.selection_bias:
        specs["selection_bias"] = dataclasses.replace(_bias(config, routed), dtype="float32")
    if experts.mlp_bias:
        specs |= {"gate_up_bias": _bias(config, count, both, ffn), "down_bias": _bias(config, count, embed)}
    if experts.shared_ffn_dim:
        specs |= {"shared_gate_up": _weight(config, both, shared, embed), "shared_down": _weight(config, embed, shared)}
    if experts.shared_gate:
        specs["shared_gate"] = dataclasses.replace(_weight(config, (1, None), embed), quantizable=False)
    return specs


_ATTENTION = {"grouped": _grouped_attention}
"""The parameters of a layer's attention, by `LayerConfig.attention`."""
_MLP = {"dense": _dense_mlp, "experts": _experts}
"""Those of its MLP, by `LayerConfig.mlp`."""


def _weight(config: ModelConfig, *axes: tuple[int, str | None], in_axes: int = 1) -> ParamSpec:
    """A matrix, of each axis its size and its logical name."""
    shape, names = zip(*axes, strict=True)
    return ParamSpec(shape, config.dtype, names, in_axes=in_axes)


def _bias(config: ModelConfig, *axes: tuple[int, str | None]) -> ParamSpec:
    return dataclasses.replace(_weight(config, *axes, in_axes=0), init="zeros")


def _norm(config: ModelConfig, *axes: tuple[int, str | None]) -> ParamSpec:
    return dataclasses.replace(_weight(config, *axes, in_axes=0), init="zeros" if config.norm_offset else "ones")


def kv_replicas(config: ModelConfig, tensor: int) -> int:
    """Copies of each KV head, so that every one of `tensor` devices that share each layer holds whole KV heads.

    The query heads of a KV head are shared out among its copies. With no more devices than KV heads it is 1.

    Raises:
      ValueError: the devices cannot share the KV heads, or the copies cannot share the query heads, evenly.
    """
    K, G = config.num_kv_heads, config.q_per_kv
    copies = max(1, tensor // K)
    if tensor > K and (tensor % K or G % copies):
        raise ValueError(
            f"num_kv_heads {K} with {G} query heads each cannot be shared by a tensor axis of {tensor}; it must "
            f"divide {K}, or be {K} times a divisor of {G}"
        )
    return copies


def padded_vocabulary(config: ModelConfig, tensor: int, scheme: Scheme | None = None) -> int:
    """Rows of a matrix of the vocabulary, as many on each of `tensor` devices; those past V are zeros and no tokens.

    Args:
      config: the model.
      tensor: devices that share each layer.
      scheme: that the matrix is stored in; devices share whole blocks of rows.

    Raises:
      ValueError: with the padding, blocks would be larger than those of the matrix itself.
    """
    V = config.vocab_size
    block = 1 if scheme is None else scheme.block_rows(V)
    rows = -(-V // (block * tensor)) * block * tensor
    if scheme is not None and scheme.block_rows(rows) != block:
        raise ValueError(
            f"vocab_size {V} makes blocks of {block} rows, not {scheme.rows}, which a tensor axis of {tensor} cannot "
            "share; store the output projection in another scheme, such as int8"
        )
    return rows


def param_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """The pytree of `NamedSharding` that places a model's parameters on a mesh.

    Raises:
      ValueError: a parameter that the mesh does not divide; see `sharding.rules.partition_spec`.
    """
    return spec_shardings(param_specs(config, mesh.shape["tensor"]), mesh)


def spec_shardings(specs: Params, mesh: Mesh | AbstractMesh) -> Params:
    """`param_shardings` of any tree of `ParamSpec`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: named_sharding(param_name(path), spec.shape, spec.axes, mesh), specs
    )


def abstract_params(config: ModelConfig, mesh: Mesh | AbstractMesh | None = None) -> Params:
    """A model's parameters as `jax.ShapeDtypeStruct`s, on a mesh or one device."""
    if mesh is None:
        return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), param_specs(config))
    return jax.tree.map(
        lambda spec, at: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=at),
        param_specs(config, mesh.shape["tensor"]),
        param_shardings(config, mesh),
    )


def param_name(path: tuple) -> str:
    """A parameter's dotted name, such as "layers.0.qkv", from its path in the tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@jax.transfer_guard("allow")
@arguments.arguments(config=arguments.config, mesh=arguments.mesh)
def init_params(config: ModelConfig, key: jax.Array, mesh: Mesh | None = None) -> Params:
    """Random parameters: normal weights of standard deviation (fan-in) ** -0.5, norms at one, biases at zero.

    Args:
      config: the model.
      key: a `jax.random.key`.
      mesh: where to make them, each device its own part; the default device otherwise.
    """
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    paths, treedef = jax.tree_util.tree_flatten_with_path(float_specs(config, tensor))
    names, specs = [param_name(path) for path, _ in paths], [spec for _, spec in paths]

    def init(key: jax.Array) -> Params:
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        if config.tie_embeddings and config.has_unembedding:
            keys["unembedding"] = keys["embedding"]
        return treedef.unflatten(
            store(_init(spec, keys[name]), config, name, spec) for name, spec in zip(names, specs, strict=True)
        )

    return init(key) if mesh is None else jax.jit(init, out_shardings=param_shardings(config, mesh))(key)


def store(
    array: jax.typing.ArrayLike, config: ModelConfig, name: str, spec: ParamSpec
) -> jax.typing.ArrayLike | QuantizedArray:
    """A parameter of `float_specs` as `param_specs` has it."""
    scheme = scheme_of(config, name, spec)
    return array if scheme is None else quantize(array, scheme, spec.in_axes)


def _init(spec: ParamSpec, key: jax.Array) -> jax.Array:
    if spec.init == "zeros":
        return jnp.zeros(spec.shape, spec.dtype)
    if spec.init == "ones":
        return jnp.ones(spec.shape, spec.dtype)
    fan_in = math.prod(spec.shape[len(spec.shape) - spec.in_axes :])
    return (jax.random.normal(key, spec.shape, jnp.float32) * fan_in**-0.5).astype(spec.dtype)


@arguments.arguments(config=arguments.config, active=arguments.flag)
def count_parameters(config: ModelConfig, active: bool = False) -> int:
    """How many numbers the model's parameters are, however they are stored.

    Args:
      config: the model.
      active: whether of routed experts only so many are counted as a token goes through.
    """
    specs, experts = jax.tree.leaves(float_specs(config.replace(quantization=None))), config.experts
    idle = 0
    if active and experts is not None:
        routed = sum(spec.size for spec in specs if "experts" in spec.axes)
        idle = routed * (experts.count - experts.per_token) // experts.count
    return sum(spec.size for spec in specs) - idle
