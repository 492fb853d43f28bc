"""config.json, with what older files beside it say of how the weights are quantized."""

from pathlib import Path
from typing import Any

from .files import is_there, read_object

QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""What AutoGPTQ, AutoAWQ and ModelOpt write beside a config.json that does not say it."""


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of config.json, whose `quantization_config` may come from one of those files ("file" names it).

    Raises:
      CheckpointError: a file that cannot be read.
    """
    config = read_object(directory / "config.json")
    if config.get("quantization_config") is None and config.get("compression_config") is None:
        for file in map(directory.joinpath, QUANTIZATION):
            if is_there(file):
                return config | {"quantization_config": {**read_object(file), "file": file.name}}
    return config
