"""The one list of what a cache is made of, as `param_specs` is of parameters.

`kv_specs(config, kv_dtype)` says what each layer keeps of the tokens it has seen; allocation, placement, what attention
does with it, and every byte count follow from it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..pallas_kernels.pages import Pages
from .config import DTYPES, LayerConfig, ModelConfig
from .params import kv_replicas

PREFILL_CHUNK = 1024
"""Most tokens of a row that are written together."""

KV_DTYPES = {name: jnp.dtype(name) for name in (*DTYPES, "int8")} | {"fp8": jnp.dtype(jnp.float8_e4m3fn)}
"""What pages may hold, by the name of a `kv_dtype`."""


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """One array of a cache before it exists: a leaf of the tree that `kv_specs` returns.

    Attributes:
      axes: a logical name an axis, which `sharding` maps to mesh axes. "pages" and "page_size" are those of the pool,
        "batch" is rows; what has "pages" grows with the tokens, what has "batch" in their place is kept once a row.
      sizes: of the other axes, by name.
      dtype: its dtype's name.
    """

    axes: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    dtype: str

    def shape(self, **counts: int) -> tuple[int, ...]:
        """Of an array of so many `pages` of `page_size` positions, or of so many rows, `batch`."""
        sizes = dict(self.sizes) | counts
        return tuple(sizes[axis] for axis in self.axes)


def kv_specs(config: ModelConfig, kv_dtype: jax.typing.DTypeLike | None = None, tensor: int = 1) -> tuple[Any, ...]:
    """What each layer keeps: a tuple of pytrees of `KVSpec`, one a layer.

    A layer of grouped attention keeps `Pages`: keys and values, [pages, kv_heads, page_size, head_dim] each, and where
    they are quantized a float32 scale a token and head, [pages, kv_heads, page_size].

    Args:
      config: the model.
      kv_dtype: of keys and values: "float32", "bfloat16", "float16", "int8", "fp8" (e4m3, held as bytes, which XLA:CPU
        too writes in place), or such a dtype; None is the model's.
      tensor: devices that share each layer, which copy KV heads where there are more of them; see `kv_replicas`.

    Raises:
      ValueError: an unknown `kv_dtype`, or devices that cannot share the KV heads.
    """
    dtype = kv_dtype_of(config.dtype if kv_dtype is None else kv_dtype)
    copies = kv_replicas(config, tensor)
    return tuple(_KINDS[layer.attention](config, layer, dtype, copies) for layer in config.layers)


def page_kinds(config: ModelConfig) -> tuple[int | None, ...]:
    """The kinds of layer that keep different pages of a row, by their window; None keeps those of all positions."""
    return tuple(dict.fromkeys(layer.window for layer in config.layers))


def kinds_by_layer(config: ModelConfig) -> tuple[int, ...]:
    """Of each layer, the place of its kind in `page_kinds`."""
    kinds = page_kinds(config)
    return tuple(kinds.index(layer.window) for layer in config.layers)


def pages_per_row(window: int | None, length: int, page_size: int, new: int = PREFILL_CHUNK) -> int:
    """Most pages that a layer holds at once of a row of some length: those that its window reaches from the first of
    `new` tokens on, which are written together.
    """
    pages = math.ceil(length / page_size)
    return pages if window is None else min(pages, math.ceil((window + new) / page_size) + 1)


def kv_dtype_of(kv_dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype that a `kv_dtype` names.

    Raises:
      ValueError: none that pages may hold.
    """
    try:
        dtype = KV_DTYPES.get(kv_dtype) if isinstance(kv_dtype, str) else jnp.dtype(kv_dtype)
    except (TypeError, ValueError):  # of what is no dtype at all
        dtype = None
    if dtype not in KV_DTYPES.values():
        raise ValueError(f"kv_dtype {kv_dtype!r} is not known; known: {', '.join(KV_DTYPES)}")
    return dtype


def _grouped(config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype, copies: int) -> Pages:
    heads = ("kv_heads", config.num_kv_heads * copies)
    held = "uint8" if dtype == jnp.float8_e4m3fn else dtype.name
    numbers = KVSpec(("pages", "kv_heads", "page_size", "head_dim"), (heads, ("head_dim", config.head_dim)), held)
    quantized = dtype in (KV_DTYPES["int8"], KV_DTYPES["fp8"])
    scales = KVSpec(("pages", "kv_heads", "page_size"), (heads,), "float32") if quantized else None
    return Pages(numbers, numbers, scales, scales)


_KINDS: dict[str, Callable[[ModelConfig, LayerConfig, jnp.dtype, int], Any]] = {"grouped": _grouped}
"""What a layer keeps, by `LayerConfig.attention`."""
