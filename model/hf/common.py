"""Reading config.json: the keys that families share."""

from collections.abc import Callable, Sequence
from typing import Any

from ..config import LayerConfig, ModelConfig, RopeConfig
from ..fields import Fields
from .declared import ACTIVATIONS, FULL, SLIDING
from .rope import rope_from_hf


def decoder_config(
    family: str,
    hf: Fields,
    *,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[RopeConfig] | None = None,
    mlps: Sequence[str] | None = None,
    activation_key: str = "hidden_act",
    **fields: Any,
) -> ModelConfig:
    """The `ModelConfig` of a decoder whose config.json uses the common keys.

    Args:
      family: the family's name.
      hf: the contents of config.json, completed with the family's defaults.
      windows: sliding window of each layer, or None for none at all.
      ropes: rotary embedding of each layer, or None to read the one that all layers share.
      mlps: what kind of MLP each layer has, or None for dense ones.
      activation_key: where the activation is named.
      **fields: what the family sets otherwise.

    Raises:
      ValueError: a key is missing, or holds a value that is not supported.
    """
    layers = hf["num_hidden_layers"]
    if ropes is None:
        parameters = rope_parameters(hf)
        for fields_of in (hf, parameters):
            fields_of.only("partial_rotary_factor", (1.0,), f"{family} rotates whole heads")
        ropes = [rope_from_hf(hf, parameters, head_dim(hf))] * layers
    if windows is None:
        windows = [None] * layers
    if mlps is None:
        mlps = ["dense"] * layers
    each = zip(ropes, windows, mlps, strict=True)
    shared = {
        "vocab_size": hf["vocab_size"],
        "embed_dim": hf["hidden_size"],
        "ffn_dim": hf["intermediate_size"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": kv_heads(hf),
        "head_dim": head_dim(hf),
        "layers": tuple(LayerConfig(rope, window, mlp=mlp) for rope, window, mlp in each),
        "max_position": _max_position(hf, ropes),
        "norm_eps": hf["rms_norm_eps"],
        "query_scale": head_dim(hf) ** -0.5,
        "activation": ACTIVATIONS[hf[activation_key]],
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "dtype": hf.get("dtype", hf.get("torch_dtype", "float32")).removeprefix("torch."),
    }
    return ModelConfig(family=family, **(shared | fields))


def _max_position(hf: Fields, ropes: Sequence[RopeConfig]) -> int:
    """What is stated, or what scaling stretches the context to where that is more.

    Configs of llama3, longrope and Gemma 3 state the stretched length themselves; those of the other kinds may or may
    not. Source: `_get_and_verify_max_len` of `vllm/config/model.py`.
    """
    stated = hf["max_position_embeddings"]
    stretched = [stated]
    for rope in ropes:
        if rope.kind in ("linear", "dynamic"):
            stretched.append(int(stated * rope.factor))
        elif rope.kind == "yarn":
            stretched.append(int(rope.original_max_position * rope.factor))
    return max(stretched)


def head_dim(hf: Fields) -> int:
    """Stated, or hidden_size / num_attention_heads."""
    if "head_dim" in hf:
        return hf["head_dim"]
    embed, heads = hf["hidden_size"], hf["num_attention_heads"]
    if embed % heads:
        raise ValueError(
            f"there is no head_dim, and hidden_size {embed} is not a multiple of num_attention_heads {heads}"
        )
    return embed // heads


def kv_heads(hf: Fields) -> int:
    """Stated, or as many as query heads (multi-head attention)."""
    return hf.get("num_key_value_heads", hf["num_attention_heads"])


def rope_parameters(hf: Fields) -> Fields:
    """The RoPE parameters that all layers share, in either form; see `hf.rope`."""
    return hf.object("rope_scaling") or hf.object("rope_parameters")


def layer_types(hf: Fields, slides: Callable[[int], bool]) -> tuple[str, ...]:
    """Each layer's type: `layer_types` where it is stated, `slides(index)` otherwise."""
    layers = hf["num_hidden_layers"]
    types = hf.get("layer_types") or tuple(SLIDING if slides(index) else FULL for index in range(layers))
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries; num_hidden_layers is {layers}")
    return types


def layer_windows(hf: Fields, types: Sequence[str]) -> list[int | None]:
    """The window of each layer: `sliding_window` for the sliding ones."""
    return [hf["sliding_window"] if kind == SLIDING else None for kind in types]
