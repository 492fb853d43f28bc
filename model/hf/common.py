"""Reading config.json: the keys that families share, and the errors for what is missing or not supported."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..config import DTYPES, LayerConfig, ModelConfig, RopeConfig
from .family import HFConfig
from .rope import rope_from_hf

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""`hidden_act` -> `ModelConfig.activation`."""

SLIDING, FULL = "sliding_attention", "full_attention"


def decoder_config(
    family: str,
    hf: HFConfig,
    *,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[RopeConfig] | None = None,
    activation_key: str = "hidden_act",
    **fields: Any,
) -> ModelConfig:
    """The `ModelConfig` of a decoder whose config.json uses the common keys.

    Args:
      family: the family's name.
      hf: the contents of config.json, completed with the family's defaults.
      windows: sliding window of each layer, or None for none at all.
      ropes: rotary embedding of each layer, or None to read the one that all layers share.
      activation_key: where the activation is named.
      **fields: what the family sets otherwise.

    Raises:
      ValueError: a key is missing, or holds a value that is not supported.
    """
    layers = count(hf, "num_hidden_layers")
    if ropes is None:
        parameters = rope_parameters(hf)
        for stated in (hf, parameters):
            refuse(stated, "partial_rotary_factor", (1.0,), f"{family} rotates whole heads")
        ropes = [rope_from_hf(hf, parameters, head_dim(hf))] * layers
    if windows is None:
        windows = [None] * layers
    shared = {
        "vocab_size": count(hf, "vocab_size"),
        "embed_dim": count(hf, "hidden_size"),
        "ffn_dim": count(hf, "intermediate_size"),
        "num_heads": count(hf, "num_attention_heads"),
        "num_kv_heads": kv_heads(hf),
        "head_dim": head_dim(hf),
        "layers": tuple(LayerConfig(rope, window) for rope, window in zip(ropes, windows, strict=True)),
        "max_position": _max_position(hf, ropes),
        "norm_eps": number(hf, "rms_norm_eps"),
        "query_scale": head_dim(hf) ** -0.5,
        "activation": _activation(hf, activation_key),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "dtype": _dtype(hf),
    }
    return ModelConfig(family=family, **(shared | fields))


def _max_position(hf: HFConfig, ropes: Sequence[RopeConfig]) -> int:
    """What is stated, or what scaling stretches the context to where that is more.

    Configs of llama3, longrope and Gemma 3 state the stretched length themselves; those of the other kinds may or may
    not. Source: `_get_and_verify_max_len` of `vllm/config/model.py`.
    """
    stated = count(hf, "max_position_embeddings")
    stretched = [stated]
    for rope in ropes:
        if rope.kind in ("linear", "dynamic"):
            stretched.append(int(stated * rope.factor))
        elif rope.kind == "yarn":
            stretched.append(int(rope.original_max_position * rope.factor))
    return max(stretched)


def required(hf: HFConfig, key: str) -> Any:
    """`hf[key]`, which may be neither absent nor null."""
    if hf.get(key) is None:
        raise ValueError(f"config.json has no {key!r}; a {hf.get('model_type', 'decoder')} model needs it")
    return hf[key]


def count(hf: HFConfig, key: str) -> int:
    """`hf[key]`, a positive whole number."""
    value = required(hf, key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key} in config.json is {value!r}; it must be a positive whole number")
    return value


def number(hf: HFConfig, key: str) -> float:
    """`hf[key]`, a finite number."""
    value = required(hf, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} in config.json is {value!r}; it must be a number")
    return float(value)


def optional_number(hf: HFConfig, key: str) -> float | None:
    """`hf[key]` as a number, or None where it is absent or null."""
    return None if hf.get(key) is None else number(hf, key)


def head_dim(hf: HFConfig) -> int:
    """Stated, or hidden_size / num_attention_heads."""
    if hf.get("head_dim") is not None:
        return count(hf, "head_dim")
    embed, heads = count(hf, "hidden_size"), count(hf, "num_attention_heads")
    if embed % heads:
        raise ValueError(
            f"config.json has no head_dim, and hidden_size {embed} is not a multiple of num_attention_heads {heads}"
        )
    return embed // heads


def kv_heads(hf: HFConfig) -> int:
    """Stated, or as many as query heads (multi-head attention)."""
    return count(hf, "num_attention_heads" if hf.get("num_key_value_heads") is None else "num_key_value_heads")


def rope_parameters(hf: HFConfig) -> HFConfig:
    """The RoPE parameters that all layers share, in either form; see `hf.rope`."""
    return hf.get("rope_scaling") or hf.get("rope_parameters") or {}


def layer_types(hf: HFConfig, slides: Callable[[int], bool]) -> list[str]:
    """Each layer's type: `layer_types` where it is stated, `slides(index)` otherwise."""
    layers, types = count(hf, "num_hidden_layers"), hf.get("layer_types")
    if types is None:
        return [SLIDING if slides(index) else FULL for index in range(layers)]
    if len(types) != layers:
        raise ValueError(f"layer_types in config.json has {len(types)} entries; num_hidden_layers is {layers}")
    for index, kind in enumerate(types):
        if kind not in (SLIDING, FULL):
            raise ValueError(f"layer_types[{index}] is {kind!r}, which is not supported; supported: {SLIDING}, {FULL}")
    return list(types)


def layer_windows(hf: HFConfig, types: Sequence[str]) -> list[int | None]:
    """The window of each layer: `sliding_window` for the sliding ones."""
    return [count(hf, "sliding_window") if kind == SLIDING else None for kind in types]


def refuse(hf: HFConfig, key: str, harmless: Sequence[Any], reason: str, what: str | None = None) -> None:
    """Raise ValueError unless `key` is absent, null, or one of the values that change nothing; `what` names it."""
    if hf.get(key) is not None and hf[key] not in harmless:
        raise ValueError(f"{what or f'{key} in config.json'} is {hf[key]!r}, which is not supported: {reason}")


def _activation(hf: HFConfig, key: str) -> str:
    name = required(hf, key)
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"{key} {name!r} is not supported; supported: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _dtype(hf: HFConfig) -> str:
    # Checkpoints say torch_dtype, transformers 5 says dtype.
    stated = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    name = str(stated).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} in config.json is not supported; supported: {', '.join(DTYPES)}")
    return name
