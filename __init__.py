"""Ridgeline: pure-functional JAX inference for decoder-only language models."""

from .model.config import LayerConfig, ModelConfig, RopeConfig
from .model.params import ParamSpec, count_parameters, init_params, param_specs
from .model.transformer import forward

__all__ = [
    "LayerConfig",
    "ModelConfig",
    "ParamSpec",
    "RopeConfig",
    "count_parameters",
    "forward",
    "init_params",
    "param_specs",
]
