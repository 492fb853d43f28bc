"""The one table from logical axes to mesh axes, and the shardings that follow from it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str | None] = {
    "batch": "data",
    "pages": "data",
    "vocab": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "experts": "expert",
    "embed": None,
    "q_per_kv": None,
    "head_dim": None,
    "page_size": None,
    "entries": None,
}
"""The mesh axis that each logical axis is split over; None is not split."""


def is_split(axis: str | None, mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether a logical axis lies in parts on a mesh."""
    physical = None if axis is None or mesh is None else RULES[axis]
    return physical is not None and mesh.shape.get(physical, 1) > 1


def mesh_of(x: jax.Array) -> AbstractMesh | None:
    """The mesh that an array, traced or not, lies on; None on one device."""
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty else mesh


def partition_spec(
    name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How an array is split over a mesh.

    Args:
      name: the array's name, for errors.
      shape: its full shape.
      axes: the logical name of each of its axes, or None.
      mesh: as `make_mesh` returns it.

    Raises:
      ValueError: a logical axis that the table lacks, two axes on one mesh axis, or a size that does not divide.
    """
    taken: dict[str, str] = {}
    spec = []
    for size, logical in zip(shape, axes, strict=True):
        if logical is not None and logical not in RULES:
            raise ValueError(f"{name}: no rule for logical axis {logical!r}; the table has {', '.join(RULES)}")
        if not is_split(logical, mesh):
            spec.append(None)
            continue
        physical = RULES[logical]
        if physical in taken:
            raise ValueError(
                f"{name} {shape}: logical axes {taken[physical]!r} and {logical!r} both map to mesh axis "
                f"{physical!r}; give one of them another rule"
            )
        taken[physical] = logical
        if size % mesh.shape[physical]:
            divisors = ", ".join(str(n) for n in range(1, mesh.shape[physical] + 1) if size % n == 0)
            raise ValueError(
                f"{name} {shape}: axis {logical!r} of size {size} does not divide over the {mesh.shape[physical]} "
                f"devices of mesh axis {physical!r}; make that axis one of {divisors}"
            )
        spec.append(physical)
    return PartitionSpec(*spec)


def named_sharding(
    name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """`partition_spec` on its mesh."""
    return NamedSharding(mesh, partition_spec(name, shape, axes, mesh))


def put_rows(rows: np.ndarray, mesh: Mesh | None) -> jax.Array | np.ndarray:
    """An array of a program's rows, [B, ...], each on its data shard; without a mesh it is left on the host."""
    if mesh is None:
        return rows
    return jax.device_put(rows, named_sharding("rows", rows.shape, ("batch", *[None] * (rows.ndim - 1)), mesh))


def constrain(x: jax.Array, *axes: str | None, mesh: Mesh | None = None) -> jax.Array:
    """Pin how an intermediate result is split over `mesh`, or the one it lies on; without either it is left alone.

    So is an array outside of a program that does not divide, of which JAX can only hold copies.
    """
    mesh = mesh or mesh_of(x)
    if mesh is None:
        return x
    parts = [mesh.shape[RULES[axis]] if is_split(axis, mesh) else 1 for axis in axes]
    divides = all(size % count == 0 for size, count in zip(x.shape, parts, strict=False))
    if not (divides or isinstance(x, jax.core.Tracer)):
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(axes)))


def shard_map(function: Callable, mesh: Mesh | AbstractMesh | None, in_axes: Any, out_axes: Any) -> Callable:
    """`function` on each device's own part of its arguments; without a mesh it is the function itself.

    Args:
      function: takes arrays, or pytrees of them.
      mesh: as `make_mesh` or `mesh_of` returns it, or None.
      in_axes, out_axes: a tuple of logical axis names for each array, trailing axes that are not split left out.
    """
    if mesh is None:
        return function

    def is_axes(node: Any) -> bool:
        return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)

    to_specs = functools.partial(jax.tree.map, _spec, is_leaf=is_axes)
    return jax.shard_map(function, mesh=mesh, in_specs=to_specs(in_axes), out_specs=to_specs(out_axes), check_vma=False)


def _spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))
