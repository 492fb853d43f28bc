"""The configuration of a model by its name, before anything of it is loaded."""

from pathlib import Path

from . import hub
from .checkpoint.description import is_converted, read_description
from .checkpoint.files import is_there
from .checkpoint.settings import read_config
from .config import ModelConfig
from .hf import config_from_hf
from .loading import BUNDLED
from .presets import PRESETS, preset
from .schemes import quantization


def find_config(model: str, quantize: str | None = None, quantize_output: str | None = None) -> ModelConfig:
    """Of a preset, a bundled model, a directory in Hugging Face layout or converted, or a snapshot in the Hub's cache.

    Args:
      model: its name.
      quantize, quantize_output: how it is to be quantized, as `load_model` takes them.

    Raises:
      ValueError: there is none, or its weights come quantized and are to be.
    """
    if model in PRESETS:
        return quantized(preset(model), quantize, quantize_output)
    directory = BUNDLED.get(model) or Path(model).expanduser()
    if hub.is_hub_name(model) and not directory.exists():
        directory = hub.cached(model) or directory
    file, converted = directory / "config.json", is_converted(directory)
    if not is_there(file):
        names = ", ".join((*PRESETS, *BUNDLED))
        raise ValueError(f"{model!r} is no directory with a config.json and no preset; presets: {names}")
    config = config_from_hf(read_config(directory), str(file))
    return quantized(read_description(directory, config) if converted else config, quantize, quantize_output)


def quantized(config: ModelConfig, quantize: str | None, quantize_output: str | None) -> ModelConfig:
    """The configuration of the model when it is quantized; arguments and errors as in `find_config`."""
    schemes = quantization(quantize, quantize_output)
    if schemes is not None and config.quantization is not None:
        raise ValueError("its weights come quantized; leave out --quantize and --quantize-output")
    return config if schemes is None else config.replace(quantization=schemes)
