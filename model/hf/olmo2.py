"""OLMo 2: norms after each sub-block instead of before it, and over all heads of queries and keys at once."""

from ..config import ModelConfig
from ..fields import Fields
from .common import decoder_config
from .family import Family
from .tensors import decoder_tensors

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    bias = hf.get("attention_bias", False)
    return decoder_config("olmo2", hf, norm_position="post", qk_norm="full", qkv_bias=bias, out_bias=bias)


FAMILY = Family("olmo2", ("Olmo2ForCausalLM",), ("olmo2",), config, decoder_tensors)
