"""Converted checkpoints: the parameter tree as this package holds it, written by orbax and restored onto any mesh."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding

from ...sharding.rules import RULES, named_sharding
from ..config import ModelConfig
from ..hf.family import TensorMap
from ..params import Params, ParamSpec, kv_replicas, param_name, param_shardings, param_specs, store
from .description import ARRAYS, DESCRIPTION, write_description
from .files import CheckpointError, listing
from .load import progress, read_parameter, specs_read
from .safetensors import Checkpoint
from .writing import BESIDE, copy_small_files, new_directory

CHUNKS = 64
"""An array that meshes split is stored in so many chunks, or the greatest divisor of it that divides the split axis."""


def convert(checkpoint: Checkpoint, config: ModelConfig, tensors: TensorMap, out: Path) -> None:
    """Write a checkpoint's parameters, tokenizer and defaults as a converted checkpoint.

    It is written into `<out>.incomplete`, ridgeline.json last, which is then renamed: `out` is there whole or not at
    all. Parameters are read and written in batches that do not exceed the largest parameter.

    Args:
      checkpoint: the open checkpoint, checked (`check_tensors`).
      config: the model, whose dtype is that of the parameters written.
      tensors: where the family keeps each parameter.
      out: the directory to make.

    Raises:
      CheckpointError: `out` exists, or `<out>.incomplete` does.
    """
    with new_directory(out) as partial:
        _save(checkpoint, config, tensors, partial / ARRAYS)
        copy_small_files(checkpoint.directory, partial, ("config.json", *BESIDE))
        write_description(partial, config)


def restore(directory: Path, stored: ModelConfig, config: ModelConfig, mesh: Mesh | None) -> Params:
    """The parameters of a converted checkpoint, on the default device or over a mesh; each device reads its shards.

    Host memory is orbax's affair: it reads as many bytes at once as the largest parameter has, and holds a few times
    that until their transfers are done, which it does not wait for.

    Args:
      directory: of the converted checkpoint.
      stored: the configuration that it was written for.
      config: the same one, with the dtype that is wanted.
      mesh: as `make_mesh` returns it, or None for the default device.

    Raises:
      CheckpointError: arrays that are damaged, or that are not those of `stored`; float16 asked of another dtype.
      ValueError: a parameter that the mesh does not divide; nothing has been read then.
    """
    from orbax.checkpoint import v1  # late, here and below: it takes a second, and most runs have no use for it

    directory = directory.absolute()  # orbax takes no other path
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    tree = param_specs(config, tensor)
    wanted, specs = _flat(tree), _flat(param_specs(stored))
    final = dict.fromkeys(wanted, _default_sharding()) if mesh is None else _flat(param_shardings(config, mesh))
    copies = kv_replicas(config, tensor)
    copied = {n for n, spec in specs.items() if spec.shape != wanted[n].shape and "kv_heads" in spec.axes}
    read_as = final | {name: _before_copying(name, specs[name], mesh, copies) for name in copied}
    if config.dtype == "float16" != stored.dtype:
        raise CheckpointError(
            f"{directory} holds {stored.dtype}, which may not fit float16; load it as bfloat16 or float32, or convert "
            "the original with --dtype float16"
        )
    _check_arrays(directory, specs)
    abstract = {
        name: jax.ShapeDtypeStruct(
            (specs if name in copied else wanted)[name].shape, spec.dtype, sharding=read_as[name]
        )
        for name, spec in wanted.items()
    }
    context = v1.Context()
    largest = max(max(spec.nbytes, wanted[name].nbytes) for name, spec in specs.items())
    context.array.loading.enable_padding_and_truncation = True  # of the vocabulary, with zeros
    context.memory.read_concurrent_bytes = largest + 1  # orbax wants each read to be smaller than the limit
    try:
        with context:
            found = jax.block_until_ready(v1.load(directory / ARRAYS, abstract))
    except Exception as error:  # what orbax raises for a failed read is a bare Exception
        raise _damaged(directory, error) from error
    for name in copied:
        found[name] = _copy_heads(found[name], specs[name], wanted[name], final[name])
    return jax.tree_util.tree_map_with_path(lambda path, _: found[param_name(path)], tree)


def _save(checkpoint: Checkpoint, config: ModelConfig, tensors: TensorMap, target: Path) -> None:
    from orbax.checkpoint import v1

    read, specs = _flat(specs_read(config, tensors)), _flat(param_specs(config))

    def stored_as(path: tuple, _: Any) -> Any:
        return v1.options.ArrayOptions.Saving.StorageOptions(**_chunks(specs[path[0].key]))

    context = v1.Context()
    context.array.saving.scoped_storage_options_creator = stored_as
    context.array.saving.use_compression = False  # of weights it takes off little, and it slows loading down
    context.memory.deepcopy_host_arrays = False
    with context, progress(f"converting {checkpoint.directory.name}", sum(s.nbytes for s in read.values())) as bar:
        for batch in _batches(read):
            whole = {name: (slice(None),) * len(read[name].shape) for name in batch}
            arrays = {name: read_parameter(checkpoint, read[name], tensors[name], whole[name]) for name in batch}
            stored = {name: store(array, config, name, read[name]) for name, array in arrays.items()}
            v1.partial.save(target, _flat(stored))
            bar.update(sum(read[name].nbytes for name in batch))
        v1.partial.finalize(target)


def _chunks(spec: ParamSpec) -> dict[str, Any]:
    """Orbax's options for chunks that lie within one device's shard, so that devices read little but their own."""
    if "kv_heads" in spec.axes:
        return {"shard_axes": (spec.axes.index("kv_heads"),)}  # a chunk a head: orbax cuts these axes all the way
    split = [size for size, name in zip(spec.shape, spec.axes, strict=True) if name and RULES[name]]
    # Orbax cuts the largest axis, which is the split one, into equal parts; a prime vocabulary has none but its rows.
    return {"chunk_byte_size": max(2**20, spec.nbytes // math.gcd(CHUNKS, split[0]))} if split else {}


def _batches(specs: dict[str, ParamSpec]) -> list[list[str]]:
    """Consecutive names, as many as do not exceed the largest parameter in bytes together."""
    largest = max(spec.nbytes for spec in specs.values())
    batches: list[list[str]] = []
    room = 0
    for name, spec in specs.items():
        if spec.nbytes > room:
            batches.append([])
            room = largest
        batches[-1].append(name)
        room -= spec.nbytes
    return batches


def _check_arrays(directory: Path, specs: dict[str, ParamSpec]) -> None:
    """Raise `CheckpointError` unless the stored arrays are those of the specs."""
    from orbax.checkpoint import v1

    try:
        found = v1.metadata(directory / ARRAYS).metadata
    except Exception as error:  # of many kinds, by what is missing
        raise _damaged(directory, error) from error
    if not isinstance(found, dict):  # it says None of some kinds of damage, and logs the reason
        raise _damaged(directory, ValueError("orbax finds no description of the arrays"))
    for difference, names in (("lack", specs.keys() - found.keys()), ("have besides", found.keys() - specs.keys())):
        if names:
            raise CheckpointError(
                f"the arrays in {directory / ARRAYS} {difference} {listing(sorted(names))}, by the config in "
                f"{DESCRIPTION}; restore {DESCRIPTION}, or convert the checkpoint again (ridgeline convert)"
            )
    for name, spec in specs.items():
        stored = (tuple(found[name].shape), jnp.dtype(found[name].dtype).name)
        if stored != (spec.shape, spec.dtype):
            raise CheckpointError(
                f"{directory / ARRAYS} holds {name!r} as {stored[1]} {list(stored[0])}, expected {spec.dtype} "
                f"{list(spec.shape)} by the config in {DESCRIPTION}; restore {DESCRIPTION}, or convert the checkpoint "
                "again (ridgeline convert)"
            )


def _damaged(directory: Path, error: Exception) -> CheckpointError:
    innermost: BaseException = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    reason = str(innermost).strip().splitlines() or [type(innermost).__name__]
    return CheckpointError(
        f"the arrays in {directory / ARRAYS} cannot be read ({reason[0][:300]}); convert the checkpoint again "
        "(ridgeline convert)"
    )


def _default_sharding() -> Sharding:
    return SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))


def _before_copying(name: str, spec: ParamSpec, mesh: Mesh, copies: int) -> NamedSharding:
    """How a parameter lies whose KV heads are not copied yet: the devices of one head's copies all hold that head."""
    shape = dict(mesh.shape)
    shape["tensor"] //= copies
    heads = Mesh(mesh.devices.reshape(*shape.values(), copies), (*shape, "copy"), axis_types=(AxisType.Auto,) * 4)
    return named_sharding(name, spec.shape, spec.axes, heads)


