"""Gemma 2: soft caps, windows on every second layer, norms before and after each sub-block, scaled embeddings."""

from typing import Any

from ..config import ModelConfig
from ..fields import Fields
from .common import decoder_config, layer_types, layer_windows
from .family import Family
from .tensors import decoder_tensors

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    windows = layer_windows(hf, layer_types(hf, lambda index: index % 2 == 0))
    cap = hf.get("attn_logit_softcapping")
    return decoder_config("gemma2", hf, windows=windows, attn_soft_cap=cap, **gemma_fields(hf))


def gemma_fields(hf: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    hf.only("use_bidirectional_attention", (False,), "only causal decoders are")
    bias = hf.get("attention_bias", False)
    return {
        "activation_key": "hidden_activation",
        "norm_position": "sandwich",
        "norm_offset": 1.0,
        "qkv_bias": bias,
        "out_bias": bias,
        "embed_scale": hf["hidden_size"] ** 0.5,
        "query_scale": hf["query_pre_attn_scalar"] ** -0.5,
        "logit_soft_cap": hf.get("final_logit_softcapping"),
    }


FAMILY = Family("gemma2", ("Gemma2ForCausalLM",), ("gemma2",), config, decoder_tensors)
