"""Gemma 3, text: Gemma 2 with normed queries and keys in place of soft caps, five sliding layers to each full one,
and a rotary embedding for each of the two types."""

from ..config import ModelConfig
from .common import FULL, SLIDING, count, decoder_config, head_dim, layer_types, layer_windows, refuse
from .family import Family, HFConfig
from .gemma2 import gemma_fields
from .rope import rope_from_hf
from .tensors import decoder_tensors

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    refuse(hf, "attn_logit_softcapping", (), "Gemma 3 caps no attention scores")
    pattern = count(hf, "sliding_window_pattern")
    types = layer_types(hf, lambda index: (index + 1) % pattern != 0)

    by_type = hf.get("rope_parameters") or {}
    full = {**(by_type.get(FULL) or {}), **(hf.get("rope_scaling") or {})}
    sliding = {"rope_theta": hf.get("rope_local_base_freq") or 10_000.0, **(by_type.get(SLIDING) or {})}
    ropes = {
        FULL: rope_from_hf(hf, full, head_dim(hf), default_theta=1_000_000.0),
        SLIDING: rope_from_hf(hf, sliding, head_dim(hf)),
    }
    return decoder_config(
        "gemma3",
        hf,
        windows=layer_windows(hf, types),
        ropes=[ropes[kind] for kind in types],
        qk_norm="head",
        max_position=count(hf, "max_position_embeddings"),  # stated with its scaling
        **gemma_fields(hf),
    )


FAMILY = Family("gemma3", ("Gemma3ForCausalLM", "Gemma3TextModel"), ("gemma3_text",), config, decoder_tensors)
