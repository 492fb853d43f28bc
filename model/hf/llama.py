"""Llama 2, 3, 3.1, 3.2 (text) and the checkpoints that share their architecture."""

from ..config import ModelConfig
from ..fields import Fields
from .common import decoder_config
from .family import Family
from .tensors import decoder_tensors

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    bias = hf.get("attention_bias", False)
    return decoder_config("llama", hf, qkv_bias=bias, out_bias=bias, mlp_bias=hf.get("mlp_bias", False))


FAMILY = Family("llama", ("LlamaForCausalLM",), ("llama",), config, decoder_tensors)
