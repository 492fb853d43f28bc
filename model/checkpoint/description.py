"""ridgeline.json, the file that makes a directory a converted checkpoint: format, version, configuration."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..config import DTYPES, ExpertsConfig, LayerConfig, ModelConfig, RopeConfig
from ..fields import Fields, Kind, an_object, flag, list_of, one_of, text, whole
from ..schemes import Quantization, Scheme
from .files import CheckpointError, is_there, listing, read_object

DESCRIPTION = "ridgeline.json"
ARRAYS = "params"
"""The folder that holds the parameters, in orbax's layout."""
INCOMPLETE = ".incomplete"
"""What a conversion adds to the name of the directory until it is whole."""
FORMAT = 4
"""Raised when older versions could no longer read, or would misread, what is written."""

_SCHEME: dict[str, Kind] = {
    "dtype": one_of("int8", "int4", "float8_e4m3fn", "float4_e2m1fn"),
    "group": whole(),
    "rows": whole(),
    "scale_dtype": one_of(*DTYPES, "float8_e8m0fnu"),
    **dict.fromkeys(("zero_points", "dynamic", "sorted_inputs", "static"), flag),
}
_QUANTIZATION = {"layers": an_object(_SCHEME), "output": an_object(_SCHEME), "skip": list_of(text)}
_CONFIG = {
    "dtype": one_of(*DTYPES),
    "tie_embeddings": flag,
    "experts": an_object({}),
    "quantization": an_object(_QUANTIZATION),
}
_DECLARED: dict[str, Kind] = {"format": whole(), "ridgeline": text, "config": an_object(_CONFIG)}
"""What ridgeline.json may hold; of the configuration, what config.json does not say too."""

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
    content = {"format": FORMAT, "ridgeline": version("ridgeline"), "config": dataclasses.asdict(config)}
    (directory / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")


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
    described = Fields(read_object(file), _DECLARED, str(file))
    written = f"Ridgeline {described.get('ridgeline', 'of unknown version')}"
    if described["format"] > FORMAT:
        raise CheckpointError(
            f"{file} is of format {described['format']}, written by {written}; this is Ridgeline "
            f"{version('ridgeline')}, which reads formats up to {FORMAT}: upgrade it, or {_AGAIN}"
        )
    try:
        config = _config(described["config"])
    except CheckpointError:
        raise
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
    return stated  # whose numbers are of the declared types: 6.0 equals 6


def _config(fields: Fields) -> ModelConfig:
    """The inverse of `dataclasses.asdict` through JSON, which knows lists and no tuples."""
    layers = tuple(
        LayerConfig(**(layer | {"rope": RopeConfig(**{k: _tuple(v) for k, v in layer["rope"].items()})}))
        for layer in fields.values["layers"]
    )
    checked = {name: fields.get(name) for name in ("dtype", "tie_embeddings")}
    quantization = _quantization(fields.object("quantization")) if "quantization" in fields else None
    experts = ExpertsConfig(**fields["experts"].values) if "experts" in fields else None
    parts = {"layers": layers, "experts": experts, "quantization": quantization}
    return ModelConfig(**{**fields.values, **checked, **parts})


def _quantization(fields: Fields) -> Quantization:
    schemes = {
        name: Scheme(**{key: fields[name].get(key) for key in fields[name]})
        for name in ("layers", "output")
        if name in fields
    }
    return Quantization(**schemes, skip=fields["skip"])


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
