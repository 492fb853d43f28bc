"""Programs without arrays: prefill and decode lowered, compiled for GPUs that need not be there, and read.

from ridgeline import programs

lowered = programs.lower_decode(config, programs.target_mesh("h200", tensor=8), batch_size=16, max_length=8192)
compiled = programs.compile_for_target(lowered)
print(programs.hlo.collectives(programs.hlo.parse(compiled.as_text())))
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .decode.cache import KVCache, init_cache, page_dtype
from .decode.prefill import prefill
from .decode.step import decode_step
from .model import arguments
from .model.config import ModelConfig
from .model.kv_specs import kv_specs
from .model.params import abstract_params
from .sharding import hlo
from .sharding.rules import named_sharding
from .sharding.targets import compile_for_target, target_mesh

_PROGRAM = {
    "config": arguments.config,
    "mesh": arguments.instance(Mesh, hint="as make_mesh or target_mesh returns it"),
    "batch_size": arguments.whole,
    "max_length": arguments.whole,
}

__all__ = [
    "abstract_cache",
    "abstract_params",
    "bytes_per_device",
    "compile_for_target",
    "hlo",
    "lower_decode",
    "lower_prefill",
    "target_mesh",
]


@arguments.arguments(**_PROGRAM)
def abstract_cache(
    config: ModelConfig,
    mesh: Mesh,
    batch_size: int,
    max_length: int,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> KVCache:
    """What `init_cache` returns for a mesh, as `jax.ShapeDtypeStruct`s."""
    cache = jax.eval_shape(lambda: init_cache(config, batch_size, max_length, mesh=mesh, kv_dtype=kv_dtype))
    specs = kv_specs(config, page_dtype(kv_dtype, config, mesh), mesh.shape["tensor"])
    rows = jax.tree.map(
        lambda leaf: _abstract(leaf.shape, leaf.dtype, ("batch", "entries")[: leaf.ndim], mesh), cache.rows
    )
    pages = jax.tree.map(lambda leaf, spec: _abstract(leaf.shape, leaf.dtype, spec.axes, mesh), cache.pages, specs)
    return KVCache(pages, rows)


@arguments.arguments(**_PROGRAM, tokens=arguments.whole)
def lower_prefill(
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    max_length: int,
    tokens: int,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> jax.stages.Lowered:
    """`prefill` of `tokens` tokens a row, lowered for a mesh.

    Args:
      config: the model.
      mesh: as `make_mesh` or `target_mesh` returns it.
      batch_size: rows.
      max_length: positions a row of the cache holds.
      tokens: new tokens a row.
      kv_dtype: of the cache, as `init_cache` takes it.

    Raises:
      ValueError: a size that the mesh does not divide, or an unknown `kv_dtype`.
    """
    new = _abstract((batch_size, tokens), jnp.int32, ("batch", None), mesh)
    lengths = _abstract((batch_size,), jnp.int32, ("batch",), mesh)
    cache = abstract_cache(config, mesh, batch_size, max_length, kv_dtype)
    return prefill.lower(abstract_params(config, mesh), config, new, lengths, cache)


@arguments.arguments(**_PROGRAM)
def lower_decode(
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    max_length: int,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> jax.stages.Lowered:
    """`decode_step` lowered for a mesh; arguments and errors as in `lower_prefill`."""
    tokens = _abstract((batch_size,), jnp.int32, ("batch",), mesh)
    cache = abstract_cache(config, mesh, batch_size, max_length, kv_dtype)
    return decode_step.lower(abstract_params(config, mesh), config, tokens, cache)


def bytes_per_device(tree: Any) -> int:
    """What a pytree of placed arrays, abstract or not, takes on each device."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _abstract(shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...], mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding("argument", shape, axes, mesh))
