"""Hugging Face checkpoints: one small file a family, and the look-up over them."""

from collections.abc import Iterable

from ..config import ModelConfig
from ..fields import CheckpointError, Fields
from . import (
    gemma2,
    gemma3,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from .experts import fused_experts
from .family import Family, HFConfig, Piece, TensorMap
from .multimodal import ARCHITECTURES as MULTIMODAL
from .multimodal import is_multimodal, text_part
from .quantized import in_other_orders, stored_quantization, stored_tensors
from .tensors import with_copied_heads

_DENSE = (llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, olmo2)
_ROUTED = (mixtral, qwen2_moe, qwen3_moe, olmoe, gpt_oss, glm4_moe)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (*_DENSE, *_ROUTED)}
"""Every supported family, by name."""


def config_from_hf(hf_config: HFConfig, file: str = "config.json") -> ModelConfig:
    """The model that a checkpoint's config.json describes, of a multimodal one the text decoder.

    Args:
      hf_config: its contents, as `json.load` returns them.
      file: its name, for errors.

    Returns:
      The configuration, in the dtype that config.json states (float32 where it states none), with the weights quantized
      that it says are; the dtype of their scales, which it does not say, is the usual one.

    Raises:
      CheckpointError: the architecture, or something that the config asks of it, is not supported, a field is missing,
        or one is of the wrong type or out of range.
    """
    hf = text_part(hf_config, file)
    try:
        family = _family_for(hf)
        config = family.config(hf)
        return config.replace(quantization=stored_quantization(hf, config, family.tensors))
    except CheckpointError:
        raise
    except ValueError as error:  # of fields that do not go together
        raise CheckpointError(f"{file}: {error}") from error


def tensors_of(config: ModelConfig, hf_config: HFConfig, kv_replicas: int = 1, held: Iterable[str] = ()) -> TensorMap:
    """Where the checkpoint of that config.json keeps each parameter, or each part of those that it holds quantized.

    The names are those of a text model with a head, "model.layers.0..." and "lm_head.weight"; a checkpoint may put them
    under other prefixes (`checkpoint.layout`).

    Args:
      config: the model.
      hf_config: as `config_from_hf` takes it.
      kv_replicas: copies of each KV head that the parameters have; see `params.kv_replicas`.
      held: the names of the checkpoint's tensors, which tell whether each expert is one or a layer's all are.
    """
    tensors = with_copied_heads(config, family_of(config).tensors(config), kv_replicas)
    if any(name.endswith(".experts.gate_up_proj") for name in held):
        tensors = fused_experts(tensors)
    return stored_tensors(text_part(hf_config), config, tensors)


def family_of(config: ModelConfig) -> Family:
    """The family that a `ModelConfig` came from."""
    if config.family not in FAMILIES:
        raise ValueError(f"family {config.family!r} is not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def _family_for(hf: Fields) -> Family:
    families = FAMILIES.values()
    stated = hf.get("architectures", ())
    if stated:
        # A bare decoder, such as "LlamaModel", is saved without its head and under other names, which are looked for.
        heads = [name.removesuffix("Model") + "ForCausalLM" for name in stated if name.endswith("Model")]
        found = [f for f in families if {*stated, *heads} & set(f.architectures)]
        what, supported = f"architecture {', '.join(stated)}", [name for f in families for name in f.architectures]
        supported += [name for name in MULTIMODAL if name.endswith("Generation")]
    else:
        found = [f for f in families if hf.get("model_type") in f.model_types]
        what = f"no architecture is named, and the model_type {hf.get('model_type')!r}"
        supported = [name for f in families for name in f.model_types]
    if not found:
        raise ValueError(f"{what} is not supported; supported: {', '.join(supported)}")
    return found[0]


__all__ = [
    "FAMILIES",
    "Family",
    "HFConfig",
    "Piece",
    "TensorMap",
    "config_from_hf",
    "family_of",
    "in_other_orders",
    "is_multimodal",
    "tensors_of",
    "text_part",
]
