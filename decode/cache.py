"""The KV cache: pages of keys and values, and the tables that say whose they are."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Num

from ..model.config import DTYPES, ModelConfig
from ..model.quantization import rounded
from ..sharding.rules import constrain, named_sharding

_QUANTIZED = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
KV_DTYPES = {name: jnp.dtype(name) for name in (*DTYPES, "int8")} | {"fp8": jnp.dtype(jnp.float8_e4m3fn)}
"""What pages may hold, by the name of a `kv_dtype`."""


@struct.dataclass
class KVCache:
    """Cached keys and values of B rows. A pytree: jit takes it, and `prefill` and `decode_step` consume it.

    Attributes:
      k, v: one array a layer, [P, K, S, H]: pages, KV heads, positions a page, head dimensions.
        float8_e4m3fn is held as bytes, uint8, which XLA:CPU too writes in place; see `numbers`.
      k_scales, v_scales: of quantized pages one array a layer, [P, K, S] float32: a number times the scale of its
        position and head is the key or value. Of other pages ().
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
    k_scales: Any = ()
    v_scales: Any = ()
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
        """Bytes of keys and values, scales included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))

    @property
    def layers(self) -> tuple[tuple[Any, ...], ...]:
        """Each layer's (k, v), or (k, v, k_scales, v_scales): the state that `cached_attend` threads through."""
        kinds = (self.k, self.v, self.k_scales, self.v_scales)
        return tuple(zip(*(leaves for leaves in kinds if leaves), strict=True))

    def read(self, layer: int) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K H"]]:
        """A layer's keys and values, float32, of all C positions that a row's table can hold, in the row's order.

        Those at lengths[b] and after are not row b's: zeros, or what an earlier row left in the page.
        """

        def rows(pages: Array, scales: Array | None = None) -> Array:
            found = numbers(pages)[self.block_tables].astype(jnp.float32)  # [B, N, K, S, H]
            if scales is not None:
                found = found * scales[self.block_tables][..., None]
            found = jnp.moveaxis(found, 2, 3)
            return found.reshape(self.batch_size, self.capacity, *found.shape[3:])

        k, v, *scales = self.layers[layer]
        return rows(k, *scales[:1]), rows(v, *scales[1:])

    def updated(
        self, logits: Float[Array, "B *T V"], layers: Sequence[tuple[Any, ...]], lengths: Int[Array, "B"]
    ) -> tuple[Float[Array, "B *T V"], "KVCache"]:
        """What prefill and decode return: logits and the cache with new layers and lengths, placed as the old ones."""
        axes = ("batch", *[None] * (logits.ndim - 2), "vocab")
        kinds = dict(zip(("k", "v", "k_scales", "v_scales"), zip(*layers, strict=True), strict=False))
        lengths = constrain(lengths, self.mesh, "batch")
        return constrain(logits, self.mesh, *axes), self.replace(**kinds, lengths=lengths)


