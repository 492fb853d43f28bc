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
      mlp: what kind of MLP it has: "dense".
    """

    rope: RopeConfig
    window: int | None = None
    attention: Literal["grouped"] = "grouped"
    mlp: Literal["dense"] = "dense"

    def __post_init__(self):
        _check_types(self)
        _one_of("attention", self.attention, ("grouped",))
        _one_of("mlp", self.mlp, ("dense",))
        if self.window is not None and self.window <= 0:
            raise ValueError(f"sliding window is {self.window}; it must be positive, or None for full attention")


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
