"""The KV cache: pages of keys and values, and the tables that say whose they are."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from ..model.config import ModelConfig
from ..sharding.rules import constrain, named_sharding


@struct.dataclass
class KVCache:
    """Cached keys and values of B rows. A pytree: jit takes it, and `prefill` and `decode_step` consume it.

    Attributes:
      k, v: one array a layer, [P, K, S, H]: pages, KV heads, positions a page, head dimensions.
      block_tables: [B, N] int32, the page that holds positions n * S to (n + 1) * S - 1 of a row.
      lengths: [B] int32, positions cached so far.
      max_lengths: [B] int32, positions at which a row is full. Length-dependent RoPE kinds (dynamic, longrope) read it
        as the row's context length, so set it to the longest the row will become.
      identity_table: whether block_tables is 0, 1, 2 ... in row order (static), which spares a gather.
      mesh: where it lies (static): rows and pages over "data", KV heads over "tensor"; None is one device. A row's
        pages must lie on the row's own data shard.
    """

    k: Any
    v: Any
    block_tables: Any
    lengths: Any
    max_lengths: Any
    identity_table: bool = struct.field(pytree_node=False, default=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    @property
    def batch_size(self) -> int:
        return self.block_tables.shape[0]

    @property
    def page_size(self) -> int:
        return self.k[0].shape[2]

    @property
    def capacity(self) -> int:
        """Positions that the table of one row can hold."""
        return self.block_tables.shape[1] * self.page_size

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (*self.k, *self.v))

    def updated(
        self, logits: Float[Array, "B V"], pages: Sequence[Any], lengths: Int[Array, "B"]
    ) -> tuple[Float[Array, "B V"], "KVCache"]:
        """What prefill and decode return: logits and the cache with new pages and lengths, placed as the old ones."""
        k, v = zip(*pages, strict=True)
        lengths = constrain(lengths, self.mesh, "batch")
        return constrain(logits, self.mesh, "batch", "vocab"), self.replace(k=k, v=v, lengths=lengths)


def init_cache(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    *,
    mesh: Mesh | None = None,
    page_size: int = 64,
    dtype: jax.typing.DTypeLike | None = None,
) -> KVCache:
    """An empty cache of `batch_size` rows, each with room for `max_length` tokens of its own.

    Args:
      config: the model.
      batch_size: rows.
      max_length: positions at which a row is full; memory is taken for the next multiple of `page_size`.
      mesh: the model's mesh, or None for one device.
      page_size: positions a page.
      dtype: of keys and values. None is the model's dtype on accelerators, and float32 on a CPU, where XLA has
        neither 16-bit updates in place nor 16-bit batched products and would convert the cache at every step.

    Raises:
      ValueError: a size that is not positive, or that does not divide over the mesh.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length), ("page_size", page_size)):
        if value <= 0:
            raise ValueError(f"init_cache: {name} is {value}; it must be positive")
    if mesh is not None and batch_size % mesh.shape["data"]:
        raise ValueError(
            f"init_cache: batch_size is {batch_size} and mesh axis 'data' has {mesh.shape['data']} devices; make it a "
            "multiple of them"
        )
    if dtype is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        dtype = "float32" if platform == "cpu" else config.dtype
    pages_per_row = math.ceil(max_length / page_size)
    pages = batch_size * pages_per_row

    def array(name: str, value: int | jax.Array, dtype: Any, **axes: int) -> jax.Array:
        shape = tuple(axes.values())
        sharding = None if mesh is None else named_sharding(f"cache {name}", shape, tuple(axes), mesh)
        return _broadcast(shape, sharding)(jnp.asarray(value, dtype))

    def leaves(name: str) -> tuple[jax.Array, ...]:
        axes = {"pages": pages, "kv_heads": config.num_kv_heads, "page_size": page_size, "head_dim": config.head_dim}
        return tuple(array(name, 0, dtype, **axes) for _ in config.layers)

    return KVCache(
        k=leaves("k"),
        v=leaves("v"),
        block_tables=array(
            "block_tables",
            jnp.arange(pages).reshape(batch_size, -1),
            jnp.int32,
            batch=batch_size,
            entries=pages_per_row,
        ),
        lengths=array("lengths", 0, jnp.int32, batch=batch_size),
        max_lengths=array("max_lengths", max_length, jnp.int32, batch=batch_size),
        identity_table=True,
        mesh=mesh,
    )


@functools.cache
def _broadcast(shape: tuple[int, ...], sharding: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
    """A program kept from call to call: a new one would be compiled at each."""
    return jax.jit(lambda value: jnp.broadcast_to(value, shape), out_shardings=sharding)


def write_pages(
    pages: Float[Array, "P K S H"],
    new: Float[Array, "B T K H"],
    block_tables: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Float[Array, "P K S H"]:
    """Pages with the keys or values of new tokens written at their positions, in place when `pages` is donated.

    Args:
      pages: keys or values of one layer.
      new: what to write.
      block_tables: page of each stretch of S positions.
      positions: where each token goes in its row.
      valid: tokens to write; the others (padding, rows without room) leave no trace.
    """
    page_size = pages.shape[2]
    page = jnp.take_along_axis(block_tables, positions // page_size, axis=1, mode="clip")
    page = jnp.where(valid, page, pages.shape[0])  # out of bounds, so that mode="drop" drops it
    return pages.at[page, :, positions % page_size].set(new.astype(pages.dtype), mode="drop")
