"""The configuration of a model by its name, before anything of it is loaded."""

import os
from pathlib import Path
from typing import Any

from . import hub
from .checkpoint.description import is_converted, read_description
from .checkpoint.files import is_there, read_object
from .checkpoint.settings import read_config
from .config import ModelConfig
from .hf import config_from_hf
from .loading import BUNDLED
from .presets import HUB_NAMES, PRESETS
from .schemes import quantization


def find_config(model: str, quantize: str | None = None, quantize_output: str | None = None) -> ModelConfig:
    """Of a preset, a bundled model, a config.json, a directory that has one, or a snapshot in the Hub's cache.

    Args:
      model: its name.
      quantize, quantize_output: how it is to be quantized, as `load_model` takes them.

    Raises:
      ValueError: there is none, or its weights come quantized and are to be.
    """
    settings = find_settings(model)
    if settings is not None:
        return quantized(config_from_hf(settings, model), quantize, quantize_output)
    directory = BUNDLED.get(model) or Path(model).expanduser()
    if hub.is_hub_name(model) and not directory.exists():
        directory = hub.cached(model) or directory
    file, converted = directory / "config.json", is_converted(directory)
    if not is_there(file):
        names = ", ".join((*PRESETS, *BUNDLED))
        raise ValueError(f"{model!r} is no directory with a config.json and no preset; presets: {names}")
    config = config_from_hf(read_config(directory), str(file))
    return quantized(read_description(directory, config) if converted else config, quantize, quantize_output)


def find_settings(model: str) -> dict[str, Any] | None:
    """The config.json of a model without weights here: of a preset, by its own name or the Hub's, or the file itself.

    Returns:
      None for a bundled model, a directory, or what there is not.
    """
    path = Path(model).expanduser()
    if model in PRESETS:
        return PRESETS[model]
    if path.suffix == ".json" and os.path.isfile(path):
        return read_config(path.parent) if path.name == "config.json" else read_object(path)
    known = HUB_NAMES.get(model.lower())
    return PRESETS[known] if known and not path.exists() and hub.cached(model) is None else None


def quantized(config: ModelConfig, quantize: str | None, quantize_output: str | None) -> ModelConfig:
    """The configuration of the model when it is quantized; arguments and errors as in `find_config`."""
    schemes = quantization(quantize, quantize_output)
    if schemes is not None and config.quantization is not None:
        raise ValueError("its weights come quantized; leave out --quantize and --quantize-output")
    return config if schemes is None else config.replace(quantization=schemes)
