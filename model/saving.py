"""`save_model`: a model -> a directory in Hugging Face's layout."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from . import arguments
from .checkpoint.files import CheckpointError
from .checkpoint.safetensors import INDEX, SINGLE
from .checkpoint.settings import read_config
from .checkpoint.writing import BESIDE, copy_small_files, new_directory
from .config import ModelConfig
from .hf import HFConfig, config_from_hf, family_of, text_part
from .hf.compress import compressed, quantization_settings
from .hf.view import hf_tensors, parameters
from .loading import Model, dtype_name
from .params import float_specs, param_name
from .quantization import QuantizedArray


@arguments.arguments(
    model=arguments.instance(Model, hint="as load_model returns it"),
    directory=arguments.path,
    dtype=arguments.optional(arguments.dtype),
    hf_config=arguments.optional(arguments.instance(Mapping)),
)
def save_model(
    model: Model,
    directory: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 10**9,
    dtype: jax.typing.DTypeLike | None = None,
    hf_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as `load_model`, transformers and other programs read it.

    The directory holds config.json, safetensors files and their index, and copies of generation_config.json and of the
    tokenizer's files in `model.directory`. It is there whole or not at all. Quantized matrices are written as
    compressed-tensors does, with the numbers and scales that they have; of a multimodal model the text part is written,
    as a model of its own. The host holds one file's tensors at a time.

    Args:
      model: whose parameters this process can read, on one device or a mesh.
      directory: to make.
      max_shard_bytes: bytes of tensors at which another file is begun.
      dtype: "float32", "bfloat16" or "float16", of everything that is not quantized; the model's own by default.
      hf_config: the contents of config.json, for a model that was loaded from nowhere or whose configuration was
        changed; by default those of config.json in `model.directory`.

    Returns:
      The directory.

    Raises:
      CheckpointError: the directory exists, or a value is beyond float16.
      ValueError: a config.json that is not there or does not say what `model.config` does; a quantization that the
        layout cannot hold; parameters of other processes.
    """
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(model.params)):
        raise ValueError("parameters lie on devices of several processes; load the model in one process to save it")
    config = model.config.replace(dtype=model.config.dtype if dtype is None else dtype_name(dtype))
    written = _hf_config(model, config, hf_config)
    with new_directory(out := Path(directory).expanduser().absolute()) as partial:
        files = []
        for tensors in _files(_tensors(model, config, written), max_shard_bytes):
            save_file(tensors, partial / f"{len(files)}.safetensors", {"format": "pt"})
            files.append({name: tensor.nbytes for name, tensor in tensors.items()})
        _name_files(partial, files)
        (partial / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        copy_small_files(model.directory, partial, BESIDE)
    return out


def _hf_config(model: Model, config: ModelConfig, given: Mapping[str, Any] | None) -> HFConfig:
    """config.json, checked to say what the configuration does."""
    if given is None and not (model.directory / "config.json").exists():
        raise ValueError(
            f"{model.directory} has no config.json, which the model's is written after; give its contents as hf_config="
        )
    source = text_part(read_config(model.directory) if given is None else given).values
    left_out = ("quantization_config", "compression_config")
    hf = {key: value for key, value in source.items() if key not in left_out} | {
        "architectures": [family_of(config).architectures[0]],
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,  # as versions of transformers before 4.56 call it
    }
    said, meant = config_from_hf(hf), config.replace(quantization=None)
    if said != meant:
        names = [f.name for f in dataclasses.fields(said) if getattr(said, f.name) != getattr(meant, f.name)]
        raise ValueError(
            f"{'hf_config' if given is not None else model.directory / 'config.json'} and the model's configuration "
            f"differ in {', '.join(names)}; give the contents of a config.json that says the same as hf_config="
        )
    if config.quantization is not None:
        floats = [
            (name, tensor)
            for _, array, pieces in parameters(model.params, config)
            if not isinstance(array, QuantizedArray)
            for name, tensor in jax.eval_shape(lambda: hf_tensors(array, pieces)).items()  # noqa: B023
        ]
        left = [name.removesuffix(".weight") for name, tensor in floats if tensor.ndim == 2]
        hf["quantization_config"] = quantization_settings(config, left)
    return hf


def _tensors(model: Model, config: ModelConfig, hf: HFConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint, parameter by parameter."""
    paths = jax.tree_util.tree_leaves_with_path(float_specs(config))
    dtypes = {param_name(path): spec.dtype for path, spec in paths}
    for parameter, array, pieces in parameters(model.params, config):
        for name, tensor in hf_tensors(jax.tree.map(np.asarray, array), pieces).items():
            if isinstance(tensor, QuantizedArray):
                yield from compressed(hf["quantization_config"], name, tensor).items()
                continue
            with np.errstate(over="ignore"):
                cast = np.asarray(tensor).astype(jnp.dtype(dtypes[parameter]))
            if np.isinf(cast).any() and not np.isinf(tensor).any():
                raise CheckpointError(f"{name!r} holds values beyond float16's 65504; save it as bfloat16 or float32")
            yield name, cast


def _files(tensors: Iterator[tuple[str, np.ndarray]], most: int) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each file: as many as do not exceed so many bytes, and at least one."""
    held: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > most:
            yield held
            held = {}
        held[name] = np.ascontiguousarray(tensor)  # safetensors takes the bytes as they lie, strides or not
    yield held


def _name_files(directory: Path, files: list[dict[str, int]]) -> None:
    """Give numbered files, whose tensors have so many bytes each, the names of the layout; index several of them."""
    if len(files) == 1:
        os.rename(directory / "0.safetensors", directory / SINGLE)
        return
    weight_map = {}
    for number, sizes in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        os.rename(directory / f"{number}.safetensors", directory / name)
        weight_map |= dict.fromkeys(sizes, name)
    total = sum(sum(sizes.values()) for sizes in files)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