def _copy_heads(array: jax.Array, stored: ParamSpec, wanted: ParamSpec, sharding: NamedSharding) -> jax.Array:
    """A parameter with its KV heads copied, where each device holds the head that it is to have a copy of.

    The query heads of a KV head are shared out among its copies; what follows them on the axis (k and v of qkv) and
    what has no query heads stays whole.
    """
    held = {shard.device: shard.data for shard in array.addressable_shards}
    head_axis = stored.axes.index("kv_heads")
    copies = wanted.shape[head_axis] // stored.shape[head_axis]
    parts = []
    for device, index in sharding.addressable_devices_indices_map(wanted.shape).items():
        part = held[device]
        if "q_per_kv" in stored.axes:
            axis = stored.axes.index("q_per_kv")
            before, after = stored.shape[axis], wanted.shape[axis]
            own = (before - after) // (copies - 1)  # before = G + rest, after = G / copies + rest
            start = index[head_axis].start % copies * own
            queries = lax.slice_in_dim(part, start, start + own, axis=axis)
            part = jnp.concatenate([queries, lax.slice_in_dim(part, own * copies, before, axis=axis)], axis)
        parts.append(part)
    return jax.make_array_from_single_device_arrays(wanted.shape, sharding, parts)


def _flat(tree: Params) -> dict[str, Any]:
    return {param_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
