"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window on the upper layers if it is enabled."""

from ..config import ModelConfig
from ..fields import Fields
from .common import decoder_config, layer_types, layer_windows
from .family import Family
from .tensors import decoder_tensors

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    return decoder_config("qwen2", hf, windows=windows(hf), qkv_bias=True)


def windows(hf: Fields) -> list[int | None]:
    """Of Qwen2 and Qwen3: none unless `use_sliding_window`; then `layer_types`, or all from `max_window_layers` on."""
    if not hf.get("use_sliding_window") or "sliding_window" not in hf:
        return [None] * hf["num_hidden_layers"]
    first = hf["max_window_layers"]
    return layer_windows(hf, layer_types(hf, lambda index: index >= first))


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), config, decoder_tensors)
