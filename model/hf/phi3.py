"""Phi-3, Phi-3.5 and Phi-4 (mini): Llama with q, k, v in one tensor, gate and up in another, partial rotary
embeddings and longrope."""

from ..config import ModelConfig
from ..fields import Fields
from .common import decoder_config, head_dim, rope_parameters
from .family import Family, Piece, TensorMap
from .rope import rope_from_hf
from .tensors import decoder_tensors, whole

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    layers = hf["num_hidden_layers"]
    window = hf.get("sliding_window")
    parameters = rope_parameters(hf)
    if "short_factor" in parameters:
        parameters = parameters | {"rope_type": "longrope"}  # early revisions call it "su" or "yarn"
    fraction = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    rope = rope_from_hf(hf, parameters, int(head_dim(hf) * fraction))
    return decoder_config("phi3", hf, windows=[window] * layers, ropes=[rope] * layers)


def tensors(config: ModelConfig) -> TensorMap:
    return decoder_tensors(config, _fused_projections)


def _fused_projections(config: ModelConfig, prefix: str) -> TensorMap:
    D, F, H = config.embed_dim, config.ffn_dim, config.head_dim
    G, q_rows = config.q_per_kv, config.num_heads * H
    kv_rows = config.num_kv_heads * H
    tensor, shape = f"{prefix}self_attn.qkv_proj.weight", (q_rows + 2 * kv_rows, D)
    qkv = (
        Piece(tensor, shape, (slice(None), slice(0, G)), (0, q_rows)),
        Piece(tensor, shape, (slice(None), G), (q_rows, q_rows + kv_rows)),
        Piece(tensor, shape, (slice(None), G + 1), (q_rows + kv_rows, q_rows + 2 * kv_rows)),
    )
    return {"qkv": qkv, "gate_up": whole(f"{prefix}mlp.gate_up_proj.weight", 2 * F, D)}


FAMILY = Family("phi3", ("Phi3ForCausalLM",), ("phi3",), config, tensors)
