"""ridgeline.json, the file that makes a directory a converted checkpoint: format, version, configuration."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..config import LayerConfig, ModelConfig, RopeConfig
from ..schemes import Quantization, Scheme
from .files import CheckpointError, is_there, listing, read_object

DESCRIPTION = "ridgeline.json"
ARRAYS = "params"
"""The folder that holds the parameters, in orbax's layout."""
INCOMPLETE = ".incomplete"
"""What a conversion adds to the name of the directory until it is whole."""
FORMAT = 3
"""Raised when older versions could no longer read, or would misread, what is written."""

_AGAIN = "convert the checkpoint again (ridgeline convert)"


def is_converted(directory: Path) -> bool:
    """Whether a directory is what `ridgeline convert` writes.

    Raises:
      CheckpointError: it is what a conversion leaves that was killed half-way.
    """
    unfinished = directory.name.endswith(INCOMPLETE)
    if not unfinished and is_there(directory / DESCRIPTION):
        return True
    if unfinished or any(path.is_dir() for path in directory.glob(ARRAYS + "*")):
        why = f"its name ends in {INCOMPLETE}" if unfinished else f"it has no {DESCRIPTION}, which is written last"
        raise CheckpointError(
            f"{directory} is a conversion that was cut short, or is still running: {why}; if none is running, delete "
            f"the directory and {_AGAIN}"
        )
    return False


def write_description(directory: Path, config: ModelConfig) -> None:
    """Write ridgeline.json."""
    text = {"format": FORMAT, "ridgeline": version("ridgeline"), "config": dataclasses.asdict(config)}
    (directory / DESCRIPTION).write_text(json.dumps(text, indent=1) + "\n")


def read_description(directory: Path, stated: ModelConfig) -> ModelConfig:
    """The configuration that the parameters were written for.

    Args:
      directory: of the converted checkpoint.
      stated: what its config.json says, which must agree but for what the tensors tell: the dtype, the quantization,
        and whether embeddings are tied.

    Raises:
      CheckpointError: a newer format, a file that is damaged, or one of the two configurations edited.
    """
    file = directory / DESCRIPTION
    found = read_object(file)
    written = f"Ridgeline {found.get('ridgeline', 'of unknown version')}"
    if type(found.get("format")) is not int or not isinstance(found.get("config"), dict):
        raise CheckpointError(
            f"{file} states format {found.get('format')!r} and a config of type {type(found.get('config')).__name__}, "
            f"expected a whole number and an object; the file is damaged, {_AGAIN}"
        )
    if not 1 <= found["format"] <= FORMAT:
        raise CheckpointError(
            f"{file} is of format {found['format']}, written by {written}; this is Ridgeline {version('ridgeline')}, "
            f"which reads formats up to {FORMAT}: upgrade it, or {_AGAIN}"
        )
    try:
        config = _config(found["config"])
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{file}, written by {written}, holds a config that is not valid here ({error}); {_AGAIN}"
        ) from error
    told = {name: getattr(config, name) for name in ("dtype", "quantization", "tie_embeddings")}
    stated = stated.replace(**told)
    if config != stated:
        names = [f.name for f in dataclasses.fields(ModelConfig) if getattr(config, f.name) != getattr(stated, f.name)]
        first = names[0]
        values = "" if first == "layers" else f" ({getattr(config, first)!r} against {getattr(stated, first)!r})"
        raise CheckpointError(
            f"{file} and config.json beside it disagree about {listing(names)}{values}: one of them was edited, or "
            f"written for another version; restore it, or edit the original's config.json and {_AGAIN}"
        )
    return config


def _config(fields: dict[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict` through JSON, which knows lists and no tuples."""
    layers = tuple(
        LayerConfig(**(layer | {"rope": RopeConfig(**{k: _tuple(v) for k, v in layer["rope"].items()})}))
        for layer in fields["layers"]
    )
    return ModelConfig(**(fields | {"layers": layers, "quantization": _quantization(fields.get("quantization"))}))


def _quantization(fields: dict[str, Any] | None) -> Quantization | None:
    if fields is None:
        return None
    schemes = {name: fields[name] and Scheme(**fields[name]) for name in ("layers", "output")}
    return Quantization(**(fields | schemes | {"skip": tuple(fields["skip"])}))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
