"""The text decoder inside a multimodal checkpoint's config.json."""

from .family import HFConfig

ARCHITECTURES = tuple(
    model + suffix
    for model in ("Gemma3", "InternVL", "Llava", "LlavaNext", "Mistral3")
    for suffix in ("ForConditionalGeneration", "Model")
)
"""Those that hand text to a causal decoder, in `text_config`, as it is: without images they are that decoder."""

_SIZES: dict[str, dict[str, int]] = {
    "gemma3_text": {"vocab_size": 262_208, "num_attention_heads": 8},
    "llama": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""Sizes that such a `text_config` leaves out where they are those of transformers' configuration class."""

_SHARED = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id", "quantization_config")


def is_multimodal(hf: HFConfig) -> bool:
    """Whether a config.json is that of a multimodal model whose text part can be read."""
    return bool(set(hf.get("architectures") or ()) & set(ARCHITECTURES))


def text_part(hf: HFConfig) -> HFConfig:
    """config.json of the text decoder alone, which is the whole of a text model's.

    Whether its embeddings are tied, old and new files say differently: the stored tensors tell.

    Raises:
      ValueError: a multimodal model's config.json without a `text_config`.
    """
    if not is_multimodal(hf):
        return hf
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"text_config in config.json is {text!r}; {hf['architectures'][0]} needs it, an object")
    shared = {key: hf[key] for key in _SHARED if hf.get(key) is not None}
    tied = {key: hf[key] for key in ("tie_word_embeddings",) if key in hf}
    return {**_SIZES.get(text.get("model_type"), {}), **text, **shared, **tied, "architectures": None}
