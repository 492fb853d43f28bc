"""Mixtral 8x7B and 8x22B: Mistral with eight experts a layer, of which each token takes two."""

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
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1_000_000.0,
}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    layers = hf["num_hidden_layers"]
    experts = ExpertsConfig(expert_count(hf, 8), hf["num_experts_per_tok"], hf["intermediate_size"])
    windows = [hf.get("sliding_window")] * layers
    return decoder_config("mixtral", hf, windows=windows, mlps=["experts"] * layers, experts=experts)


_experts = functools.partial(expert_tensors, module="block_sparse_moe", names=("w1", "w3", "w2"))
FAMILY = Family(
    "mixtral", ("MixtralForCausalLM",), ("mixtral",), config, functools.partial(decoder_tensors, experts=_experts)
)
