"""The `attend` of prefill and decode: write the new keys and values into their pages, then attend over the pages."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..model.config import ModelConfig
from ..model.kv_specs import kv_specs
from ..model.transformer import Attend, AttentionSpec
from ..pallas_kernels.attention import decode_attention, prefill_attention
from ..sharding.rules import mesh_of, shard_map
from .cache import KVCache, write_pages

Form = Literal["prefill", "decode"]
"""How new tokens attend over pages: as blocks of queries, or as a few of them for which the pages are read once."""

_ROWS = ("batch",)
_HEADS = ("batch", None, "kv_heads")


def cached_attend(
    config: ModelConfig, cache: KVCache, form: Form, new: Int[Array, "B"], positions: Int[Array, "B T"]
) -> Attend:
    """An `attend` whose state is a layer's entry of `KVCache.pages`.

    On a mesh it runs on each device's own rows and heads, so that neither the write nor the kernel communicates.

    Args:
      config: the model.
      cache: its rows are used; its pages come as the state.
      form: how to attend; "decode" takes up to 16 tokens.
      new: how many of the T tokens of each row to write.
      positions: where they stand.
    """
    T = positions.shape[1]
    leaf = jax.tree.leaves(cache.pages)[0]
    mesh, specs = mesh_of(leaf), kv_specs(config, "fp8" if leaf.dtype == jnp.uint8 else leaf.dtype)

    def attend(
        q: Float[Array, "B T K G H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        spec: AttentionSpec,
        state: Any,
    ) -> tuple[Float[Array, "B T K G H"], Any]:
        tables = cache.rows.table(spec.layer)

        def local(q, k, v, pages, tables, positions, new):
            if mesh is not None and tables is not None:
                # Tables name pages of the whole pool; each data shard holds a run of them.
                tables = tables - lax.axis_index("data") * pages.k.shape[0]
            pages = write_pages(pages, k, v, tables, positions, jnp.arange(T) < new[:, None])
            starts = positions[:, 0]
            if form == "prefill":
                return prefill_attention(q, pages, tables, starts, starts + new, spec.options), pages
            queries = q[:, 0] if T == 1 else q
            # All T: of a row with fewer, the others' results are nobody's, and no token of the row sees past its own.
            out = decode_attention(queries, pages, tables, starts + T * (new > 0), spec.options)
            return out.reshape(q.shape), pages

        layer_axes = jax.tree.map(lambda leaf: leaf.axes, specs[spec.layer])
        in_axes = (_HEADS, _HEADS, _HEADS, layer_axes, None if tables is None else _ROWS, _ROWS, _ROWS)
        with jax.named_scope("cached_attention"):
            run = shard_map(local, mesh, in_axes, (_HEADS, layer_axes))
            return run(q, k, v, state, tables, positions, new)

    return attend
