"""The static description of a model: everything that shapes its compiled programs."""

import dataclasses
import functools
import math
import numbers
import typing
from typing import Any, Literal

from .schemes import Quantization

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one layer; `model.rope` holds the formulas of each kind.

    Attributes:
      rotary_dim: how many leading dimensions of a head are rotated (even; the rest pass through).
      theta: the base of the geometric series of wavelengths.
      kind: one of `ROPE_KINDS`; the fields after it are read by the kinds that name them.
      factor: context extension factor (linear, dynamic, llama3, yarn).
      original_max_position: context length of pre-training (dynamic, llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: band between kept and divided frequencies (llama3).
      beta_fast, beta_slow, truncate: the same band counted in rotations (yarn).
      short_factor, long_factor: a divisor a frequency, `rotary_dim / 2` of each (longrope).
      attention_factor: multiplies cos and sin (yarn, longrope).
    """

    rotary_dim: int
    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self):
        _check_types(self)
        _one_of("RoPE kind", self.kind, ROPE_KINDS)
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim is {self.rotary_dim}; it must be positive and even")
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and self.original_max_position <= 0:
            raise ValueError(
                f"RoPE kind {self.kind!r} needs original_max_position, got {self.original_max_position}; "
                "set original_max_position_embeddings in the config's rope parameters"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"llama3 high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}"
            )
        if self.kind == "yarn" and self.beta_fast < self.beta_slow:
            raise ValueError(f"yarn beta_fast {self.beta_fast} must not be below beta_slow {self.beta_slow}")
        if self.kind == "dynamic" and self.rotary_dim == 2:
            raise ValueError("RoPE kind 'dynamic' needs a rotary_dim of 4 or more, got 2")
        for name in ("short_factor", "long_factor"):
            found = len(getattr(self, name))
            if self.kind == "longrope" and found != self.rotary_dim // 2:
                raise ValueError(
                    f"longrope {name} has {found} entries; rotary_dim {self.rotary_dim} needs {self.rotary_dim // 2}"
                )


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What differs from one layer to the next.

    Attributes:
      rope: the layer's rotary embedding.
      window: sliding-window width in tokens, the token itself included; None attends to everything.
      attention: what kind of attention the layer has: "grouped", queries that share KV heads.
      mlp: what kind of MLP it has: "dense", or the routed "experts" of `ModelConfig.experts`.
    """

    rope: RopeConfig
    window: int | None = None
    attention: Literal["grouped"] = "grouped"
    mlp: Literal["dense", "experts"] = "dense"

    def __post_init__(self):
        _check_types(self)
        _one_of("attention", self.attention, ("grouped",))
        _one_of("mlp", self.mlp, ("dense", "experts"))
        if self.window is not None and self.window <= 0:
            raise ValueError(f"sliding window is {self.window}; it must be positive, or None for full attention")


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The routed experts of a layer, all layers alike: each token goes through a few of many small MLPs.

    Attributes:
      count: experts of a layer, E.
      per_token: of which each token goes through so many, k.
      ffn_dim: of each of them.
      scores: what the router's logits become, "softmax" over all experts or "sigmoid" of each.
      renormalize: whether the scores of a token's experts are divided by their sum. After a softmax this is the
        softmax over the logits of the token's experts alone.
      scale: multiplies the sum of a token's experts.
      router_bias: whether the router has a bias, which is added to its logits.
      selection_bias: whether a bias is added to the scores when experts are selected, and only then.
      groups, groups_per_token: consecutive experts form so many groups, and a token's experts come from the so many
        of them whose two best scores have the largest sums.
      mlp_bias: whether experts have biases.
      shared_ffn_dim: of one more expert, which all tokens go through; 0 where there is none.
      shared_gate: whether the sigmoid of one more product with the token multiplies what that one yields.
      swiglu_limit: bounds the gate from above and the up projection on both sides, and makes the inner activations
        (up + 1) * gate * sigmoid(swiglu_alpha * gate), as in gpt-oss; None leaves activation(gate) * up.
      swiglu_alpha: as above.
    """

    count: int
    per_token: int
    ffn_dim: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    router_bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    groups_per_token: int = 1
    mlp_bias: bool = False
    shared_ffn_dim: int = 0
    shared_gate: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def __post_init__(self):
        _check_types(self)
        _one_of("scores", self.scores, ("softmax", "sigmoid"))
        for name in ("count", "per_token", "ffn_dim", "groups", "groups_per_token"):
            if getattr(self, name) <= 0:
                raise ValueError(f"experts: {name} is {getattr(self, name)}; it must be positive")
        if self.shared_ffn_dim < 0 or (self.shared_gate and not self.shared_ffn_dim):
            raise ValueError(f"experts: shared_ffn_dim is {self.shared_ffn_dim}; a shared expert needs a positive one")
        if self.count % self.groups or self.groups_per_token > self.groups:
            raise ValueError(
                f"experts: {self.count} in {self.groups} groups, {self.groups_per_token} of them for a token; the "
                "groups must divide the experts, and a token cannot have more than there are"
            )
        if self.groups > 1 and self.count // self.groups < 2:
            raise ValueError(f"experts: {self.groups} groups of {self.count} experts are too small; two or more each")
        eligible = self.count // self.groups * self.groups_per_token
        if self.per_token > eligible:
            raise ValueError(f"experts: per_token is {self.per_token}; it must be at most {eligible}, of {self.count}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Frozen and hashable: jit takes it as a static argument.

    Sizes are in elements. The letters are those of the shape annotations: `vocab_size` V, `embed_dim` D,
    `ffn_dim` F, `num_kv_heads` K, `q_per_kv` G, `head_dim` H, `num_layers` L.

    Attributes:
      family: the family file in `model/hf` that the configuration came from.
      layers: one `LayerConfig` a layer.
      max_position: longest sequence the model was made for, in tokens.
      norm_position: norms before each sub-block ("pre"), after it ("post"), or both ("sandwich").
      norm_offset: added to every norm weight (1.0 in Gemma, whose checkpoints store w - 1).
      qk_norm: RMS norm of queries and keys over each head ("head"), over all heads at once ("full"), or None.
      embed_scale: multiplies the token embeddings.
      query_scale: multiplies q . k before the softmax.
      attn_soft_cap, logit_soft_cap: cap * tanh(x / cap) on attention scores and on logits.
      attn_sinks: whether each head has a learned logit that takes its share of the softmax and has no value.
      experts: the routed experts of the layers that have them; None where none has.
      dtype: of weights, activations and KV cache; sums, norms, softmax and logits are float32 always.
      quantization: which weights are stored in fewer bits, and how; None leaves all in `dtype`.
    """

    family: str
    vocab_size: int
    embed_dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_position: int
    norm_eps: float
    query_scale: float
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    norm_offset: float = 0.0
    qk_norm: Literal["head", "full"] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    attn_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    attn_sinks: bool = False
    experts: ExpertsConfig | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Quantization | None = None

    def __post_init__(self):
        _check_types(self)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("norm_position", self.norm_position, ("pre", "post", "sandwich"))
        _one_of("qk_norm", self.qk_norm, (None, "head", "full"))
        _one_of("dtype", self.dtype, DTYPES)
        for name in ("vocab_size", "embed_dim", "ffn_dim", "num_heads", "num_kv_heads", "head_dim", "max_position"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.max_position >= 2**31:
            raise ValueError(f"max_position is {self.max_position}; positions are counted in 32 bits")
        if not self.layers:
            raise ValueError("the model has no layers; num_hidden_layers must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "every KV head must serve the same number of query heads"
            )
        if (self.experts is not None) != any(layer.mlp == "experts" for layer in self.layers):
            kinds = sorted({layer.mlp for layer in self.layers})
            raise ValueError(f"experts is {self.experts} and layers have mlp {kinds}; only layers of experts need it")
        for index, layer in enumerate(self.layers):
            if layer.rope.rotary_dim > self.head_dim:
                raise ValueError(
                    f"layer {index} rotates {layer.rope.rotary_dim} dimensions of a head that has {self.head_dim}"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def q_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def has_unembedding(self) -> bool:
        """Whether the output projection is a parameter of its own; else it is the embedding."""
        return not self.tie_embeddings or (self.quantization is not None and self.quantization.output is not None)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with the named fields changed, validated again."""
        return dataclasses.replace(self, **changes)


_ABSTRACT = {int: numbers.Integral, float: numbers.Real}


def _check_types(config: Any) -> None:
    """Raise TypeError, or ValueError for a number that is not finite, naming the field; `_one_of` checks choices."""
    for name, types in _field_types(type(config)).items():
        value = getattr(config, name)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            allowed = " or ".join(one.__name__ for one in types)
            raise TypeError(f"{type(config).__name__}: {name} is {value!r:.80}; it must be {allowed}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{type(config).__name__}: {name} is {value}; it must be finite")


@functools.cache
def _field_types(config: type) -> dict[str, tuple[type, ...]]:
    """The types of each field, but of those that are `Literal`s."""
    fields = {}
    for name, hint in typing.get_type_hints(config).items():
        types = (tuple,) if typing.get_origin(hint) is tuple else typing.get_args(hint) or (hint,)
        if all(isinstance(one, type) for one in types):
            fields[name] = tuple(_ABSTRACT.get(one, one) for one in types)
    return fields


def _one_of(what: str, value: Any, supported: tuple) -> None:
    if value not in supported:
        raise ValueError(f"{what} {value!r} is not supported; supported: {', '.join(map(str, supported))}")
