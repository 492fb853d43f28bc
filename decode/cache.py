"""The KV cache: a pool of pages, and the rows that use it."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from ..model import arguments
from ..model.config import ModelConfig
from ..model.kv_specs import PREFILL_CHUNK, KVSpec, kinds_by_layer, kv_dtype_of, kv_specs, page_kinds, pages_per_row
from ..model.quantization import rounded
from ..pallas_kernels.dispatch import current_device
from ..pallas_kernels.pages import Pages
from ..sharding.rules import mesh_of, named_sharding, shard_map
from .consume import telling_what_was_consumed


@struct.dataclass
class Rows:
    """Who uses a pool of pages: B rows. A pytree.

    Attributes:
      lengths: [B] int32, positions cached so far.
      max_lengths: [B] int32, positions at which a row is full. It is room, and changes no number.
      contexts: [B] int32, what length-dependent RoPE kinds (dynamic, longrope) take a row's length for until it is
        longer, so that the chunks of a prompt agree: the prompt's length, or whatever the row is to become.
      block_tables: [B, N] int32, the page that holds positions n * S to (n + 1) * S - 1 of a row, S a page's; or one
        such table for each kind of layer. None is row order: of a pool of P pages row b has those from b * P / B on.
      kinds: of each layer, which of the tables is its (static).
      most_new: tokens that a call may append, where layers with a window keep no more than it reaches (static).
    """

    lengths: Any
    max_lengths: Any
    contexts: Any
    block_tables: Any = None
    kinds: tuple[int, ...] = struct.field(pytree_node=False, default=())
    most_new: int | None = struct.field(pytree_node=False, default=None)

    def table(self, layer: int) -> Any:
        """The table of a layer's pages, or None."""
        return self.block_tables[self.kinds[layer]] if isinstance(self.block_tables, tuple) else self.block_tables


_ROW_FIELDS = tuple(field.name for field in dataclasses.fields(Rows))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Cached keys and values of B rows. A pytree: jit takes it, and `prefill` and `decode_step` consume it.

    Where it lies is a property of its arrays: on a mesh rows and pages are split over "data" and KV heads over
    "tensor", and a row's pages must lie on the row's own data shard.

    Attributes:
      pages: the pool: what `kv_specs` lists, an entry a layer.
      rows: whose they are. Their fields can be read and replaced on the cache itself: `cache.lengths`,
        `cache.replace(lengths=...)`.
    """

    pages: tuple[Any, ...]
    rows: Rows

    def replace(self, **changes: Any) -> "KVCache":
        """A copy with `pages`, `rows`, or fields of the rows changed.

        `lengths` may be lowered, which rewinds rows: what came after is written over. (Layers with a window that keep
        only its pages have what 1,024 tokens less than a row's longest length needs, and no more.) `max_lengths` may be
        anything up to `capacity`. `block_tables` may name any pages: they are written and read by the table that is
        given; rows may share pages that none of them writes to. To cut, copy or reorder rows call `fork`.
        """
        of_rows = {name: changes.pop(name) for name in _ROW_FIELDS if name in changes}
        cache = dataclasses.replace(self, **changes)
        return dataclasses.replace(cache, rows=cache.rows.replace(**of_rows)) if of_rows else cache

    @property
    def lengths(self) -> Any:
        return self.rows.lengths

    @property
    def max_lengths(self) -> Any:
        return self.rows.max_lengths

    @property
    def contexts(self) -> Any:
        return self.rows.contexts

    @property
    def block_tables(self) -> Any:
        """The rows' table, or one for each kind of layer; also where none is stored as pages lie in row order."""
        return self._in_row_order() if self.rows.block_tables is None else self.rows.block_tables

    def _in_row_order(self) -> Any:
        return jnp.arange(self.num_pages, dtype=jnp.int32).reshape(self.batch_size, -1)

    @property
    def batch_size(self) -> int:
        return self.rows.lengths.shape[0]

    @property
    def num_pages(self) -> int:
        return jax.tree.leaves(self.pages)[0].shape[0]

    @property
    def page_size(self) -> int:
        return jax.tree.leaves(self.pages)[0].shape[2]

    @property
    def capacity(self) -> int:
        """Positions that the table of one row can hold."""
        return self.page_size * jax.tree.leaves(self.block_tables)[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, scales included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.pages))

    @telling_what_was_consumed("KVCache.read")
    def read(self, layer: int) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K H"]]:
        """A layer's keys and values, float32, of all C positions that a row's table can hold, in the row's order.

        Those at lengths[b] and after are not row b's: zeros, or what an earlier row left in the page; where the layer
        has a window, so are those before it.
        """
        if not isinstance(layer, numbers.Integral) or not -len(self.pages) <= layer < len(self.pages):
            raise ValueError(f"KVCache.read: layer is {layer!r}; it must be a number below {len(self.pages)}")
        table = self._in_row_order() if self.rows.block_tables is None else self.rows.table(layer)

        def rows(numbers: Array, scales: Array | None) -> Array:
            values = numbers[table].astype(jnp.float32)  # [B, N, K, S, H]
            if scales is not None:
                values = values * scales[table][..., None]
            values = jnp.moveaxis(values, 2, 3)
            return values.reshape(self.batch_size, self.capacity, *values.shape[3:])

        pages = self.pages[layer].numbers()
        return rows(pages.k, pages.k_scales), rows(pages.v, pages.v_scales)


