"""OLMo 2: norms after each sub-block instead of before it, and over all heads of queries and keys at once."""

from ..config import ModelConfig
from .common import decoder_config
from .family import Family, HFConfig
from .tensors import decoder_tensors

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


def config(hf: HFConfig) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    bias = bool(hf.get("attention_bias"))
    return decoder_config("olmo2", hf, norm_position="post", qk_norm="full", qkv_bias=bias, out_bias=bias)


FAMILY = Family("olmo2", ("Olmo2ForCausalLM",), ("olmo2",), config, decoder_tensors)
