"""Reading RoPE parameters, in the form most checkpoints carry and in the one that transformers 5 writes.

Before transformers 5: `rope_theta` at the top of config.json and the rest in `rope_scaling`, its kind under "type" or
"rope_type". Since: all of it in `rope_parameters`. The rules that fill in what is not stated are transformers'.
"""

import math
from typing import Any

from ..config import ROPE_KINDS, RopeConfig
from .family import HFConfig

_ORIGINAL = "original_max_position_embeddings"


def rope_from_hf(hf: HFConfig, parameters: HFConfig, rotary_dim: int, default_theta: float = 10_000.0) -> RopeConfig:
    """The rotary embedding that `parameters` describe.

    Args:
      hf: the contents of config.json, where the old form keeps part of the parameters.
      parameters: `rope_scaling`, `rope_parameters`, or one layer type's part of it.
      rotary_dim: how many dimensions of a head are rotated.
      default_theta: the family's base, where none is stated.

    Raises:
      ValueError: the kind is not supported, or lacks a parameter.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"RoPE kind {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")

    outer = {key: hf.get(key) for key in ("rope_theta", "max_position_embeddings", _ORIGINAL)}
    given = {"rope_theta": default_theta, **_not_null(outer), **_not_null(parameters)}
    if hf.get(_ORIGINAL) is not None:
        given[_ORIGINAL] = hf[_ORIGINAL]  # Phi-3 states it at the top, where it takes precedence

    fields: dict[str, Any] = {}
    match kind:
        case "linear":
            fields = _numbers(given, kind, "factor")
        case "dynamic":
            fields = _numbers(given, kind, "factor")
            fields["original_max_position"] = int(_number(given, kind, "max_position_embeddings"))
        case "llama3":
            fields = _numbers(given, kind, "factor", "low_freq_factor", "high_freq_factor")
            fields["original_max_position"] = int(_number(given, kind, _ORIGINAL))
        case "yarn":
            fields = _yarn(given)
        case "longrope":
            fields = _longrope(given)
    return RopeConfig(rotary_dim=rotary_dim, theta=_number(given, kind, "rope_theta"), kind=kind, **fields)


def _yarn(given: HFConfig) -> dict[str, Any]:
    original = int(_number({_ORIGINAL: given.get("max_position_embeddings"), **given}, "yarn", _ORIGINAL))
    factor = _factor(given, "yarn", original)
    attention = given.get("attention_factor")
    if attention is None:
        scale, scale_all = given.get("mscale"), given.get("mscale_all_dim")
        both = scale and scale_all
        attention = _yarn_mscale(factor, scale) / _yarn_mscale(factor, scale_all) if both else _yarn_mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_max_position": original,
        "beta_fast": float(given.get("beta_fast") or 32.0),
        "beta_slow": float(given.get("beta_slow") or 1.0),
        "truncate": bool(given.get("truncate", True)),
        "attention_factor": float(attention),
    }


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(given: HFConfig) -> dict[str, Any]:
    original = int(_number(given, "longrope", _ORIGINAL))
    attention = given.get("attention_factor")
    if attention is None:
        factor = _factor(given, "longrope", original)
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    for name in ("short_factor", "long_factor"):
        if not isinstance(given.get(name), list | tuple):
            raise ValueError(f"RoPE kind 'longrope' needs {name}, a list of numbers; found {given.get(name)!r}")
    return {
        "original_max_position": original,
        "short_factor": tuple(map(float, given["short_factor"])),
        "long_factor": tuple(map(float, given["long_factor"])),
        "attention_factor": float(attention),
    }


def _factor(given: HFConfig, kind: str, original: int) -> float:
    if "factor" in given:
        return _number(given, kind, "factor")
    return _number(given, kind, "max_position_embeddings") / original


def _not_null(stated: HFConfig) -> dict[str, Any]:
    return {key: value for key, value in stated.items() if value is not None}


def _numbers(given: HFConfig, kind: str, *keys: str) -> dict[str, Any]:
    return {key: _number(given, kind, key) for key in keys}


def _number(given: HFConfig, kind: str, key: str) -> float:
    value = given.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"RoPE kind {kind!r} needs {key}, a positive number; found {value!r} in config.json")
    return float(value)
