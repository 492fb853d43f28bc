"""`load_model`: a directory -> configuration, parameters, tokenizer, generation defaults."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..sharding.mesh import AXES
from . import arguments, hub
from .checkpoint import kinds
from .checkpoint.check import check_tensors, checkpoint_dtype, with_stored_scales
from .checkpoint.description import is_converted, read_description
from .checkpoint.files import CheckpointError, check_file, is_there, listing
from .checkpoint.layout import as_stored, has_head
from .checkpoint.load import load_params
from .checkpoint.orbax import convert, restore
from .checkpoint.safetensors import Checkpoint
from .checkpoint.settings import read_config
from .config import DTYPES, ModelConfig
from .generation import GenerationDefaults, generation_defaults
from .hf import TensorMap, config_from_hf, in_other_orders, is_multimodal, tensors_of, text_part
from .params import Params, abstract_params, count_parameters, float_specs, kv_replicas, param_shardings
from .schemes import Quantization, quantization
from .tokenizer import Tokenizer, load_tokenizer

_BUNDLED = Path(__file__).parent / "bundled"
BUNDLED = {"bundled": _BUNDLED / "story", "bundled-draft": _BUNDLED / "draft"}
"""The models that come with the package, by the names that `load_model` takes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
      config: its static configuration.
      params: its parameters, a pytree of arrays as `param_specs(config)`.
      tokenizer: text <-> ids; None where the directory has none.
      generation: the checkpoint's own ends of text, tokens never made, and sampling defaults.
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
        """The directory's name, of a snapshot in the Hugging Face cache the repository's."""
        return kinds.model_name(self.directory)

    def __repr__(self) -> str:
        c, layers = self.config, self.config.quantization and self.config.quantization.layers
        parameters = sum(spec.size for spec in jax.tree.leaves(float_specs(c)))
        active = "" if c.experts is None else f" ({count_parameters(c, active=True):,} a token)"
        nbytes = sum(array.nbytes for array in jax.tree.leaves(self.params))
        held = c.dtype if layers is None else f"{layers.dtype} and {c.dtype}"
        return (
            f"Model {self.name!r}: {c.family}, {c.num_layers} layers, {parameters:,} parameters{active} in {held}, "
            f"{nbytes / 1e9:.3g} GB\n"
            f"  vocab_size {c.vocab_size}, embed_dim {c.embed_dim}, ffn_dim {c.ffn_dim}, {c.num_heads} heads of "
            f"{c.head_dim}, {c.num_kv_heads} KV heads, max_position {c.max_position}\n"
            f"  {'no tokenizer' if self.tokenizer is None else f'{self.tokenizer.vocab_size} tokens'}, "
            f"{'one device' if self.mesh is None else f'mesh {dict(self.mesh.shape)}'}, from {self.directory}"
        )


@arguments.arguments(path=arguments.path, mesh=arguments.mesh, check_finite=arguments.flag)
def load_model(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    quantize: str | None = None,
    quantize_output: str | None = None,
    check_finite: bool = True,
) -> Model:
    """Load a checkpoint onto the default device, or onto the devices of a mesh.

    No network is used but to download a model of the Hugging Face Hub that is not in its cache on this machine.

    On a mesh every device's shards go from the file straight to it, and a process reads those of its own devices only.
    With more devices on the "tensor" axis than KV heads, KV heads are copied; the configuration is that of the file.

    Args:
      path: a directory in Hugging Face layout, with config.json and model.safetensors or its shards and their index;
        or one that `ridgeline convert` wrote; or a name on the Hugging Face Hub, "organization/model", where there is
        no such directory; or "bundled" or "bundled-draft", the models that come with the package ("./bundled" is a
        directory of that name).
      mesh: as `make_mesh` returns it; None is one device.
      dtype: "float32", "bfloat16" or "float16", of weights, activations and KV cache; the checkpoint's own by default.
      quantize: the scheme, one of `SCHEMES`, that the matrices of the layers are stored in. Each is quantized as it is
        loaded. None leaves them as the checkpoint has them, which may hold them quantized.
      quantize_output: the scheme of the output projection. Where it is tied to the embedding, the embedding stays and
        a quantized copy of it makes the logits.
      check_finite: whether a checkpoint with NaN or infinite weights is refused.

    Raises:
      CheckpointError: a file or tensor that is missing, damaged or not supported, or weights to be quantized that the
        checkpoint holds quantized; it names the file and the remedy.
      ValueError: an unknown dtype or scheme, or a mesh that the model does not divide over; nothing has been read then.
    """
    _, read = open_model(
        path,
        mesh=mesh,
        dtype=dtype,
        quantize=quantize,
        quantize_output=quantize_output,
        check_finite=check_finite,
    )
    return read()


