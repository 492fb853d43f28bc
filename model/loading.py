"""`load_model`: a directory in Hugging Face layout -> configuration, parameters, tokenizer, generation defaults."""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .checkpoint.files import CheckpointError, listing, read_object, read_optional
from .checkpoint.load import checkpoint_dtype, load_params
from .checkpoint.safetensors import Checkpoint
from .config import DTYPES, ModelConfig
from .hf import config_from_hf, family_of
from .params import Params
from .tokenizer import Tokenizer, load_tokenizer

_BUNDLED = Path(__file__).parent / "bundled"
BUNDLED = {"bundled": _BUNDLED / "story", "bundled-draft": _BUNDLED / "draft"}
"""The models that come with the package, by the names that `load_model` takes."""


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json says; None where it says nothing.

    Attributes:
      eos_token_ids: the tokens that end a text; from config.json where generation_config.json names none.
      bos_token_id, pad_token_id: from the same two files.
      temperature: 0.0 (greedy) where `do_sample` is stated to be false.
      top_p, top_k, min_p, repetition_penalty: as stated.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
      config: its static configuration.
      params: its parameters, a pytree of arrays as `param_specs(config)`.
      tokenizer: text <-> ids; None where the directory has no tokenizer.json.
      generation: the checkpoint's own stop ids and sampling defaults.
      directory: where it was loaded from.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    directory: Path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.name


def load_model(path: str | os.PathLike[str], *, dtype: jax.typing.DTypeLike | None = None) -> Model:
    """Load a checkpoint in Hugging Face layout onto the default device. No network is used.

    Args:
      path: a directory with config.json and model.safetensors, or its shards and their index; or "bundled" or
        "bundled-draft", the models that come with the package ("./bundled" is a directory of that name).
      dtype: "float32", "bfloat16" or "float16", of weights, activations and KV cache; the checkpoint's own by default.

    Raises:
      CheckpointError: a file or tensor that is missing, damaged or not supported; it names the file and the remedy.
      ValueError: an unknown dtype.
    """
    chosen = None if dtype is None else _dtype_name(dtype)
    directory = BUNDLED[path] if isinstance(path, str) and path in BUNDLED else _directory(Path(path).expanduser())
    config_file = directory / "config.json"
    if not config_file.exists():
        raise CheckpointError(
            f"{directory} has no config.json; give the directory that holds a model's config.json and weights"
        )
    raw = read_object(config_file)
    try:
        config = config_from_hf(raw)
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    # Read before the weights, so that a damaged small file is told before minutes of loading.
    generation = generation_defaults(directory)
    tokenizer = load_tokenizer(directory)

    checkpoint = Checkpoint(directory)
    tensors = family_of(config).tensors(config)
    if chosen is None and raw.get("dtype") is None and raw.get("torch_dtype") is None:
        chosen = checkpoint_dtype(checkpoint, tensors)
    if chosen is not None:
        config = config.replace(dtype=chosen)
    return Model(config, load_params(checkpoint, config, tensors), tokenizer, generation, directory)


def generation_defaults(directory: Path) -> GenerationDefaults:
    """Stop ids and sampling defaults of generation_config.json, which may be absent, and of config.json.

    Raises:
      CheckpointError: a value of the wrong type or out of range, naming the file.
    """
    generation_file, config_file = directory / "generation_config.json", directory / "config.json"
    stated, fallback = read_optional(generation_file), read_object(config_file)

    def ids(name: str) -> tuple[int, ...]:
        file, value = generation_file, stated.get(name)
        if value is None:
            file, value = config_file, fallback.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int and v >= 0 for v in values):
            raise CheckpointError(f"{file}: {name} is {value!r}, expected a token id or a list of them")
        return tuple(values)

    def number(name: str, low: float, high: float, *, integer: bool = False) -> Any:
        value = stated.get(name)
        if value is None:
            return None
        kinds = (int,) if integer else (int, float)
        if type(value) not in kinds or not low <= value <= high:
            kind = "an integer" if integer else "a number"
            raise CheckpointError(f"{generation_file}: {name} is {value!r}, expected {kind} from {low:g} to {high:g}")
        return value if integer else float(value)

    temperature = number("temperature", 0.0, math.inf)
    return GenerationDefaults(
        eos_token_ids=ids("eos_token_id"),
        bos_token_id=next(iter(ids("bos_token_id")), None),
        pad_token_id=next(iter(ids("pad_token_id")), None),
        temperature=0.0 if stated.get("do_sample") is False else temperature,
        top_p=number("top_p", 0.0, 1.0),
        top_k=number("top_k", -1.0, math.inf, integer=True),
        min_p=number("min_p", 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 0.0, math.inf),
    )


def _dtype_name(dtype: jax.typing.DTypeLike) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _directory(path: Path) -> Path:
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds it and config.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        raise CheckpointError(
            f"{path} is no directory here. If it is a name on the Hugging Face Hub, download it first, since Ridgeline "
            f"opens no network: pip install huggingface_hub, then hf download {path} --local-dir {path.name} "
            f"(huggingface-cli download in versions before 1.0), and load {path.name!r}"
        )
    raise CheckpointError(
        f"no such directory: {path}; give a directory that holds config.json and model.safetensors, "
        f"or one of {listing(sorted(BUNDLED))}"
    )
