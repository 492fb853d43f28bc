"""`load_model`: a directory -> configuration, parameters, tokenizer, generation defaults."""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..sharding.mesh import AXES
from .checkpoint.check import checkpoint_dtype, with_stored_scales
from .checkpoint.description import is_converted, read_description
from .checkpoint.files import CheckpointError, listing, read_object, read_optional
from .checkpoint.load import load_params
from .checkpoint.orbax import convert, restore
from .checkpoint.safetensors import Checkpoint
from .config import DTYPES, ModelConfig
from .hf import config_from_hf, tensors_of
from .params import Params, kv_replicas, param_shardings
from .schemes import Quantization, quantization
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
      mesh: where the parameters lie; None is one device.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    directory: Path
    mesh: Mesh | None = None

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.name


def load_model(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    quantize: str | None = None,
    quantize_output: str | None = None,
) -> Model:
    """Load a checkpoint onto the default device, or onto the devices of a mesh. No network is used.

    On a mesh every device's shards go from the file straight to it, and a process reads those of its own devices only.
    With more devices on the "tensor" axis than KV heads, KV heads are copied; the configuration is that of the file.

    Args:
      path: a directory in Hugging Face layout, with config.json and model.safetensors or its shards and their index;
        or one that `ridgeline convert` wrote; or "bundled" or "bundled-draft", the models that come with the package
        ("./bundled" is a directory of that name).
      mesh: as `make_mesh` returns it; None is one device.
      dtype: "float32", "bfloat16" or "float16", of weights, activations and KV cache; the checkpoint's own by default.
      quantize: the scheme, one of `SCHEMES`, that the matrices of the layers are stored in. Each is quantized as it is
        loaded. None leaves them as the checkpoint has them, which may hold them quantized.
      quantize_output: the scheme of the output projection. Where it is tied to the embedding, the embedding stays and
        a quantized copy of it makes the logits.

    Raises:
      CheckpointError: a file or tensor that is missing, damaged or not supported, or weights to be quantized that the
        checkpoint holds quantized; it names the file and the remedy.
      ValueError: an unknown dtype or scheme, or a mesh that the model does not divide over; nothing has been read then.
    """
    chosen = None if dtype is None else _dtype_name(dtype)
    asked = quantization(quantize, quantize_output)
    directory, raw, stated = _open(path)
    converted = is_converted(directory)
    if not converted:
        stated = _quantized(directory, stated, asked)
    if mesh is not None:
        _check_mesh(stated, mesh)
    # Read before the weights, so that a damaged small file is told before minutes of loading.
    generation = generation_defaults(directory)
    tokenizer = load_tokenizer(directory)

    if converted:
        stored = read_description(directory, stated)
        if asked not in (None, stored.quantization):
            raise CheckpointError(
                f"{directory} is a converted checkpoint, whose weights are quantized when it is written or not at all; "
                f"convert the original again with quantize={quantize!r}, quantize_output={quantize_output!r}"
            )
        config = stored.replace(dtype=chosen or stored.dtype)
        params = restore(directory, stored, config, mesh)
    else:
        checkpoint, config = _open_weights(directory, raw, stated, chosen)
        copies = 1 if mesh is None else kv_replicas(config, mesh.shape["tensor"])
        params = load_params(checkpoint, config, tensors_of(config, raw, copies), mesh)
    return Model(config, params, tokenizer, generation, directory, mesh)


def convert_model(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    quantize: str | None = None,
    quantize_output: str | None = None,
) -> Path:
    """Write a checkpoint in Hugging Face layout as one that holds the parameters as this package does.

    It loads onto one device or any mesh, and other programs read its arrays with orbax. A conversion that is cut short
    leaves no `out`.

    Args:
      path: as `load_model` takes it.
      out: the directory to make.
      dtype: of the weights written; the checkpoint's own by default.
      quantize, quantize_output: as `load_model` takes them.

    Returns:
      `out`.

    Raises:
      CheckpointError: as `load_model`; or `path` is a converted checkpoint itself, or `out` exists.
      ValueError: an unknown dtype or scheme.
    """
    chosen = None if dtype is None else _dtype_name(dtype)
    asked = quantization(quantize, quantize_output)
    directory, raw, stated = _open(path)
    if is_converted(directory):
        raise CheckpointError(f"{directory} is a converted checkpoint already; give the original to convert it anew")
    stated = _quantized(directory, stated, asked)
    generation_defaults(directory)
    load_tokenizer(directory)
    checkpoint, config = _open_weights(directory, raw, stated, chosen)
    convert(checkpoint, config, tensors_of(config, raw), out := Path(out).expanduser().absolute())
    return out


def _open(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], ModelConfig]:
    """The directory, its config.json, and what that says."""
    directory = BUNDLED[path] if isinstance(path, str) and path in BUNDLED else _directory(Path(path).expanduser())
    is_converted(directory)  # refuses half a conversion, whose config.json may be absent as well
    config_file = directory / "config.json"
    if not config_file.exists():
        raise CheckpointError(
            f"{directory} has no config.json; give the directory that holds a model's config.json and weights"
        )
    raw = read_object(config_file)
    try:
        return directory, raw, config_from_hf(raw)
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from error


def _open_weights(
    directory: Path, raw: dict[str, Any], config: ModelConfig, dtype: str | None
) -> tuple[Checkpoint, ModelConfig]:
    """The safetensors files, and the configuration in the dtype asked for, stated, or that of the tensors."""
    checkpoint, tensors = Checkpoint(directory), tensors_of(config, raw)
    if dtype is None and raw.get("dtype") is None and raw.get("torch_dtype") is None:
        dtype = checkpoint_dtype(checkpoint, tensors)
    config = with_stored_scales(checkpoint, config, tensors)
    return checkpoint, config if dtype is None else config.replace(dtype=dtype)


def _quantized(directory: Path, stated: ModelConfig, asked: Quantization | None) -> ModelConfig:
    """The configuration with what the checkpoint holds quantized, and what is to be quantized besides."""
    held = stated.quantization
    if held is None or asked is None:
        return stated if asked is None else stated.replace(quantization=asked)
    if asked.layers is not None or held.output is not None:
        raise CheckpointError(
            f"{directory} is quantized already, to {held.layers.dtype}; load it without quantize= and "
            "quantize_output=, or load the checkpoint that it was quantized from"
        )
    return stated.replace(quantization=dataclasses.replace(held, output=asked.output))


def _check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raise ValueError if the mesh lacks an axis, or the model does not divide over it."""
    if mesh.axis_names != AXES:
        raise ValueError(f"the mesh has axes {mesh.axis_names}, expected {AXES}; make it with ridgeline.make_mesh")
    param_shardings(config, mesh)


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