def init_cache(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    *,
    mesh: Mesh | None = None,
    page_size: int = 64,
    kv_dtype: jax.typing.DTypeLike | None = None,
    block_tables: Sequence[Sequence[int]] | np.ndarray | Array | None = None,
) -> KVCache:
    """An empty cache of `batch_size` rows, each with room for `max_length` tokens.

    Args:
      config: the model.
      batch_size: rows.
      max_length: positions at which a row is full; memory is taken for the next multiple of `page_size`.
      mesh: the model's mesh, or None for one device.
      page_size: positions a page.
      kv_dtype: of keys and values, as `page_dtype` takes it; "int8" and "fp8" bring a float32 scale a token and head.
      block_tables: [batch_size, N] integers, the page of each stretch of `page_size` positions of each row; the largest
        says how many pages there are. Rows that name the same page share what it holds, so let one of them write it.
        By default every row has pages of its own.

    Raises:
      ValueError: a size that is not positive, or that does not divide over the mesh, an unknown `kv_dtype`, or
        `block_tables` of another shape or with negative entries.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length), ("page_size", page_size)):
        if value <= 0:
            raise ValueError(f"init_cache: {name} is {value}; it must be positive")
    if mesh is not None and batch_size % mesh.shape["data"]:
        raise ValueError(
            f"init_cache: batch_size is {batch_size} and mesh axis 'data' has {mesh.shape['data']} devices; make it a "
            "multiple of them"
        )
    dtype = page_dtype(kv_dtype, config, mesh)
    held = jnp.uint8 if dtype == jnp.float8_e4m3fn else dtype
    pages_per_row = math.ceil(max_length / page_size)
    own = block_tables is None
    tables = np.arange(batch_size * pages_per_row).reshape(batch_size, -1) if own else np.asarray(block_tables)
    if tables.shape != (batch_size, pages_per_row) or tables.dtype.kind not in "iu" or tables.min() < 0:
        raise ValueError(
            f"init_cache: block_tables is {tables.dtype} {tables.shape} from {tables.min()} up; give integers from 0 "
            f"up, {batch_size} rows of {pages_per_row} (max_length {max_length} in pages of {page_size})"
        )
    pages = int(tables.max()) + 1

    def array(name: str, value: int | jax.Array, dtype: Any, **axes: int) -> jax.Array:
        shape = tuple(axes.values())
        sharding = None if mesh is None else named_sharding(f"cache {name}", shape, tuple(axes), mesh)
        return _broadcast(shape, sharding)(jnp.asarray(value, dtype))

    def leaves(name: str, dtype: Any, **more: int) -> tuple[jax.Array, ...]:
        axes = {"pages": pages, "kv_heads": config.num_kv_heads, "page_size": page_size} | more
        return tuple(array(name, 0, dtype, **axes) for _ in config.layers)

    return KVCache(
        k=leaves("k", held, head_dim=config.head_dim),
        v=leaves("v", held, head_dim=config.head_dim),
        block_tables=array(
            "block_tables",
            jnp.asarray(tables),
            jnp.int32,
            batch=batch_size,
            entries=pages_per_row,
        ),
        lengths=array("lengths", 0, jnp.int32, batch=batch_size),
        max_lengths=array("max_lengths", max_length, jnp.int32, batch=batch_size),
        k_scales=leaves("k_scales", jnp.float32) if dtype in _QUANTIZED else (),
        v_scales=leaves("v_scales", jnp.float32) if dtype in _QUANTIZED else (),
        identity_table=own,
        mesh=mesh,
    )


def page_dtype(kv_dtype: jax.typing.DTypeLike | None, config: ModelConfig, mesh: Mesh | None) -> jnp.dtype:
    """The dtype of the numbers in a cache's pages.

    Args:
      kv_dtype: "float32", "bfloat16", "float16", "int8" or "fp8" (e4m3), or such a dtype. None is the model's dtype on
        accelerators, and float32 on a CPU, where XLA has neither 16-bit updates in place nor 16-bit batched products
        and would convert the cache at every step.
      config, mesh: as in `init_cache`.

    Raises:
      ValueError: `kv_dtype` is another one.
    """
    if kv_dtype is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        kv_dtype = "float32" if platform == "cpu" else config.dtype
    dtype = KV_DTYPES.get(kv_dtype) if isinstance(kv_dtype, str) else jnp.dtype(kv_dtype)
    if dtype not in KV_DTYPES.values():
        raise ValueError(f"kv_dtype {kv_dtype!r} is not known; known: {', '.join(KV_DTYPES)}")
    return dtype


@functools.cache
def _broadcast(shape: tuple[int, ...], sharding: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
    """A program kept from call to call: a new one would be compiled at each."""
    return jax.jit(lambda value: jnp.broadcast_to(value, shape), out_shardings=sharding)


def write_layer(
    layer: tuple[Array, ...],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    block_tables: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> tuple[Array, ...]:
    """A layer of the cache with the keys and values of new tokens at their positions, in place when it is donated.

    Args:
      layer: one entry of `KVCache.layers`.
      k, v: what to write; quantized here if the layer is.
      block_tables: page of each stretch of S positions.
      positions: where each token goes in its row.
      valid: tokens to write; the others (padding, rows without room) leave no trace.
    """
    pages, _, page_size = layer[0].shape[:3]
    page = jnp.take_along_axis(block_tables, positions // page_size, axis=1, mode="clip")
    page = jnp.where(valid, page, pages)  # out of bounds, so that mode="drop" drops it
    new = k, v
    if len(layer) > 2:
        dtype = "int8" if layer[0].dtype == jnp.int8 else "float8_e4m3fn"
        (k, k_scales), (v, v_scales) = rounded(k, dtype), rounded(v, dtype)
        new = k, v, k_scales[..., 0], v_scales[..., 0]

    def written(leaf: Array, part: Array) -> Array:
        part = lax.bitcast_convert_type(part, jnp.uint8) if leaf.dtype == jnp.uint8 else part.astype(leaf.dtype)
        return leaf.at[page, :, positions % page_size].set(part, mode="drop")

    return tuple(map(written, layer, new))


def numbers(pages: Num[Array, "P K S H"]) -> Num[Array, "P K S H"]:
    """The keys or values that pages of the cache hold, in their dtype: float8 is held as bytes."""
    return lax.bitcast_convert_type(pages, jnp.float8_e4m3fn) if pages.dtype == jnp.uint8 else pages
