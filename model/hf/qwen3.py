"""Qwen3 (dense): Qwen2 without biases, with an RMS norm on each head's queries and keys."""

from ..config import ModelConfig
from . import qwen2
from .common import decoder_config
from .family import Family, HFConfig
from .tensors import decoder_tensors

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def config(hf: HFConfig) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    bias = bool(hf.get("attention_bias"))
    return decoder_config("qwen3", hf, windows=qwen2.windows(hf), qk_norm="head", qkv_bias=bias, out_bias=bias)


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), config, decoder_tensors)
