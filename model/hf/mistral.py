"""Mistral 7B and Nemo: Llama with a sliding window on every layer (`sliding_window`; null is none)."""

from ..config import ModelConfig
from ..fields import Fields
from .common import decoder_config
from .declared import FULL, SLIDING
from .family import Family
from .tensors import decoder_tensors

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    layers = hf["num_hidden_layers"]
    window = hf.get("sliding_window")
    uniform = (FULL if window is None else SLIDING,) * layers
    hf.only("layer_types", (uniform,), "Mistral's layers are all alike")
    return decoder_config("mistral", hf, windows=[window] * layers)


FAMILY = Family("mistral", ("MistralForCausalLM",), ("mistral",), config, decoder_tensors)
