"""The text decoder inside a multimodal checkpoint's config.json."""

from ..fields import Fields
from .declared import CONFIG
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


def is_multimodal(hf_config: HFConfig, file: str = "config.json") -> bool:
    """Whether a config.json is that of a multimodal model whose text part can be read."""
    return bool({*Fields(hf_config, CONFIG, file).get("architectures", ())} & {*ARCHITECTURES})


def text_part(hf_config: HFConfig, file: str = "config.json") -> Fields:
    """config.json of the text decoder alone, which is the whole of a text model's.

    Whether its embeddings are tied, old and new files say differently: the stored tensors tell.

    Raises:
      CheckpointError: a multimodal model's config.json without a `text_config`.
    """
    hf = Fields(hf_config, CONFIG, file)
    if not is_multimodal(hf_config, file):
        return hf
    text = Fields(hf["text_config"].values, CONFIG, file, "text_config.")
    shared = {key: hf_config[key] for key in _SHARED if key in hf}
    tied = {key: hf_config[key] for key in ("tie_word_embeddings",) if key in hf_config}
    return _SIZES.get(text.get("model_type", ""), {}) | text | shared | tied | {"architectures": None}
