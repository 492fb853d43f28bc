"""Gemma 3, text: Gemma 2 with normed queries and keys in place of soft caps, five sliding layers to each full one,
and a rotary embedding for each of the two types."""

from ..config import ModelConfig
from ..fields import Fields
from .common import decoder_config, head_dim, layer_types, layer_windows
from .declared import FULL, SLIDING
from .family import Family
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


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    hf.only("attn_logit_softcapping", (), "Gemma 3 caps no attention scores")
    pattern = hf["sliding_window_pattern"]
    types = layer_types(hf, lambda index: (index + 1) % pattern != 0)

    by_type = hf.object("rope_parameters")
    full = by_type.object(FULL).values | hf.object("rope_scaling")
    sliding = {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)} | by_type.object(SLIDING)
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
        max_position=hf["max_position_embeddings"],  # stated with its scaling
        **gemma_fields(hf),
    )


FAMILY = Family("gemma3", ("Gemma3ForCausalLM", "Gemma3TextModel"), ("gemma3_text",), config, decoder_tensors)
