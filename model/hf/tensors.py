"""Where parameters lie in a checkpoint: the names that families share."""

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


def decoder_tensors(
    config: ModelConfig, projections: Callable[[ModelConfig, str], TensorMap] | None = None
) -> TensorMap:
    """The pieces of every parameter.

    Args:
      config: the model.
      projections: (config, prefix of the layer's tensors) -> pieces of `qkv` and `gate_up` and their biases, for
        families that name them otherwise than `separate_projections`.
    """
    V, D = config.vocab_size, config.embed_dim
    found = {
        "embedding": whole("model.embed_tokens.weight", V, D),
        "final_norm": whole("model.norm.weight", D),
    }
    if not config.tie_embeddings:
        found["unembedding"] = whole("lm_head.weight", V, D)
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        layer = _layer(config, prefix) | (projections or separate_projections)(config, prefix)
        found |= {f"layers.{index}.{name}": pieces for name, pieces in layer.items()}
    return found


def whole(tensor: str, *shape: int) -> tuple[Piece, ...]:
    """A parameter that is one tensor, reshaped if need be."""
    return (Piece(tensor, shape),)


def separate_projections(config: ModelConfig, prefix: str) -> TensorMap:
    """q, k, v, gate and up as tensors of their own, with the biases that the config has."""
    D, F, H = config.embed_dim, config.ffn_dim, config.head_dim
    K, G = config.num_kv_heads, config.q_per_kv
    # A q head's index is k * G + g, so that a plain reshape groups the q heads by their KV head.
    groups = {"q": (K * G * H, slice(0, G)), "k": (K * H, G), "v": (K * H, G + 1)}

    def qkv(suffix: str, *fan_in: int) -> tuple[Piece, ...]:
        return tuple(
            Piece(f"{prefix}self_attn.{name}_proj.{suffix}", (rows, *fan_in), (slice(None), where))
            for name, (rows, where) in groups.items()
        )

    def gate_up(suffix: str, *fan_in: int) -> tuple[Piece, ...]:
        names = enumerate(("gate", "up"))
        return tuple(Piece(f"{prefix}mlp.{name}_proj.{suffix}", (F, *fan_in), (index,)) for index, name in names)

    found = {"qkv": qkv("weight", D), "gate_up": gate_up("weight", D)}
    if config.qkv_bias:
        found["qkv_bias"] = qkv("bias")
    if config.mlp_bias:
        found["gate_up_bias"] = gate_up("bias")
    return found


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
    for name, tensor in _NORMS[config.norm_position].items():
        found[name] = whole(f"{prefix}{tensor}.weight", D)
    if config.qk_norm is not None:
        full = config.qk_norm == "full"
        for name, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
            found[name] = whole(f"{prefix}self_attn.{name}.weight", heads * H if full else H)
    return found
