"""Qwen3 MoE, such as 30B-A3B and 235B-A22B: Qwen3 with many small experts."""

import functools

from ..config import ExpertsConfig, ModelConfig
from ..fields import Fields
from . import qwen2
from .common import decoder_config
from .experts import expert_count, expert_tensors, sparse_layers
from .family import Family
from .tensors import decoder_tensors

DEFAULTS = qwen2.DEFAULTS | {
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    mlps, bias = sparse_layers(hf), hf.get("attention_bias", False)
    experts = ExpertsConfig(
        expert_count(hf, 128),
        hf["num_experts_per_tok"],
        hf["moe_intermediate_size"],
        renormalize=hf.get("norm_topk_prob", False),
    )
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return decoder_config(
        "qwen3_moe",
        hf,
        windows=[window] * hf["num_hidden_layers"],
        mlps=mlps,
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        experts=experts if "experts" in mlps else None,
    )


FAMILY = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    ("qwen3_moe",),
    config,
    functools.partial(decoder_tensors, experts=expert_tensors),
)