@arguments.arguments(path=arguments.path, mesh=arguments.mesh, check_finite=arguments.flag)
def open_model(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    quantize: str | None = None,
    quantize_output: str | None = None,
    check_finite: bool = True,
) -> tuple[Model, Callable[[], Model]]:
    """A checkpoint's model before its weights are read, and what reads them.

    Arguments and errors are those of `load_model`. The parameters are `jax.ShapeDtypeStruct`s, so that programs can be
    compiled while the weights load.
    """
    chosen = None if dtype is None else dtype_name(dtype)
    asked = quantization(quantize, quantize_output)
    directory, raw, stated = _open(path)
    converted = is_converted(directory)
    if not converted:
        stated = _quantized(directory, stated, asked)
    if mesh is not None:
        _check_mesh(stated, mesh)
    # Read before the weights, so that a damaged small file is told before minutes of loading.
    tokenizer = load_tokenizer(directory, stated.vocab_size)
    generation = generation_defaults(directory, tokenizer, stated.vocab_size)

    if converted:
        stored = read_description(directory, stated)
        if asked not in (None, stored.quantization):
            raise CheckpointError(
                f"{directory} is a converted checkpoint, whose weights are quantized when it is written or not at all; "
                f"convert the original again with quantize={quantize!r}, quantize_output={quantize_output!r}"
            )
        config = stored.replace(dtype=chosen or stored.dtype)
        read = functools.partial(restore, directory, stored, config, mesh)
    else:
        checkpoint, config, tensors = _open_weights(directory, raw, stated, chosen, mesh)
        read = functools.partial(load_params, checkpoint, config, tensors, mesh, check_finite)
    model = Model(config, abstract_params(config, mesh), tokenizer, generation, directory, mesh)
    return model, lambda: dataclasses.replace(model, params=read())


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
    chosen = None if dtype is None else dtype_name(dtype)
    asked = quantization(quantize, quantize_output)
    directory, raw, stated = _open(path)
    if is_converted(directory):
        raise CheckpointError(f"{directory} is a converted checkpoint already; give the original to convert it anew")
    stated = _quantized(directory, stated, asked)
    generation_defaults(directory, load_tokenizer(directory, stated.vocab_size), stated.vocab_size)
    checkpoint, config, tensors = _open_weights(directory, raw, stated, chosen)
    convert(checkpoint, config, tensors, out := Path(out).expanduser().absolute())
    return out


def _open(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], ModelConfig]:
    """The directory, its config.json, and what that says."""
    directory = BUNDLED[path] if isinstance(path, str) and path in BUNDLED else _directory(os.fspath(path))
    is_converted(directory)  # refuses half a conversion, whose config.json may be absent as well
    config_file = directory / "config.json"
    if not is_there(config_file):
        raise CheckpointError(kinds.other_kind(directory) or f"{directory} has no config.json; {_instead(directory)}")
    if is_there(directory / "adapter_config.json"):
        warnings.warn(f"{directory} also holds {kinds.adapter(directory)}", stacklevel=3)
    raw = read_config(directory)
    return directory, raw, config_from_hf(raw, str(config_file))


def _instead(directory: Path) -> str:
    """What to give instead of a directory without a config.json."""
    if inner := sorted(file.parent.name for file in directory.glob("*/config.json")):
        return f"those inside it, {listing(inner)}, do: give one of them"
    return "give the directory that holds a model's config.json and weights"


def _open_weights(
    directory: Path, raw: dict[str, Any], config: ModelConfig, dtype: str | None, mesh: Mesh | None = None
) -> tuple[Checkpoint, ModelConfig, TensorMap]:
    """The safetensors files, checked; the configuration in the dtype asked for, stated, or stored; where all lies."""
    checkpoint, multimodal = Checkpoint(directory), is_multimodal(raw)
    if multimodal:
        config = config.replace(tie_embeddings=not has_head(checkpoint))
    tensors = as_stored(checkpoint, tensors_of(config, raw, held=checkpoint.tensors))
    if floats := in_other_orders(text_part(raw), tensors, checkpoint.get):
        warnings.warn(
            f"{directory}: {listing([*floats])} are kept in {dtype or config.dtype}, not in 4 or 8 bits: the matrices "
            "that each is made of have their inputs in different orders (desc_act)",
            stacklevel=3,
        )
        skip = (*config.quantization.skip, *floats)
        config = config.replace(quantization=dataclasses.replace(config.quantization, skip=skip))
    if dtype is None and raw.get("dtype") is None and raw.get("torch_dtype") is None:
        dtype = checkpoint_dtype(checkpoint, tensors)
    config = with_stored_scales(checkpoint, config, tensors)
    config = config if dtype is None else config.replace(dtype=dtype)
    copies = 1 if mesh is None else kv_replicas(config, mesh.shape["tensor"])
    tensors = as_stored(checkpoint, tensors_of(config, raw, copies, checkpoint.tensors))
    check_tensors(checkpoint, config, tensors, multimodal)
    return checkpoint, config, tensors


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


def dtype_name(dtype: jax.typing.DTypeLike) -> str:
    """The name of a dtype that weights may have; ValueError for any other."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _directory(name: str) -> Path:
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike the path's own method, of a name that is too long too
        return kinds.snapshot(path)
    if os.path.lexists(path):
        check_file(path)
        whose = kinds.foreign_file(path)
        remedy = "give the directory that holds it and config.json" if whose is None else f"in {kinds.foreign(whose)}"
        raise CheckpointError(f"{path} is a file{';' if whose is None else ''} {remedy}")
    if hub.is_hub_name(name):  # "./organization/model" is none
        if snapshot := hub.cached(name):
            return snapshot
        if not path.parent.exists():
            return hub.download(name)
    raise CheckpointError(
        f"no such directory: {path!s:.1000}; give a directory that holds config.json and model.safetensors, "
        f"or one of {listing(sorted(BUNDLED))}"
    )
