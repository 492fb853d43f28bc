"""Where parameters lie in a checkpoint: the names that families share."""

import dataclasses
from collections.abc import Callable

from ..config import ModelConfig
from .family import Piece, TensorMap

_NORMS = {
    "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"post_attn_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"},
    "sandwich": {
        "attn_norm": "input_layernorm",
        "post_attn_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
}


_DENSE = ("gate_up", "gate_up_bias", "down", "down_bias")


def decoder_tensors(
    config: ModelConfig,
    projections: Callable[[ModelConfig, str], TensorMap] | None = None,
    experts: Callable[[ModelConfig, str], TensorMap] | None = None,
) -> TensorMap:
    """The pieces of every parameter.

    Args:
      config: the model.
      projections: (config, prefix of the layer's tensors) -> pieces of `qkv` and `gate_up` and their biases, for
        families that name them otherwise than `separate_projections`.
      experts: the same of all that a layer of experts has in place of a dense MLP.
    """
    V, D = config.vocab_size, config.embed_dim
    found = {
        "embedding": whole("model.embed_tokens.weight", V, D),
        "final_norm": whole("model.norm.weight", D),
    }
    if config.has_unembedding:
        found["unembedding"] = found["embedding"] if config.tie_embeddings else whole("lm_head.weight", V, D)
    for index, kinds in enumerate(config.layers):
        prefix = f"model.layers.{index}."
        layer = _layer(config, prefix) | (projections or separate_projections)(config, prefix)
        if kinds.mlp == "experts":
            layer = {name: pieces for name, pieces in layer.items() if name not in _DENSE} | experts(config, prefix)
        found |= {f"layers.{index}.{name}": pieces for name, pieces in layer.items()}
    return found


def whole(tensor: str, *shape: int) -> tuple[Piece, ...]:
    """A parameter that is one tensor, reshaped if need be."""
    return (Piece(tensor, shape),)


def separate_projections(config: ModelConfig, prefix: str) -> TensorMap:
    """q, k, v, gate and up as tensors of their own, with the biases that the config has."""
    D, F, H = config.embed_dim, config.ffn_dim, config.head_dim
    G = config.q_per_kv
    kv_rows = config.num_kv_heads * H

    def qkv(suffix: str, *fan_in: int) -> tuple[Piece, ...]:
        q, k, v = (f"{prefix}self_attn.{name}_proj.{suffix}" for name in "qkv")
        # A q head's index is k * G + g, so that a plain reshape groups the q heads by their KV head.
        pieces = [Piece(q, (config.num_heads * H, *fan_in), (slice(None), slice(0, G)))]
        for where, tensor in ((G, k), (G + 1, v)):
            pieces.append(Piece(tensor, (kv_rows, *fan_in), (slice(None), where)))
        return tuple(pieces)

    def gate_up(suffix: str, *fan_in: int) -> tuple[Piece, ...]:
        names = enumerate(("gate", "up"))
        return tuple(Piece(f"{prefix}mlp.{name}_proj.{suffix}", (F, *fan_in), (index,)) for index, name in names)

    found = {"qkv": qkv("weight", D), "gate_up": gate_up("weight", D)}
    if config.qkv_bias:
        found["qkv_bias"] = qkv("bias")
    if config.mlp_bias:
        found["gate_up_bias"] = gate_up("bias")
    return found


def with_copied_heads(config: ModelConfig, tensors: TensorMap, copies: int) -> TensorMap:
    """The same tensors for parameters with so many copies of each KV head, which share out its query heads."""
    return {name: _copied(config, name.split(".")[-1], pieces, copies) for name, pieces in tensors.items()}


def _copied(config: ModelConfig, name: str, pieces: tuple[Piece, ...], copies: int) -> tuple[Piece, ...]:
    G, heads = config.q_per_kv, config.num_kv_heads * copies
    if copies == 1 or not (name in ("qkv", "qkv_bias") or (name == "k_norm" and config.qk_norm == "full")):
        return pieces  # its query heads, in their order, are those of the copies in theirs
    placed = []
    for piece in pieces:
        match piece.index[1:]:
            case [slice()]:  # query heads, as above
                placed.append(dataclasses.replace(piece, index=(slice(None), slice(0, G // copies))))
            case where:  # keys or values
                first, last = piece.rows or (0, piece.shape[0])
                height, where = (last - first) // config.num_kv_heads, [n - G + G // copies for n in where]
                for head in range(heads):
                    start = first + head // copies * height
                    placed.append(dataclasses.replace(piece, index=(head, *where), rows=(start, start + height)))
    return tuple(placed)


def _layer(config: ModelConfig, prefix: str) -> TensorMap:
    D, F, H = config.embed_dim, config.ffn_dim, config.head_dim
    found = {
        "out": whole(f"{prefix}self_attn.o_proj.weight", D, config.num_heads * H),
        "down": whole(f"{prefix}mlp.down_proj.weight", D, F),
    }
    if config.out_bias:
        found["out_bias"] = whole(f"{prefix}self_attn.o_proj.bias", D)
    if config.mlp_bias:
        found["down_bias"] = whole(f"{prefix}mlp.down_proj.bias", D)
    if config.attn_sinks:
        found["sinks"] = whole(f"{prefix}self_attn.sinks", config.num_heads)
    for name, tensor in _NORMS[config.norm_position].items():
        found[name] = whole(f"{prefix}{tensor}.weight", D)
    q_norm, k_norm = (f"{prefix}self_attn.{name}_norm.weight" for name in "qk")
    if config.qk_norm == "head":
        found |= {"q_norm": whole(q_norm, H), "k_norm": whole(k_norm, H)}
    elif config.qk_norm == "full":
        found |= {"q_norm": whole(q_norm, config.num_heads * H), "k_norm": whole(k_norm, config.num_kv_heads * H)}
    return found
