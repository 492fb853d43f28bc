"""Llama 2, 3, 3.1, 3.2 (text) and the checkpoints that share their architecture."""

from ..config import ModelConfig
from .common import decoder_config
from .family import Family, HFConfig
from .tensors import decoder_tensors

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


def config(hf: HFConfig) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    bias = bool(hf.get("attention_bias"))
    return decoder_config("llama", hf, qkv_bias=bias, out_bias=bias, mlp_bias=bool(hf.get("mlp_bias")))


FAMILY = Family("llama", ("LlamaForCausalLM",), ("llama",), config, decoder_tensors)
