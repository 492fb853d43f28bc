"""Reading RoPE parameters, in the form most checkpoints carry and in the one that transformers 5 writes.

Before transformers 5: `rope_theta` at the top of config.json and the rest in `rope_scaling`, its kind under "type" or
"rope_type". Since: all of it in `rope_parameters`. The rules that fill in what is not stated are transformers'.
"""

import math
from typing import Any

from ..config import RopeConfig
from ..fields import Fields

_ORIGINAL = "original_max_position_embeddings"


def rope_from_hf(hf: Fields, parameters: Fields, rotary_dim: int, default_theta: float = 10_000.0) -> RopeConfig:
    """The rotary embedding that `parameters` describe.

    Args:
      hf: the contents of config.json, where the old form keeps part of the parameters.
      parameters: `rope_scaling`, `rope_parameters`, or one layer type's part of it.
      rotary_dim: how many dimensions of a head are rotated.
      default_theta: the family's base, where none is stated.

    Raises:
      ValueError: the kind is not supported, or lacks a parameter.
    """
    kind = parameters.get("rope_type") or parameters.get("type", "default")
    given = parameters | {
        "max_position_embeddings": parameters.get("max_position_embeddings", hf.get("max_position_embeddings")),
        _ORIGINAL: hf.get(
            _ORIGINAL, parameters.get(_ORIGINAL)
        ),  # Phi-3 states it at the top, where it takes precedence
    }
    fields: dict[str, Any] = {}
    match kind:
        case "linear":
            fields = {"factor": given["factor"]}
        case "dynamic":
            fields = {"factor": given["factor"], "original_max_position": given["max_position_embeddings"]}
        case "llama3":
            fields = {key: given[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
            fields["original_max_position"] = given[_ORIGINAL]
        case "yarn":
            fields = _yarn(given)
        case "longrope":
            fields = _longrope(given)
    theta = parameters.get("rope_theta", hf.get("rope_theta", default_theta))
    return RopeConfig(rotary_dim=rotary_dim, theta=theta, kind=kind, **fields)


def _yarn(given: Fields) -> dict[str, Any]:
    original = given.get(_ORIGINAL) or given["max_position_embeddings"]
    factor = _factor(given, original)
    scale, scale_all = given.get("mscale"), given.get("mscale_all_dim")
    usual = _yarn_mscale(factor, scale) / _yarn_mscale(factor, scale_all) if scale and scale_all else None
    return {
        "factor": factor,
        "original_max_position": original,
        "beta_fast": given.get("beta_fast") or 32.0,
        "beta_slow": given.get("beta_slow") or 1.0,
        "truncate": given.get("truncate", True),
        "attention_factor": given.get("attention_factor", usual or _yarn_mscale(factor, 1.0)),
    }


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(given: Fields) -> dict[str, Any]:
    original = given[_ORIGINAL]
    attention = given.get("attention_factor")
    if attention is None:
        factor = _factor(given, original)
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "original_max_position": original,
        "short_factor": given["short_factor"],
        "long_factor": given["long_factor"],
        "attention_factor": attention,
    }


def _factor(given: Fields, original: int) -> float:
    return given["factor"] if "factor" in given else given["max_position_embeddings"] / original
