"""Qwen3 (dense): Qwen2 without biases, with an RMS norm on each head's queries and keys."""

from ..config import ModelConfig
from ..fields import Fields
from . import qwen2
from .common import decoder_config
from .family import Family
from .tensors import decoder_tensors

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    bias = hf.get("attention_bias", False)
    return decoder_config("qwen3", hf, windows=qwen2.windows(hf), qk_norm="head", qkv_bias=bias, out_bias=bias)


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), config, decoder_tensors)