@jax.transfer_guard("allow")
@arguments.arguments(
    config=arguments.config,
    batch_size=arguments.whole,
    max_length=arguments.whole,
    page_size=arguments.whole,
    mesh=arguments.optional(arguments.instance(Mesh, hint="as make_mesh returns it")),
    num_pages=arguments.optional(arguments.whole),
)
def init_cache(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    *,
    mesh: Mesh | None = None,
    page_size: int = 64,
    kv_dtype: jax.typing.DTypeLike | None = None,
    block_tables: Sequence[Sequence[int]] | np.ndarray | Array | None = None,
    num_pages: int | None = None,
) -> KVCache:
    """An empty cache of `batch_size` rows, each with room for `max_length` tokens.

    Args:
      config: the model.
      batch_size: rows.
      max_length: positions at which a row is full; a row's table holds the next multiple of `page_size`.
      mesh: the model's mesh, or None for one device.
      page_size: positions a page.
      kv_dtype: of keys and values, as `page_dtype` takes it; "int8" and "fp8" bring a float32 scale a token and head.
      block_tables: [batch_size, N] integers, the page of each stretch of `page_size` positions of each row. Rows that
        name the same page share what it holds, so let one of them write it. By default every row has pages of its own,
        and layers with a window have those that it reaches, used in turn: then a prefill takes 1,024 tokens at most.
      num_pages: of the pool; by default as many as rows of their own pages take.

    Raises:
      ValueError: a size that is not positive, or that does not divide over the mesh, an unknown `kv_dtype`, or
        `block_tables` of another shape or with entries that are no page.
    """
    sizes = {"batch_size": batch_size, "max_length": max_length, "page_size": page_size}
    for name, value in (sizes | ({} if num_pages is None else {"num_pages": num_pages})).items():
        if value <= 0:
            raise ValueError(f"init_cache: {name} is {value}; it must be positive")
    if mesh is not None and batch_size % mesh.shape["data"]:
        raise ValueError(
            f"init_cache: batch_size is {batch_size} and mesh axis 'data' has {mesh.shape['data']} devices; make it a "
            "multiple of them"
        )
    width = math.ceil(max_length / page_size)
    own = batch_size * width
    if num_pages is None or block_tables is None:
        if num_pages not in (None, own):
            raise ValueError(f"init_cache: num_pages is {num_pages} and block_tables are not given; give both")
        num_pages = own
    held = [pages_per_row(window, max_length, page_size) for window in page_kinds(config)]
    pages, most_new, tables = [num_pages] * len(held), None, None
    if block_tables is not None:
        tables = _checked_tables(block_tables, (batch_size, width), num_pages)
    elif min(held) < width:
        # Each row's pages in turn: those of a layer that keeps all positions are never used twice.
        starts, turns = np.arange(batch_size)[:, None], np.arange(width)
        tables = tuple(n * starts + turns % n for n in held)
        pages, most_new = [batch_size * n for n in held], PREFILL_CHUNK

    def row(name: str, value: Any, *shape: int) -> jax.Array:
        axes = ("batch", "entries")[: 1 + len(shape)]
        return _placed(f"cache {name}", value, jnp.int32, (batch_size, *shape), axes, mesh)

    return KVCache(
        pages=init_pages(config, pages, page_size, mesh, kv_dtype),
        rows=Rows(
            lengths=row("lengths", 0),
            max_lengths=row("max_lengths", max_length),
            contexts=row("contexts", 0),
            block_tables=jax.tree.map(lambda table: row("block_tables", table, width), tables),
            kinds=kinds_by_layer(config),
            most_new=most_new,
        ),
    )


def init_pages(
    config: ModelConfig,
    pages: Sequence[int],
    page_size: int,
    mesh: Mesh | None = None,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Any, ...]:
    """An empty pool: an entry a layer, as `kv_specs` lists them.

    Args:
      config, page_size, mesh, kv_dtype: as in `init_cache`.
      pages: how many layers of each kind have (`page_kinds`).
    """
    specs = kv_specs(config, page_dtype(kv_dtype, config, mesh), 1 if mesh is None else mesh.shape["tensor"])
    counts = dict(zip(page_kinds(config), pages, strict=True))

    def zeros(path: tuple, spec: KVSpec) -> jax.Array:
        count = counts[config.layers[path[0].idx].window]
        shape = spec.shape(pages=count, page_size=page_size)
        return _placed(f"cache {jax.tree_util.keystr(path)}", 0, spec.dtype, shape, spec.axes, mesh)

    return jax.tree_util.tree_map_with_path(zeros, specs)


