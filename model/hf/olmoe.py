"""OLMoE: 64 small experts a layer, and norms over the full width of queries and keys."""

import functools

from ..config import ExpertsConfig, ModelConfig
from ..fields import Fields
from .common import decoder_config
from .experts import expert_count, expert_tensors
from .family import Family
from .tensors import decoder_tensors

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 8,
}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    hf.only("clip_qkv", (), "queries, keys and values are not clipped")
    bias = hf.get("attention_bias", False)
    experts = ExpertsConfig(
        expert_count(hf, 64),
        hf["num_experts_per_tok"],
        hf["intermediate_size"],
        renormalize=hf.get("norm_topk_prob", False),
    )
    mlps = ["experts"] * hf["num_hidden_layers"]
    return decoder_config("olmoe", hf, mlps=mlps, qk_norm="full", qkv_bias=bias, out_bias=bias, experts=experts)


FAMILY = Family(
    "olmoe", ("OlmoeForCausalLM",), ("olmoe",), config, functools.partial(decoder_tensors, experts=expert_tensors)
)
