"""The `attend` of prefill and decode: write the new keys and values into their pages, then attend over the pages."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..model.transformer import Attend, AttentionSpec
from ..sharding.rules import shard_map
from .cache import KVCache, numbers, write_layer

_ROWS = ("batch",)
_HEADS = ("batch", None, "kv_heads")
_PAGES = ("pages", "kv_heads")


def cached_attend(
    cache: KVCache, op: Callable[..., Array], positions: Int[Array, "B T"], valid: Bool[Array, "B T"], *lengths: Array
) -> Attend:
    """An `attend` whose state is one entry of `KVCache.layers`.

    On a mesh it runs on each device's own rows and heads, so that neither the write nor the kernel communicates.

    Args:
      cache: its tables and mesh are used; its layers come as the state.
      op: op(q, k_pages, v_pages, block_tables, *lengths, scale=, window=, soft_cap=, identity_table=), which takes
        k_scales= and v_scales= too if the cache is quantized.
      positions: of the new tokens.
      valid: which of them to write.
      lengths: [B] arrays that `op` takes.
    """

    def attend(
        q: Float[Array, "B T K G H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        spec: AttentionSpec,
        state: Any,
    ) -> tuple[Float[Array, "B T K G H"], Any]:
        def local(q, k, v, layer, tables, positions, valid, lengths):
            if cache.mesh is not None:  # tables name pages of the whole cache; each data shard holds a run of them
                tables = tables - lax.axis_index("data") * layer[0].shape[0]
            layer = write_layer(layer, k, v, tables, positions, valid)
            k_pages, v_pages, *scales = layer
            out = op(
                q,
                numbers(k_pages),
                numbers(v_pages),
                tables,
                *lengths,
                scale=spec.scale,
                window=spec.window,
                soft_cap=spec.soft_cap,
                identity_table=cache.identity_table,
                **dict(zip(("k_scales", "v_scales"), scales, strict=False)),
            )
            return out, layer

        layer_axes = (_PAGES,) * len(state)
        in_axes = (_HEADS, _HEADS, _HEADS, layer_axes, _ROWS, _ROWS, _ROWS, (_ROWS,) * len(lengths))
        run = shard_map(local, cache.mesh, in_axes, (_HEADS, layer_axes))
        with jax.named_scope("cached_attention"):
            return run(q, k, v, state, cache.block_tables, positions, valid, lengths)

    return attend
