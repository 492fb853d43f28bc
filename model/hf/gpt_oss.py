"""gpt-oss: a learned sink a head, every other layer with a window, YaRN, and experts with biases and a clamped gate.

A layer's experts are one tensor, transposed, whose gate and up projections take turns.
"""

import functools

from ..config import ExpertsConfig, ModelConfig
from ..fields import Fields
from .common import decoder_config, layer_types, layer_windows
from .experts import expert_count
from .family import Family, Piece, TensorMap
from .tensors import decoder_tensors, whole

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "head_dim": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "rope_theta": 150_000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    bias = hf.get("attention_bias", True)
    experts = ExpertsConfig(
        expert_count(hf, 128),
        hf["num_experts_per_tok"],
        hf["intermediate_size"],
        router_bias=True,
        mlp_bias=True,
        swiglu_limit=hf["swiglu_limit"],
        swiglu_alpha=hf["swiglu_alpha"],
    )
    return decoder_config(
        "gpt_oss",
        hf,
        windows=layer_windows(hf, layer_types(hf, lambda index: index % 2 == 0)),
        mlps=["experts"] * hf["num_hidden_layers"],
        qkv_bias=bias,
        out_bias=bias,
        attn_sinks=True,
        experts=experts,
    )


def _experts(config: ModelConfig, prefix: str) -> TensorMap:
    E, D, F = config.experts.count, config.embed_dim, config.experts.ffn_dim
    module = f"{prefix}mlp."
    gate_up, down = f"{module}experts.gate_up_proj", f"{module}experts.down_proj"
    return {
        "router": whole(f"{module}router.weight", E, D),
        "router_bias": whole(f"{module}router.bias", E),
        "gate_up": (Piece(gate_up, (E, D, 2 * F), split=(E, D, F, 2), order=(0, 3, 2, 1)),),
        "gate_up_bias": (Piece(f"{gate_up}_bias", (E, 2 * F), split=(E, F, 2), order=(0, 2, 1)),),
        "down": (Piece(down, (E, F, D), split=(E, F, D), order=(0, 2, 1)),),
        "down_bias": whole(f"{down}_bias", E, D),
    }


FAMILY = Family(
    "gpt_oss", ("GptOssForCausalLM",), ("gpt_oss",), config, functools.partial(decoder_tensors, experts=_experts)
)