def _checked_tables(block_tables: Any, shape: tuple[int, int], num_pages: int) -> np.ndarray:
    tables = np.asarray(block_tables)
    if tables.shape != shape or tables.dtype.kind not in "iu" or tables.min() < 0 or tables.max() >= num_pages:
        raise ValueError(
            f"init_cache: block_tables is {tables.dtype} {tables.shape} from {tables.min()} to {tables.max()}; give "
            f"integers from 0 to {num_pages - 1} (num_pages is {num_pages}), {shape[0]} rows of {shape[1]}"
        )
    return tables


def page_dtype(kv_dtype: jax.typing.DTypeLike | None, config: ModelConfig, mesh: Mesh | None) -> jnp.dtype:
    """The dtype of the numbers in a cache's pages.

    Args:
      kv_dtype: as `kv_specs` takes it. None is the model's dtype on accelerators, and float32 on a CPU, where XLA has
        neither 16-bit updates in place nor 16-bit batched products and would convert the cache at every step.
      config, mesh: as in `init_cache`.

    Raises:
      ValueError: `kv_dtype` is another one.
    """
    if kv_dtype is None:
        platform = current_device().platform if mesh is None else mesh.devices.flat[0].platform
        kv_dtype = "float32" if platform == "cpu" else config.dtype
    return kv_dtype_of(kv_dtype)


def _placed(
    name: str, value: Any, dtype: Any, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh | None
) -> jax.Array:
    sharding = None if mesh is None else named_sharding(name, shape, axes, mesh)
    return _broadcast(shape, sharding)(jnp.asarray(value, dtype))


@functools.cache
def _broadcast(shape: tuple[int, ...], sharding: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
    """A program kept from call to call: a new one would be compiled at each."""
    return jax.jit(lambda value: jnp.broadcast_to(value, shape), out_shardings=sharding)


def write_pages(
    pages: Pages,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    block_tables: Int[Array, "B N"] | None,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Pages:
    """A layer's pages with the keys and values of new tokens at their positions, in place where they are donated.

    Args:
      pages: of one layer, as the cache holds them.
      k, v: what to write; quantized here if the pages are.
      block_tables: page of each stretch of S positions; None is row order.
      positions: where each token goes in its row.
      valid: tokens to write; the others (padding, rows without room) leave no trace.
    """
    count, _, page_size = pages.k.shape[:3]
    entry = positions // page_size
    if block_tables is None:
        per_row = count // len(positions)
        page = per_row * jnp.arange(len(positions))[:, None] + jnp.minimum(entry, per_row - 1)
    else:
        page = jnp.take_along_axis(block_tables, entry, axis=1, mode="clip")
    page = jnp.where(valid, page, count)  # out of bounds, so that mode="drop" drops it
    new = Pages(k, v)
    if pages.k_scales is not None:
        dtype = "int8" if pages.k.dtype == jnp.int8 else "float8_e4m3fn"
        (k, k_scales), (v, v_scales) = _rounded(k, dtype), _rounded(v, dtype)
        new = Pages(k, v, k_scales[..., 0], v_scales[..., 0])

    def written(leaf: Array, part: Array) -> Array:
        part = lax.bitcast_convert_type(part, jnp.uint8) if leaf.dtype == jnp.uint8 else part.astype(leaf.dtype)
        return leaf.at[page, :, positions % page_size].set(part, mode="drop")

    return jax.tree.map(written, pages, new)


def copy_pages(
    pages: tuple[Any, ...], config: ModelConfig, sources: Int[Array, "B"], copies: Int[Array, "B"]
) -> tuple[Any, ...]:
    """A pool in which `copies[b]` holds what `sources[b]` does, in every layer, in place where the pool is donated.

    Args:
      pages: of all layers, each of which has as many.
      config: the model.
      sources, copies: page numbers, on a mesh of row b's data shard; a copy that is out of bounds is not made.
    """
    leaf = jax.tree.leaves(pages)[0]
    mesh, dtype = mesh_of(leaf), "fp8" if leaf.dtype == jnp.uint8 else leaf.dtype

    def local(pages, sources, copies):
        def copied(leaf: Array) -> Array:
            first = 0 if mesh is None else lax.axis_index("data") * leaf.shape[0]
            return leaf.at[copies - first].set(leaf[sources - first], mode="drop")

        return jax.tree.map(copied, pages)

    axes = jax.tree.map(lambda spec: spec.axes, kv_specs(config, dtype))
    return shard_map(local, mesh, (axes, ("batch",), ("batch",)), axes)(pages, sources, copies)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(x: Float[Array, "B T K H"], dtype: str) -> tuple[Array, Float[Array, "B T K 1"]]:
    return rounded(x, dtype)


@_rounded.defjvp
def _no_derivative(dtype: str, *_: Any) -> None:
    raise NotImplementedError(
        f"no derivative passes through keys and values that a cache holds in {dtype}; make it with kv_dtype='float32'"
    )
