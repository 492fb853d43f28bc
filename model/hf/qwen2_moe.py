"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with many small experts, and one that all tokens go through, times its own gate."""

import functools

from ..config import ExpertsConfig, ModelConfig
from ..fields import Fields
from . import qwen2
from .common import decoder_config, layer_types, layer_windows
from .experts import expert_count, expert_tensors, sparse_layers
from .family import Family
from .tensors import decoder_tensors

DEFAULTS = qwen2.DEFAULTS | {
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "decoder_sparse_step": 1,
}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    mlps = sparse_layers(hf)
    experts = ExpertsConfig(
        expert_count(hf, 60),
        hf["num_experts_per_tok"],
        hf["moe_intermediate_size"],
        renormalize=hf.get("norm_topk_prob", False),
        shared_ffn_dim=hf["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    return decoder_config(
        "qwen2_moe",
        hf,
        windows=_windows(hf),
        mlps=mlps,
        qkv_bias=hf.get("qkv_bias", True),
        experts=experts if "experts" in mlps else None,
    )


def _windows(hf: Fields) -> list[int | None]:
    """None unless `use_sliding_window`; then `layer_types`, or every other layer below `max_window_layers`."""
    if not hf.get("use_sliding_window"):
        return [None] * hf["num_hidden_layers"]
    last = hf["max_window_layers"]
    return layer_windows(hf, layer_types(hf, lambda index: index % 2 == 0 and index < last))


FAMILY = Family(
    "qwen2_moe",
    ("Qwen2MoeForCausalLM",),
    ("qwen2_moe",),
    config,
    functools.partial(decoder_tensors, experts=expert_tensors),
)
