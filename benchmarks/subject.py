"""The model that is measured: a preset, scaled as asked, with random weights; or the weights of a directory."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..model.config import ModelConfig
from ..model.find import find_config, find_settings, quantized
from ..model.generation import GenerationDefaults
from ..model.hf import config_from_hf
from ..model.loading import Model, load_model
from ..model.params import init_params
from ..model.presets import PRESETS
from ..roofline.deployment import Deployment

_FIELDS: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "embed_dim": ("hidden_size", int),
    "ffn_dim": ("intermediate_size", int),
    "num_layers": ("num_hidden_layers", int),
    "num_heads": ("num_attention_heads", int),
    "num_kv_heads": ("num_key_value_heads", int),
    "head_dim": ("head_dim", int),
    "max_position": ("max_position_embeddings", int),
    "tie_embeddings": ("tie_word_embeddings", bool),
}
"""What `--set` may change: field of `ModelConfig` -> key of config.json, from which all that depends on it follows."""

_MEMORY_FRACTION = 0.9


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is to be measured.

    Attributes:
      name: as the user gave it.
      config: with changes and dtype applied; of one device.
      hf: config.json of a model with random weights; None where a directory has the weights.
      changes: what was set, by field.
      schemes: how it is quantized, as `load_model` takes it.
    """

    name: str
    config: ModelConfig
    hf: Mapping[str, Any] | None
    changes: Mapping[str, Any]
    schemes: Mapping[str, str | None]

    @property
    def title(self) -> str:
        """For a file's name: without directories, and marked where it is scaled."""
        return self._short + (" scaled" if self.changes else "")

    @property
    def _short(self) -> str:
        path = Path(self.name)
        return path.absolute().parent.name if path.name == "config.json" else path.name

    @property
    def record(self) -> dict[str, Any]:
        """What results are stored with."""
        own = {"random_weights": self.hf is not None, **self.schemes}
        return {"name": self._short, "changes": dict(self.changes), "dtype": self.config.dtype, **own}


def add_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """The model and its size."""
    add = parser.add_argument
    help = "a preset, its name on the Hub or a config.json, with random weights; a directory with a model; or 'bundled'"
    help = f"{help} (default: %(default)s)"
    add("model", metavar="MODEL", nargs="?", default=default, help=help)
    add("--layers", type=int, metavar="N", help="with random weights, run N layers")
    help = f"with random weights, change a size; repeatable. Fields: {', '.join(_FIELDS)}"
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help=help)


def find_subject(
    model: str,
    layers: int | None,
    settings: Sequence[str],
    dtype: str | None,
    quantize: str | None = None,
    quantize_output: str | None = None,
) -> Subject:
    """The model by name, with its shape changed.

    Args:
      model: a preset, by its name here or on the Hub, a config.json, a bundled model, or a directory.
      layers: how many, where the weights are random.
      settings: "field=value" each, likewise.
      dtype: of weights and activations; the model's own by default.
      quantize, quantize_output: as `load_model` takes them.

    Raises:
      ValueError: a field that is not known, a value of the wrong type, or a shape that the family cannot have.
    """
    changes, schemes = dict(map(_setting, settings)), {"quantize": quantize, "quantize_output": quantize_output}
    if layers is not None and layers < 1:
        raise ValueError(f"--layers is {layers}; it must be at least 1")
    changes |= {} if layers is None else {"num_layers": layers}
    own = find_settings(model)
    if own is None:
        if changes:
            raise ValueError(
                f"{model!r} has weights of its own, whose shape is fixed; leave out {', '.join(changes)}, or measure a "
                f"preset with random weights: {', '.join(PRESETS)}"
            )
        config = find_config(model, **schemes)
        config = config if dtype is None else config.replace(dtype=dtype)
        return Subject(model, config, None, {}, schemes)
    hf = own | {_FIELDS[field][0]: value for field, value in changes.items()}
    hf |= {} if dtype is None else {"dtype": dtype}
    try:
        config = config_from_hf(hf)
    except ValueError as error:
        listed = ", ".join(f"{field} {value}" for field, value in changes.items()) or "no changes"
        raise ValueError(f"{model} with {listed} is no model: {error}") from None
    for field, value in changes.items():
        if getattr(config, field) != value:
            raise ValueError(f"--set {field}={value} has no effect: for {model} it is {getattr(config, field)}")
    return Subject(model, quantized(config, **schemes), hf, changes, schemes)


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} is not FIELD=VALUE, such as embed_dim=768")
    if field not in _FIELDS:
        raise ValueError(f"--set {text!r}: there is no field {field!r}; there are {', '.join(_FIELDS)}")
    if _FIELDS[field][1] is bool:
        if value not in ("true", "false"):
            raise ValueError(f"--set {text!r}: {field} is true or false")
        return field, value == "true"
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise ValueError(f"--set {text!r}: {field} is a whole number, at least 1")
    return field, int(value)


def make_model(subject: Subject, mesh: Mesh | None = None, checkpoint: Path | None = None) -> Model:
    """The model on its devices.

    Args:
      subject: what it is.
      mesh: where it goes; None is one device.
      checkpoint: where random weights have been written; None makes them here.
    """
    if checkpoint is not None or subject.hf is None:
        return load_model(checkpoint or subject.name, mesh=mesh, dtype=subject.config.dtype, **subject.schemes)
    config = subject.config
    params = jax.block_until_ready(init_params(config, jax.random.key(0), mesh))
    return Model(config, params, None, GenerationDefaults(), Path(subject.name), mesh)


def check_memory(deployment: Deployment, memory: int, sizes: Sequence[tuple[int, int]], copies: int) -> None:
    """ValueError, with the numbers, for what does not fit a device of so many bytes, before anything is made.

    `sizes` are rows and positions of each cache, of which one is held at a time; `copies` of the weights, those of
    peers included, are not quantized but for the first.
    """
    plain = dataclasses.replace(deployment, config=deployment.config.replace(quantization=None))
    weights = deployment.parameter_bytes + (copies - 1) * plain.parameter_bytes
    cache, batch, length = max((deployment.cache_bytes(*size), *size) for size in sizes)
    room = int(memory * _MEMORY_FRACTION)
    if weights + cache > room:
        shared = f" in {copies} copies" if copies > 1 else ""
        raise ValueError(
            f"it does not fit: weights of {weights / 1e9:,.2f} GB{shared} and a cache of {cache / 1e9:,.2f} GB (batch "
            f"{batch}, {length:,} positions) are more than the {room / 1e9:,.2f} GB of each device that are to be had; "
            "take fewer --layers, a smaller --batch or --context, more --tensor devices, or leave out --compare"
        )
